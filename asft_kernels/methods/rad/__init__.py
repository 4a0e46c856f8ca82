"""RAD: reward-conditioned data."""
