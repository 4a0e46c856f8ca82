"""One run: arguments, data, model, head check, evaluation, training, evaluation, curves, summary."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState

from asft_kernels.data import PairCollator, load_pairs, split_every_nth
from asft_kernels.methods.fpo.cache import ReferenceFeatures, write_reference_features
from asft_kernels.models import PreferenceModel
from asft_kernels.models.loading import check_positions, load_causal_lm, load_tokenizer
from asft_kernels.objectives import BMC
from asft_kernels.train import run_folder
from asft_kernels.train.arguments import JobArguments, RunArguments
from asft_kernels.train.metrics import Evaluation, MetricsFile, change, change_table
from asft_kernels.train.on_pairs import on_pairs
from asft_kernels.train.plot import plot_curves
from asft_kernels.train.reference import ObjectiveCollator, with_reference
from asft_kernels.train.step_inputs import FeatureInputs, step_inputs_for
from asft_kernels.train.trainer import BEFORE, PreferenceTrainer, StopWhenAsked, pad_token, saves


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
    """Train as the arguments say. InputError on bad input.

    say: takes the report, text by text; say_at_once: what a user who stops the run waits for.
    """
    first = args.process_index == 0
    say_at_once = (say_at_once or say) if first else (lambda *_: None)
    say = say if first else (lambda *_: None)
    folder = Path(str(args.output_dir))
    objective = job.build_objective()
    settings = {**asdict(job), **args.to_dict(), "world_size": args.world_size, "objective": repr(objective)}
    checkpoint = run_folder.find_checkpoint(job, args, folder)
    source = checkpoint.parent if checkpoint else folder  # where that run's run.json and figures are
    if checkpoint:
        run_folder.require_same_settings(source / "run.json", settings, say)

    tokenizer, config = load_tokenizer(job.model)
    check_positions(config, job.max_length)
    train, evaluation, report = _data(job, tokenizer)  # what is wrong there is said before the long wait
    say(report)
    say(f"{len(train)} pairs for training, {len(evaluation) if evaluation else 0} for evaluation")
    language_model = load_causal_lm(job.model, job.dtype)
    model = PreferenceModel(
        language_model,
        on_pairs(objective),
        step_inputs=step_inputs_for(objective, job.sae, job.sae_layer, language_model),
        logit_scale=job.logit_scale,
        softcap=job.softcap,
        backend=job.backend,
        cache_bytes=job.cache_bytes,
    )

    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl", writes=first)
    if first and not run_folder.same_folder(
        source, folder
    ):  # --resume PATH: the new folder starts with the old one's rows
        for name in ("metrics.jsonl", BEFORE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    done = json.loads((checkpoint / "trainer_state.json").read_text()) if checkpoint else None
    complete = done is not None and done["global_step"] >= run_folder.last_step(args, done)
    # With the best model restored at the end, the last step's evaluation is not made again.
    metrics.start(done["global_step"] if done else None, complete and not args.load_best_model_at_end)
    if first and not (checkpoint and (folder / "run.json").is_file()):
        run_folder.write_json(
            folder / "run.json",
            {"command": run_folder.command(), "versions": run_folder.versions(), "settings": settings},
        )
    stop = StopWhenAsked(say_at_once)
    if not job.ref_scores and model.objective.needs_reference:
        model.to(args.device)  # to be scored as it comes; else the Trainer moves it
    scoring: dict[str, Any] = {
        "tokenizer": tokenizer, "batch_size": args.per_device_eval_batch_size, "max_length": job.max_length,
    }  # fmt: skip
    train = with_reference(train, model, scores=job.ref_scores, label="reference, training pairs", **scoring)
    if evaluation:
        evaluation = with_reference(
            evaluation, model, scores=job.ref_scores, label="reference, evaluation pairs", **scoring
        )
    features = None
    if isinstance(model.step_inputs, FeatureInputs):
        features = _reference_features(folder / "ref_features.arrow", model, train, evaluation, args)
    trainer = PreferenceTrainer(
        model,
        args,
        tokenizer=tokenizer,
        metrics=metrics,
        collator=ObjectiveCollator(
            pad_token(tokenizer),
            nll_on_prompt=job.nll_on_prompt,
            unweighted_nll=isinstance(objective, BMC) and objective.uses_nll_labels,
            features=features,
        ),
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=[stop],
    )
    batch = PairCollator(0)([train[0], train[min(1, len(train) - 1)]])
    worst = model.check_head({name: tensor.to(args.device) for name, tensor in batch.items()})
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
            rest = (
                f"go on with: {run_folder.command()} --resume" if saves(args) else "--save-strategy no: no checkpoint"
            )
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
            run_folder.write_json(
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


def _reference_features(
    path: Path, model: PreferenceModel, train: Any, evaluation: Any, args: RunArguments
) -> ReferenceFeatures:
    """Of the model as it is now, by the first process for all."""
    from datasets import concatenate_datasets

    names = ["id", "prompt", "chosen", "rejected"]
    pairs = concatenate_datasets([part.select_columns(names) for part in (train, evaluation) if part])
    made: Any = model.step_inputs
    with args.main_process_first(local=False, desc="reference features"):
        if args.process_index == 0:
            batch_size = args.per_device_eval_batch_size
            write_reference_features(path, model.model, made.sae, pairs, layer=made.layer, batch_size=batch_size)
    return ReferenceFeatures(path, made.sae, layer=made.layer, pairs=pairs)


def _short(model: str) -> str:
    return Path(model).name or model
