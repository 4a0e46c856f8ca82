"""Triton kernels, one stage a file. They import torch and Triton only and know no loss, but for asft_sequence."""
