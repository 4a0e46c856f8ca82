"""`fuse`: a Hugging Face model whose forward returns log-probabilities of its labels in the place of logits."""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from asft_kernels.core.options import Options
from asft_kernels.functional import fused_linear_logps
from asft_kernels.models.head import FusedHead
from asft_kernels.models.output import FusedOutput
from asft_kernels.models.positions import by_name, check_labels, last_positions
from asft_kernels.models.seam import UnsupportedHead, causal_lm, output_head, refuse_masked_lm

STATISTICS = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1", "lse")
DIFFERENTIABLE = ("entropy", "lse", "mean_logits")


def fuse(
    model: Any,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    differentiable: tuple[str, ...] = ("entropy", "lse"),
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    logit_scale: float | None = None,
    softcap: float | None = None,
    check: bool = True,
    backend: str | None = None,
    cache_bytes: int | None = None,
    chunk_size: int | None = None,
) -> None:
    """Gives a causal or image-text model a fused output head, in place.

    Afterwards `model(..., labels=labels, fused_lm_head=True)` runs the model's own forward up to its head, computes
    there the log-probability of every label that is not -100, and returns a `FusedOutput`; no logits are made.
    `shift_labels` (R, T), already shifted, may take the place of labels; `num_items_in_batch` divides the loss.
    Without `fused_lm_head` the forward is the original one. The head is looked up at every call: PEFT adapters may
    come before or after, and are disabled where they are. A second `fuse` replaces the first.

    The first such batch runs one more forward, without gradients and dropout (two where the config does not tell scale
    and cap): it finds the head's scale and cap, and holds log-probabilities of a few labels against the model's own
    logits.

    Args:
        model: a Hugging Face model with get_output_embeddings(), PEFT-wrapped or not; no encoder-decoder.
        outputs: what to compute beside the loss: "log_probs" (always), "entropy", "mean_logits", "log_sum_sq_probs",
            "is_top1", "lse".
        differentiable: those of outputs that gradients go through beside log_probs, of "entropy", "lse" (both by
            default), "mean_logits"; what each costs stands at `asft_kernels.fused_linear_logps`.
        temperature: logits are divided by it, > 0, default 1.
        cast_lm_head_to_fp32: True: autocast is off at the head, so that an fp32 head stays so. Default False. Logits
            are sums in fp32 either way, and are never rounded to fewer bits.
        logit_scale, softcap: what the model does to its head's output; None (default): found out.
        check: False leaves that batch's forward out: scale and cap are then read from the config, and a model that
            does something else is computed wrongly.
        backend, cache_bytes, chunk_size: as in `asft_kernels.fused_linear_logps`.

    Raises:
        UnsupportedHead: now, for encoder-decoders, masked LMs and models without a head; at the first batch, if its
            log-probabilities differ from the model's own by more than rounding explains.
        ValueError: for names that are none of the outputs, or an option that is none.
    """
    unknown = [name for name in outputs if name not in ("log_probs", *STATISTICS)]
    if isinstance(outputs, str) or unknown:
        known = ", ".join(map(repr, ("log_probs", *STATISTICS)))
        raise ValueError(f"outputs: got {outputs!r}, need a tuple of {known}; leave the others out")
    if isinstance(differentiable, str) or not set(differentiable) <= set(DIFFERENTIABLE):
        raise ValueError(
            f"differentiable: got {differentiable!r}, need a tuple of {', '.join(map(repr, DIFFERENTIABLE))}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature!r}, need a finite number > 0; logits are divided by it")
    options = {"backend": backend, "cache_bytes": cache_bytes, "chunk_size": chunk_size}
    Options(logit_scale=1.0 if logit_scale is None else logit_scale, softcap=softcap, **options)  # refuses wrong ones
    output_head(model)
    inner = causal_lm(model)
    refuse_masked_lm(inner)
    unfuse(inner)
    head = FusedHead(
        inner,
        statistics=tuple(name for name in STATISTICS if name in outputs),
        differentiable=tuple(name for name in differentiable if name in outputs),
        temperature=float(temperature),
        given=(logit_scale, softcap),
        autocasts=not cast_lm_head_to_fp32,
        check=check,
        options=options,
    )
    vars(inner)["forward"] = FusedForward(inner, head, vars(inner).get("forward"))
    # torch.nn.DataParallel copies this dictionary, and with it the forward of the first device's model.
    vars(inner)["_replicate_for_data_parallel"] = functools.partial(refuse_replicas, type(inner).__name__)


def unfuse(model: Any) -> None:
    """Takes back what `fuse` did to the model; nothing to do for one that is not fused.

    Raises:
        ValueError: if something else has wrapped the fused forward since.
    """
    inner = causal_lm(model)
    if "_replicate_for_data_parallel" not in vars(inner):
        return
    forward = fused_forward(inner)
    if forward is None:
        raise ValueError(
            f"{type(inner).__name__}: got a forward that something has wrapped since fuse(), need the fused one; undo "
            "that first (accelerate: unwrap_model(model, keep_fp32_wrapper=False))"
        )
    del vars(inner)["_replicate_for_data_parallel"]
    if forward.own is None:
        del vars(inner)["forward"]
    else:
        vars(inner)["forward"] = forward.own


def fused_forward(inner: Any) -> "FusedForward | None":
    """Returns the forward that `fuse` gave a model; None if it has another."""
    forward = vars(inner).get("forward")
    forward = getattr(forward, "__func__", forward)  # accelerate binds what it unwraps
    return forward if isinstance(forward, FusedForward) else None


def refuse_replicas(name: str) -> NoReturn:
    raise ValueError(
        f"{name}: got several GPUs in one process (torch.nn.DataParallel), need one: it would put chosen and rejected "
        "rows on different devices; start a process a GPU with torchrun"
    )


class FusedForward:
    """The forward of a fused model. An object, and no closure: it is copied and pickled with the model.

    It does not keep the model alive: a cycle would hold a large one until the garbage collector comes by.
    """

    def __init__(self, model: Any, head: FusedHead, own: Callable[..., Any] | None):
        self.__setstate__({"model": model, "head": head, "own": own})

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "head": self.head, "own": self.own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.weak_model = weakref.ref(state["model"])
        self.head: FusedHead = state["head"]
        self.own: Callable[..., Any] | None = state["own"]

    @property
    def model(self) -> Any:
        return self.weak_model()

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own: generate() and the Trainer ask for it."""
        return inspect.signature(self.own or type(self.model).forward.__get__(self.model))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward as it was."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)  # torch.compile looks bound methods up by name

    def __call__(
        self,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if args and args[0] is self.model:  # bound to it by accelerate
            args = args[1:]
        if fused_lm_head:
            return self._fused(args, labels, shift_labels, num_items_in_batch, kwargs)
        own = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return self.original(*args, **{name: x for name, x in own.items() if x is not None}, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _fused(
        self,
        args: tuple[Any, ...],
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        kwargs: dict[str, Any],
    ) -> FusedOutput:
        shift = shift_labels is None
        if labels is not None and shift_labels is not None:
            raise ValueError("shift_labels: got labels as well, need one of the two; leave one out")
        name, given = type(self.model).__name__, by_name(self.__signature__, args, kwargs)
        if given.get("use_cache"):
            raise ValueError("use_cache: got True, need False: a fused forward returns no cache; leave it out")
        targets = check_labels(labels if shift else shift_labels, given, "labels" if shift else "shift_labels")
        statistics: dict[str, Tensor] = {}

        def compute(hidden: Tensor, lm_head: Any) -> Tensor:
            hidden, here = last_positions(hidden, targets, name), targets.to(hidden.device)
            asked = self.head.statistics
            options: dict[str, Any] = {"shift": shift, **self.head.keywords}
            options |= {"return_stats": asked, "differentiable": self.head.differentiable}
            with self.head.precision(hidden):
                found: Any = fused_linear_logps(hidden, lm_head, here, **options)
            statistics.update({x: getattr(found, x) for x in asked})
            return found.logps[..., None]

        call = functools.partial(self.original, *args)
        result, output = self.head.run(self.model, call, compute, targets, kwargs, shift=shift)
        columns = {"log_probs": result.squeeze(-1), **statistics}
        columns |= {x: After.apply(columns[x], result) for x in self.head.differentiable}
        mask = targets.to(result.device) != -100
        if shift:
            # No views: FSDP2 warns of hooks on those, which an operation in place would drop.
            columns, mask = {x: value[:, :-1].clone() for x, value in columns.items()}, mask[:, 1:]
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -columns["log_probs"].sum() / count, None
        of_model = output if isinstance(output, Mapping) else {}
        if of_model.get("aux_loss") is not None:
            aux_loss = of_model["aux_loss"]
            loss = loss + aux_loss_coefficient(self.model) * aux_loss.to(loss.device)
        further = {x: of_model.get(x) for x in ("hidden_states", "attentions")}
        return FusedOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **columns, **further)


class After(torch.autograd.Function):
    """Values whose gradient waits for that of `first`, though it adds nothing to it.

    FSDP gathers the head's weight where the gradient of the head's output comes by: a loss of the entropy alone must
    pass there as well, without a gradient of zeros, which would cost its products.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, first: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def aux_loss_coefficient(inner: Any) -> float:
    """Returns what the model's own loss multiplies its load-balancing loss by."""
    text_config = inner.config.get_text_config()
    for of, name in (inner, "router_aux_loss_coef"), (inner, "aux_loss_coef"), (text_config, "router_aux_loss_coef"):
        value = getattr(of, name, None)
        if value is not None:
            return float(value)
    raise UnsupportedHead(
        f"{type(inner).__name__}: got an aux_loss and no router_aux_loss_coef, need one; set it in the config, or "
        "leave router logits out"
    )
