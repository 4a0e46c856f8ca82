"""BMC, arXiv 2408.07471: bridged pairs, and marks of the tokens that differ."""
