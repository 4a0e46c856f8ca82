"""TRL's trainers on `fuse` in the place of their own fused head: losses and metrics of each step."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

import trl
from datasets import Dataset

from asft_kernels.models import fuse
from tiny_lm import pairs, saved_tiny_model, tiny_tokenizer

pytestmark = [
    # peft 0.21 and trl ask for names that transformers renamed; nothing of ours does
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
ROWS = pairs(8)
PROMPTS, CHOSEN, REJECTED = ([row[key] for row in ROWS] for key in ("prompt", "chosen", "rejected"))
ONLINE = {"num_generations": 4, "max_completion_length": 8}
UNCOMPARED = ("runtime", "per_second", "step_time", "profiling", "epoch", "accuracies")  # clocks; ties of equal rewards


def lengths(completions, **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


DATA: dict[str, Callable[[], dict[str, list]]] = {
    "SFT": lambda: {"prompt": PROMPTS, "completion": CHOSEN},
    "DPO": lambda: {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED},
    "KTO": lambda: {
        "prompt": PROMPTS, "completion": CHOSEN[:4] + REJECTED[4:], "label": [True] * 4 + [False] * 4,
    },
    "GRPO": lambda: {"prompt": PROMPTS},
    "RLOO": lambda: {"prompt": PROMPTS},
}  # fmt: skip


def steps(kind: str, head: Callable[..., None], folder, options: dict[str, Any], monkeypatch) -> list[dict[str, float]]:
    module = importlib.import_module(f"trl.trainer.{kind.lower()}_trainer")
    monkeypatch.setattr(module, "add_fused_lm_head", head)
    torch.manual_seed(0)
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=3,
        disable_tqdm=True, **(ONLINE if kind in ("GRPO", "RLOO") else {}), **options,
    )  # fmt: skip
    rewards = {"reward_funcs": lengths} if kind in ("GRPO", "RLOO") else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        str(saved_tiny_model(folder / "model", initializer_range=0.3)), args=arguments,
        train_dataset=Dataset.from_dict(DATA[kind]()), processing_class=tiny_tokenizer(), **rewards,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if not any(x in k for x in UNCOMPARED)} for row in rows]


SLOW = [
    ("SFT", {"loss_type": "dft"}),
    ("DPO", {"f_divergence_type": "js_divergence"}),
    ("DPO", {"ld_alpha": 0.3}),
    ("DPO", {"precompute_ref_log_probs": True}),
    ("GRPO", {"beta": 0.1}),
    ("RLOO", {}),
]
CASES = [
    ("SFT", {"packing": True, "max_length": 64}),
    ("DPO", {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.5], "use_weighting": True}),
    ("KTO", {}),
    ("GRPO", {"cast_lm_head_to_fp32": True}),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_losses_and_metrics_are_those_of_trls_own_head(kind, options, tmp_path, monkeypatch):
    """Within fp32 rounding of log-probabilities of size 6, in sums of 20 tokens, over three steps: 2e-4 of a figure."""
    from trl.trainer.utils import add_fused_lm_head

    theirs, ours = (
        steps(kind, head, tmp_path / name, options, monkeypatch)
        for name, head in (("theirs", add_fused_lm_head), ("ours", fuse))
    )
    assert len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-4)
