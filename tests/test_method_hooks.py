"""KTO, BMC, FPO, PoFT and MRPO in `PreferenceTrainer`: what their hooks make of data, against plain computations."""

# ruff: noqa: F811  (a fixture that is imported)
import math

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

pytest.importorskip("trl", reason="needs the train extra: trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from datasets import Dataset

from asft_kernels import fused_linear_logps, fused_preference_loss
from asft_kernels.core.sequence import Logps
from asft_kernels.errors import InputError
from asft_kernels.methods.bmc.diff_marks import diff_marks
from asft_kernels.methods.fpo import SparseAutoencoder, fpo_inputs, pooled_features, read_sae, write_sae
from asft_kernels.methods.fpo.cache import write_reference_features
from asft_kernels.methods.fpo.hidden import hidden_states
from asft_kernels.methods.fpo.hooks import Arguments, Hooks
from asft_kernels.objectives import BMC, DPO, FPO, KTO, SFT, PoFT, WeightedSum, weighted_reference
from asft_kernels.training import PreferenceConfig, PreferenceTrainer
from asft_kernels.training.hooks import find_method
from asft_kernels.training.on_pairs import OnPairs
from bounds import unit_roundoff
from test_preference_trainer import logs, model, options, pytestmark  # noqa: F401
from tiny_lm import pairs, saved_sae, tiny_model, tiny_tokenizer

SIDES = ("chosen", "rejected")
MAX_LENGTH = 24  # some answers are cut
# Sums of some 25 log-probabilities of size 6 in fp32: 1e-5 at most, in losses that beta scales to a tenth of it.
AT_START = 1e-5


def tokenised(count=8):
    tokenizer, names = tiny_tokenizer(), ("prompt", *SIDES)
    rows = [{f"{name}_ids": tokenizer(row[name])["input_ids"] for name in names} for row in pairs(count)]
    return [{"id": str(place), **row} for place, row in enumerate(rows)]


def made(folder, model, objective, *, rows=None, method=None, lora=None, ref_model=None, eval_rows=None, **changes):
    one_step = dict(
        max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, optim="sgd", learning_rate=1.0,
        max_grad_norm=0, max_length=MAX_LENGTH,
    )  # fmt: skip
    return PreferenceTrainer(
        model, args=PreferenceConfig(**options(folder, **{**one_step, **changes})), method=method, peft_config=lora,
        train_dataset=Dataset.from_list(rows or tokenised()), processing_class=tiny_tokenizer(),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None, objective=objective,
        ref_model=ref_model,
    )  # fmt: skip


SEVERAL = {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "adamw_torch", "learning_rate": 1e-2}


def padded(rows):
    """input_ids, attention_mask, labels (2B, T) of rows, cut at MAX_LENGTH."""
    whole = [(row["prompt_ids"], row[f"{side}_ids"]) for side in SIDES for row in rows]
    ids = [torch.tensor((prompt + answer)[:MAX_LENGTH]) for prompt, answer in whole]
    labels = [x.clone().index_fill(0, torch.arange(len(p)), -100) for x, (p, _) in zip(ids, whole, strict=True)]
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True), mask, pad_sequence(labels, batch_first=True, padding_value=-100)


def token_logps(model, rows):
    ids, mask, labels = padded(rows)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden, labels, fused_linear_logps(hidden, model.lm_head, labels)


def reference(seed=1):
    return tiny_model(seed, initializer_range=0.3).eval()


def is_a_step(trainer, expected, plain):
    """The trainer's loss, and its step of SGD by 1, are those of `expected`, made of the weights of `plain`."""
    expected.backward()
    row = logs(trainer)[0]
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for (name, moved), start in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        # Sums over 16 rows and 300 tokens in another order, and one rounding of the weight itself.
        allowed = 64 * unit_roundoff(torch.float32) * max(1.0, start.grad.abs().max().item())
        assert (moved - (start.detach() - start.grad)).abs().max() <= allowed, name
    return row


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precomputed", [False, True])
def test_ktos_reference_point_is_that_of_other_pairs_answers(tmp_path, model, accumulation, precomputed):
    """Of each micro-batch its own; the losses of both add up to their mean."""
    rows, plain, ref = tokenised(), tiny_model(initializer_range=0.3), reference(5)
    trainer = made(
        tmp_path, model, "kto", ref_model=reference(5), per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation, precompute_ref_log_probs=precomputed,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    others = [{**rows[(i + 4) % 8], "prompt_ids": row["prompt_ids"]} for i, row in enumerate(rows)]
    losses, kls = [], []
    for part in torch.arange(8).chunk(accumulation):
        with torch.no_grad():
            sums = [token_logps(m, [others[i] for i in part])[2].double().sum(1) for m in (plain, ref)]
            ref_sums = token_logps(ref, [rows[i] for i in part])[2].double().sum(1)
        kls.append((sums[0] - sums[1]).mean().clamp(min=0))
        hidden, labels, _ = token_logps(plain, [rows[i] for i in part])
        inputs = {"desirable": torch.arange(len(labels)) < len(part), "kl": kls[-1]}
        losses.append(
            fused_preference_loss(hidden, plain.lm_head, labels, "kto", ref_logps=ref_sums, objective_inputs=inputs)
        )
    assert min(kls) > 0.1
    row = is_a_step(trainer, torch.stack(losses).mean(), plain)
    assert row["chosen_kl"] == pytest.approx(torch.stack(kls).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("base", "weighting"), [("dpo", "own"), ("dpo", "policy"), ("orpo", "own")])
def test_bmc_weighs_the_tokens_that_differ(tmp_path, model, base, weighting):
    rows, plain, ref = tokenised(), tiny_model(initializer_range=0.3), reference()
    objective = BMC(base, delta=3.0, ref_weighting=weighting)
    of_reference = {"ref_model": reference()} if base == "dpo" else {}
    trainer = made(tmp_path, model, objective, **of_reference)
    hidden, labels, _ = token_logps(plain, rows)
    weights = torch.zeros(labels.shape)
    for i in range(8):
        answers = [labels[j][labels[j] != -100].tolist() for j in (i, i + 8)]
        for j, marks in zip((i, i + 8), diff_marks(*answers), strict=True):
            weights[j, labels[j] != -100] = torch.tensor(marks, dtype=torch.float32)
    assert weights[:8].sum() > 0
    given = {}
    if base == "orpo":
        given["nll_labels"] = labels[:8]
    else:
        with torch.no_grad():
            tokens = token_logps(ref, rows)[2]
        given["ref_logps"] = tokens if weighting == "policy" else weighted_reference(tokens, weights, 3.0)
    loss = fused_preference_loss(hidden, plain.lm_head, labels, objective, token_weights=weights, **given)
    is_a_step(trainer, loss, plain)


def test_bmcs_reference_may_come_per_token_with_the_data(tmp_path, model):
    rows = tokenised()
    with torch.no_grad():
        _, labels, tokens = token_logps(reference(), rows)
    for side, of_side in zip(SIDES, (0, 8), strict=True):
        for i, row in enumerate(rows):
            valid = labels[of_side + i, 1:] != -100
            row[f"ref_{side}_token_logps"] = tokens[of_side + i, :-1][valid].tolist()
            row[f"ref_{side}_logps"] = 0.0  # sums, which bmc has no use for
    (live,), (given,) = (
        logs(made(tmp_path / name, model, BMC("dpo"), **more))
        for name, more in (("live", {"ref_model": reference()}), ("given", {"rows": rows}))
    )
    assert given["loss"] == pytest.approx(live["loss"], rel=1e-5)
    sums = [{name: value for name, value in row.items() if not name.endswith("token_logps")} for row in rows]
    with pytest.raises(InputError, match="train_dataset: got ref_chosen_logps, sums of answers, need ref_chosen_token"):
        made(tmp_path, model, BMC("dpo"), rows=sums)
    trainer = made(tmp_path, model, BMC("dpo"), rows=rows, eval_rows=tokenised())
    with pytest.raises(InputError, match="eval_dataset: got rows without ref_chosen_token_logps"):
        trainer.evaluate()


@pytest.mark.parametrize(("layer", "checkpointing"), [(-1, False), (0, False), (0, True)])
@pytest.mark.parametrize("stored", [False, True])
def test_fpo_compares_features_at_a_layer(tmp_path, model, layer, checkpointing, stored):
    rows, plain, ref = tokenised(), tiny_model(initializer_range=0.3), reference()
    sae = read_sae(saved_sae(tmp_path / "sae.npz"))
    objective = FPO(beta=0.7, alpha=50.0, top_k=4)  # alpha: large enough that the features' gradient shows
    given = {"sae": str(tmp_path / "sae.npz"), "sae_layer": layer}
    if stored:
        given["ref_features"] = str(tmp_path / "ref.arrow")
        write_reference_features(
            given["ref_features"], ref, sae, Dataset.from_list(rows), layer=layer, max_length=MAX_LENGTH, batch_size=3
        )
    method = Hooks(Arguments(**given))
    trainer = made(
        tmp_path, model, objective, rows=rows, method=method, ref_model=reference(),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    ids, mask, labels = padded(rows)
    with torch.no_grad():
        ref_pooled = pooled_features(sae, hidden_states(ref, ids, mask, layer)[1], labels)
        ref_sums = token_logps(ref, rows)[2].double().sum(1)
    last, hidden = hidden_states(plain, ids, mask, layer)
    if stored:
        rounded = method.features.pooled([row["id"] for row in rows])
        # float16 in the file, 2^-11 of each entry, of fp32 sums in batches of other padding.
        torch.testing.assert_close(rounded, ref_pooled, rtol=2**-11 + 1e-5, atol=1e-5)
        ref_pooled = rounded
    inputs = fpo_inputs(sae, hidden, labels, ref_pooled, 4)
    assert inputs["feature_distance"].min() > 0
    loss = fused_preference_loss(last, plain.lm_head, labels, objective, ref_logps=ref_sums, objective_inputs=inputs)
    is_a_step(trainer, loss, plain)


def test_fpos_reference_may_be_the_model_without_its_adapters(tmp_path, model):
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, task_type="CAUSAL_LM")
    method = Hooks(Arguments(sae=str(saved_sae(tmp_path / "sae.npz")), sae_layer=1))
    rows = logs(made(tmp_path, model, FPO(top_k=4), method=method, lora=lora, **SEVERAL))
    distances = [row["rejected_feature_distance"] for row in rows]
    assert distances[0] < 1e-8 < distances[-1]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=AT_START)


# (objective, loss while policy and reference are the same)
TRAINED = [
    ("kto", 0.5), ("poft", math.log(2)), ("mrpo", math.log(2)), (FPO(top_k=4), math.log(2)), (BMC("dpo"), math.log(2)),
    (BMC("dpo", 1.5, "policy"), math.log(2)), (BMC("dpo + 0.1 sft"), None), ("poft + 0.1 sft", None),
    (WeightedSum(((1.0, FPO(top_k=4)), (0.1, SFT()))), None),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "start"), TRAINED, ids=[str(o) for o, _ in TRAINED])
def test_each_trains_and_resumes_to_the_bit(tmp_path, model, objective, start):
    """The reference is the model as it came, in the resumed run too."""
    given = {**SEVERAL, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "max_length": 64}

    def run(folder):
        sae = Arguments(sae=str(saved_sae(tmp_path / "sae.npz")))
        return made(folder, model, objective, method=Hooks(sae) if "FPO" in str(objective) else None, **given)

    rows = logs(run(tmp_path / "whole"))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert start is None or rows[0]["loss"] == pytest.approx(start, abs=AT_START)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1e-4
    again = run(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [row["loss"] for row in again.state.log_history if "loss" in row] == [row["loss"] for row in rows]


def test_single_answers_on_pairs_see_pairs_that_count():
    sums = torch.tensor([-3.0, -8.0, -5.0, 0.0], dtype=torch.float64)  # the second pair has an empty rejected answer
    policy = Logps(sums, torch.tensor([2, 4, 5, 0]))
    assert OnPairs(SFT("token"))(policy).loss[0].item() == 3.0 / 2
    ref = torch.tensor([-1.0, -2.0, -9.0, -9.0], dtype=torch.float64)
    assert OnPairs(PoFT())(policy, ref).loss[0].item() == pytest.approx(math.log1p(math.exp(1.5 - 1)), rel=1e-12)
    kto = OnPairs(KTO(beta=1.0, undesirable_weight=2.0))(policy, policy.sum - 1.0).loss[0].item()
    good, bad = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))
    assert kto == pytest.approx((good + 2 * bad) / 2, rel=1e-12)


REFUSED = [
    ({"objective": "fpo"}, None, "sae: got none, need the file of an autoencoder"),
    ({"objective": "fpo"}, {"sae": "nosuch.npz"}, "nosuch.npz: no such file"),
    ({"objective": "fpo"}, {"sae": (8, 60)}, "is of hidden size 8, need 16"),
    ({"objective": "fpo"}, {"sae": (16, 3)}, "top_k: got 50, need at most 3, the features of"),
    ({"objective": "fpo"}, {"sae": (16, 60), "sae_layer": 9}, "layer: got 9, need -1"),
    ({"objective": "fpo"}, {"sae": (16, 60), "ref_features": "nosuch"}, "nosuch: no such file; asft data features"),
    ({"objective": "fpo", "precompute_ref_log_probs": True}, {"sae": (16, 60)}, "precompute_ref_log_probs: got True"),
    (
        {"objective": "fpo", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"sae": (16, 60), "sae_layer": 0}, "gradient_checkpointing_kwargs: got use_reentrant=True with sae_layer 0",
    ),
    ({"objective": "fpo", "truncation_mode": "keep_end"}, {"sae": "a", "ref_features": "b"}, "truncation_mode: got"),
    ({"objective": "dpo"}, {"sae": (16, 60)}, "objective: got dpo with fpo's features, need fpo by itself"),
    ({"objective": "bmc", "objective_args": ["base=fpo"]}, None, "needs feature_distance .*, which nothing here makes"),
    ({"objective": "bmc", "objective_args": ["base=dpo"], "precompute_ref_log_probs": True}, None, "token by token"),
    ({"objective": "dpo + kto"}, None, "need kto by itself"),
    ({"objective": "kto + 0.1 sft"}, None, "need kto by itself"),
    ({"objective": "kto", "ref_scores": ["a"]}, None, "ref_scores: got the reference's .* kto asks the reference"),
    ({"objective": "kto", "rows": tokenised(1)}, None, "kto: got 1 pair for training, need at least 2"),
    ({"objective": "dpo", "method": "kto"}, None, "method: got 'kto' with dpo, need"),
    ({"objective": "dpo", "method": "bmc"}, None, "method: got 'bmc' with dpo, need"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "arguments", "text"), REFUSED, ids=[text for *_, text in REFUSED])
def test_what_does_not_fit_is_refused_by_name(tmp_path, model, changes, arguments, text):
    rows, method = changes.get("rows"), None
    if arguments:
        if isinstance(arguments["sae"], tuple):
            zeros = torch.zeros(arguments["sae"])
            write_sae(SparseAutoencoder(zeros, zeros[0], zeros.T, zeros[:, 0]), tmp_path / "sae.npz")
            arguments = {**arguments, "sae": str(tmp_path / "sae.npz")}
        method = Hooks(Arguments(**arguments))
    config = PreferenceConfig(**options(tmp_path, **{k: v for k, v in changes.items() if k != "rows"}))
    with pytest.raises(InputError, match=text):
        PreferenceTrainer(
            model, args=config, train_dataset=Dataset.from_list(rows or tokenised()), method=method,
            processing_class=tiny_tokenizer(),
        )  # fmt: skip


def test_arguments_of_another_method_are_refused():
    with pytest.raises(
        InputError,
        match=r"sae: got 'a\.npz', which is fpo's, need method='fpo' for it",
    ):
        find_method(None, DPO(), {"fpo": Arguments(sae="a.npz")})


def test_rows_of_another_data_set_have_no_reference_point(tmp_path, model):
    trainer = made(tmp_path, model, "kto", eval_rows=tokenised(4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.5, abs=AT_START)
    with pytest.raises(InputError, match="kto: got rows without other pairs' answers"):
        trainer.evaluate(Dataset.from_list(tokenised(4)))
