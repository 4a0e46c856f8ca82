"""RSO, arXiv 2309.06657: rejection sampling from scored candidates."""
