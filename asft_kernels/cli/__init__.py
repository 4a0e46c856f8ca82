"""The `asft` command: one parser, one way to fail."""
