"""TRL's trainers with `patch_trl` beside TRL's own: losses, metrics and weights of each step."""

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

import trl
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM

from asft_kernels.models import UnsupportedHead, fuse
from asft_kernels.models.fused import FusedForward
from asft_kernels.training import patch_trl, unpatch_trl
from tiny_lm import pairs, saved_tiny_model, tiny_config, tiny_tokenizer

pytestmark = [
    # peft 0.21 and trl ask for names that transformers renamed; nothing of ours does
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning"),
    # peft, of one model in two folders
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
]
SEAM_IN = ("sft", "dpo", "kto", "grpo", "rloo")
ROWS = pairs(8)
PROMPTS, CHOSEN, REJECTED = ([row[key] for row in ROWS] for key in ("prompt", "chosen", "rejected"))
PREFERENCES = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
DATA = {
    "SFT": {"prompt": PROMPTS, "completion": CHOSEN},
    "KTO": {"prompt": PROMPTS, "completion": CHOSEN[:4] + REJECTED[4:], "label": [True] * 4 + [False] * 4},
    "GRPO": {"prompt": PROMPTS},
    "RLOO": {"prompt": PROMPTS},
}
ONLINE = ("GRPO", "RLOO")
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0}
UNCOMPARED = ("runtime", "per_second", "step_time", "profiling", "epoch", "accuracies")  # clocks; ties of equal rewards


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Others for almost any two completions: of equal ones in a group nothing would be learned."""
    return [sum((7 * token + 3 * place) % 11 for place, token in enumerate(ids)) / 10 for ids in completion_ids]


def capped(folder: Path) -> Path:
    """Logits that are no linear function of hidden states: their mean is none of the mean hidden state."""
    return saved(Gemma2ForCausalLM, Gemma2Config, folder, head_dim=8, final_logit_softcapping=2.0)


def experts(folder: Path) -> Path:
    """With a load-balancing loss."""
    options = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    return saved(MixtralForCausalLM, MixtralConfig, folder, **options)


def saved(model: Any, config: Any, folder: Path, **options: Any) -> Path:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "pad_token_id", "eos_token_id")  # fmt: skip
    torch.manual_seed(0)
    like = {name: getattr(tiny_config(), name) for name in sizes}
    model(config(**like, initializer_range=0.3, **options)).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def plain(folder: Path) -> Path:
    return saved_tiny_model(folder, initializer_range=0.3)


def trainer_of(kind: str) -> tuple[Any, Any]:
    """Trainer and config. The experimental ones come from their own modules."""
    of = importlib.import_module(f"trl.experimental.{kind.lower()}") if kind in ("ORPO", "CPO") else trl
    return getattr(of, f"{kind}Trainer"), getattr(of, f"{kind}Config")


def make(kind: str, folder: Path, *, model: Callable[[Path], Path] = plain, lora: bool = False, **options: Any) -> Any:
    trainer, config = trainer_of(kind)
    given: dict[str, Any] = {
        "max_steps": 10, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.01, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "seed": 3, "disable_tqdm": True,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if kind in ONLINE:
        given |= {"num_generations": 4, "max_completion_length": 8, "max_steps": 3}
        more["reward_funcs"] = rewards
    else:
        given["max_length"] = 64
        more["eval_dataset"] = Dataset.from_dict({k: x[:4] for k, x in DATA.get(kind, PREFERENCES).items()})
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        more["peft_config"] = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return trainer(
        str(model(folder / "model")), args=config(output_dir=str(folder), **{**given, **options}),
        train_dataset=Dataset.from_dict(DATA.get(kind, PREFERENCES)), processing_class=tiny_tokenizer(), **more,
    )  # fmt: skip


def train(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Figures of each step and of an evaluation, and the weights."""
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    rows = [row for row in trainer.state.log_history if "train_loss" not in row]
    figures = [{k: v for k, v in row.items() if not any(x in k for x in UNCOMPARED)} for row in rows]
    return figures, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


CASES = [
    ("DPO", {}),
    ("DPO", {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.5], "use_weighting": True}),
    ("DPO", {"ld_alpha": 0.3}),
    ("DPO", {"f_divergence_type": "js_divergence"}),
    ("DPO", {"precompute_ref_log_probs": True}),
    ("DPO", {"lora": True}),
    ("DPO", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    ("KTO", {}),
    ("SFT", {"packing": True}),
    ("SFT", {"loss_type": "dft", "lora": True}),
    ("GRPO", {"cast_lm_head_to_fp32": True, "beta": 0.1, "num_iterations": 2}),
    ("RLOO", {"num_iterations": 2}),
    ("ORPO", {}),
    ("ORPO", {"model": capped}),
    ("ORPO", {"model": experts, "lora": True, "gradient_accumulation_steps": 2}),
    ("CPO", {"model": experts}),
    ("CPO", SIMPO),
    ("CPO", {**SIMPO, "cpo_alpha": 0.5, "lora": True, "gradient_checkpointing": True}),
]


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(f"{k}={getattr(x, '__name__', x)}" for k, x in value.items())


@pytest.mark.parametrize(("kind", "options"), CASES, ids=name_of)
def test_losses_metrics_and_weights_are_trls_own(kind, options, tmp_path):
    """Sums of 20 log-probabilities of size 6 and a logit's 16 products, in another order: some 20 * 6 * 2^-24 = 7e-6.

    Ten steps of SGD, at gradients cut to norm 1, carry it on as it is: 3e-5. Adam would divide it by a gradient that
    is nearly 0.
    """
    theirs, their_weights = train(make(kind, tmp_path / "theirs", **options))
    with patch_trl():
        trainer = make(kind, tmp_path / "ours", **options)
    ours, weights = train(trainer)
    inner = trainer.model.get_base_model() if options.get("lora") else trainer.model
    forward = vars(inner)["forward"]
    assert isinstance(getattr(forward, "__func__", forward), FusedForward)
    assert len(ours) == (3 if kind in ONLINE else 11)
    assert all(row["grad_norm"] > 0 for row in ours if "grad_norm" in row)
    assert kind not in ONLINE or abs(ours[-1].get("kl", 1)) > 1e-6
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=3e-5, abs=3e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, their_weights[name], rtol=0, atol=3e-5, msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_dpo_begins_at_ln_2_in_bf16(lora, tmp_path):
    """Policy and reference are one model in one kernel: bf16 or not, their difference is 0."""
    with patch_trl():
        figures, _ = train(make("DPO", tmp_path, bf16=True, lora=lora, max_steps=2))
    assert figures[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures[1]["loss"] != pytest.approx(math.log(2), abs=1e-6)


def heads() -> list[Any]:
    return [importlib.import_module(f"trl.trainer.{kind}_trainer").add_fused_lm_head for kind in SEAM_IN]


def inits() -> list[Any]:
    return [trainer_of(kind)[0].__init__ for kind in ("ORPO", "CPO")]


@pytest.fixture
def before():
    """What TRL has unpatched; afterwards it has it again."""
    found = heads(), inits()
    assert fuse not in found[0]
    yield found
    unpatch_trl()
    assert (heads(), inits()) == found


def test_a_plain_call_holds_until_it_is_taken_back(before):
    patch_trl()
    assert heads() == [fuse] * len(SEAM_IN)
    once = inits()
    assert not set(once) & set(before[1])
    patch_trl()
    with patch_trl():
        assert inits() == once
    assert heads() == [fuse] * len(SEAM_IN), "taken back by a block that did not patch"
    unpatch_trl()
    assert (heads(), inits()) == before
    unpatch_trl()


def test_a_block_takes_it_back_after_an_error(before):
    with pytest.raises(KeyError), patch_trl():
        raise KeyError
    assert (heads(), inits()) == before


def test_a_trainer_that_is_imported_later(before, monkeypatch):
    """By another name than those that are there, as AsyncGRPO's is, which needs more packages."""
    monkeypatch.delitem(sys.modules, "trl.trainer.dpo_trainer")
    with patch_trl():
        later = importlib.import_module("trl.trainer.dpo_trainer")
        assert later.add_fused_lm_head is fuse
    assert later.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head is before[0][0]


def test_a_trainer_keeps_what_it_was_made_with(before, tmp_path):
    """Of pairs: logits are (rows, positions, vocabulary), our means scalars."""
    trainer, config = trainer_of("ORPO")

    class OwnForward(trainer):
        def concatenated_forward(self, model, batch):
            return super().concatenated_forward(model, batch)

    class OwnSums(trainer):
        @staticmethod
        def get_batch_logps(*args, **kwargs):
            return 2 * trainer.get_batch_logps(*args, **kwargs)

    old = make("ORPO", tmp_path / "old")
    with patch_trl():
        new = make("ORPO", tmp_path / "new")
        of_subclasses = [
            kind(
                str(plain(tmp_path / "model")),
                args=config(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
                train_dataset=Dataset.from_dict(PREFERENCES), processing_class=tiny_tokenizer(),
            )
            for kind in (OwnForward, OwnSums)
        ]  # fmt: skip
        of_old = shapes(old)
    assert of_old == [3, 3]
    assert [shapes(one) for one in of_subclasses] == [[3, 3], [3, 3]]
    assert shapes(new) == [0, 0]


def shapes(trainer: Any) -> list[int]:
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    return [logits.dim() for logits in trainer.concatenated_forward(trainer.model, batch)[2:4]]


def test_a_model_that_is_no_causal_one_is_refused(before, tmp_path, monkeypatch):
    with patch_trl():
        monkeypatch.setattr("transformers.LlamaForCausalLM.get_output_embeddings", lambda self: None)
        with pytest.raises(UnsupportedHead, match="need a model with one LM head"):
            make("ORPO", tmp_path)


def test_another_version(before, monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.14.2")
    with pytest.raises(ImportError, match=r"^trl: got 1\.14\.2, need 1\.15 or a later 1\.x; run: pip install 'trl>="):
        patch_trl()


def test_another_seam(before, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr("trl.trainer.utils.add_fused_lm_head", lambda model, chunk: None)
        with pytest.raises(ImportError, match="whose add_fused_lm_head takes model, chunk, need one that takes mod"):
            patch_trl()


def test_no_trl(before, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"^trl: not installed, need 1\.15 or a later"):
        patch_trl()


def test_patching_says_nothing_of_trainers_that_nobody_chose():
    code = (
        "import warnings\n"
        "from asft_kernels.training import patch_trl\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    patch_trl()\n"
        "print([str(w.message) for w in said if 'trl.experimental' in str(w.message)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRL_EXPERIMENTAL_SILENCE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
