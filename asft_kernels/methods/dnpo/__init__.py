"""DNPO, Dynamic Noise Preference Optimization, arXiv 2502.05400: trainable noise on the reference's logits."""
