"""A sparse autoencoder of hidden states: its five tensors, encode and decode.

    pre = h W_enc + b_enc;   c_i = pre_i if pre_i > threshold_i, else 0;   h^ = c W_dec + b_dec

Without a threshold it is a ReLU autoencoder, with one a JumpReLU one (arXiv 2407.14435; Gemma Scope, arXiv
2408.05147), in Gemma Scope's form: b_dec is not subtracted from h. Where a trainer of yours does that, fold it
in: b_enc - b_dec W_enc.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SparseAutoencoder(nn.Module):
    """Frozen (FPO uses it as it is) and in fp32, or in float64 if all its tensors are.

    W_enc: (D, F). b_enc: (F,). W_dec: (F, D). b_dec: (D,). threshold: (F,), >= 0, or None (default) for ReLU.
    Raises ValueError that names the tensor, what it was and what it must be.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter | None

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor | None = None):
        super().__init__()
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if threshold is not None:
            tensors["threshold"] = threshold
        _check(tensors)
        dtype = torch.float64 if all(x.dtype == torch.float64 for x in tensors.values()) else torch.float32
        self.register_parameter("threshold", None)
        for name, tensor in tensors.items():
            frozen = nn.Parameter(tensor.detach().to(dtype).contiguous(), requires_grad=False)
            self.register_parameter(name, frozen)

    @property
    def hidden_size(self) -> int:
        return self.W_enc.shape[0]

    @property
    def features(self) -> int:
        return self.W_enc.shape[1]

    @property
    def floor(self) -> Tensor:
        """(F,): what a pre-activation must exceed."""
        return torch.zeros_like(self.b_enc) if self.threshold is None else self.threshold

    def encode(self, hidden: Tensor) -> Tensor:
        """(..., D) -> features (..., F), in the autoencoder's dtype, under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            pre = nn.functional.linear(hidden.to(self.W_enc.dtype), self.W_enc.T, self.b_enc)
            return pre.masked_fill(pre <= self.floor, 0)  # a NaN stays one

    def decode(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., D)."""
        with torch.autocast(features.device.type, enabled=False):
            return features.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, hidden: Tensor) -> Tensor:
        """The reconstruction of (..., D)."""
        return self.decode(self.encode(hidden))


def _check(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: got {got}, need a floating tensor")
    shape = tuple(tensors["W_enc"].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"W_enc: got shape {shape}, need (D, F) with both at least 1")
    size, features = shape
    need = {"b_enc": (features,), "W_dec": (features, size), "b_dec": (size,), "threshold": (features,)}
    for name, tensor in tensors.items():
        if name in need and tuple(tensor.shape) != need[name]:
            turned = "; transpose it with .T" if tuple(tensor.shape) == need[name][::-1] else ""
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need {need[name]}: W_enc is {shape}{turned}")
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"{name}: got {bad} of {tensor.numel()} entries not finite, need all finite")
    if "threshold" in tensors and (tensors["threshold"] < 0).any():
        low = tensors["threshold"].min().item()
        raise ValueError(f"threshold: got entries down to {low:g}, need >= 0 (a log-threshold? then take its exp)")
