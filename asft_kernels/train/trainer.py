"""transformers.Trainer for pairs: what is counted, logged, saved; the loop is the Trainer's."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, ProgressCallback, Trainer, TrainerCallback

from asft_kernels.data import PairCollator
from asft_kernels.errors import InputError
from asft_kernels.models import PreferenceModel
from asft_kernels.models.seam import causal_lm
from asft_kernels.train.arguments import RunArguments
from asft_kernels.train.metrics import COLUMNS, Evaluation, MetricsFile, Window, counting_pairs

BEFORE = "eval_before.json"  # in the output folder: a resumed run compares with it
STATE = "objective.pt"  # in checkpoints: the statistics of an objective that keeps some (lmpo)
SHOWN_IN_BAR = ("loss", "margin", "accuracy", "tokens_per_second")


class PreferenceTrainer(Trainer):
    """Trains a PreferenceModel on the pairs of `load_pairs`.

    A batch is B pairs, (2B, T). The loss of an optimiser step is the mean over all pairs that count
    in it, whatever the number and size of its micro-batches and ranks: each forward is handed the
    total and divides by it.
    """

    def __init__(
        self,
        model: PreferenceModel,
        args: RunArguments,
        *,
        tokenizer: Any,
        metrics: MetricsFile,
        collator: PairCollator | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs in one process: nn.DataParallel would put chosen and rejected "
                "rows on different devices; start one process a GPU: "
                f"torchrun --nproc-per-node {args.n_gpu} -m asft_kernels.train ..."
            )
        self.tokenizer_to_save = tokenizer
        self.metrics_file = metrics
        self.window = Window()
        self.window_start: float | None = None
        self.paused = 0.0
        self.before: Evaluation | None = None  # of the model as it came
        self.evaluation: Evaluation | None = None  # the last one, after evaluated_step steps
        self.evaluated_step = -1
        self.restored_step: int | None = None  # --load-best-model-at-end: its weights are the model's now
        super().__init__(
            model=model,
            args=args,
            data_collator=collator or PairCollator(pad_token(tokenizer)),
            compute_metrics=self._evaluation_figures,
            **kwargs,
        )
        # The count of each step is asked for, and it is of pairs.
        self.model_accepts_loss_kwargs = True
        self.add_callback(LogTheRest)
        if not args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(Bar())

    # What is counted

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Pairs that count in this step, all micro-batches and ranks; the Trainer counts tokens."""
        if not batch_samples:
            return None
        counts = [counting_pairs(batch["labels"]).sum() for batch in batch_samples]
        pairs = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            pairs = self.accelerator.reduce(pairs, "sum")
        return cast(Tensor, pairs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        wrapped = self.is_fsdp_enabled or self.is_deepspeed_enabled or model is not self.model
        if self.args.world_size > 1 and not wrapped:
            raise RuntimeError(
                "bug: several ranks, and the model is not wrapped for them: each would train on "
                "its own gradients (so it goes when Trainer.evaluate() runs before Trainer.train())"
            )
        if self.window_start is None:
            self.window_start, self.paused = time.perf_counter(), 0.0
        outputs = model(**inputs, num_pairs=num_items_in_batch)
        loss = outputs["loss"]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is of all ranks, their gradients are averaged
        self.window.add(outputs, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        trains = "loss" in logs and self.window_start is not None
        if trains:  # `loss` too: the Trainer's is a mean of the steps' means, ours are all per pair
            seconds = time.perf_counter() - cast(float, self.window_start) - self.paused
            logs.update(self.window.take(seconds, lambda sums: self.accelerator.reduce(sums, "sum")))
            self.window_start = None
        super().log(logs, start_time)
        if trains:
            self.metrics_file.write({"kind": "train", "step": self.state.global_step, **logs})

    # Evaluation: per-pair figures, so that two evaluations can be compared pair by pair

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs)
        counts = (out["chosen_lengths"] > 0) & (out["rejected_lengths"] > 0)
        columns = dict(
            chosen_avg_logp=out["chosen_avg_logps"],
            rejected_avg_logp=out["rejected_avg_logps"],
            margin=out["margins"],
            loss=out["pair_losses"],
            counts=counts,
        )
        table = torch.stack([columns[name].double() for name in COLUMNS], dim=1)
        return None, table, counts

    def _evaluation_figures(self, prediction: EvalPrediction) -> dict[str, float]:
        self.evaluation = Evaluation(np.asarray(prediction.predictions))
        self.evaluated_step = self.state.global_step
        if self.evaluated_step == 0:
            self.before = self.evaluation
            if self.args.should_save:
                self.before.save(Path(str(self.args.output_dir)) / BEFORE)
        return self.evaluation.figures()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        figures = super().evaluate(*args, **kwargs)
        self.paused += time.perf_counter() - start
        prefix = kwargs.get("metric_key_prefix", "eval") + "_"
        row = {name.removeprefix(prefix): value for name, value in figures.items()}
        if self.restored_step is None:  # the row of the best step's own evaluation is there already
            self.metrics_file.write({"kind": "eval", "step": self.state.global_step, **row})
        return figures

    # Checkpoints hold the language model itself, as from_pretrained reads it

    def _language_model(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.model if isinstance(model, PreferenceModel) else model

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is not None:
            own = {name: value for name, value in state_dict.items() if name.startswith("model.")}
            state_dict = {name.removeprefix("model."): value for name, value in own.items()}
        objective = self._objective()
        if objective is not None:
            torch.save(objective.state_dict(), folder / STATE)
        self._language_model().save_pretrained(folder, state_dict=state_dict)
        self.tokenizer_to_save.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _objective(self) -> nn.Module | None:
        """The objective, if it keeps statistics."""
        objective = getattr(self.accelerator.unwrap_model(self.model), "objective", None)
        return objective if isinstance(objective, nn.Module) and objective.state_dict() else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        objective = self._objective()
        if objective is not None:
            objective.load_state_dict(torch.load(Path(resume_from_checkpoint) / STATE, weights_only=True))
        super()._load_from_checkpoint(resume_from_checkpoint, self._language_model() if model is None else model)

    def _load_best_model(self) -> None:
        whole = self.model
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # these save and load the whole
            self.model = self._language_model()
        try:
            super()._load_best_model()
        finally:
            self.model = whole
        self.restored_step = int(str(self.state.best_model_checkpoint).rpartition("-")[2])
        same = self.evaluated_step == self.restored_step  # else the last evaluation was of other weights
        self.evaluated_step = self.state.global_step if same else -1

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are stored once; anything else that does not match is another model's."""
        inner = causal_lm(self._language_model())
        inner.tie_weights()
        tied = set(getattr(inner, "all_tied_weights_keys", None) or {})
        missing = set(load_result.missing_keys) - tied
        if missing or load_result.unexpected_keys:
            names = sorted(missing | set(load_result.unexpected_keys))[:3]
            raise InputError(f"--resume: the checkpoint is not of --model: {', '.join(names)} ... do not match")


def pad_token(tokenizer: Any) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def saves(args: Any) -> bool:
    return args.save_strategy != "no"


class LogTheRest(TrainerCallback):
    """Logs after the last step, though --logging-steps do not divide it: no pair goes unreported."""

    def on_step_end(self, args, state, control, **kwargs):
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last and args.logging_strategy != "no":
            control.should_log = True


class Bar(ProgressCallback):
    """The Trainer's progress bar with the figures in it, instead of a line for every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.3g}" for name in SHOWN_IN_BAR if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)


class StopWhenAsked(TrainerCallback):
    """Ends training after the current step once `asked` is set on any rank.

    With a checkpoint, unless --save-strategy is "no".
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.asked = False
        self.announced = False
        self.stopped = False
        self.training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.asked and not (self.training and state.global_step):  # no step to end, nothing to save
            raise KeyboardInterrupt
        self._announce(args)

    def on_substep_end(self, args, state, control, **kwargs):
        self._announce(args)

    def on_step_end(self, args, state, control, **kwargs):
        self._announce(args)
        asked = self.asked
        if args.world_size > 1:  # every rank must stop at the same step
            flag = torch.tensor([float(asked)], device=args.device)
            torch.distributed.all_reduce(flag)
            asked = flag.item() > 0
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = saves(args)

    def _announce(self, args: Any) -> None:
        """Not from the signal's handler: a print within a print raises."""
        if self.asked and not self.announced:
            self.announced = True
            with_what = "with a checkpoint" if saves(args) else "without a checkpoint (--save-strategy no)"
            self.say(f"\nstopping after this step, {with_what}; once more to stop at once")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM set `asked`; a second one interrupts at once."""
        import signal
        import threading

        def handler(number, frame):
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can hear signals
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        old = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield
        finally:
            for number, previous in old.items():
                signal.signal(number, previous)
