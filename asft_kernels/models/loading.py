"""A causal language model and its tokenizer from a folder or the hub, with errors that name both."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asft_kernels.errors import InputError


def load_tokenizer(model: str) -> tuple[Any, Any]:
    """(tokenizer, config). InputError before the hub is asked for what cannot be a name there."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    from transformers import AutoConfig, AutoTokenizer

    path = Path(model)
    if not path.is_dir():
        try:
            validate_repo_id(model)
            plausible = "/" in model and not path.exists()
        except HFValidationError:
            plausible = False
        if not plausible:
            what = "a file" if path.exists() else "no such folder, and no hub name either"
            raise InputError(
                f"--model: got {model!r}, {what}; need a folder that from_pretrained reads, or a hub name as org/name"
            )
    with _loading(model):
        return AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)


def load_causal_lm(model: str, dtype: str) -> Any:
    """dtype: "float32", "bfloat16", ..., or "auto": as stored."""
    import torch
    from transformers import AutoModelForCausalLM

    with _loading(model):
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))


@contextmanager
def _loading(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--model: {model!r} cannot be loaded as a causal language model with its "
            f"tokenizer ({reason}); need a folder that from_pretrained reads, or a hub name"
        ) from error


def check_positions(config: Any, max_length: int) -> None:
    """InputError where max_length tokens pass what the model was made for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and max_length > positions:
        raise InputError(f"--max-length: got {max_length}, need at most {positions}, the model's positions")
