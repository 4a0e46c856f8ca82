"""One run: data with its report, model, evaluation, training, evaluation, curves, summary."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import IntervalStrategy, ProgressCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from trl import get_peft_config, get_quantization_config

from asft_kernels.backends import choose_backend
from asft_kernels.data import load_pairs, split_every_nth
from asft_kernels.errors import InputError, of_a_library
from asft_kernels.files import write_json
from asft_kernels.models.fused import fused_forward
from asft_kernels.models.loading import digest_of_model, fitted_length, load_processor, load_trainable_adapter
from asft_kernels.models.seam import causal_lm
from asft_kernels.score.table import tokenizer_fingerprint
from asft_kernels.training import run_folder
from asft_kernels.training.arguments import DataArguments, ModelArguments
from asft_kernels.training.callbacks import Bar, LogTheRest, MetricsFile, StopWhenAsked, saves
from asft_kernels.training.checkpoints import STATE, find_checkpoint, read_state
from asft_kernels.training.collator import longest_first
from asft_kernels.training.config import PreferenceConfig
from asft_kernels.training.dry_run import describe
from asft_kernels.training.figures import BEFORE, Evaluation, change, change_table
from asft_kernels.training.hooks import find_method
from asft_kernels.training.model_keywords import with_options
from asft_kernels.training.plot import plot_curves
from asft_kernels.training.tensor_parallel import data_ranks, sharded_at_load
from asft_kernels.training.trainer import PreferenceTrainer

Say = Callable[[str], None]
# What libraries raise where a model cannot be loaded, or arguments do not go together.
LOADING = (ImportError, NotImplementedError, OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        stopped: whether Ctrl-C ended it.
        changes: see `figures.change`; empty without evaluation pairs, of which there were `pairs`.
    """

    folder: Path
    step: int
    stopped: bool
    plot: Path
    changes: dict[str, dict[str, float]]
    pairs: int
    report: str


@dataclass(frozen=True)
class Data:
    """Training pairs, pairs held out or None, and what was read and left out."""

    train: Any
    evaluation: Any
    report: str


def run(
    data: DataArguments,
    config: PreferenceConfig,
    model: ModelArguments,
    method_arguments: Mapping[str, Any] | None = None,
    *,
    say: Say = print,
    say_at_once: Say | None = None,
) -> Result:
    """Trains as the arguments say.

    Args:
        method_arguments: instances of methods' `Arguments` by the methods' names; None for their defaults.
        say: takes the report, text by text.
        say_at_once: takes what a user who stops the run waits for; None: `say`.

    Raises:
        InputError: for what the user got wrong.
    """
    first = config.process_index == 0
    say, at_once = (say, say_at_once or say) if first else (_silent, _silent)
    if data.dry_run:
        with TemporaryDirectory() as nowhere:  # the Trainer makes its folder
            config.output_dir = nowhere
            return _run(data, config, model, method_arguments, say, at_once)
    folder = Path(str(config.output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir: {folder} is a file, need a folder; name another")
    if not first:  # the first rank's lock is the run's
        return _run(data, config, model, method_arguments, say, at_once)
    with run_folder.taken(folder):
        return _run(data, config, model, method_arguments, say, at_once)


def _run(
    data: DataArguments, config: PreferenceConfig, model: ModelArguments, method_arguments: Mapping[str, Any] | None,
    say: Say, at_once: Say,
) -> Result:  # fmt: skip
    first = config.process_index == 0
    folder = Path(str(config.output_dir))
    _check_adapters(model)
    checkpoint = (
        None if data.dry_run else _checkpoint(data.resume or config.resume_from_checkpoint, config, folder, say)
    )
    done = read_state(checkpoint) if checkpoint else None
    ended = done is not None and _ended(done, config)
    name = _model_name(model)
    processor, model_config = load_processor(
        name, trust_remote_code=config.trust_remote_code, revision=model.model_revision
    )
    if config.max_length is not None:
        config.max_length = fitted_length(model_config, config.max_length)
    _check_loggers(config)
    objective = config.build_objective()
    method = find_method(config.method, objective, dict(method_arguments or {}))
    settings = {
        **config.to_dict(), **asdict(model), **asdict(data), "objective": repr(objective), "method": method.name,
        "method_arguments": asdict(method.arguments) if method.arguments is not None else None,
        "model": digest_of_model(name), "world_size": config.world_size,
        "tokenizer": tokenizer_fingerprint(getattr(processor, "tokenizer", processor)),
        "files": run_folder.digest_of_files([*(config.ref_scores or ()), *_strings(method.arguments)]),
    }  # fmt: skip
    if checkpoint:  # ahead of the data, which take long
        run_folder.require_same_settings(folder / run_folder.SETTINGS, settings, _silent)
    read = _read(data, config, processor, model_config, ("chosen",) if method.makes_pairs else ("chosen", "rejected"))
    say(read.report)
    say(f"{len(read.train)} pairs for training, {len(read.evaluation) if read.evaluation else 0} for evaluation")
    if config.eval_strategy != "no" and read.evaluation is None:
        raise InputError(
            f"eval_strategy: got {IntervalStrategy(config.eval_strategy).value!r} without pairs to evaluate on; add "
            "--eval_every_nth, or --eval_dataset_name (which may be the same data, with --dataset_test_split)"
        )
    if model.use_peft and config.learning_rate == PreferenceConfig.learning_rate:
        say(f"learning_rate {config.learning_rate:g}, TRL's default, is next to nothing for adapters; try 2e-5 to 2e-4")
    datasets = {"training_pairs": read.train, "evaluation_pairs": read.evaluation}
    settings |= {name: run_folder.digest_of_pairs(dataset) for name, dataset in datasets.items()}
    if checkpoint:
        run_folder.require_same_settings(folder / run_folder.SETTINGS, settings, say, datasets)
        more = "; that was the last step, give --max_steps to train further" if ended else ""
        say(f"goes on from {checkpoint}{more}")
    metrics, stop = MetricsFile(folder / run_folder.METRICS), StopWhenAsked(at_once)
    config.eval_on_start = read.evaluation is not None and checkpoint is None
    try:
        trainer = PreferenceTrainer(
            _policy(name, config, model), args=config, train_dataset=read.train, eval_dataset=read.evaluation,
            processing_class=processor, callbacks=[metrics, stop, LogTheRest()], method=method,
            quantization_config=None if _is_adapter(name) else get_quantization_config(model),
            peft_config=None if _is_adapter(name) else get_peft_config(model),
        )  # fmt: skip
        choose_backend(config.backend, config.device, torch.float32)
    except LOADING as error:
        if isinstance(error, InputError | torch.OutOfMemoryError) or not of_a_library(error):
            raise
        raise InputError(f"{str(error).strip().splitlines()[0]} ({type(error).__name__})") from error
    if not config.disable_tqdm:
        trainer.pop_callback(ProgressCallback)
        trainer.add_callback(Bar())
    if "distributed_config" in (config.model_init_kwargs or {}):
        say(f"tensor parallel {trainer.get_tp_size()} x data parallel {data_ranks(trainer)}")
    say(_head_checked(trainer))
    if data.dry_run:
        say(describe(trainer))
        return Result(folder, 0, False, folder / run_folder.CURVES, {}, 0, read.report)
    if first:
        metrics.start(done["global_step"] if done else None, evaluates_again=ended and read.evaluation is not None)
        if not checkpoint:
            run_folder.write_pairs(folder, datasets)
        content = {"command": run_folder.command(), "versions": run_folder.versions(), "settings": settings}
        write_json(folder / run_folder.SETTINGS, content)
    with stop.listening():
        _train(trainer, checkpoint, ended=ended)
        before = _before(trainer, folder, say, resumed=checkpoint is not None)
        step = trainer.state.global_step
        if stop.stopped:
            rest = (
                f"go on with: {run_folder.command()} --resume"
                if saves(config)
                else "no checkpoint, as save_strategy is no"
            )
            at_once(f"stopped after step {trainer.state.global_step}; {rest}")
        else:
            if saves(config):
                trainer.save_model()
            best = trainer.state.best_model_checkpoint if config.load_best_model_at_end else None
            if best:
                step = int(best.rpartition("-")[2])
                say(f"best after step {step}: its weights are the final model's")
            if read.evaluation is not None and (best or trainer.evaluated_step != step):
                trainer.evaluate()
    changes = {} if stop.stopped or before is None else change(before, _last(trainer))
    pairs = len(before.column("margin")) if before else 0
    plot = folder / run_folder.CURVES
    if first:
        errors = {figure: row["standard_error"] for figure, row in changes.items()}
        title = f"{config.objective}, {Path(name).name} on {Path(data.dataset_name[0]).name}"
        plot_curves(metrics.rows(), plot, title, errors)
        if changes:
            summary = {"step": step, "pairs": pairs, "changes": changes}
            write_json(folder / run_folder.SUMMARY, summary)
            say(change_table(changes, pairs))
        saved = f"model:   {folder}\n" if saves(config) and not stop.stopped else ""
        say(f"{saved}metrics: {metrics.path}\ncurves:  {plot}")
    return Result(folder, trainer.state.global_step, stop.stopped, plot, changes, pairs, read.report)


def _checkpoint(wanted: str | None, config: PreferenceConfig, folder: Path, say: Say) -> Path | None:
    """What the first rank finds, on all of them: others may look when it has begun to write."""
    answer: list[Any] = [None, None]
    if config.process_index == 0:
        try:
            ranks = 1 if config.save_on_each_node else config.world_size
            answer[0] = find_checkpoint(wanted, folder, say, ranks)
        except InputError as error:
            answer[1] = str(error)
    found, refused = broadcast_object_list(answer)
    if refused:
        raise InputError(refused)
    return found


def _check_adapters(model: ModelArguments) -> None:
    """Without --use_peft TRL would train the whole model, whatever else is said of LoRA."""
    if (model.load_in_4bit or model.load_in_8bit) and find_spec("bitsandbytes") is None:
        name = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise InputError(f"{name}: needs bitsandbytes, which is not installed; pip install bitsandbytes")
    if model.use_peft:
        return
    usual = ModelArguments()
    for name in vars(model):
        if name.startswith(("lora_", "use_rslora", "use_dora")) and getattr(model, name) != getattr(usual, name):
            raise InputError(f"{name}: got {getattr(model, name)!r} without use_peft, need it with --use_peft; add it")


def _check_loggers(config: PreferenceConfig) -> None:
    try:
        for logger in get_reporting_integration_callbacks(config.report_to):
            logger()
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"report_to: {error}; or give none") from error


def _strings(arguments: Any) -> list[str]:
    return [] if arguments is None else [value for value in vars(arguments).values() if isinstance(value, str)]


def _silent(_: str) -> None:
    pass


def _model_name(model: ModelArguments) -> str:
    if not model.model_name_or_path:
        raise InputError("model_name_or_path: got none, need a folder that from_pretrained reads, or a hub name")
    return model.model_name_or_path


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _policy(name: str, config: PreferenceConfig, model: ModelArguments) -> Any:
    """What DPOTrainer takes as model: a name with its keywords in config, or the model that an adapter is part of."""
    options = {
        "dtype": model.dtype, "attn_implementation": model.attn_implementation, "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }  # fmt: skip
    given: Any = config.model_init_kwargs or {}
    keywords = with_options(given, options)
    if _is_adapter(name):
        if model.use_peft:
            raise InputError(f"use_peft: got True, need False: {name} is an adapter already, which is trained on")
        quantization = get_quantization_config(model)
        if quantization is not None:
            keywords["quantization_config"] = quantization
        return load_trainable_adapter(name, keywords)
    config.model_init_kwargs = keywords
    return name


def _read(
    data: DataArguments, config: PreferenceConfig, processor: Any, model_config: Any, answers: tuple[str, ...]
) -> Data:
    cut_here = config.truncation_mode == "keep_start"  # the other end is cut batch by batch, by TRL's collator
    limits: dict[str, Any] = {
        "max_length": config.max_length if cut_here else None, "strict": data.strict, "config": data.dataset_config,
        "vocab_size": model_config.get_text_config().vocab_size, "num_proc": config.dataset_num_proc,
    }  # fmt: skip
    if data.eval_every_nth:
        answers = ("chosen", "rejected")  # the held-out rows are pairs
    train, report = load_pairs(data.dataset_name, processor, split=data.dataset_train_split, answers=answers, **limits)
    text, evaluation = str(report), None
    if data.eval_every_nth:
        train, evaluation = split_every_nth(train, data.eval_every_nth)
    elif data.eval_dataset_name:
        split = data.dataset_test_split
        if split == "test" and all(Path(name).is_file() for name in data.eval_dataset_name):
            split = "train"  # as all of a file is called, which has no splits
        images = "images" in train.column_names
        evaluation, of_evaluation = load_pairs(data.eval_dataset_name, processor, split=split, images=images, **limits)
        if "images" in evaluation.column_names and not images:
            raise InputError("eval_dataset_name: got rows with images, need text alone, as all training rows are")
        text += f"\n{of_evaluation}"
    if evaluation is not None:
        trained = set(train["id"][:])
        if seen := sum(pair in trained for pair in evaluation["id"][:]):
            text += f"\n{seen} of {len(evaluation)} evaluation pairs are training pairs, too"
        evaluation = evaluation.select(longest_first(evaluation))  # too large a batch shows at once
    return Data(train, evaluation, text)


@torch.no_grad()
def _head_checked(trainer: PreferenceTrainer) -> str:
    """Holds the fused head against the model's own logits before the long wait, and says what came of it.

    Sharded models are held against them at their first batch: they are whole in no place before.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or sharded_at_load(trainer)
    if sharded or trainer.method.makes_pairs:
        goes = f"{trainer.head_goes}; " if trainer.head_goes else ""
        return f"output head: {goes}checked at the first batch"
    rows = [trainer.train_dataset[i] for i in (0, min(1, len(trainer.train_dataset) - 1))]
    batch = trainer._prepare_inputs(trainer.collator(rows))
    trainer.model.to(trainer.args.device)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    trainer.token_logps(trainer.model, batch, labels)
    forward = fused_forward(causal_lm(trainer.model))
    worst = None if forward is None else forward.head.difference
    return f"output head checked: fused and own log-probabilities differ by at most {worst or 0.0:.1e}"


def _ended(done: Mapping[str, Any], config: PreferenceConfig) -> bool:
    """Whether a checkpoint is of the run's last step.

    Raises:
        InputError: it is of a later one.
    """
    if 0 < config.max_steps < done["global_step"]:
        raise InputError(
            f"max_steps: got {config.max_steps}, need at least {done['global_step']}, the steps that are done"
        )
    return done["global_step"] >= (config.max_steps if config.max_steps > 0 else done.get("max_steps", 0))


def _train(trainer: PreferenceTrainer, checkpoint: Path | None, *, ended: bool) -> None:
    if checkpoint and ended:  # after its last checkpoint: only the end is left
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.load_own_state(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except pickle.UnpicklingError as error:  # of torch.load with weights_only
        raise InputError(
            f"resume: {checkpoint} has a file that holds more than tensors and plain values, which could run code; "
            "need a checkpoint as the Trainer saves it"
        ) from error


def _before(trainer: PreferenceTrainer, folder: Path, say: Say, *, resumed: bool) -> Evaluation | None:
    """The evaluation of the model as it came, of this run or of the one that it resumes."""
    path = folder / BEFORE
    if not resumed:
        return trainer.first_evaluation
    try:
        return Evaluation.load(path) if path.is_file() else None
    except ValueError:
        say(f"{path} is damaged: what training changed is not reported")
        return None


def _last(trainer: PreferenceTrainer) -> Evaluation:
    if trainer.evaluation is None:
        raise RuntimeError("bug: a run with an evaluation before training has none after it")
    return trainer.evaluation
