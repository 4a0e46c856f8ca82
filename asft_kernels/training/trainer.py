"""`PreferenceTrainer`: TRL's DPOTrainer with any objective, on fused heads."""

import copy
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import is_caching_enabled
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from asft_kernels.errors import InputError
from asft_kernels.models.check import evaluating
from asft_kernels.models.fused import DIFFERENTIABLE
from asft_kernels.objectives import Objective, expression_of
from asft_kernels.token_loss import preference_loss_from_logps
from asft_kernels.training.collator import ENTRIES, Collator, counting_pairs
from asft_kernels.training.config import PreferenceConfig
from asft_kernels.training.hooks import Method, find_method
from asft_kernels.training.on_pairs import on_pairs
from asft_kernels.training.pair_trainer import PairTrainer
from asft_kernels.training.reference import SIDES, TOKENS, given_columns, require_references, require_whole, with_scores
from asft_kernels.training.refusals import (
    refuse_beside_images,
    refuse_missing_inputs,
    refuse_other_data,
    refuse_other_order,
    refuse_torn_batches,
    refuse_unnamed_model,
)
from asft_kernels.training.seams import exchanged
from asft_kernels.training.sharded import place_head
from asft_kernels.training.tensor_parallel import (
    check_parallelism,
    check_tensor_parallel,
    data_ranks,
    sum_over_data,
)  # fmt: skip

OF_BATCH = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", ENTRIES}  # no keywords of the model
TRL_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class PreferenceTrainer(PairTrainer):
    """Trains with any objective on preference pairs, as TRL's DPOTrainer does with its own losses.

    Data, chat templates, tokenising, truncation, PEFT (LoRA on lm_head too), quantisation, loggers, model cards,
    DeepSpeed and FSDP configs are TRL's. The loss is made of the fused head's log-probabilities; the loss of an
    optimiser step is the mean over the pairs that count in it, whatever the number and size of its micro-batches and
    ranks. No reference model is made for an objective without one.

    Args:
        model, ref_model, data_collator, processing_class, callbacks, optimizers: as `trl.DPOTrainer` takes them.
        quantization_config, peft_config: as `trl.DPOTrainer` takes them.
        train_dataset, eval_dataset: as `trl.DPOTrainer` takes them, or of `asft_kernels.data.load_pairs`. They may
            bring the reference's log-probabilities: columns ref_chosen_logps, ref_rejected_logps (a number, or a list
            of one a reference model), or ref_chosen_token_logps, ref_rejected_token_logps (a list of one a token of
            the answer).
        compute_metrics: None; there are no logits to compute metrics from.
        args: a `PreferenceConfig`; None for its defaults.
        objective: a name, a sum of names, or an object; None: what args say.
        method: a `Method` of asft_kernels/methods; None: what args say, or the one that serves the objective.

    Raises:
        InputError: for arguments that do not go together, and a loss that is not finite.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "asft_kernels"]
    _signature_columns: Any
    loss_is_scaled_for_ga = True  # `_compute_loss` divides by the pairs of the whole step

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: PreferenceConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        objective: str | Objective | None = None,
        method: Method | None = None,
    ):
        args = PreferenceConfig("preference-run") if args is None else args
        if not isinstance(args, PreferenceConfig):
            raise InputError(f"args: got {type(args).__name__}, need PreferenceConfig, which has DPOConfig's fields")
        if compute_metrics is not None:
            raise InputError("compute_metrics: got a function, need None: there are no logits to compute them from")
        refuse_other_data(train_dataset)
        refuse_torn_batches(args, train_dataset, eval_dataset)
        refuse_other_order(args, train_dataset)
        check_parallelism(args)
        given = args.build_objective(objective)
        self.objective = on_pairs(given)
        self.method = method or find_method(args.method, given)
        self.method.check(args, self.objective)
        self._name = f"asft_kernels, {', '.join(_what_trains(given, self.method))}"  # in model cards
        self._paper = {"title": f"arXiv {given.arxiv}", "id": given.arxiv} if given.arxiv else {}
        refuse_missing_inputs(self.objective, self.method)
        self.ref_per_token = self.objective.needs_reference and (self.objective.ref_per_token or self.method.ref_tokens)
        given_ref = given_columns(train_dataset, self.ref_per_token)
        self.brings_reference = bool(args.ref_scores or given_ref or self.method.own_reference)
        if self.brings_reference and self.method.live_reference:
            raise InputError(
                "ref_scores: got the reference's log-probabilities with the data, need none: "
                f"{self.method.name} asks the reference model for more than they hold; leave them out"
            )
        if args.nll_on_prompt and not self.objective.uses_nll_labels:
            what = f"{expression_of(given)} has no separate likelihood term"
            raise InputError(f"nll_on_prompt: got True, need False: {what}")
        with_data = self.brings_reference and not self.method.own_reference
        if with_data and args.truncation_mode != "keep_start":
            raise InputError(
                f"truncation_mode: got {args.truncation_mode!r}, need 'keep_start' where the reference's "
                "log-probabilities come with the data: they are of the answers' first tokens"
            )
        if args.sync_ref_model and (with_data or not self.objective.needs_reference):
            what = "it comes with the data" if with_data else "the objective has no reference"
            raise InputError(f"sync_ref_model: got True, need False: {what}, and moves nowhere")
        if self.objective.needs_reference and not self.method.own_reference:
            held_out = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            with_sums = [] if self.ref_per_token else [rows for rows in (train_dataset, *held_out) if rows is not None]
            require_references(given, None if self.ref_per_token else args.ref_scores, with_sums)
        self._pairs_of_step: Tensor | int | None = None
        live = self.objective.needs_reference and not self.brings_reference
        if not live and ref_model is not None and not self.method.own_reference:
            what = "it comes with the data" if self.objective.needs_reference else "the objective has no reference"
            raise InputError(f"ref_model: got a model, need None: {what}; leave it out")
        if self.ref_per_token and live and args.precompute_ref_log_probs:
            raise InputError(
                f"precompute_ref_log_probs: got True, need False: {type(given).__name__} compares token by token; or "
                "give ref_scores, a file of asft score --token_logps"
            )
        if {"image", "images"} & set(train_dataset.column_names or ()):
            refuse_beside_images(self.method, args, self.brings_reference)
        without = peft_config is not None or hasattr(model, "peft_config") or args.precompute_ref_log_probs
        refuse_unnamed_model(model, processing_class, live and ref_model is None and not without)
        figures = dict.fromkeys((*TRL_OUTPUTS, *self.objective.stats))
        with_grad = tuple(name for name in DIFFERENTIABLE if name in self.objective.stats_with_grad)
        options = {
            name: getattr(args, name) for name in ("logit_scale", "softcap", "backend", "cache_bytes", "chunk_size")
        }
        of_policy = {"outputs": tuple(figures), "differentiable": with_grad}
        with (
            exchanged(makes_policy=isinstance(model, str), makes_reference=live, policy=of_policy, options=options),
            args.as_trl_reads_it(precompute_ref_log_probs=live and args.precompute_ref_log_probs),
        ):
            super().__init__(
                model=model, ref_model=ref_model, args=args, data_collator=data_collator, train_dataset=train_dataset,
                eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
                optimizers=optimizers, quantization_config=quantization_config, peft_config=peft_config,
            )  # fmt: skip
        check_tensor_parallel(self)
        if args.sync_ref_model and self.is_deepspeed_enabled and not args.save_only_model:
            raise InputError(
                "sync_ref_model: got True with DeepSpeed, need save_only_model=True: to resume from, a checkpoint "
                "would need the reference's parts of all ranks"
            )
        if args.disable_dropout:
            models: list[Any] = [self.model, self.ref_model]
            for of_trl in filter(None, models):
                _without_functional_dropout(of_trl)
        self.compute_metrics = self._evaluation_figures  # so that predictions are gathered
        self.collator = Collator(self.data_collator, self.method, nll_on_prompt=args.nll_on_prompt)
        self.data_collator = self.collator
        if isinstance(self.objective, nn.Module):
            self.objective.to(self.args.device)
        self.head_goes = place_head(self)
        self.method.start(self)
        self._change_datasets(self._with_columns)

    # Datasets

    def _change_datasets(self, change: Any) -> None:
        self.train_dataset = change(self.train_dataset, "training")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: change(of_name, name) for name, of_name in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = change(self.eval_dataset, "evaluation")

    def _with_columns(self, dataset: Any, label: str) -> Any:
        if self.args.ref_scores:
            dataset = with_scores(
                dataset, self.args.ref_scores, self.objective, self.processing_class, per_token=self.ref_per_token
            )
        if self.brings_reference and not (self.method.own_reference or self.ref_per_token):
            require_whole(dataset, self.args.max_length, label)
        return self.method.dataset(self, dataset, label)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if "prompt_ids" in (dataset.column_names or ()):
            return dataset  # tokenised by `load_pairs`, with a report
        if "rejected" not in (dataset.column_names or ()) and self.method.makes_pairs:
            raise InputError(
                "train_dataset: got no column rejected, need it for TRL's tokenising; or a dataset of "
                'asft_kernels.data.load_pairs(..., answers=("chosen",))'
            )
        columns = dataset.column_names or ("chosen", "rejected")  # of a stream nobody may know them
        if missing := [name for name in ("chosen", "rejected") if name not in columns]:
            raise InputError(
                f"{dataset_name}_dataset: got the columns {', '.join(columns)}, need {' and '.join(missing)} as well; "
                "dataset.rename_column(old, new) renames one"
            )
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.objective.needs_reference:
            return dataset
        # TRL's cache knows the data and the model, but not what cuts tokenised rows, nor the precision.
        dataset = copy.copy(dataset)
        own = [getattr(self.args, x) for x in ("max_length", "truncation_mode", "bf16", "fp16")]
        dataset._fingerprint = Hasher.hash((dataset._fingerprint, own))
        # Rows in memory have a folder of each process, and without caching all have: the first one alone writes.
        if not (dataset.cache_files and is_caching_enabled()):
            folder = [dataset._get_cache_file_path("")]
            broadcast_object_list(folder)
            dataset._get_cache_file_path = lambda _: folder[0]
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), *TOKENS, *self.method.columns]

    def get_train_dataloader(self) -> DataLoader:
        if not self.method.makes_pairs:
            return super().get_train_dataloader()
        self.data_collator = list  # rows as they are; pairs are made in `get_batch_samples`
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = self.collator

    # What is counted

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        incoming = list(itertools.islice(epoch_iterator, num_batches))
        if incoming and not self.method.makes_pairs:
            self._leave_out_filling(incoming[-1])
        batches = self.method.batches(self, incoming)
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Pairs that count in this step, all micro-batches and ranks; the Trainer counts tokens."""
        if not batch_samples:
            return None
        counts = [counting_pairs(batch["completion_mask"]).sum() for batch in batch_samples]
        pairs = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            pairs = sum_over_data(self, pairs)
        return pairs  # pyright: ignore[reportReturnType]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        if self.window_start is None:
            self.window_start, self.paused = time.perf_counter(), 0.0
        self._pairs_of_step = num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Tensor:
        losses, out, aux_loss = self._losses(model, inputs)
        total = losses.sum()
        if aux_loss is not None:
            total = total + out.num_pairs * self.router_aux_loss_coef * aux_loss
        of_step = self._pairs_of_step
        loss = total / torch.as_tensor(out.num_pairs if of_step is None else of_step, device=total.device).clamp(min=1)
        if of_step is not None and self.args.average_tokens_across_devices:
            loss = loss * data_ranks(self)  # the count is of all ranks, their gradients are averaged
        return loss

    def _losses(self, model: Any, inputs: Any) -> tuple[Tensor, Any, Tensor | None]:
        """(B,) losses, their `PreferenceOutputs`, the load-balancing loss of a mixture of experts."""
        objective: Any = self.objective
        if isinstance(self.objective, nn.Module):  # statistics stand still in evaluation
            objective.train(self.model.training)
        entries = inputs.get(ENTRIES, {})
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        of_model = {name: value for name, value in inputs.items() if name not in OF_BATCH}
        of_model["use_cache"] = False
        if self.aux_loss_enabled:
            of_model["output_router_logits"] = True
        nll_labels = entries.get("nll_labels")
        targets = labels
        if nll_labels is not None:  # the head is asked for both label sets at once
            chosen = labels[: len(nll_labels)]
            targets = torch.cat([nll_labels.where(nll_labels != -100, chosen), labels[len(nll_labels) :]])
        with self.method.at_head(self, model, inputs, entries) as further:
            outputs = model(**of_model, labels=targets, fused_lm_head=True)
            given = {"nll_labels": nll_labels, **further()}
        if objective.needs_reference and "ref_logps" not in given:
            given["ref_logps"] = self._reference(model, inputs, labels, entries)
        width = labels.shape[1] - 1  # prompt learning puts virtual tokens in front
        stats = {name: getattr(outputs, name)[:, -width:] for name in objective.stats}
        losses, out = preference_loss_from_logps(
            outputs.log_probs[:, -width:], labels, objective, stats=stats, reduction="none", return_outputs=True,
            **given,
        )  # fmt: skip
        self._count(losses, out, outputs, inputs)
        return losses, out, outputs.aux_loss if self.aux_loss_enabled else None

    def _reference(self, model: Any, inputs: Any, labels: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        """What the objective takes as ref_logps."""
        objective: Any = self.objective
        if "ref_chosen_logps" in inputs and not self.ref_per_token:
            sums = torch.cat([inputs[f"ref_{side}_logps"] for side in SIDES])
            sums = sums.T if sums.dim() == 2 else sums  # (K, 2B)
            lengths = (labels[:, 1:] != -100).sum(dim=1).clamp(min=1)
            of_files = self.args.ref_scores  # their means are over their own lengths
            return sums / lengths if objective.reference_kind == "mean" and not of_files else sums
        tokens = entries.get("ref_token_logps")
        if tokens is None:
            if self.brings_reference:
                need = "ref_chosen_token_logps" if self.ref_per_token else "ref_chosen_logps"
                raise InputError(f"eval_dataset: got rows without {need}, need them as in train_dataset")
            tokens = self.reference_token_logps(self.ref_model or model, inputs, labels)
        if self.method.ref_tokens:
            return self.method.ref_logps(tokens, labels, entries)
        return self.as_ref_logps(tokens, labels)

    def as_ref_logps(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns what the objective takes as ref_logps.

        Args:
            tokens: (2B, T - 1) log-probabilities under the reference, that of label t + 1 at t.
            labels: (2B, T).
        """
        if self.objective.ref_per_token:
            return tokens
        sums = tokens.double().sum(dim=1)
        if self.objective.reference_kind == "mean":
            return sums / (labels[:, 1:] != -100).sum(dim=1).clamp(min=1)
        return sums

    def reference_token_logps(self, model: Any, inputs: Any, labels: Tensor) -> Tensor:
        """`token_logps` under the reference: its own model, or the policy without its adapters.

        Args:
            model: the reference model, or the policy.
        """
        with self.without_adapters():
            return self.token_logps(model, inputs, labels)

    def without_adapters(self) -> AbstractContextManager[Any]:
        """Makes the policy the reference where that is what it is without its adapters."""
        if self.ref_model is not None or not is_peft_model(self.model):
            return nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        return use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)

    @torch.no_grad()
    def token_logps(self, model: Any, inputs: Any, labels: Tensor) -> Tensor:
        """Computes log-probabilities of a batch, without dropout.

        Args:
            inputs: a batch.
            labels: (2B, T), -100 where none is wanted.

        Returns:
            (2B, T - 1), that of label t + 1 at t.
        """
        of_model = {name: value for name, value in inputs.items() if name not in OF_BATCH}
        kwargs: Any = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(self.model, kwargs), evaluating(model):
            outputs = model(**of_model, use_cache=False, labels=labels, fused_lm_head=True)
        return outputs.log_probs[:, -(labels.shape[1] - 1) :]

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with self.accelerator.autocast():
            sums = self.reference_token_logps(model, inputs, labels).double().sum(dim=1)
        chosen, rejected = sums.chunk(2)
        return chosen, rejected


def _what_trains(objective: Objective, method: Method) -> list[str]:
    expression = expression_of(objective)
    if expression == type(objective).__name__ and is_dataclass(objective):
        expression = repr(objective)  # one of the user's own, with its parameters
    named = [f"method {method.name}"] if method.name and not method.serves(objective) else []
    return [f"objective {expression}", *named]


def _without_functional_dropout(model: nn.Module) -> None:
    """TRL silences nn.Dropout; attention takes its rate from an attribute (attention_dropout) of the module."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
