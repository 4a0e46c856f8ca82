"""A causal language model and its tokenizer from a folder or the hub, with errors that name both."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asft_kernels.errors import InputError, of_a_library

DEFAULT_LENGTH = 1024  # tokens of prompt and answer, TRL's
# Keywords of from_pretrained that every run gives, or that stand for an option checked before.
OF_RUNS = ("dtype", "device_map", "trust_remote_code", "revision", "quantization_config", "output_loading_info")
OF_ANY_LAYERS = (*OF_RUNS, "attn_implementation")  # those that leave a model's weights what they are
# Files that say, beside the weights, what a model makes of a text.
READ_WITH_WEIGHTS = (
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja", "chat_template*", "additional_chat_templates/*",
    "*processor_config.json",
)  # fmt: skip


def load_tokenizer(model: str) -> tuple[Any, Any]:
    """(tokenizer, config). InputError before the hub is asked for what cannot be a name there."""
    from transformers import AutoConfig, AutoTokenizer

    _plausible(model)
    with loading(model):
        config = AutoConfig.from_pretrained(_base_of_adapter(model) or model, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False), config


def _plausible(model: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

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


def load_causal_lm(model: str, dtype: str) -> Any:
    """Loads a model, of whose weights none may be missing: transformers would draw them at random.

    Args:
        model: a folder, or a name on the hub. Code that it brings is not run.
        dtype: "float32", "bfloat16", ..., or "auto": as stored.

    Raises:
        InputError: it cannot be read, or its weights are not those of its configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with loading(model):
        both: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        return with_all_weights(*both)


def with_all_weights(model: Any, found: Mapping[str, Any], keywords: Mapping[str, Any] | None = None) -> Any:
    """Returns a model whose weights were all there.

    Args:
        model: a PreTrainedModel.
        found: from_pretrained's loading info.
        keywords: what it was given; weights that some of a user's own leave without a place are refused, too.

    Raises:
        OtherWeights: which are missing or left over.
    """
    missing = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    unused = sorted(found["unexpected_keys"])
    if missing:
        raise OtherWeights(f"weights without {_first_of(missing)}, which would be random")
    if unused and any(name not in OF_ANY_LAYERS for name in keywords or ()):
        import torch

        own = type(model.config).from_pretrained(model.name_or_path, revision=(keywords or {}).get("revision", "main"))
        with torch.device("meta"):
            unused = sorted({*unused} & type(model)(own).state_dict().keys())
        if unused:
            raise OtherWeights(f"weights with {_first_of(unused)}, which would not be used")
    return model


class OtherWeights(ValueError):
    """The checkpoint's weights are not the model's."""


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def load_processor(model: str, *, trust_remote_code: bool = False, revision: str = "main") -> tuple[Any, Any]:
    """Loads what makes a model's inputs: its processor, if it takes images, else its tokenizer; and its config.

    model may be the folder of an adapter: config is then of the model that it is part of.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    _plausible(model)
    with loading(model):
        base = _base_of_adapter(model)
        keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        try:
            processor = AutoProcessor.from_pretrained(model, **keywords)
        except (OSError, ValueError):
            processor = AutoTokenizer.from_pretrained(base or model, **keywords)
        return processor, AutoConfig.from_pretrained(base or model, **keywords)


def load_trainable_adapter(folder: str, keywords: dict[str, Any]) -> Any:
    """Loads an adapter with the model that it is part of. keywords: of the model's from_pretrained."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"model: {folder} is an adapter: peft is not installed; pip install peft") from error
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    with loading(folder, keywords):
        base = _base_of_adapter(folder) or folder
        names = ("trust_remote_code", "revision")
        config = AutoConfig.from_pretrained(base, **{name: keywords[name] for name in names if name in keywords})
        kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
        of_text = type(config) in kinds or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
        kind = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
        both: Any = kind.from_pretrained(base, **keywords, output_loading_info=True)
        model = with_all_weights(both[0], both[1], keywords)
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def load_renamed(model: Any, folder: str) -> bool:
    """Loads the weights of a folder where transformers has saved them under other names than the model has now.

    It does so with image-text models whose first checkpoints had other names; only `from_pretrained` knows both.

    Args:
        model: a PreTrainedModel, its weights whole on this rank.
        folder: as `save_pretrained` writes it.

    Returns:
        Whether it was so; otherwise nothing is loaded.

    Raises:
        InputError: the weights are another model's.
    """
    from safetensors import safe_open

    saved = set()
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= set(file.keys())
    if saved <= set(model.state_dict()):
        return False
    with loading(folder):
        loaded, found = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *(x[0] for x in found["mismatched_keys"])})
    if wrong:
        raise InputError(
            f"resume_from_checkpoint: got a checkpoint of another model: {', '.join(wrong[:3])} ... do not match"
        )
    model.load_state_dict(loaded.state_dict())
    return True


def _base_of_adapter(model: str) -> str | None:
    file = Path(model) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--model: {file} is damaged ({type(error).__name__}: {error}); need it as peft saves it"
        ) from error


def digest_of_model(model: str) -> str:
    """Tells whether the files of a model were replaced.

    Args:
        model: a folder, or a name on the hub, which is its own digest.

    Returns:
        The name; of a folder with a digest of its weights and adapters (by size and time, as they are large), of
        configuration, tokenizer and chat templates (by content), and of an adapter with that of its base model.
    """
    folder = Path(model)
    weights = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".gguf"))
    sizes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    texts = sorted({path for pattern in READ_WITH_WEIGHTS for path in folder.glob(pattern) if path.is_file()})
    if not weights and not texts:
        return model
    digest = hashlib.sha256(repr(sizes).encode())
    for path in texts:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    base = _base_of_adapter(model)
    return f"{model} {digest.hexdigest()[:16]}" + (f" on {digest_of_model(base)}" if base and base != model else "")


@contextmanager
def loading(model: str, keywords: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Makes InputError of what from_pretrained raises where a model cannot be read.

    Args:
        model: a folder, or a name on the hub.
        keywords: what from_pretrained was given beside it; what a user has said of them is named first.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # of safetensors, tokenizers, pickle and torch each their own
        expected = isinstance(error, OSError | ValueError) or of_a_library(error)
        if not expected or type(error).__name__ == "OutOfMemoryError":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        of_weights = isinstance(error, OtherWeights)
        others = OF_ANY_LAYERS if of_weights else OF_RUNS
        said = {name: x for name, x in (keywords or {}).items() if x is not None and name not in others}
        if not said or type(error).__name__ == "SafetensorError":
            raise InputError(
                f"--model: {model!r} cannot be loaded as a causal language model with its "
                f"tokenizer ({reason}); need a folder that from_pretrained reads, or a hub name"
            ) from error
        if of_weights:
            raise InputError(
                f"--model, model_init_kwargs: {model!r} with {said} cannot be loaded ({reason}); need a checkpoint "
                "that is whole, and keywords that leave its layers as they are"
            ) from error
        of_option = said.keys() == {"attn_implementation"}
        what = f"attn_implementation: got {said.popitem()[1]!r}" if of_option else f"model_init_kwargs: got {said}"
        raise InputError(
            f"{what}, with which {model!r} cannot be loaded ({reason}); mend it or leave it out"
        ) from error


def fitted_length(config: Any, max_length: int) -> int:
    """Returns max_length, or the model's positions where the default has more.

    Raises:
        InputError: where another max_length has more tokens than the model was made for.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not positions or max_length <= positions:
        return max_length
    if max_length == DEFAULT_LENGTH:
        return positions
    raise InputError(f"max_length: got {max_length}, need at most {positions}, the model's positions")
