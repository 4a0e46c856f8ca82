"""Commands for who writes kernels: timing of tiles, a report of what compiles for which chip."""
