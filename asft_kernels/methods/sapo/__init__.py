"""SAPO, arXiv 2405.20830: rejected answers written anew on the way, by a moving average of the policy."""
