"""Rows in, rows out: what every data command (`asft data NAME`) is made of."""
