"""The table of docs/models.md: every architecture of transformers' mappings, as a tiny random model, fused.

python -m tests.architectures            prints the table
python -m tests.architectures --write    writes it into docs/models.md
"""

import argparse
import inspect
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

from asft_kernels.models import UnsupportedHead, fuse
from asft_kernels.models.seam import causal_lm

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- architectures -->", "<!-- end -->"
MROPE = "vl|glm4|glm_ocr|qwen"  # text models that may divide their frequencies among time, height and width
SECONDS = 300  # for one model, on a busy machine
MAPPINGS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING, "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
VOCAB, WIDTH = 96, 64
# What a config has of these is made small, in its parts too.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "intermediate_size", "ffn_dim", "d_ff",
         "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size", "out_hidden_size",
         "shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp", "embedding_size",
         "hidden_size_per_layer_input", "projection_dim", "text_hidden_size", "encoder_hidden_size", "lru_width",
         "hidden_size_global",
         "dense_intermediate_size", "attention_hidden_size", "projector_hidden_size", "mlp_dim",
         "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "hidden_dim", "dim"), WIDTH
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
         "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
         "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "global_head_dim"), WIDTH // 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "block_size"), 128),
    "rotary_dim": 8,
}  # fmt: skip
# The same where keys and values are made from a latent vector.
LATENT: dict[str, Any] = {
    "head_dim": None, "num_key_value_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "kv_lora_rank": 16, "q_lora_rank": 24,
}  # fmt: skip
# Not what a plain model has: a wrong scale, a forgotten cap or bias must show.
UNUSUAL: dict[str, Any] = {
    "logit_scale": 0.3, "logits_scaling": 1.7, "lm_head_multiplier": 0.6, "output_multiplier": 0.6,
    "logits_mup_width_multiplier": 2.5, "final_logit_softcapping": 5.0, "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0, "lm_head_bias": True,
}  # fmt: skip
ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4,
    "attention_hidden_size": 2 * WIDTH, "attention_head_dim": WIDTH // 2,
}  # fmt: skip
# What a model type needs besides.
SPECIFIC: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            f"{kind}_attention": {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding", "full")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGABZ": 5}},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, "<|visual token 000001|>": 6}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "longcat_flash": {"head_dim": 8},
    "step3p7_text": {"sliding_window": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}


class Row(NamedTuple):
    """outcome: equal, WRONG, refused, crash or not built; why: in words."""

    kind: str
    model_type: str
    name: str
    outcome: str
    why: str


class TooLong(Exception):
    pass


def tiny_config(config_class: type[PreTrainedConfig], default: Any = None) -> PreTrainedConfig:
    default = config_class() if default is None else default
    changes: dict[str, Any] = {}
    small = {**SMALL, **LATENT} if vars(default).get("kv_lora_rank") else SMALL
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = tiny_config(type(value), value)
        elif name in UNUSUAL or (small.get(name) and value is not None and not isinstance(value, list | tuple)):
            changes[name] = UNUSUAL.get(name, small.get(name))
        elif name == "rope_parameters" and "rope_type" in (value or {}) and re.search(MROPE, default.model_type):
            changes[name] = {**value, "mrope_section": mrope_section(value)}
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id") and value is not None:
            changes[name] = 0
    return config_class(**{**changes, **SPECIFIC.get(default.model_type, {})})


def mrope_section(rope: dict[str, Any]) -> list[int]:
    """Frequencies of time, height and width, of a head of SMALL["head_dim"]."""
    pairs = int(SMALL["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    return [pairs * 3 // 8, pairs * 3 // 8, pairs - 2 * (pairs * 3 // 8)]


def tiny(kind: str, config_class: type[PreTrainedConfig], model_class: Any) -> Any:
    torch.manual_seed(0)
    if kind == "causal" and not issubclass(
        config_class, model_class.config_class
    ):  # a text model of a multimodal config
        config_class = model_class.config_class
    config = tiny_config(config_class)
    model = model_class._from_config(config, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        if head is not None:
            for weight in head.parameters():  # logits that a cap bends, a bias that is not 0
                weight.copy_(torch.randn_like(weight))
    return model


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(number, frame):
        raise TooLong(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(kind: str, config_class: type[PreTrainedConfig], model_class: Any) -> Row:
    """Builds, runs and fuses one architecture; whatever happens is its row."""

    def row(outcome: str, why: object) -> Row:
        text = f"{type(why).__name__}: {why}" if isinstance(why, Exception) and outcome != "refused" else str(why)
        return Row(kind, config_class.model_type, model_class.__name__, outcome, " ".join(text.split()))

    ids = torch.randint(5, VOCAB - 30, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with time_limit(SECONDS):
            model = tiny(kind, config_class, model_class)
            takes = inspect.signature(model.forward).parameters
            loose = any(x.kind == x.VAR_KEYWORD for x in takes.values())
            inputs = {name: x for name, x in inputs.items() if name in takes or (name == "use_cache" and loose)}
            with torch.no_grad():
                own = model(**inputs).logits
    except Exception as error:
        return row("not built", error)
    if own.shape != (4, 12, own.shape[-1]):
        return row("not built", f"its own logits are {tuple(own.shape)}")
    own = own[:, :-1].double().log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    try:
        with time_limit(SECONDS):
            fuse(model)
            with torch.no_grad():
                out = model(**inputs, labels=labels, fused_lm_head=True)
    except UnsupportedHead as error:
        return row("refused", error)
    except Exception as error:
        return row("crash", error)
    difference = (own.where(out.label_mask, 0) - out.log_probs).abs().max().item()
    # fp32 sums of 64 terms of size up to 30 err by some 1e-5, a head that is scaled otherwise by more than 1e-2.
    if not difference <= 1e-3:
        return row("WRONG", f"differs by {difference:.2g}")
    scale, cap = causal_lm(model).forward.head.logits
    does = [f"scale {scale:.3g}"] if scale != 1 else []
    return row("equal", ", ".join([*does, f"cap {cap:.3g}"] if cap else does))


def rows(kinds: list[str], only: list[str]) -> Iterator[Row]:
    for kind in kinds:
        for config_class, model_classes in MAPPINGS[kind].items():
            for model_class in model_classes if isinstance(model_classes, tuple) else (model_classes,):
                if not only or config_class.model_type in only:
                    yield judge(kind, config_class, model_class)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    parser.add_argument("--kind", choices=list(MAPPINGS), help="one mapping; both by default")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    table = []
    for found in rows([args.kind] if args.kind else list(MAPPINGS), args.only):
        table.append(found)
        print(*found[:4], found.why[:300], flush=True)
    print(Counter(found[:1] + found[3:4] for found in table))
    if args.write:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(before + START + page(table) + END + rest.partition(END)[2])
    return 0


def page(table: list[Row]) -> str:
    counts = Counter((found.kind, found.outcome) for found in table)
    lines = [f"\ntransformers {transformers.__version__}. `python -m tests.architectures --write` writes this.\n"]
    for kind in MAPPINGS:
        of_kind = {outcome: count for (k, outcome), count in counts.items() if k == kind}
        total = sum(of_kind.values())
        lines.append(
            f"{kind}: {total}; " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(of_kind.items()))
        )
        lines.append("")
    lines += ["| mapping | model type | class | | |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {found.kind} | {found.model_type} | {found.name} | {found.outcome} | {found.why[:160].replace('|', '/')} |"
        for found in table
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
