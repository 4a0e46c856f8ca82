"""Scale and cap of the logits as Hugging Face configs name them."""

from typing import Any

from asft_kernels.models.check import LogitMap

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, Inkling
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # the same config name, the other way round
BEFORE_THE_HEAD = ("minicpm3",)  # scales what goes into the head
NOT_IN_THE_WRAPPER = ("aya_vision", "cohere2_vision", "gemma3")  # whose text model alone scales or caps


def logit_options(config: Any) -> LogitMap:
    """Reads scale and cap from a model's config.

    Args:
        config: a PreTrainedConfig, that of a multimodal wrapper included.

    Returns:
        (logit_scale, softcap); 1.0 and None if it has neither.
    """
    if config.model_type in NOT_IN_THE_WRAPPER:
        return LogitMap(1.0, None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in FACTORS + DIVISORS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > 0 and config.model_type not in BEFORE_THE_HEAD:
            divides = name in DIVISORS and config.model_type not in MULTIPLIES_BY_DIVISOR
            scale = scale / value if divides else scale * value
    caps = [getattr(config, name, None) for name in CAPS]
    return LogitMap(scale, next((float(cap) for cap in caps if cap), None))
