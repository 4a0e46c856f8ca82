"""KTO's reference point from mismatched rows, arXiv 2402.01306."""
