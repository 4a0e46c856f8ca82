"""SAPO, Self-Augmented Preference Optimization, arXiv 2405.20830: negatives that the model writes itself.

(Not Soft Adaptive Policy Optimization, arXiv 2511.20347, an RL loss that other projects call by this name.)
"""
