"""What surrounds the loss in `PreferenceTrainer`: what is logged, evaluation pair by pair, state in checkpoints."""

import functools
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import EvalPrediction
from trl import DPOTrainer

from asft_kernels.errors import InputError
from asft_kernels.models.loading import load_renamed
from asft_kernels.models.seam import causal_lm
from asft_kernels.training.checkpoints import what_trained, write_digests
from asft_kernels.training.config import PreferenceConfig
from asft_kernels.training.figures import BEFORE, Evaluation, Window, pair_figures, pair_table, token_figures
from asft_kernels.training.hooks import Method
from asft_kernels.training.refusals import refuse_torn_batches
from asft_kernels.training.tensor_parallel import data_rank, data_ranks, gathered_rows, sum_over_data

# In checkpoints, where there is any.
OBJECTIVE_STATE, REFERENCE_STATE = "objective.pt", "ref_model.pt"
METHOD_STATE, RANKS_STATE = "method.pt", "method_{rank}.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class PairTrainer(DPOTrainer):
    """TRL's DPOTrainer with figures of each pair, and an objective and a method that may have state.

    `_losses` is its subclass's, which also sets objective and method.
    """

    args: PreferenceConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: Any
    ref_model: Any
    objective: Any
    method: Method

    def __init__(self, *args: Any, **kwargs: Any):
        self.windows = {"train": Window(), "eval": Window()}
        self.window_start: float | None = None
        self.paused = 0.0  # seconds of evaluation since the window began
        self.first_evaluation: Evaluation | None = None  # of the model as it came
        self.evaluation: Evaluation | None = None  # the last one, after evaluated_step steps
        self.evaluated_step = -1
        super().__init__(*args, **kwargs)

    def _losses(self, model: Any, inputs: Any) -> tuple[Tensor, Any, Tensor | None]:
        """(B,) losses, their `PreferenceOutputs`, the load-balancing loss of a mixture of experts."""
        raise NotImplementedError

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
            # accelerate's rounds what a model gives, and so its log-probabilities, to 16 bits.
            plugin = accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=torch.float32)

    def _leave_out_filling(self, batch: dict[str, Any]) -> None:
        """Empties answers of pairs by which accelerate fills up the last batch: they are in another one already.

        Of a stream nobody knows how many they are: there they count again.
        """
        state, mask, ranks = self.accelerator.gradient_state, batch["completion_mask"], data_ranks(self)
        if ranks == 1 or self.args.dataloader_drop_last or not state.end_of_dataloader:
            return
        loader: Any = state.active_dataloader
        rows = len(mask) // 2  # on each rank: a full batch
        # accelerate's own remainder is lost on resume.
        left = len(loader.dataset) % (ranks * rows) if hasattr(loader.dataset, "__len__") else 0
        if left:
            own = data_rank(self) * rows + torch.arange(rows, device=mask.device)
            batch["completion_mask"] = mask * (own < left).repeat(2)[:, None]

    # What is logged

    def _count(self, losses: Tensor, out: Any, outputs: Any, inputs: Any) -> None:
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"][:, 1:].bool()
        figures = {**pair_figures(out, losses), **token_figures(outputs, mask), **self.method.figures()}
        if self.aux_loss_enabled:
            figures["aux_loss"] = (outputs.aux_loss * out.num_pairs, out.num_pairs)
        one = torch.ones((), device=losses.device)
        figures["tokens"] = (inputs["attention_mask"].sum(), one * 0)  # sums: a count of 0 is taken for 1
        figures["pairs"] = (out.num_pairs, one * 0)
        self.windows[mode].add(figures)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        figures = self.windows[mode].take(lambda sums: sum_over_data(self, sums))
        loss, tokens = figures.pop("loss", None), figures.pop("tokens", 0.0)
        if not self._total_train_tokens:  # of the steps before a checkpoint
            rows = (row["num_tokens"] for row in reversed(self.state.log_history) if "num_tokens" in row)
            self._total_train_tokens = next(rows, 0)
        if mode == "train" and "loss" in logs and loss is not None and self.window_start is not None:
            logs["loss"] = loss  # the Trainer's is a mean of the steps' means, ours are all per pair
            seconds = time.perf_counter() - self.window_start - self.paused
            figures["tokens_per_second"] = tokens / seconds if seconds > 0 else 0.0
            self._total_train_tokens += int(tokens)
            if self.args.device.type == "cuda":  # the allocator's own count: the device is not asked
                figures["peak_bytes"] = torch.cuda.max_memory_allocated(self.args.device)
            self.window_start = None
        if loss is not None:
            figures["num_tokens"] = self._total_train_tokens  # of training, in evaluation too, as TRL has it
        self._metrics[mode].update({name: [value] for name, value in figures.items()})
        super().log(logs, start_time)
        if mode == "train" and loss is not None:  # at the last log of all, too, which tells no loss
            self._refuse_not_finite(loss)

    def _refuse_not_finite(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise InputError(
                f"learning_rate: the loss is {loss} after step {self.state.global_step}; lower it, warm up, or clip "
                "gradients (max_grad_norm)"
            )

    def _loss_since_log(self) -> float:
        """Its sum over all ranks: a loss that is not finite on one ends all of them, none waits for the others."""
        own = torch.tensor(self.windows["train"].sum_of("loss"), device=self.args.device)
        return self.accelerator.reduce(own, "sum").item()  # pyright: ignore[reportAttributeAccessIssue]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._refuse_not_finite(self._loss_since_log())
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # files of every rank are there
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_digests(folder, self._name)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        self._refuse_not_finite(self._loss_since_log())
        return result

    # Evaluation: figures of each pair, so that two evaluations can be compared pair by pair

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        self._leave_out_filling(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, out, _ = self._losses(model, inputs)
        return None, *pair_table(out, losses)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.get_tp_size() > 1:
            self.gather_function = functools.partial(gathered_rows, self)
        return super().evaluation_loop(*args, **kwargs)

    def _evaluation_figures(self, prediction: EvalPrediction) -> dict[str, float]:
        self.evaluation = Evaluation(np.asarray(prediction.predictions))
        self.evaluated_step = self.state.global_step
        if self.evaluated_step == 0 and not isinstance(self.eval_dataset, dict):
            self.first_evaluation = self.evaluation
            if self.args.should_save:
                Path(str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)
                self.evaluation.save(Path(str(self.args.output_dir)) / BEFORE)
        return self.evaluation.mean_loss()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        refuse_torn_batches(self.args, eval_dataset)
        start = time.perf_counter()
        self.windows["eval"] = Window()
        figures = super().evaluate(eval_dataset, *args, **kwargs)
        self.paused += time.perf_counter() - start
        return figures

    # State beside the model's

    def _state_of_objective(self) -> dict[str, Any]:
        return self.objective.state_dict() if isinstance(self.objective, nn.Module) else {}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save and self._state_of_objective():
            torch.save(self._state_of_objective(), folder / OBJECTIVE_STATE)
        if self.args.sync_ref_model:  # it moves; every rank has a part
            reference = get_model_state_dict(self.ref_model, options=WHOLE)
            if self.args.should_save:
                torch.save(reference, folder / REFERENCE_STATE)
        if not self.method.has_state:
            return
        state = self.method.state_dict()
        own = {name: state.pop(name) for name in self.method.of_rank}
        if self.args.should_save:
            torch.save(state, folder / METHOD_STATE)
        if own:
            torch.save(own, folder / RANKS_STATE.format(rank=self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._follow_schedule()
            self.load_own_state(checkpoint)

    def _follow_schedule(self) -> None:
        """Takes the rate from the schedule: a checkpoint brings that of its own max_steps, 0 at their end."""
        schedule: Any = self.lr_scheduler
        if not isinstance(schedule, LambdaLR):
            return
        pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * share(schedule.last_epoch) for base, share in pairs]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def load_own_state(self, checkpoint: str) -> None:
        """Takes the state of objective and method from a checkpoint.

        Raises:
            InputError: if it has none, or is of another objective or method.
        """
        before = what_trained(Path(checkpoint))
        if before not in (None, self._name):
            raise InputError(
                f"resume_from_checkpoint: {checkpoint} is of {before}, and this is {self._name}; need the same, or the "
                "checkpoint as model of a new run"
            )
        if self._state_of_objective():
            self.objective.load_state_dict(_state(checkpoint, OBJECTIVE_STATE))
        if self.args.sync_ref_model:
            set_model_state_dict(self.ref_model, _state(checkpoint, REFERENCE_STATE), options=WHOLE)
        if self.method.has_state:
            state = _state(checkpoint, METHOD_STATE)
            if self.method.of_rank:
                state |= _state(checkpoint, RANKS_STATE.format(rank=self.args.process_index))
            self.method.load_state_dict(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_renamed(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: str) -> bool:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft_model(self.model):
            return False
        return load_renamed(self.accelerator.unwrap_model(self.model), checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are stored once; anything else that does not match is another model's."""
        inner = causal_lm(self.model)
        tied = set(getattr(inner, "all_tied_weights_keys", None) or {})
        wrong = sorted({*load_result.missing_keys, *load_result.unexpected_keys} - tied)
        if wrong:
            raise InputError(
                f"resume_from_checkpoint: got a checkpoint of another model: {', '.join(wrong[:3])} ... do not match"
            )
        inner.tie_weights()


def _state(checkpoint: str, name: str) -> dict[str, Any]:
    file = Path(checkpoint) / name
    if not file.is_file():
        raise InputError(
            f"resume_from_checkpoint: {checkpoint} has no {name}, need a checkpoint of the same objective and method, "
            "saved without save_only_model"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"resume_from_checkpoint: {file} cannot be read as tensors and plain values ({type(error).__name__}); "
            "need it as it was saved"
        ) from error
