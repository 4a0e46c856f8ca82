"""DNPO, Dynamic Noise Preference Optimization, arXiv 2502.05400: noise on the reference, trained against the policy."""
