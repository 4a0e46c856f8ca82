"""Sparse autoencoders, and the feature distance that FPO (arXiv 2411.07618) computes with them.

`asft data sae` trains one, `asft data features` stores a reference model's features.
"""

from asft_kernels.methods.fpo.autoencoder import SparseAutoencoder
from asft_kernels.methods.fpo.features import feature_distance, fpo_inputs, pooled_features
from asft_kernels.methods.fpo.files import read_sae, write_sae

__all__ = ["SparseAutoencoder", "feature_distance", "fpo_inputs", "pooled_features", "read_sae", "write_sae"]
