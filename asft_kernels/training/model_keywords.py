"""`model_init_kwargs`: what transformers would drop without a word, or fail at far away."""

import math
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch

from asft_kernels.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "auto")
SIZES = ("tp_size", "fsdp_size", "dp_replicate_size")
OPTIONS = {"revision": "--model_revision"}  # of the command, where it has another name
EXAMPLE = '{"distributed_config": {"tp_size": 2}}'


def check_model_keywords(given: Any, ranks: int) -> None:
    """Refuses what cannot be meant.

    Args:
        given: model_init_kwargs, or None.
        ranks: how many processes there are.

    Raises:
        InputError: names model_init_kwargs and what of it is at fault.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise _wrong("", given, f"a mapping, on the command line as JSON: '{EXAMPLE}'")
    if "torch_dtype" in given:
        raise _wrong("", "torch_dtype", "its name of today, 'dtype'")
    if "output_loading_info" in given:
        raise _wrong("", "output_loading_info", "it left out: missing weights are an error here")
    for name in ("tp_plan", "tp_size"):
        if name in given:
            raise _wrong("", name, f"it in distributed_config, as in {EXAMPLE}")
    dtype = given.get("dtype")
    if not (dtype is None or isinstance(dtype, torch.dtype) or dtype in DTYPES):
        raise _wrong("dtype: ", dtype, f"one of {', '.join(DTYPES)}")
    if (sizes := given.get("distributed_config")) is not None:
        _check_sizes(sizes, ranks)


def with_options(given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns both as one.

    Args:
        given: model_init_kwargs.
        options: what has an option of its own in the command, by the same names.

    Raises:
        InputError: they do not say the same.
    """
    for name in options:
        if given.get(name) not in (None, options[name]):
            option = OPTIONS.get(name, f"--{name}")
            raise _wrong(f"{name}: ", given[name], f"it in {option} alone, which is {options[name]!r} here")
    return {name: value for name, value in {**options, **given}.items() if value is not None}


def _check_sizes(sizes: Any, ranks: int) -> None:
    from transformers.distributed import DistributedConfig

    if isinstance(sizes, DistributedConfig):
        sizes = sizes.to_dict()
    if not isinstance(sizes, Mapping):
        raise _wrong("distributed_config: ", sizes, f"a mapping, as in {EXAMPLE}")
    known = [field.name for field in fields(DistributedConfig)]
    for name, value in sizes.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise _wrong("distributed_config: ", name, f"names out of {', '.join(known)}{hint}")
        if name.endswith("_size") and value is not None and (type(value) is not int or value < 1):
            raise _wrong(f"distributed_config: {name}: ", value, "an integer >= 1")
    if (sizes.get("pp_size") or 1) > 1:
        raise _wrong("distributed_config: pp_size: ", sizes["pp_size"], "1: the head is on every rank")
    plan = sizes.get("tp_plan")
    if plan is not None and plan != "auto" and not isinstance(plan, Mapping):
        raise _wrong("distributed_config: tp_plan: ", plan, "'auto', or a mapping from modules to plans")
    asked = {name: sizes.get(name) or 1 for name in SIZES}
    if plan and not sizes.get("tp_size"):
        others = math.prod(asked.values())
        if ranks == others or ranks % others:
            need = f"more ranks than {ranks} for it: {_launcher(2 * others)}"
            raise _wrong("distributed_config: tp_plan: ", plan, need)
    elif (product := math.prod(asked.values())) not in (1, ranks):
        raise _wrong("distributed_config: ", sizes, f"{product} ranks for it, not {ranks}: {_launcher(product)}")


def _launcher(ranks: int) -> str:
    return f"start it by torchrun --nproc-per-node {ranks} -m asft_kernels.cli train ..., or leave it out"


def _wrong(where: str, got: Any, need: str) -> InputError:
    return InputError(f"model_init_kwargs: {where}got {got!r}, need {need}")
