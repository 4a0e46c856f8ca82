"""What a SAPO run takes beside the arguments of asft-train."""

from dataclasses import dataclass, field
from typing import Any

from asft_kernels.errors import InputError
from asft_kernels.methods.sapo.ema import MODES, MovingModels
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.train.arguments import JobArguments


@dataclass
class SapoArguments(JobArguments):
    """The defaults are those of the authors' runs."""

    ema_beta: float = field(default=0.5, metadata={"help": "share of itself that the EMA keeps at every step"})
    ref_update_mode: str = field(default="ema", metadata={"help": "what the reference follows", "choices": list(MODES)})
    ref_sync_steps: int = field(default=108, metadata={"help": "steps between copies into the reference"})
    token_generate_length: int = field(default=256, metadata={"help": "tokens of a segment that is written anew"})
    max_replay_buffer_size: int = field(default=2000, metadata={"help": "pairs kept, each rank its own"})
    temperature: float = field(default=0.7, metadata={"help": "of the sampled segments"})
    top_k: int = field(default=50, metadata={"help": "0: off"})
    top_p: float = field(default=0.95, metadata={"help": "1: off"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ref_scores:
            raise InputError("--ref-scores: got files, need none: the reference of SAPO moves")
        if self.max_replay_buffer_size < 1:
            raise InputError(f"--max-replay-buffer-size: got {self.max_replay_buffer_size}, need at least 1")
        try:
            self.regeneration()
        except ValueError as error:
            raise InputError(f"--{str(error).replace('_', '-')}") from error

    def build_objective(self) -> Any:
        objective = super().build_objective()
        needs = [*objective.inputs, *(["token log-probabilities"] if objective.ref_per_token else [])]
        if needs or not objective.paired:
            what = f"needs {', '.join(needs)}" if needs else "is not of pairs"
            raise InputError(
                f"--objective: {self.objective!r} {what}, need one of sums or means of pairs: dpo, orpo, asft, ..."
            )
        return objective

    def regeneration(self) -> Regeneration:
        return Regeneration(
            max_length=self.max_length,
            token_generate_length=self.token_generate_length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def moving_models(self, policy: Any, *, needs_reference: bool) -> MovingModels:
        try:
            return MovingModels(
                policy,
                ema_beta=self.ema_beta,
                ref_update_mode=self.ref_update_mode,
                ref_sync_steps=self.ref_sync_steps,
                needs_reference=needs_reference,
            )
        except ValueError as error:
            raise InputError(f"--{str(error).replace('_', '-')}") from error
