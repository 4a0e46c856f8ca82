"""One run: arguments, data, model, head check, evaluation, training, evaluation, curves, summary."""

import json
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import TrainerState

from asft_kernels.data import PairCollator, load_pairs, split_every_nth
from asft_kernels.integrations.hf_model import PreferenceModel, verify_head
from asft_kernels.integrations.loading import check_positions, load_causal_lm, load_tokenizer
from asft_kernels.train.arguments import ArgumentProblem, JobArguments, RunArguments
from asft_kernels.train.metrics import Evaluation, MetricsFile, change, change_table
from asft_kernels.train.on_pairs import on_pairs
from asft_kernels.train.plot import plot_curves
from asft_kernels.train.reference import ObjectiveCollator, with_reference
from asft_kernels.train.trainer import BEFORE, PreferenceTrainer, StopWhenAsked, pad_token, saves

# A resumed run that changed one of these would go on as another experiment, without a word.
SAME_ON_RESUME = (
    "model", "data", "eval_data", "eval_every_nth", "objective",
    "nll_on_prompt", "ref_scores", "max_length",
    "max_prompt_length", "dtype", "learning_rate", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed", "world_size", "logit_scale", "softcap", "num_train_epochs",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args",
    "weight_decay", "max_grad_norm",
)  # fmt: skip  # not max_steps: a run may go on for more steps, and says so

RESUME = ("--resume", "--resume-from-checkpoint", "--resume_from_checkpoint")


@dataclass(frozen=True)
class Result:
    """What a run left behind. changes: see `metrics.change`, empty without evaluation pairs."""

    folder: Path
    step: int
    stopped: bool  # by Ctrl-C, with a checkpoint unless --save-strategy is no
    plot: Path
    changes: dict[str, dict[str, float]]
    pairs: int  # evaluation pairs
    report: str


def run(job: JobArguments, args: RunArguments, say: Any = print, say_at_once: Any = None) -> Result:
    """Train as the arguments say. ArgumentProblem, DataError, ModelProblem or UnsupportedHead on bad input.

    say: takes the report, text by text; say_at_once: what a user who stops the run waits for.
    """
    first = args.process_index == 0
    say_at_once = (say_at_once or say) if first else (lambda *_: None)
    say = say if first else (lambda *_: None)
    folder = Path(str(args.output_dir))
    objective = job.build_objective()
    settings = {**asdict(job), **args.to_dict(), "world_size": args.world_size, "objective": repr(objective)}
    checkpoint = _checkpoint(job, args, folder)
    source = checkpoint.parent if checkpoint else folder  # where that run's run.json and figures are
    if checkpoint:
        _same_settings(source / "run.json", settings, say)

    tokenizer, config = load_tokenizer(job.model)
    check_positions(config, job.max_length)
    train, evaluation, report = _data(job, tokenizer)  # what is wrong there is said before the long wait
    say(report)
    say(f"{len(train)} pairs for training, {len(evaluation) if evaluation else 0} for evaluation")
    model = PreferenceModel(
        load_causal_lm(job.model, job.dtype),
        on_pairs(objective),
        logit_scale=job.logit_scale,
        softcap=job.softcap,
        backend=job.backend,
        cache_bytes=job.cache_bytes,
    )

    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl", writes=first)
    if first and not _same_folder(source, folder):  # --resume PATH: the new folder starts with the old one's rows
        for name in ("metrics.jsonl", BEFORE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    done = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else None
    complete = done is not None and done["global_step"] >= _last_step(args, done)
    # With the best model restored at the end, the last step's evaluation is not made again.
    metrics.start(done["global_step"] if done else None, complete and not args.load_best_model_at_end)
    if first and not (checkpoint and (folder / "run.json").is_file()):
        _write(
            folder / "run.json",
            {"command": _command(), "versions": _versions(), "settings": settings},
        )
    stop = StopWhenAsked(say_at_once)
    if not job.ref_scores and model.objective.needs_reference:
        model.to(args.device)  # to be scored as it comes; else the Trainer moves it
    scoring: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": args.per_device_eval_batch_size}
    train = with_reference(train, model, scores=job.ref_scores, label="reference, training pairs", **scoring)
    if evaluation:
        evaluation = with_reference(
            evaluation, model, scores=job.ref_scores, label="reference, evaluation pairs", **scoring
        )
    trainer = PreferenceTrainer(
        model,
        args,
        tokenizer=tokenizer,
        metrics=metrics,
        collator=ObjectiveCollator(pad_token(tokenizer), nll_on_prompt=job.nll_on_prompt),
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=[stop],
    )
    batch = PairCollator(0)([train[0], train[min(1, len(train) - 1)]])
    worst = verify_head(model, {name: tensor.to(args.device) for name, tensor in batch.items()})
    say(f"output head checked: fused and own log-probabilities differ by at most {worst:.1e}")

    # Not evaluate() before train(): accelerate would then take the model for prepared: no DDP.
    args.eval_on_start = evaluation is not None and checkpoint is None
    with stop.listening():
        if checkpoint and complete:  # ended after its last checkpoint: only the end is left to do
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stored = source / BEFORE
        before = Evaluation.load(stored) if checkpoint and stored.is_file() else trainer.before
        changes: dict[str, dict[str, float]] = {}
        if stop.stopped:
            rest = f"go on with: {_command()} --resume" if saves(args) else "--save-strategy no: no checkpoint"
            say_at_once(f"stopped after step {trainer.state.global_step}; {rest}")
        else:
            if trainer.restored_step is not None:
                say(f"best after step {trainer.restored_step}: its weights are the final model's")
            if saves(args):
                trainer.save_model()
            if evaluation is not None and trainer.evaluated_step != trainer.state.global_step:
                trainer.evaluate()
            if before is not None and trainer.evaluation is not None:
                changes = change(before, trainer.evaluation)
    plot = folder / "curves.png"
    if first:
        errors = {name: row["standard_error"] for name, row in changes.items()}
        plot_curves(metrics.rows(), plot, f"{job.objective}, {_short(job.model)} on {Path(job.data).name}", errors)
        pairs = len(before.column("margin")) if before else 0
        if changes:
            _write(
                folder / "summary.json",
                {"step": trainer.restored_step or trainer.state.global_step, "pairs": pairs, "changes": changes},
            )
            say(change_table(changes, pairs))
        say(f"metrics: {metrics.path}\ncurves:  {plot}")
    return Result(
        folder,
        trainer.state.global_step,
        stop.stopped,
        plot,
        changes,
        len(before.column("margin")) if before else 0,
        report,
    )


def _checkpoint(job: JobArguments, args: RunArguments, folder: Path) -> Path | None:
    """The checkpoint to go on from; the newest complete one for --resume without a path."""
    wanted = job.resume or args.resume_from_checkpoint
    if wanted is None:
        if _holds_run(folder):
            raise ArgumentProblem(
                f"--output-dir: {folder} holds a run already; add --resume to go on with it, or name another folder"
            )
        return None
    if wanted != "last":
        if not _complete(Path(wanted)):
            raise ArgumentProblem(f"--resume: {wanted} is no complete checkpoint (trainer_state.json is missing)")
        if not _same_folder(Path(wanted).parent, folder) and _holds_run(folder):
            raise ArgumentProblem(
                f"--output-dir: {folder} holds a run already, and {wanted} is of another; "
                "name the folder of that run, or a fresh one"
            )
        return Path(wanted)
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()),
        key=lambda path: int(path.name.split("-")[-1]),
    )
    complete = [path for path in found if _complete(path)]
    if not complete:
        raise ArgumentProblem(
            f"--resume: no complete checkpoint in {folder}; leave --resume out and name a fresh --output-dir"
        )
    return complete[-1]


def _holds_run(folder: Path) -> bool:
    """Anything that a new run would overwrite; run.json alone is of one that had not begun."""
    if MetricsFile(folder / "metrics.jsonl").rows():
        return True
    left = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")
    return (folder / "run.json").is_file() and any(any(folder.glob(pattern)) for pattern in left)


def _same_folder(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _complete(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last: a killed save lacks it or leaves half of it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _last_step(args: RunArguments, state: dict[str, Any]) -> int:
    return args.max_steps if args.max_steps > 0 else state["max_steps"]


def _same_settings(path: Path, settings: dict[str, Any], say: Any) -> None:
    if not path.is_file():
        return
    old = json.loads(path.read_text())["settings"]
    for name in SAME_ON_RESUME:
        if name in old and name in settings and old[name] != settings[name]:
            raise ArgumentProblem(
                f"--resume: --{name.replace('_', '-')} was {old[name]!r} and is {settings[name]!r} "
                "now, need the same; start another run in another --output-dir to change it"
            )
    steps = old.get("max_steps"), settings["max_steps"]
    if None not in steps and steps[0] != steps[1]:
        say(f"--max-steps was {steps[0]} and is {steps[1]} now: the learning rate goes on by the new schedule")


def _data(job: JobArguments, tokenizer: Any) -> tuple[Any, Any, str]:
    """(training pairs, evaluation pairs or None, what was read and left out)."""
    limits: dict[str, Any] = dict(max_length=job.max_length, max_prompt_length=job.max_prompt_length, strict=job.strict)
    train, report = load_pairs(job.data, tokenizer, **limits)
    text, evaluation = str(report), None
    if job.eval_every_nth:
        train, evaluation = split_every_nth(train, job.eval_every_nth)
    elif job.eval_data:
        evaluation, eval_report = load_pairs(job.eval_data, tokenizer, **limits)
        text += f"\n{eval_report}"
    if evaluation:  # longest first: little padding, and too large a batch shows at once
        columns = (evaluation[name] for name in ("prompt", "chosen", "rejected"))
        lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
        evaluation = evaluation.select(np.argsort(np.negative(lengths), kind="stable"))
    return train, evaluation, text


def _write(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _command() -> str:
    """This command without --resume and its value, as the user can type it."""
    given, dropping = [], False
    for word in sys.argv[1:]:
        dropping = word in RESUME or (dropping and not word.startswith("-"))
        if not dropping and not word.startswith(tuple(f"{name}=" for name in RESUME)):
            given.append(word)
    return shlex.join(["asft-train", *given])


def _short(model: str) -> str:
    return Path(model).name or model
