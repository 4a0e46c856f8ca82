"""DNPO on the trainer: before each step of the model, one of the noise against it.

The noise is a linear layer of the reference's hidden states (V, D): the standard deviation of a Gaussian on each
of the reference's logits, at rejected answers only. It lives here, not in the model: what is saved and evaluated
has none.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from asft_kernels.core.heads import resolve_head
from asft_kernels.core.sequence import Logps
from asft_kernels.errors import InputError
from asft_kernels.methods.dnpo.noisy_logps import fused_noisy_linear_logps
from asft_kernels.models.fused import FusedForward
from asft_kernels.models.positions import last_positions
from asft_kernels.models.seam import causal_lm, output_head
from asft_kernels.objectives import DNPO, expression_of
from asft_kernels.objectives.base import counting
from asft_kernels.training.collator import ENTRIES
from asft_kernels.training.figures import REWARDS
from asft_kernels.training.hooks import LossInputs, Method

INITIAL_STD = 0.1  # of every logit; at 0 the noise would have no mean gradient to grow by


@dataclass
class Arguments:
    """Holds DNPO's options."""

    noise_learning_rate: float = field(default=1e-4, metadata={"help": "DNPO: of the noise's AdamW, constant."})

    def __post_init__(self) -> None:
        if not 0 <= self.noise_learning_rate < float("inf"):
            raise InputError(f"noise_learning_rate: got {self.noise_learning_rate}, need a finite number >= 0")


class Hooks(Method):
    """Trains the noise of DNPO's reference beside the model."""

    name = "dnpo"
    Arguments = Arguments
    live_reference = True
    has_state = True
    of_rank = ("generator",)
    arguments: Any

    @classmethod
    def serves(cls, objective: Any) -> bool:
        """By itself, in a sum, or as a base: `check` refuses the latter two."""
        parts = [term for _, term in getattr(objective, "terms", ())] + [getattr(objective, "base", None)]
        return isinstance(objective, DNPO) or any(cls.serves(part) for part in parts if part is not None)

    def check(self, config: Any, objective: Any) -> None:
        if not isinstance(objective, DNPO):
            got = expression_of(objective)
            raise InputError(f"objective: got {got}, need dnpo by itself: it trains its reference's noise, too")
        if config.precompute_ref_log_probs:
            raise InputError(
                "precompute_ref_log_probs: got True, need False: DNPO needs the reference's hidden states at every step"
            )
        self.objective = objective

    def start(self, trainer: Any) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("fsdp: got sharded parameters (FSDP, DeepSpeed), need whole heads for DNPO; use DDP")
        args = trainer.args
        with trainer.without_adapters():
            head = resolve_head(output_head(trainer.ref_model or trainer.model))
        if not head.rows.is_plain:
            raise InputError("model: got an output head of few bits, need a plain one for DNPO's noise; dequantise it")
        vocab, size = head.rows.weight.shape
        self.noise_head = nn.Linear(size, vocab, device=args.device, dtype=torch.float32)
        nn.init.zeros_(self.noise_head.weight)
        nn.init.constant_(self.noise_head.bias, INITIAL_STD)
        rate = self.arguments.noise_learning_rate
        self.optimizer = torch.optim.AdamW(self.noise_head.parameters(), lr=rate, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(args.seed + args.process_index)
        self._figures: dict[str, Tensor] = {}

    def batches(self, trainer: Any, incoming: list[Any]) -> list[Any]:
        """The noise's step, over all micro-batches and ranks."""
        if not incoming:
            return incoming
        batches = [self._with_sums(trainer, trainer._prepare_inputs(batch)) for batch in incoming]
        pairs = torch.stack([batch[ENTRIES]["counts"].sum() for batch in batches]).sum()
        pairs = trainer.accelerator.reduce(pairs, "sum").clamp(min=1)
        self.optimizer.zero_grad()
        for batch in batches:
            seen = batch[ENTRIES]
            noisy, power = self._noisy(trainer, seen)
            policy = Logps(seen["policy_sums"], seen["lengths"])
            losses = self.objective.noise_loss(policy, seen["ref_sums"], noisy, power).where(seen["counts"], 0)
            (losses.sum() / pairs).backward()
            seen["noise_losses"], seen["noise_power"] = losses.detach(), power.detach()
        for parameter in self.noise_head.parameters():
            parameter.grad = trainer.accelerator.reduce(parameter.grad, "sum")
        self.optimizer.step()
        return batches

    @torch.no_grad()
    def _with_sums(self, trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with what both steps read: sums under both models, hidden states of the rejected answers."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        reference = trainer.ref_model or trainer.model
        with _head_inputs(reference) as kept:
            ref = trainer.reference_token_logps(reference, batch, labels)
        policy = trainer.token_logps(trainer.model, batch, labels)
        lengths = (labels[:, 1:] != -100).sum(dim=1)
        policy_sums, ref_sums = (tokens.double().sum(dim=1) for tokens in (policy, ref))
        hidden = last_positions(kept[-1], labels, type(causal_lm(reference)).__name__)
        seen = {
            "hidden": hidden.chunk(2)[1], "labels": labels.chunk(2)[1], "lengths": lengths, "ref_sums": ref_sums,
            "policy_sums": policy_sums, "counts": counting(Logps(policy_sums, lengths), paired=True),
        }  # fmt: skip
        return {**batch, ENTRIES: {**batch.get(ENTRIES, {}), **seen}}

    def _noisy(self, trainer: Any, seen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B,) each: sums under one draw of the noise, and the mean over the row's tokens of its mean square."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        reference = trainer.ref_model or trainer.model
        keywords = _fused_forward(reference).head.keywords
        options = {name: keywords[name] for name in ("logit_scale", "softcap", "backend")}
        with trainer.without_adapters(), trainer.accelerator.autocast():  # as the reference's own products
            noisy = fused_noisy_linear_logps(
                seen["hidden"], output_head(reference), self.noise_head, seen["labels"], seed=seed, **options
            )
        sums, power = (values.double().sum(dim=1) for values in noisy)
        return sums, power / seen["lengths"].chunk(2)[1].clamp(min=1)

    @contextmanager
    def at_head(
        self, trainer: Any, model: Any, inputs: Mapping[str, Tensor], entries: Mapping[str, Tensor]
    ) -> Iterator[LossInputs]:
        self._figures = {}
        if not trainer.model.training:  # under the reference without noise
            yield dict
            return
        with torch.no_grad():
            noisy, _ = self._noisy(trainer, entries)
        ref_logps = torch.cat([entries["ref_sums"].chunk(2)[0], noisy])
        self._figures = self._compared(entries, ref_logps)
        yield lambda: {"ref_logps": ref_logps}

    def _compared(self, seen: Mapping[str, Tensor], ref_logps: Tensor) -> dict[str, Tensor]:
        """Figures without noise by their own names, and of the noise."""
        policy = Logps(seen["policy_sums"], seen["lengths"])
        clean, noisy = (self.objective(policy, ref) for ref in (seen["ref_sums"], ref_logps))
        figures = {
            "clean_loss": clean.loss,
            **{REWARDS[name]: values for name, values in clean.metrics.items()},
            **{f"noisy_{REWARDS[name]}": values for name, values in noisy.metrics.items()},
            "noise_loss": seen["noise_losses"],
            "noise_power": seen["noise_power"],
            "reference_shift": (ref_logps - seen["ref_sums"]).chunk(2)[1],
        }
        counts = seen["counts"]
        return {name: torch.stack([x.where(counts, 0).sum(), counts.sum()]) for name, x in figures.items()}

    def figures(self) -> dict[str, Tensor]:
        return self._figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "noise_head": self.noise_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.noise_head.load_state_dict(state["noise_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


@contextmanager
def _head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Gives a list that forwards of the model fill with what their head sees."""
    kept: list[Tensor] = []
    handle = output_head(model).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        yield kept
    finally:
        handle.remove()


def _fused_forward(model: Any) -> FusedForward:
    """Also under what accelerate wraps around it for mixed precision."""
    return inspect.unwrap(causal_lm(model).forward, stop=lambda forward: isinstance(forward, FusedForward))
