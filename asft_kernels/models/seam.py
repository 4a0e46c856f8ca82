"""A model's own forward with another computation where its output head is called.

Images, position ids, prompt tuning, load-balancing losses, what FSDP gathers around the head: all of it stays the
model's own business, and nothing of vocabulary size is made.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from asft_kernels.core.tensor_parallel import is_colwise, is_layout, localised
from asft_kernels.errors import InputError

ComputeAtHead = Callable[[Tensor, nn.Module], Tensor]


class UnsupportedHead(InputError):
    """The output head, or what the model does with its output, is more than this package computes."""


def causal_lm(model: Any) -> Any:
    """Returns the Hugging Face model under a PEFT wrapper (its adapters stay injected), or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: Any) -> nn.Module:
    """Returns the output head of a causal LM as it is now, adapters included.

    Raises:
        UnsupportedHead: for encoder-decoders and models without an output head.
    """
    inner = causal_lm(model)
    name = type(inner).__name__
    if not hasattr(inner, "get_output_embeddings"):
        raise UnsupportedHead(f"{name}: has no get_output_embeddings(), need a Hugging Face causal LM")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedHead(f"{name}: is an encoder-decoder, need a decoder-only causal LM")
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Module):
        got = "None" if head is None else f"a {type(head).__name__}"
        raise UnsupportedHead(f"{name}: get_output_embeddings() is {got}, need a model with one LM head")
    return head


def refuse_masked_lm(inner: Any) -> None:
    """UnsupportedHead for a model that predicts the token at its own position, and no next one."""
    name = type(inner).__name__
    masked, causal, image_text = (_classes(x) for x in (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ))  # fmt: skip
    if name.endswith("ForMaskedLM") or name in masked - causal - image_text:
        raise UnsupportedHead(
            f"{name}: is a masked language model, need a causal one, whose position t predicts label t+1; load it with "
            "AutoModelForCausalLM, or compute the loss from its logits"
        )


def _classes(mapping: Mapping[Any, Any]) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names.update((value,) if isinstance(value, str) else value)
    return names


def run_to_head(
    model: Any, call: Callable[..., Any], compute: ComputeAtHead, inputs: Mapping[str, Any]
) -> tuple[Tensor, Any]:
    """Runs the model, calling `compute` in place of its output head's forward.

    The head is called with all hooks around it, so FSDP has its weight whole just then, and gathers it again before
    the backward of what `compute` returned.

    Args:
        model: the model whose head is meant, PEFT-wrapped or not.
        call: what runs its forward: the model, a wrapper around it, or its forward itself.
        compute: called with (the head's input, the head); returns a floating tensor of at least 3 dimensions, which
            the model then takes for its logits.
        inputs: keywords of `call`.

    Returns:
        (what `compute` returned, the output of `call`).

    Raises:
        UnsupportedHead: if the head is not called exactly once, or the model cannot go on without real logits.
    """
    head = output_head(model)
    name = type(causal_lm(model)).__name__
    _refuse_hooks(head, name)
    run = _Run(name, compute)
    with _replaced_forward(head, run):
        try:
            output = call(**inputs)
        except (UnsupportedHead, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if run.result is None:  # before the head, or in it: not ours to explain
                raise
            raise UnsupportedHead(
                f"{name}: its forward fails after the output head ({type(error).__name__}: {error}): it does more with "
                "the logits than scale and cap them; use another model, or compute the loss from its logits"
            ) from error
    if run.result is None:
        raise UnsupportedHead(
            f"{name}: its forward does not call the module that get_output_embeddings() returns, need a model that "
            "does; compute the loss from its logits"
        )
    return run.result, output


# FSDP, accelerate and the like gather, move and cast; what anyone else's hook returns would not reach the loss.
HOOKS_OF = ("torch", "accelerate", "deepspeed", "peft", "transformers", "asft_kernels")


def _refuse_hooks(head: nn.Module, name: str) -> None:
    for hook in head._forward_hooks.values():
        while isinstance(hook, partial):
            hook = hook.func
        module = str(getattr(hook, "__module__", ""))
        if module.partition(".")[0] not in HOOKS_OF:
            what = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise UnsupportedHead(
                f"{name}: its output head has the forward hook {module}.{what}, need none: there is no output for it "
                "to see or change; remove it, or use a forward pre-hook, which sees the hidden states"
            )


class _Run:
    """One pass of one thread."""

    def __init__(self, name: str, compute: ComputeAtHead):
        self.name, self.compute = name, compute
        self.thread = 0
        self.result: Tensor | None = None

    def __call__(self, head: nn.Module, hidden: Any) -> Tensor:
        if is_colwise(head):
            hidden, _ = localised(hidden, head)
        if self.result is not None:
            raise UnsupportedHead(f"{self.name}: its output head is called more than once, need one call a forward")
        # Copies: the model may change its logits in place, and the hooks of FSDP must be on no view.
        placeholder = self.compute(hidden, head).clone()
        self.result = placeholder.clone()
        return placeholder

    @torch.compiler.disable
    def after_hooks(self, head: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook after all others: the gradient must pass what they have put behind the placeholder, for there
        DeepSpeed gathers the weight before backward."""
        if get_ident() == self.thread:
            self.result = output.clone()


class _Layout:
    """A head's forward hook that leaves the output alone while this thread is in `run_to_head`."""

    is_seam = True

    def __init__(self, own: Callable[..., Any], runs: Mapping[int, _Run]):
        self.own, self.runs = own, runs

    def __call__(self, head: nn.Module, inputs: Any, output: Any) -> Any:
        return output if get_ident() in self.runs else self.own(head, inputs, output)


class _HeadForward:
    """The forward of a head while some thread is in `run_to_head`; others get the head's own.

    own: the instance's forward that this one stands for, None for that of its class.
    """

    is_seam = True  # checks.py asks a head with a forward of its own

    def __init__(self, head: nn.Module, own: Callable[..., Any] | None):
        self.head, self.own = head, own
        self.runs: dict[int, _Run] = {}
        # ColwiseParallel's lay out logits, which our result is not.
        self.layouts = {key: hook for key, hook in head._forward_hooks.items() if is_layout(hook)}
        for key, hook in self.layouts.items():
            head._forward_hooks[key] = _Layout(hook, self.runs)

    def give_back(self) -> None:
        self.head._forward_hooks.update(self.layouts)

    @torch.compiler.disable
    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.runs.get(get_ident())
        if run is None:
            return own_forward(self.head)(hidden, *args, **kwargs)
        if args or kwargs:  # PEFT's adapter_names: an adapter for each row
            raise UnsupportedHead(
                f"{run.name}: its output head is called with {', '.join([*map(repr, args), *kwargs])} beside the "
                "hidden states, need these alone; leave that argument out, or keep the adapters off the head"
            )
        return run(self.head, hidden)


def own_forward(head: nn.Module) -> Callable[..., Any]:
    """Returns the forward that a head has of its own, also while `run_to_head` has replaced it."""
    forward = vars(head).get("_old_forward" if hasattr(head, "_hf_hook") else "forward")
    if isinstance(forward, _HeadForward):
        forward = forward.own
    return type(head).forward.__get__(head) if forward is None else forward


_lock = Lock()


@contextmanager
def _replaced_forward(head: nn.Module, run: _Run) -> Iterator[None]:
    # accelerate's forward moves tensors and weights to their place and then calls _old_forward.
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    with _lock:
        forward = vars(head).get(name)
        if isinstance(forward, _HeadForward) and get_ident() in forward.runs:
            raise UnsupportedHead(
                f"{run.name}: a fused call runs inside another of the same head, need one at a time; make the inner "
                "call before or after the outer one"
            )
        if not isinstance(forward, _HeadForward):
            forward = vars(head)[name] = _HeadForward(head, forward)
        forward.runs[get_ident()] = run
    run.thread = get_ident()
    after: Any = run.after_hooks
    hook = head.register_forward_hook(after) if head._forward_hooks else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        with _lock:
            del forward.runs[get_ident()]
            if not forward.runs:
                forward.give_back()
                if forward.own is None:
                    del vars(head)[name]
                else:
                    vars(head)[name] = forward.own
