"""`PreferenceConfig`: TRL's DPOConfig, with the objective by our names."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import SchedulerType, get_scheduler
from trl import DPOConfig

from asft_kernels.core.options import Options
from asft_kernels.errors import InputError
from asft_kernels.objectives import OBJECTIVES, get_objective
from asft_kernels.objectives.grammar import literal
from asft_kernels.training.model_keywords import check_model_keywords

# Of TRL's loss: given ones are parameters of the objective.
OF_THE_LOSS = (
    "beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting",
    "discopop_tau",
)  # fmt: skip
NAMED_OTHERWISE = {"sigmoid": "dpo", "hinge": "hinge_norm"}  # of the second beta is gamma, 0.1 where none is given
# TRL's losses that read it; others leave it aside without a word.
READ_BY = {"label_smoothing": ("exo_pair", "robust", "aot", "aot_unpaired"), "discopop_tau": ("discopop",)}
# What DPOTrainer checks and never uses here.
TRLS_OWN = {
    "loss_type": ["sigmoid"], "loss_weights": None, "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None,
    "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False, "discopop_tau": 0.05,
}  # fmt: skip
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


@dataclass
class PreferenceConfig(DPOConfig):
    """Holds TRL's DPOConfig, with `objective` in the place of loss_type, and how the fused head runs.

    TRL's arguments keep their names, defaults and meaning, but for logging_steps=1, save_total_limit=2, a name for
    output_dir, and bf16, which is off where there is no accelerator. Those of its loss (beta, label_smoothing,
    ld_alpha, f_divergence_type, use_weighting, ...) are parameters of the objective.

    Args:
        objective: the loss, by name, or a sum such as "dpo(beta=0.2) + 0.005 sft"; default "asft".
        objective_args: parameters of one that is no sum, as ["NAME=VALUE", ...] or a dict; None (default): the paper's.
        method: what makes the pairs or their further inputs, where the objective does not say ("sapo"); default None.
        ref_scores: files of `asft score` with the reference's log-probabilities, one a reference model; default None.
        nll_on_prompt: True: the likelihood term is over prompt and answer, as TRL's ORPO; default False.
        logit_scale, softcap: what the model does to its head's output; None (default): found out.
        backend, cache_bytes, chunk_size: as in `asft_kernels.fused_linear_logps`.
        sharded_head: under FSDP2 "gather" (the output head whole on each rank, once a step), "stream" (chunk by chunk,
            never whole on one), None (default): streamed where it takes more than 2 GiB and is not tied.

    Raises:
        InputError: for an objective or a parameter that is none, and for TRL's loss_type, with our name for it.
    """

    output_dir: str | None = field(
        default="preference-run", metadata={"help": "Checkpoints, final model, metrics, curves."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between rows of metrics.jsonl."})
    objective: str = field(
        default="asft",
        metadata={
            "help": "The loss, by name, or a sum such as 'dpo(beta=0.2) + 0.005 sft'; docs/objectives.md lists them."
        },
    )
    objective_args: list[str] | None = field(
        default=None,
        metadata={
            "help": "Its parameters as NAME=VALUE, such as lam=0.5 beta=0.1; the paper's where none is given. A sum "
            "has them inside."
        },
    )
    method: str | None = field(
        default=None,
        metadata={"help": "What makes the pairs or their further inputs, where the objective does not say (sapo)."},
    )
    ref_scores: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files of `asft score` with the reference's log-probabilities, one a reference model; no "
            "reference model is then loaded."
        },
    )
    nll_on_prompt: bool = field(
        default=False,
        metadata={"help": "Likelihood term over prompt and answer, as TRL's ORPO, where the objective has one."},
    )
    logit_scale: float | None = field(default=None, metadata={"help": "Of the model's head; found out if not given."})
    softcap: float | None = field(default=None, metadata={"help": "Of the model's head; found out if not given."})
    backend: str | None = field(
        default=None,
        metadata={"help": "What runs the fused head; by device if not given.", "choices": ["torch", "triton"]},
    )
    cache_bytes: int | None = field(
        default=None, metadata={"help": "Memory for exponentials that the head keeps for the backward pass."}
    )
    chunk_size: int | None = field(default=None, metadata={"help": "Rows of the vocabulary that are computed at once."})
    sharded_head: str | None = field(
        default=None,
        metadata={
            "help": "Under FSDP2: 'gather' has the output head whole on each rank once a step, 'stream' never; by size "
            "if not given.",
            "choices": ["gather", "stream"],
        },
    )

    # Of TRL's loss: None, so that it shows whether they were given.
    loss_type: list[str] | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "TRL's name for what --objective says: 'sigmoid' is --objective dpo."}
    )
    beta: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Short for --objective_args beta=..."}
    )
    label_smoothing: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Short for --objective_args label_smoothing=..."}
    )
    f_divergence_type: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Short for --objective_args f_divergence_type=..."}
    )
    f_alpha_divergence_coef: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Short for --objective_args f_alpha_divergence_coef=..."}
    )
    use_weighting: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "WPO's weights: short for --objective_args use_weighting=true"}
    )
    discopop_tau: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Short for --objective_args discopop_tau=..."}
    )
    # A NaN loss must be seen, not averaged away.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide NaN losses in logs."})

    def __post_init__(self) -> None:
        if self.loss_type is not None:
            raise InputError(_named_otherwise(self))
        if isinstance(self.objective_args, dict):
            self.objective_args = [f"{name}={value!r}" for name, value in self.objective_args.items()]
        if self.objective_args is not None and not isinstance(self.objective_args, list | tuple):
            raise InputError(
                f"objective_args: got {self.objective_args!r}, need a list of texts such as ['beta=0.2'], or a dict"
            )
        if self.label_smoothing_factor:
            raise InputError(
                f"label_smoothing_factor: got {self.label_smoothing_factor}, need 0: the loss is made at the head, "
                "from hard labels; sft has label_smoothing"
            )
        self.build_objective()
        self._check_numbers()
        self._check_json()
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        if self.bf16 and not (self.use_cpu or torch.accelerator.is_available()):
            raise InputError("bf16: got True without an accelerator, need use_cpu beside it, or bf16 left out")
        super().__post_init__()
        self._check_schedule()
        check_model_keywords(self.model_init_kwargs, self.world_size)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns of it

    def _check_numbers(self) -> None:
        """What would otherwise fail far away."""
        if self.sharded_head not in (None, "gather", "stream"):
            raise InputError(f"sharded_head: got {self.sharded_head!r}, need 'gather', 'stream' or None")
        for name in ("learning_rate", "num_train_epochs", "max_steps", "ref_model_sync_steps", *COUNTS):
            if not isinstance(getattr(self, name), int | float):
                raise InputError(f"{name}: got {getattr(self, name)!r}, need a number")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, need at least 1")
        if self.sync_ref_model and self.ref_model_sync_steps < 1:
            raise InputError(f"ref_model_sync_steps: got {self.ref_model_sync_steps}, need at least 1")
        if not 0 <= self.learning_rate < float("inf"):
            raise InputError(f"learning_rate: got {self.learning_rate}, need a finite number >= 0")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise InputError(f"num_train_epochs: got {self.num_train_epochs}, need more than 0, or max_steps")
        try:
            Options(backend=self.backend, cache_bytes=self.cache_bytes, chunk_size=self.chunk_size)
        except ValueError as error:
            raise InputError(str(error)) from error

    def _check_json(self) -> None:
        """Names the option whose JSON is none: transformers does not, or fails when training has begun."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str):
                continue
            if value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise InputError(f"{name}: got {value!r}, need JSON ({error})") from error
            elif name.endswith("_kwargs"):
                need = "a mapping, on the command line as JSON: '{\"NAME\": VALUE}'"
                raise InputError(f"{name}: got {value!r}, need {need}")
            elif name != "deepspeed" and not Path(value).is_file():
                raise InputError(f"{name}: got {value!r}, need JSON such as '{{...}}', or a file of it")

    def _check_schedule(self) -> None:
        """Makes the schedule once: transformers does when all else is loaded, and drops keywords of a constant one."""
        name, keywords = SchedulerType(self.lr_scheduler_type), cast("dict[str, Any]", self.lr_scheduler_kwargs or {})
        got = f"lr_scheduler_kwargs: got {keywords!r}"
        if keywords and name in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
            raise InputError(f"{got}, need none: the schedule {name.value!r} takes none")
        try:
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
            get_scheduler(name, optimizer, 0, 2, scheduler_specific_kwargs=keywords)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{got}, need those of the schedule {name.value!r} ({error})") from error

    def build_objective(self, given: Any = None) -> Any:
        """Returns the objective that the arguments name, or the one that is given in its place.

        Args:
            given: a name, with the parameters of these arguments, or an object, which has its own.

        Raises:
            InputError: if there is none, or a parameter is not its own.
        """
        name = self.objective if given is None else given
        shorts = {key: getattr(self, key) for key in OF_THE_LOSS if getattr(self, key) is not None}
        if given is not None and not isinstance(given, str):
            for key in (*shorts, *(["objective_args"] if self.objective_args else [])):
                raise InputError(
                    f"{key}: got {getattr(self, key)!r} beside an objective object, need it in that object"
                )
            return given
        if not isinstance(name, str):
            raise InputError(
                f"objective: got {type(name).__name__}, need a name; give an object to PreferenceTrainer(objective=...)"
            )
        parameters: dict[str, Any] = {}
        for word in self.objective_args or ():
            key, equals, value = word.partition("=") if isinstance(word, str) else ("", "", "")
            if not (key and equals):
                raise InputError(f"objective_args: got {word!r}, need a text NAME=VALUE")
            if key in parameters:
                raise InputError(f"objective_args: got {key} twice, need it once")
            parameters[key] = literal(value)
        twice = parameters.keys() & shorts.keys()
        if twice:
            raise InputError(f"objective_args: got {min(twice)} there and as an option of its own, need it once")
        parameters |= shorts
        try:
            return get_objective(name, **parameters)
        except (TypeError, ValueError) as error:
            raise InputError(f"objective: {str(error).removeprefix('objective: ')}") from error

    @contextmanager
    def as_trl_reads_it(self, **fields: Any) -> Iterator[None]:
        """Gives DPOTrainer's constructor values of its own loss that it accepts, and `fields`."""
        before = {name: getattr(self, name) for name in (*TRLS_OWN, *fields)}
        vars(self).update({**TRLS_OWN, **fields})
        try:
            yield
        finally:
            vars(self).update(before)


def _named_otherwise(config: PreferenceConfig) -> str:
    """The error for TRL's loss_type, with the same loss in our words: its defaults, and what is given beside it."""
    given: Any = config.loss_type
    types = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else [given]
    names = [NAMED_OTHERWISE.get(str(name), name) for name in types]
    if unknown := [name for name in names or [str(given)] if name not in OBJECTIVES]:
        return f"loss_type: got {unknown[0]!r}, need objective, one of {', '.join(map(repr, OBJECTIVES))}"
    weights = [1.0] * len(names) if config.loss_weights is None else config.loss_weights
    if len(weights) != len(names):
        got = f"{len(weights)} for {len(names)} losses"
        return f"loss_weights: got {got}, need one each, which stand in objective: 'dpo + 0.5 sft'"
    beside = {key: getattr(config, key) for key in OF_THE_LOSS if getattr(config, key) is not None}
    terms = [_term(name, beside) for name in names]
    # As numbers stand in Python, which lose no digit.
    parts = [term if weight == 1 else f"{weight!r} {term}" for weight, term in zip(weights, terms, strict=True)]
    ours = " + ".join(parts)
    got = f"loss_type: got {', '.join(map(repr, types))}"
    replaced = ["loss_type", *(["loss_weights"] if config.loss_weights is not None else []), *beside]
    try:
        get_objective(ours)
    except ValueError as error:
        return f"{got} with {', '.join(replaced[1:])}, which objective cannot say: {error}; need another loss"
    return f"{got}, which is called objective here: need objective={ours!r} in the place of {', '.join(replaced)}"


def _term(name: str, beside: dict[str, Any]) -> str:
    """An objective with what TRL's loss of that name reads of the config, and TRL's own defaults."""
    own = inspect.signature(OBJECTIVES[name]).parameters
    read = {key: value for key, value in beside.items() if name in READ_BY.get(key, (name,))}
    if name == "sft":  # of the batch's tokens; nothing else in TRL's DPOTrainer touches it but WPO's weights
        read = {"normalization": "token", **{key: value for key, value in read.items() if key == "use_weighting"}}
    if name == "hinge_norm":
        read["gamma"] = read.pop("beta", 0.1)
    known = {key: value for key, value in read.items() if key in own or key in ("ld_alpha", "use_weighting")}
    inside = ", ".join(f"{key}={value}" for key, value in known.items())
    return f"{name}({inside})" if inside else name
