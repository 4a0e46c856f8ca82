"""Training of a ReLU autoencoder on hidden states that are in memory.

    L = ||x - x^||^2 + l1 * sum_i c_i ||W_dec_i||,   x = (h - mean) scaled to E ||x||^2 = D

The penalty takes the decoder's norms in, so the decoder needs no constraint and no projection (Templeton et al.
2024, "Scaling Monosemanticity", and Anthropic's Circuits Updates, April 2024, which this follows in plain form:
Adam, decoder's transpose as the encoder's start, l1 ramped up first, the learning rate down to 0 at the end,
gradients clipped; no dead feature is started anew). At the end scale and mean are folded into the weights and
each decoder row is made a unit vector, so that features are in the units of h and encode() takes h itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asft_kernels.methods.fpo.autoencoder import SparseAutoencoder

DECODER_NORM = 0.1  # at the start: small, so that first reconstructions are not noise
L1_RAMP, DECAY = 0.05, 0.2  # shares of the steps: the penalty's rise, the learning rate's fall
EVALUATED_AT_ONCE = 1024  # tokens


@dataclass(frozen=True)
class Quality:
    """Of an autoencoder on some tokens.

    explained_variance: 1 - sum ||h - h^||^2 / sum ||h - mean h||^2. l0: features above 0 a token.
    dead: share of the features that no token has. tokens: how many there were.
    """

    explained_variance: float
    l0: float
    dead: float
    tokens: int


@torch.no_grad()
def quality(sae: SparseAutoencoder, tokens: Tensor) -> Quality:
    """tokens: (N, D)."""
    error, active, alive = 0.0, 0, torch.zeros(sae.features, dtype=torch.bool, device=sae.W_enc.device)
    for part in tokens.split(EVALUATED_AT_ONCE):
        hidden = part.to(sae.W_enc)
        features = sae.encode(hidden)
        error += (sae.decode(features) - hidden).double().square().sum().item()
        active += int((features > 0).sum())
        alive |= (features > 0).any(dim=0)
    total = (tokens.double() - tokens.double().mean(dim=0)).square().sum().item()
    return Quality(1 - error / total, active / len(tokens), 1 - alive.double().mean().item(), len(tokens))


class Trainer:
    """`step` until `steps` are done or you have enough; `finished` at any time.

    tokens: (N, D) to train on. features: F. l1: weight of the penalty. All else: the file's head.
    """

    def __init__(
        self,
        tokens: Tensor,
        features: int,
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        l1: float,
        seed: int,
        device: str = "cpu",
    ):
        self.tokens, self.steps, self.batch_size, self.l1 = tokens, steps, batch_size, l1
        self.device, self.done = device, 0
        size = tokens.shape[1]
        self.mean = tokens.mean(dim=0, dtype=torch.float64).float()
        spread = sum((part - self.mean).double().square().sum().item() for part in tokens.split(EVALUATED_AT_ONCE))
        self.scale = (size * len(tokens) / spread) ** 0.5
        self.generator = torch.Generator().manual_seed(seed)
        decoder = torch.randn(features, size, generator=self.generator)
        decoder *= DECODER_NORM / decoder.norm(dim=1, keepdim=True)
        self.sae = SparseAutoencoder(decoder.T, torch.zeros(features), decoder.clone(), torch.zeros(size)).to(device)
        self.sae.requires_grad_()
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=learning_rate)
        rate: Callable[[int], float] = lambda step: min(1.0, (steps - step) / max(1.0, DECAY * steps))  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.order, self.at = torch.empty(0, dtype=torch.int64), 0

    def step(self) -> float:
        """One step; the loss per token, for a progress bar."""
        batch = (self._next() - self.mean).to(self.device) * self.scale
        features = self.sae.encode(batch)
        error = (self.sae.decode(features) - batch).square().sum(dim=1).mean()
        penalty = (features * self.sae.W_dec.norm(dim=1)).sum(dim=1).mean()
        ramp = min(1.0, (self.done + 1) / max(1.0, L1_RAMP * self.steps))
        loss = error + ramp * self.l1 * penalty
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return loss.item()

    def _next(self) -> Tensor:
        """The next batch of a shuffled pass over all tokens; then another pass."""
        if self.at + self.batch_size > len(self.order):
            self.order, self.at = torch.randperm(len(self.tokens), generator=self.generator), 0
        self.at += self.batch_size
        return self.tokens[self.order[self.at - self.batch_size : self.at]]

    @torch.no_grad()
    def finished(self) -> SparseAutoencoder:
        """For hidden states as they are: x = scale (h - mean), h^ = mean + x^ / scale, ||W_dec_i|| = 1."""
        sae = self.sae
        norms = sae.W_dec.norm(dim=1) / self.scale
        mean = self.mean.to(sae.W_dec)
        bias = sae.b_enc - self.scale * mean @ sae.W_enc
        return SparseAutoencoder(
            self.scale * sae.W_enc * norms,
            bias * norms,
            sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True),
            sae.b_dec / self.scale + mean,
        )
