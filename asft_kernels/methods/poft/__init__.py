"""PoFT: the mean log-probability of other models' answers, from score files."""
