"""What a run takes beside `PreferenceConfig`: model and data."""

from dataclasses import dataclass, field

from trl import ModelConfig

from asft_kernels.data.rows import KINDS
from asft_kernels.errors import InputError


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ModelConfig: model, dtype, attention, LoRA, quantisation."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Folder or hub name of a causal or image-text model, or the folder of an adapter to go on with.",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # TRL makes a text of one name, which PEFT reads as a pattern of whole paths: "q_proj" alone would match none.
        if isinstance(self.lora_target_modules, str) and self.lora_target_modules.isidentifier():
            self.lora_target_modules = [self.lora_target_modules]


@dataclass
class DataArguments:
    """Data, what is held out of it, and what a run does beside training."""

    dataset_name: list[str] = field(
        default_factory=list,
        metadata={"aliases": ["--data"], "help": f"Preference pairs, one or several of: {KINDS}, a hub name."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of --eval_dataset_name on the hub."})
    eval_dataset_name: list[str] = field(
        default_factory=list,
        metadata={"aliases": ["--eval_data"], "help": "Pairs to evaluate on, in the same formats."},
    )
    eval_every_nth: int | None = field(
        default=None,
        metadata={"help": "N: hold out every Nth row (counted from 0: number mod N is N - 1) for evaluation."},
    )
    strict: bool = field(default=False, metadata={"help": "Rows that cannot be used are an error."})
    resume: str | None = field(
        default=None,
        metadata={
            "help": "Go on from a checkpoint; alone, from the newest complete one in --output_dir; auto: from that one "
            "if there is one, else begin, for launchers that restart a command.",
            "nargs": "?",
            "const": "last",
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Train nothing: tokens, predicted time and memory, the first pair as it will be trained."},
    )

    def __post_init__(self) -> None:
        if not self.dataset_name:
            raise InputError(f"dataset_name: got none, need preference pairs: {KINDS}, or a hub name")
        if self.eval_every_nth is not None and self.eval_every_nth < 2:
            raise InputError(f"eval_every_nth: got {self.eval_every_nth}, need at least 2")
        if self.eval_dataset_name and self.eval_every_nth is not None:
            raise InputError("eval_dataset_name, eval_every_nth: got both, need one or neither")
