"""From what a caller gave to log-probabilities: checks, heads, shards, the one differentiable primitive."""
