"""What a run takes: the job's own arguments, and the Trainer's with defaults that suit it."""

import ast
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from asft_kernels.data.rows import KINDS
from asft_kernels.errors import InputError
from asft_kernels.objectives import ASFT, BMC, DNPO, FPO, KTO, WeightedSum, get_objective


@dataclass
class JobArguments:
    """Model, data and loss."""

    model: str = field(metadata={"help": "folder or hub name of a causal language model"})
    data: str = field(metadata={"help": f"preference pairs: {KINDS}"})
    eval_data: str | None = field(default=None, metadata={"help": "pairs to evaluate on, same formats"})
    eval_every_nth: int | None = field(
        default=None,
        metadata={"help": "N: hold out every Nth line of --data (counted from 0: number mod N is N - 1)"},
    )
    objective: str = field(
        default="asft", metadata={"help": "the loss, by name, or a sum such as 'dpo + 0.005 sft'; docs/objectives.md"}
    )
    objective_args: list[str] = field(
        default_factory=list,
        metadata={"help": "its parameters as NAME=VALUE, such as beta=0.1 gamma=0.5; default: the paper's"},
    )
    lam: float | None = field(default=None, metadata={"help": "short for --objective-args lam=..."})
    beta: float | None = field(default=None, metadata={"help": "short for --objective-args beta=..."})
    sft_weight: float | None = field(default=None, metadata={"help": "short for --objective-args sft_weight=..."})
    nll_on_prompt: bool = field(
        default=False,
        metadata={"help": "likelihood term over prompt and answer, as TRL's ORPO"},
    )
    ref_scores: list[str] = field(
        default_factory=list,
        metadata={"help": "files of asft-score with the reference's log-probabilities, one a reference model; "
                  "default: --model as it comes is scored first"},
    )  # fmt: skip
    sae: str | None = field(
        default=None,
        metadata={"help": "fpo's autoencoder, .npz or .safetensors: python -m asft_kernels.methods.fpo"},
    )
    sae_layer: int = field(
        default=-1, metadata={"help": "where it reads hidden states: -1 the head's input, l the output of block l"}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of prompt and answer; longer answers are cut"})
    max_prompt_length: int = field(default=512, metadata={"help": "tokens; pairs with a longer prompt are left out"})
    strict: bool = field(default=False, metadata={"help": "unusable rows are an error"})
    resume: str | None = field(
        default=None,
        metadata={
            "help": "go on from a checkpoint: alone, the newest complete one in --output-dir",
            "nargs": "?",
            "const": "last",
        },
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "of the weights; --bf16 adds autocast to float32 weights",
            "choices": ["float32", "bfloat16", "auto"],
        },
    )
    logit_scale: float | None = field(default=None, metadata={"help": "default: from the config"})
    softcap: float | None = field(default=None, metadata={"help": "default: from the config"})
    backend: str | None = field(default=None, metadata={"help": "torch or triton; default: by device"})
    cache_bytes: int | None = field(
        default=None, metadata={"help": "memory for exponentials kept for the backward pass"}
    )

    def __post_init__(self) -> None:
        self.build_objective()
        if self.max_length < 2 or not self.max_prompt_length >= 1:
            raise InputError(
                f"--max-length, --max-prompt-length: got {self.max_length}, "
                f"{self.max_prompt_length}; need at least 2 and 1"
            )
        if self.eval_every_nth is not None and self.eval_every_nth < 2:
            raise InputError(f"--eval-every-nth: got {self.eval_every_nth}, need at least 2")
        if self.eval_data is not None and self.eval_every_nth is not None:
            raise InputError("--eval-data, --eval-every-nth: got both, need one or neither")
        if self.backend not in (None, "torch", "triton"):
            raise InputError(f"--backend: got {self.backend!r}, need 'torch' or 'triton'")

    def build_objective(self) -> Any:
        """The objective that the arguments name, InputError if there is none."""
        parameters: dict[str, Any] = {}
        for given in self.objective_args:
            name, equals, value = given.partition("=")
            if not (name and equals):
                raise InputError(f"--objective-args: got {given!r}, need NAME=VALUE")
            parameters[name] = _literal(value)
        for name in ("lam", "beta", "sft_weight"):
            value = getattr(self, name)
            if value is not None:
                parameters[name] = value
        if parameters and "+" in self.objective:
            raise InputError(
                f"--objective: got the sum {self.objective!r} and values for {', '.join(parameters)}, need a sum "
                "alone: its terms have their papers' defaults"
            )
        try:
            objective = get_objective(self.objective, **parameters)
        except (TypeError, ValueError) as error:
            raise InputError(f"--objective: {str(error).removeprefix('objective: ')}") from error
        self._can_train(objective)
        if isinstance(objective, ASFT) and objective.lam == objective.sft_weight == 0:
            raise InputError("--lam, --sft-weight: both are 0, need one above 0: there is no loss")
        return objective

    def _can_train(self, objective: Any) -> None:
        if _has_dnpo(objective):
            raise InputError("--objective: dnpo trains its reference's noise, too: python -m asft_kernels.methods.dnpo")
        if "desirable" in objective.inputs and not isinstance(objective, KTO):
            raise InputError(
                f"--objective: got {self.objective}, need kto by itself: a sum does not tell it which answers are good"
            )
        if "feature_distance" in objective.inputs and fpo_of(objective) is None:
            raise InputError(
                f"--objective: {self.objective} has fpo for its base, which asft-train does not train; need fpo by "
                "itself or in a sum"
            )
        if ("feature_distance" in objective.inputs) != (self.sae is not None):
            raise InputError(
                "--sae: fpo needs the file of an autoencoder; python -m asft_kernels.methods.fpo trains one"
                if self.sae is None
                else f"--sae: got {self.sae}, need none: {self.objective} reads no features"
            )
        if self.ref_scores and {"feature_distance", "kl"} & {*objective.inputs, *objective.optional_inputs}:
            raise InputError(
                f"--ref-scores: got files, need none: {self.objective} asks the reference for more than they hold, so "
                "its reference is --model as it comes"
            )
        if self.ref_scores and not objective.needs_reference:
            raise InputError(f"--ref-scores: got files, need none: {self.objective} has no reference")
        if (isinstance(objective, BMC) or objective.ref_per_token) and len(self.ref_scores) > 1:
            raise InputError(
                f"--ref-scores: got {len(self.ref_scores)} files, need one: {self.objective} has one reference"
            )
        if self.nll_on_prompt and not objective.uses_nll_labels:
            raise InputError(f"--nll-on-prompt: {self.objective} has no separate likelihood term; leave it out")


def fpo_of(objective: Any) -> FPO | None:
    """The fpo that objective is, or has as a term of its sum."""
    terms = [term for _, term in objective.terms] if isinstance(objective, WeightedSum) else [objective]
    return next((term for term in terms if isinstance(term, FPO)), None)


def _has_dnpo(objective: Any) -> bool:
    """By itself, in a sum, or as a base."""
    parts = [term for _, term in getattr(objective, "terms", ())] + [getattr(objective, "base", None)]
    return isinstance(objective, DNPO) or any(_has_dnpo(part) for part in parts if part is not None)


def _literal(value: str) -> Any:
    """A number, a tuple, None, True or False (in small letters, too); else the text itself."""
    if value.lower() in ("true", "false", "none"):
        value = value.capitalize()
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


@dataclass
class RunArguments(TrainingArguments):
    """transformers.TrainingArguments; what differs in its defaults stands here."""

    output_dir: str | None = field(default="asft-run", metadata={"help": "checkpoints, final model, metrics, curves"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate"})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "pairs, not rows"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "pairs, not rows"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the training pairs"})
    logging_steps: float = field(default=1, metadata={"help": "steps between rows of metrics.jsonl"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept"})
    # A NaN loss must be seen, not averaged away.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide NaN losses in logs"})
    # The collator reads columns that no forward takes.
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave this off"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing_factor:
            raise InputError(
                f"--label-smoothing-factor: got {self.label_smoothing_factor}, need 0: "
                "the loss is computed inside the model, from hard labels"
            )
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns of it
