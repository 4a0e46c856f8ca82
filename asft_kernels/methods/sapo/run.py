"""One SAPO run: as asft-train's, with rows of prompt and chosen answer and models that move."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers import TrainerState

from asft_kernels.data import PairCollator, load_pairs, split_every_nth
from asft_kernels.errors import InputError
from asft_kernels.methods.sapo.arguments import SapoArguments
from asft_kernels.methods.sapo.buffer import ReplayBuffer
from asft_kernels.methods.sapo.data import load_chosen
from asft_kernels.methods.sapo.trainer import SapoTrainer
from asft_kernels.models import PreferenceModel
from asft_kernels.models.loading import check_positions, load_causal_lm, load_tokenizer
from asft_kernels.train import run_folder
from asft_kernels.train.arguments import RunArguments
from asft_kernels.train.metrics import Evaluation, MetricsFile, change, change_table
from asft_kernels.train.plot import plot_curves
from asft_kernels.train.trainer import BEFORE, StopWhenAsked, saves

FREE_ON_RESUME = ("resume", "strict", "backend", "cache_bytes")


def run(job: SapoArguments, args: RunArguments, say: Any = print) -> bool:
    """Train as the arguments say; True if Ctrl-C ended it. Errors: as `asft_kernels.train.run.run`."""
    first = args.process_index == 0
    say = say if first else (lambda *_: None)
    folder = Path(str(args.output_dir))
    objective = job.build_objective()
    settings = {**asdict(job), **args.to_dict(), "world_size": args.world_size, "objective": repr(objective)}
    checkpoint = run_folder.find_checkpoint(job, args, folder)
    if checkpoint:
        _same_run(checkpoint, folder, settings, say)

    tokenizer, config = load_tokenizer(job.model)
    check_positions(config, job.max_length)
    train, evaluation, report = _data(job, tokenizer)
    say(f"{report}\n{len(train)} rows for training, {len(evaluation) if evaluation else 0} pairs for evaluation")
    model = PreferenceModel(
        load_causal_lm(job.model, job.dtype),
        objective,
        logit_scale=job.logit_scale,
        softcap=job.softcap,
        backend=job.backend,
        cache_bytes=job.cache_bytes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl", writes=first)
    done = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else None
    complete = done is not None and done["global_step"] >= run_folder.last_step(args, done)
    metrics.start(done["global_step"] if done else None, complete)
    if first and not checkpoint:
        run_folder.write_json(
            folder / "run.json", {"command": _own_command(), "versions": run_folder.versions(), "settings": settings}
        )
    stop = StopWhenAsked(say)
    trainer = SapoTrainer(
        model,
        args,
        tokenizer=tokenizer,
        metrics=metrics,
        models=job.moving_models(model, needs_reference=objective.needs_reference),
        buffer=ReplayBuffer(job.max_replay_buffer_size),
        regeneration=job.regeneration(),
        nll_on_prompt=job.nll_on_prompt or job.objective == "orpo",
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=[stop],
    )
    batch = PairCollator(0)([{**row, "rejected": row["chosen"]} for row in (train[0], train[len(train) - 1])])
    worst = model.check_head({name: tensor.to(args.device) for name, tensor in batch.items()})
    say(f"output head checked: fused and own log-probabilities differ by at most {worst:.1e}")

    args.eval_on_start = evaluation is not None and checkpoint is None
    with stop.listening():
        if checkpoint and complete:  # ended after its last checkpoint: only the end is left to do
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.load_sapo_state(checkpoint)
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.stopped:
            rest = f"go on with: {_own_command()} --resume" if saves(args) else "--save-strategy no: no checkpoint"
            say(f"stopped after step {trainer.state.global_step}; {rest}")
        else:
            if saves(args):
                trainer.save_model()
            if evaluation is not None and trainer.evaluated_step != trainer.state.global_step:
                trainer.evaluate()
    if first:
        _conclude(folder, trainer, job, say, compare=not stop.stopped)
    return stop.stopped


def _same_run(checkpoint: Path, folder: Path, settings: dict[str, Any], say: Any) -> None:
    if not run_folder.same_folder(checkpoint.parent, folder):
        raise InputError(
            f"--resume: {checkpoint} is of the run in {checkpoint.parent}, need a checkpoint of --output-dir; "
            "name that folder as --output-dir"
        )
    run_folder.require_same_settings(folder / "run.json", settings, say)
    old = json.loads((folder / "run.json").read_text())["settings"]
    for name in (field.name for field in fields(SapoArguments)):
        if name not in FREE_ON_RESUME and old.get(name) != settings[name]:
            raise InputError(
                f"--resume: --{name.replace('_', '-')} was {old.get(name)!r} and is {settings[name]!r} now, "
                "need the same; start another run in another --output-dir to change it"
            )


def _data(job: SapoArguments, tokenizer: Any) -> tuple[Any, Any, str]:
    """(rows for training, evaluation pairs or None, what was read and left out)."""
    limits: dict[str, Any] = dict(max_length=job.max_length, max_prompt_length=job.max_prompt_length, strict=job.strict)
    if job.eval_every_nth:  # the file holds pairs then
        pairs, report = load_pairs(job.data, tokenizer, **limits)
        return *split_every_nth(pairs, job.eval_every_nth), str(report)
    train, report = load_chosen(job.data, tokenizer, **limits)
    if not job.eval_data:
        return train, None, str(report)
    evaluation, eval_report = load_pairs(job.eval_data, tokenizer, **limits)
    return train, evaluation, f"{report}\n{eval_report}"


def _conclude(folder: Path, trainer: SapoTrainer, job: SapoArguments, say: Any, *, compare: bool) -> None:
    """Curves, and the change between the evaluations before and after."""
    changes: dict[str, dict[str, float]] = {}
    if compare and trainer.evaluation is not None and (folder / BEFORE).is_file():
        changes = change(Evaluation.load(folder / BEFORE), trainer.evaluation)
        pairs = len(trainer.evaluation.column("margin"))
        run_folder.write_json(
            folder / "summary.json", {"step": trainer.state.global_step, "pairs": pairs, "changes": changes}
        )
        say(change_table(changes, pairs))
    errors = {name: row["standard_error"] for name, row in changes.items()}
    title = f"SAPO with {job.objective}, {Path(job.model).name} on {Path(job.data).name}"
    plot_curves(trainer.metrics_file.rows(), folder / "curves.png", title, errors)
    say(f"metrics: {trainer.metrics_file.path}\ncurves:  {folder / 'curves.png'}")


def _own_command() -> str:
    return run_folder.command().replace("asft-train", "python -m asft_kernels.methods.sapo", 1)
