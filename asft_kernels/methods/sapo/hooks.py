"""SAPO on the trainer: what happens before each optimiser step, and the moving reference.

EMA of the policy -> reference -> negatives for the incoming rows, into the buffer -> batches out of it -> loss
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from asft_kernels.errors import InputError
from asft_kernels.methods.sapo.buffer import ReplayBuffer
from asft_kernels.methods.sapo.ema import MODES, MovingWeights
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.models.generation import TransformersGenerator
from asft_kernels.objectives import expression_of
from asft_kernels.training.hooks import LossInputs, Method
from asft_kernels.training.on_pairs import OnPairs

ROW = ("prompt_ids", "chosen_ids")


@dataclass
class Arguments:
    """Holds SAPO's options; the defaults are those of the authors' runs.

    Raises:
        InputError: for values outside their range.
    """

    ema_beta: float = field(default=0.5, metadata={"help": "SAPO: share of itself that the EMA keeps at every step."})
    ref_update_mode: str = field(
        default="ema", metadata={"help": "SAPO: what the reference follows.", "choices": list(MODES)}
    )
    ref_sync_steps: int = field(default=108, metadata={"help": "SAPO: steps between copies into the reference."})
    token_generate_length: int = field(default=256, metadata={"help": "SAPO: tokens of a segment written anew."})
    max_replay_buffer_size: int = field(default=2000, metadata={"help": "SAPO: pairs kept, each rank its own."})
    temperature: float = field(default=0.7, metadata={"help": "SAPO: of the sampled segments."})
    top_k: int = field(default=50, metadata={"help": "SAPO: of the sampled segments, 0: off."})
    top_p: float = field(default=0.95, metadata={"help": "SAPO: of the sampled segments, 1: off."})

    def __post_init__(self) -> None:
        if not 0 <= self.ema_beta < 1:
            raise InputError(f"ema_beta: got {self.ema_beta}, need a number from 0 to below 1")
        if self.ref_update_mode not in MODES:
            modes = ", ".join(map(repr, MODES))
            raise InputError(f"ref_update_mode: got {self.ref_update_mode!r}, need one of {modes}")
        for name in ("ref_sync_steps", "max_replay_buffer_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, need at least 1")
        self.regeneration(max_length=1)

    def regeneration(self, max_length: int) -> Regeneration:
        """Returns how negatives are written, within max_length tokens of prompt and answer."""
        return Regeneration(max_length, self.token_generate_length, self.temperature, self.top_k, self.top_p)


class Hooks(Method):
    """Makes the pairs of each step from prompts and chosen answers."""

    name = "sapo"
    Arguments = Arguments
    makes_pairs = True
    has_state = True
    of_rank = ("buffer", "random")

    arguments: Any
    _refused: ClassVar[Mapping[str, str]] = {
        "ref_scores": "the reference of SAPO moves",
        "precompute_ref_log_probs": "the reference of SAPO moves",
        "sync_ref_model": "ref_update_mode and ref_sync_steps say how the reference moves",
    }

    def check(self, config: Any, objective: Any) -> None:
        for name, why in self._refused.items():
            if getattr(config, name):
                raise InputError(f"{name}: got {getattr(config, name)!r}, need none: {why}; leave it out")
        if not objective.paired or isinstance(objective, OnPairs):
            got = expression_of(objective)
            raise InputError(f"objective: got {got}, need one of pairs for SAPO: dpo, orpo, asft, ...")
        if config.max_length is None or config.truncation_mode != "keep_start":
            raise InputError(
                f"max_length: got {config.max_length} and truncation_mode {config.truncation_mode!r}, need a number "
                "and 'keep_start': segments are written anew within it"
            )
        self.own_reference = objective.needs_reference

    def start(self, trainer: Any) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("fsdp: got sharded parameters (FSDP, DeepSpeed), need them whole for the EMA; use DDP")
        missing = set(ROW) - set(trainer.train_dataset.column_names or ROW)
        if missing:
            raise InputError(
                f"train_dataset: got no column {', '.join(sorted(missing))}, need rows of text alone: answers with "
                "images are not written anew"
            )
        args, given = trainer.args, self.arguments
        self.moving = MovingWeights(
            trainer.model, ema_beta=given.ema_beta, ref_update_mode=given.ref_update_mode,
            ref_sync_steps=given.ref_sync_steps, needs_reference=self.own_reference,
        )  # fmt: skip
        self.buffer = ReplayBuffer(given.max_replay_buffer_size)
        self.regeneration = given.regeneration(args.max_length)
        self.writer = TransformersGenerator(trainer.model, trainer._tokenizer, batch_size=args.train_batch_size)
        self.random = torch.Generator().manual_seed(args.seed + args.process_index)
        self.made, self.unchanged = 0, 0  # negatives since `figures`, and how many equal the chosen answer
        self._figures: dict[str, Tensor] = {}

    def batches(self, trainer: Any, incoming: list[Any]) -> list[Any]:
        if incoming:
            self.moving.update(trainer.state.global_step)
        return [self._batch(trainer, [self._cut(row) for row in rows]) for rows in incoming]

    def _cut(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """As the collator would cut it: a segment must lie within what is trained on."""
        prompt = list(row["prompt_ids"])
        chosen = list(row["chosen_ids"])[: max(self.regeneration.max_length - len(prompt), 0)]
        if not chosen:
            raise InputError(
                f"train_dataset: got a row without an answer within max_length {self.regeneration.max_length} (its "
                f"prompt has {len(prompt)} tokens), need one; asft_kernels.data.load_pairs leaves such rows out"
            )
        return {"prompt_ids": prompt, "chosen_ids": chosen}

    def _batch(self, trainer: Any, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        """As many pairs as a batch has, out of the buffer that those of `rows` have just joined."""
        with (
            self.moving.used(self.moving.average),
            trainer.accelerator.autocast(),
        ):  # generate() passes PEFT's forward by
            negatives = self.regeneration.negatives(rows, self.writer, self.random)
        for row, rejected in zip(rows, negatives, strict=True):
            self.buffer.push({**row, "rejected_ids": rejected})
            self.made += 1
            self.unchanged += rejected == row["chosen_ids"]
        return trainer.collator(self.buffer.sample(trainer.args.train_batch_size, self.random))

    @contextmanager
    def at_head(
        self, trainer: Any, model: Any, inputs: Mapping[str, Tensor], entries: Mapping[str, Tensor]
    ) -> Iterator[LossInputs]:
        self._figures = self._counts(trainer) if trainer.model.training else {}
        if self.moving.reference is None:
            yield dict
            return
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with self.moving.used(self.moving.reference):
            tokens = trainer.token_logps(trainer.model, inputs, labels)
        ref_logps = trainer.as_ref_logps(tokens, labels)
        yield lambda: {"ref_logps": ref_logps}

    def _counts(self, trainer: Any) -> dict[str, Tensor]:
        shares = {"unchanged_share": (self.unchanged, self.made), "buffer_size": (len(self.buffer), 1)}
        self.made = self.unchanged = 0
        return {name: torch.tensor(pair, device=trainer.args.device) for name, pair in shares.items()}

    def figures(self) -> dict[str, Tensor]:
        return self._figures

    def state_dict(self) -> dict[str, Any]:
        return {**self.moving.state_dict(), "buffer": self.buffer.state_dict(), "random": self.random.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moving.load_state_dict(state)
        self.buffer.load_state_dict(state["buffer"])
        self.random.set_state(state["random"])
