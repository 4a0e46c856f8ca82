"""MRPO: several reference models, from score files."""
