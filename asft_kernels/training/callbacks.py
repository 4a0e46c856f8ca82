"""What a run does beside the Trainer's loop: metrics.jsonl, a bar with figures, Ctrl-C with a checkpoint."""

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from asft_kernels.files import replacing

SHOWN_IN_BAR = ("loss", "rewards/margins", "log_odds/margins", "accuracy", "tokens_per_second")


class MetricsFile(TrainerCallback):
    """Writes metrics.jsonl: a JSON object a line, `kind` "train" or "eval", `step`, then figures."""

    def __init__(self, path: Path):
        self.path = path

    def start(self, resumed_step: int | None, *, evaluates_again: bool = False) -> None:
        """Begins anew, or keeps what the run had written up to the checkpoint that it resumes from.

        Args:
            evaluates_again: that step's evaluation is made and written again.
        """
        kept = [] if resumed_step is None else [row for row in self.rows() if row["step"] <= resumed_step]
        if evaluates_again:
            kept = [row for row in kept if (row["kind"], row["step"]) != ("eval", resumed_step)]
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed process was writing
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
        return rows

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        kind = "train" if "loss" in (logs or {}) else "eval" if "eval_loss" in (logs or {}) else None
        if kind is None or not state.is_world_process_zero:
            return
        figures = {name.removeprefix("eval_"): value for name, value in (logs or {}).items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": state.global_step, **figures}) + "\n")


class LogTheRest(TrainerCallback):
    """Logs after the last step, though logging_steps do not divide it: no pair goes unreported."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last and args.logging_strategy != "no":
            control.should_log = True


class Bar(ProgressCallback):
    """The Trainer's progress bar with the figures in it, instead of a line for every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.3g}" for name in SHOWN_IN_BAR if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)


class StopWhenAsked(TrainerCallback):
    """Ends training after the current step once `asked` is set on any rank, with a checkpoint if any are saved."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.asked = False
        self.announced = False
        self.stopped = False
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and not (self.training and state.global_step):  # no step to end, nothing to save
            raise KeyboardInterrupt
        self._announce(args)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._announce(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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
            with_what = "with a checkpoint" if saves(args) else "without a checkpoint (save_strategy is no)"
            self.say(f"\nstopping after this step, {with_what}; once more to stop at once")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM set `asked`; a second one interrupts at once."""

        def handler(number: int, frame: Any) -> None:
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


def saves(args: Any) -> bool:
    return args.save_strategy != "no"
