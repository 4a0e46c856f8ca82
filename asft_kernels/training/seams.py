"""Where TRL's DPOTrainer is another one for us: names of its module, exchanged while its constructor runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import transformers
from trl.trainer import dpo_trainer

from asft_kernels.models import fuse
from asft_kernels.models.loading import loading, with_all_weights

_exchanging = RLock()  # the names are the module's: one constructor at a time


class _NoLayer:
    """Stands where DPOTrainer looks for an adapter on the head, which it cannot train and we can."""


@contextmanager
def exchanged(
    *, makes_policy: bool, makes_reference: bool, policy: dict[str, Any], options: dict[str, Any]
) -> Iterator[None]:
    """Lets DPOTrainer's constructor fuse models, and make no reference model where none is needed.

    Args:
        makes_policy: whether it loads the policy: it was given a name.
        makes_reference: whether it may load a reference model.
        policy: keywords of `fuse` for the policy alone.
        options: keywords of `fuse` for policy and reference.
    """
    load, loaded = dpo_trainer.create_model_from_path, []

    def create_model_from_path(*args: Any, **kwargs: Any) -> Any:
        of_policy = makes_policy and not loaded
        loaded.append(of_policy)
        if not (of_policy or makes_reference):
            return None
        with loading(str(args[0]), kwargs):
            if transformers.__version__ == "5.3.0":  # TRL then ties the weights of what it takes for the model
                return load(*args, **kwargs)
            both: Any = load(*args, **kwargs, output_loading_info=True)
            return with_all_weights(both[0], both[1], kwargs)

    def add_fused_lm_head(model: Any, **trls: Any) -> None:
        fuse(model, **(policy if "outputs" in trls else {}), **options)

    ours = {
        "create_model_from_path": create_model_from_path,
        "add_fused_lm_head": add_fused_lm_head,
        "BaseTunerLayer": _NoLayer,
    }
    with _exchanging:
        before = {name: getattr(dpo_trainer, name) for name in ours if hasattr(dpo_trainer, name)}
        _set({name: ours[name] for name in before})
        try:
            yield
        finally:
            _set(before)


def _set(names: dict[str, Any]) -> None:
    for name, value in names.items():
        setattr(dpo_trainer, name, value)
