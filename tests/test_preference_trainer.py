"""`PreferenceTrainer` on TRL's DPOTrainer: equal to TRL where both can, and right where TRL has nothing."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("train_extra")

from datasets import Dataset, Features, IterableDataset, Value
from trl import DPOConfig, DPOTrainer

from asft_kernels import fused_linear_logps, fused_preference_loss
from asft_kernels.errors import InputError
from asft_kernels.objectives import DPO, MRPO, LossTerms, Objective, get_objective
from asft_kernels.training import PreferenceConfig, PreferenceTrainer
from asft_kernels.training.collator import at_labels
from asft_kernels.training.reference import require_references, with_scores
from bounds import unit_roundoff
from tiny_lm import pairs, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines
from train_extra import QUIET

pytestmark = QUIET
TESTS = Path(__file__).parent
OF_CLOCKS = ("runtime", "per_second", "epoch", "step_time", "profiling")
# fp32 log-probabilities of 20 tokens of size 6 in sums of some -100, over three steps that Adam's rounding moves apart.
CLOSE = {"rel": 2e-4, "abs": 2e-4}


def options(folder, **changes):
    given = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, max_length=64, seed=3,
    )  # fmt: skip
    return {**given, **changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(saved_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.3))


def made(folder, model, *, rows=None, trainer=PreferenceTrainer, config=PreferenceConfig, lora=None, **changes):
    own = {name: changes.pop(name) for name in ("objective_object", "eval_dataset", "ref_model") if name in changes}
    if "objective_object" in own:
        own["objective"] = own.pop("objective_object")
    return trainer(
        model, args=config(**options(folder, **changes)), peft_config=lora, processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(pairs(12)) if rows is None else rows, **own,
    )  # fmt: skip


def logs(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


TRLS = [
    ("dpo", {}, {}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.1}, {"beta": 0.3, "label_smoothing": 0.1, "loss_type": ["robust"]}),
    (
        "hinge_norm",
        {"objective_args": ["gamma=0.1"], "gradient_checkpointing": True},
        {"loss_type": ["hinge"], "gradient_checkpointing": True},
    ),
    ("ipo", {"precompute_ref_log_probs": True}, {"loss_type": ["ipo"], "precompute_ref_log_probs": True}),
    ("dpo", {"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    ("dpo", {"use_weighting": True}, {"use_weighting": True}),
    ("dpo", {"f_divergence_type": "js_divergence"}, {"f_divergence_type": "js_divergence"}),
    ("discopop", {"discopop_tau": 0.1}, {"loss_type": ["discopop"], "discopop_tau": 0.1}),
    (
        "dpo(beta=0.2) + 0.5 bco_pair(beta=0.2)",
        {},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.5], "beta": 0.2},
    ),
]


@pytest.mark.parametrize(("objective", "ours", "theirs"), TRLS, ids=[f"{a}-{b}" for a, b, _ in TRLS])
def test_losses_weights_and_metrics_are_trls(tmp_path, model, objective, ours, theirs):
    """One micro-batch a step: TRL's figures are means of micro-batches' means, ours are over all pairs and tokens."""
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    own = made(tmp_path / "ours", model, objective=objective, **batch, **ours)
    rows = logs(own)
    assert len(rows) == 3
    trl = made(tmp_path / "trl", model, trainer=DPOTrainer, config=DPOConfig, **batch, **theirs)
    expected = logs(trl)
    shared = set(rows[0]) & set(expected[0]) - {"epoch", "step"}
    assert {"loss", "rewards/chosen", "rewards/margins", "logps/chosen", "entropy", "logits/chosen"} <= shared
    assert {"mean_token_accuracy", "num_tokens", "rewards/accuracies", "grad_norm"} <= shared
    if "+" in objective or objective == "ipo" or "f_divergence_type" in ours:
        shared -= {name for name in shared if name.startswith("rewards/")}  # ours are those of the loss itself
    if "ld_alpha" in ours:
        shared -= {"logps/chosen", "logps/rejected"}  # TRL logs the weighed sums
    for one, other in zip(rows, expected, strict=True):
        for name in shared:
            if not any(clock in name for clock in OF_CLOCKS):
                if name == "rewards/accuracies" and one["step"] == 1:
                    continue  # rewards of 0, but for rounding
                assert one[name] == pytest.approx(other[name], **CLOSE), name
    for (name, one), other in zip(own.model.named_parameters(), trl.model.parameters(), strict=True):
        assert (one - other).abs().mean() <= 1e-5, name  # a hundredth of a step of Adam


@pytest.mark.parametrize(
    "theirs",
    [
        {"loss_type": "sigmoid", "ld_alpha": 0.3},
        {"loss_type": "sigmoid", "use_weighting": True, "label_smoothing": 0.2},
        {"loss_type": ["robust", "sft"], "label_smoothing": 0.1, "loss_weights": [2.0, 0.12345678]},
        {"loss_type": "hinge", "beta": 0.3, "loss_weights": [2.0]},
    ],
    ids=lambda theirs: " ".join(theirs),
)
def test_the_answer_to_loss_type_is_the_same_loss(tmp_path, model, theirs):
    with pytest.raises(InputError) as error:
        PreferenceConfig("out", use_cpu=True, **theirs)
    objective = re.search(r"need objective='(.*)' in the place of loss_type, (.*)", str(error.value))
    assert set(objective[2].split(", ")) == set(theirs) - {"loss_type"}
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    ours = logs(made(tmp_path / "ours", model, objective=objective[1], **batch))
    expected = logs(made(tmp_path / "trl", model, trainer=DPOTrainer, config=DPOConfig, **batch, **theirs))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in expected], **CLOSE)


def test_lora_compares_with_the_model_without_it(tmp_path, model):
    peft = pytest.importorskip("peft", reason="needs peft")
    adapters = [peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM") for _ in range(2)]
    own = made(tmp_path / "ours", model, objective="dpo", lora=adapters[0], learning_rate=1e-2)
    trl = made(tmp_path / "trl", model, trainer=DPOTrainer, config=DPOConfig, lora=adapters[1], learning_rate=1e-2)
    assert own.ref_model is None
    for one, other in zip(logs(own), logs(trl), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], **CLOSE)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], **CLOSE)


@pytest.mark.parametrize("objective", ["asft", "dpo"])
def test_lora_on_the_output_head_is_trained(tmp_path, objective):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = str(saved_tiny_model(tmp_path / "untied", tie_word_embeddings=False))
    lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, task_type="CAUSAL_LM")
    trainer = made(tmp_path, model, objective=objective, lora=lora, learning_rate=1e-2)
    rows = logs(trainer)
    of_head = [p for name, p in trainer.model.named_parameters() if "lm_head.lora_B" in name]
    assert of_head
    assert of_head[0].abs().sum() > 0
    assert rows[-1]["loss"] < rows[0]["loss"]


def rows_that_count_differently():
    """The third pair has a prompt so long that its rejected answer is cut away whole."""
    rows = pairs(8)
    dataset = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    tokenizer = tiny_tokenizer()
    for row in rows:
        for name in ("prompt", "chosen", "rejected"):
            dataset[f"{name}_ids"].append(tokenizer(row[name])["input_ids"])
    dataset["rejected_ids"][2] = []
    return Dataset.from_dict(dataset)


@pytest.mark.parametrize("objective", ["asft", "lmpo", "simpo"])
def test_the_loss_of_a_step_is_the_mean_over_its_pairs_however_they_are_split(tmp_path, model, objective):
    found = []
    for size, accumulation in ((8, 1), (2, 4), (4, 2), (3, 3)):
        if objective == "lmpo" and accumulation > 1:
            continue  # its statistics move with every micro-batch
        trainer = made(
            tmp_path / f"{size}", model, rows=rows_that_count_differently(), objective=objective, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd",
            learning_rate=1.0, max_grad_norm=0,
        )  # fmt: skip
        row = logs(trainer)[0]
        assert row["pairs"] == 7
        found.append((row, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}))
    (first, weights), *others = found
    for row, moved in others:
        for name in ("loss", "logps/chosen", "log_odds/margins", "accuracy", "entropy", "mean_token_accuracy"):
            assert row[name] == pytest.approx(first[name], rel=1e-5), name
        for name, value in moved.items():
            # Sums of at most 8 pairs in another order: some roundings of a gradient of size 1.
            assert (value - weights[name]).abs().max() <= 64 * unit_roundoff(torch.float32), name


def test_the_first_step_moves_by_the_gradient_of_the_fused_call(tmp_path, model):
    """asft: the trainer's loss and step against the primitive on the model's own hidden states."""
    trainer = made(
        tmp_path, model, objective="asft", max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        optim="sgd", learning_rate=1.0, max_grad_norm=0, rows=rows_that_count_differently(),
    )  # fmt: skip
    plain = tiny_model(initializer_range=0.3)
    batch = trainer.collator([trainer.train_dataset[i] for i in range(8)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    hidden = plain.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    loss = fused_preference_loss(hidden, plain.lm_head, labels, "asft")
    loss.backward()
    row = logs(trainer)[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for (name, moved), start in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        expected = start.detach() - start.grad
        assert (moved - expected).abs().max() <= 64 * unit_roundoff(torch.float32), name


def test_no_reference_model_without_need(tmp_path, model):
    assert made(tmp_path, model, objective="asft").ref_model is None
    assert made(tmp_path, model, objective="dpo").ref_model is not None
    with pytest.raises(InputError, match="ref_model: got a model, need None: the objective has no reference"):
        made(tmp_path, model, objective="asft", ref_model=tiny_model())


def tokenised(count=12):
    tokenizer = tiny_tokenizer()
    return [
        {f"{k}_ids": tokenizer(row[k])["input_ids"] for k in ("prompt", "chosen", "rejected")} for row in pairs(count)
    ]


def test_references_may_come_as_columns(tmp_path, model):
    """One sum, several models, or a value a token."""
    live = logs(made(tmp_path, model, rows=Dataset.from_list(tokenised()), objective="dpo"))
    reference = tiny_model(initializer_range=0.3).eval()
    rows = tokenised()
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            labels = ids.clone()
            labels[:, : len(row["prompt_ids"])] = -100
            with torch.no_grad():
                logps = fused_linear_logps(reference.model(ids).last_hidden_state, reference.lm_head, labels)[0]
            row[f"ref_{side}_token_logps"] = logps[len(row["prompt_ids"]) - 1 : -1].tolist()
            row[f"ref_{side}_logps"] = logps.sum().item()
    names = [name for name in rows[0] if not name.endswith("token_logps")]
    sums = made(tmp_path, model, rows=Dataset.from_list(rows).select_columns(names), objective="dpo")
    assert sums.ref_model is None
    tokens = made(
        tmp_path, model, rows=Dataset.from_list(rows).remove_columns(["ref_chosen_logps", "ref_rejected_logps"]),
        objective="dpo",
    )  # fmt: skip
    for one, other, third in zip(live, logs(sums), logs(tokens), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], **CLOSE)
        assert one["loss"] == pytest.approx(third["loss"], **CLOSE)
    twice = [{**{name: row[name] for name in names}, "ref_chosen_logps": [row["ref_chosen_logps"]] * 2,
              "ref_rejected_logps": [row["ref_rejected_logps"]] * 2} for row in rows]  # fmt: skip
    several = made(tmp_path, model, rows=Dataset.from_list(twice), objective_object=MRPO(alpha=(0.5, 0.5)))
    assert logs(several)[0]["loss"] == pytest.approx(live[0]["loss"], **CLOSE)


def test_references_of_files_beside_columns_are_refused():
    rows = Dataset.from_list([{**row, "id": "a", "ref_chosen_logps": -1.0} for row in tokenised()])
    with pytest.raises(InputError, match="ref_scores: got files, and rows with ref_chosen_logps; need one of both"):
        with_scores(rows, ["a.parquet"], DPO(), None, per_token=False)


def test_values_at_labels_stop_where_an_answer_was_cut():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]])
    spread = at_labels(mask, [[-1.0, -2.0, -3.0], [-4.0]])
    assert spread.tolist() == [[0, 0, -1, -2], [0, -4, 0, 0]]


def test_the_likelihood_may_cover_the_prompt(tmp_path, model):
    trainer = made(
        tmp_path, model, objective="orpo", nll_on_prompt=True, max_steps=1, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, rows=Dataset.from_list(tokenised(8)),
    )  # fmt: skip
    plain = tiny_model(initializer_range=0.3)
    batch = trainer.collator([trainer.train_dataset[i] for i in range(8)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    whole = batch["input_ids"][:8].masked_fill(batch["attention_mask"][:8] == 0, -100)
    hidden = plain.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    expected = fused_preference_loss(hidden, plain.lm_head, labels, "orpo", nll_labels=whole)
    assert logs(trainer)[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_has_every_figure_pair_by_pair(tmp_path, model):
    trainer = made(
        tmp_path, model, objective="dpo", eval_dataset=Dataset.from_list(pairs(7)), eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=2,
    )  # fmt: skip
    figures = trainer.evaluate()
    assert figures["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert {"eval_rewards/margins", "eval_logps/chosen", "eval_log_odds/margins", "eval_entropy"} <= set(figures)
    assert trainer.evaluation.table.shape == (7, 5)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    seen = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
    assert rows[-1]["eval_num_tokens"] == seen[-1] > seen[0] > 0
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert rows[-1]["eval_loss"] == pytest.approx(trainer.evaluation.column("loss").mean())


def test_bf16_starts_at_ln_2(tmp_path, model):
    """Policy and reference run through the same kernel."""
    row = logs(made(tmp_path, model, objective="dpo", bf16=True, max_steps=1))[0]
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_dropout_is_off_in_attention_too(tmp_path):
    """TRL's disable_dropout leaves it on: DPO then starts beside ln 2, as the reference has none."""
    model = str(saved_tiny_model(tmp_path / "model", attention_dropout=0.5))
    assert logs(made(tmp_path, model, objective="dpo", max_steps=1))[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    on = made(tmp_path, model, objective="dpo", max_steps=1, disable_dropout=False)
    assert logs(on)[0]["loss"] != pytest.approx(0.6931472, abs=1e-4)


def test_state_of_objectives_resumes_to_the_bit(tmp_path, model):
    given = {"objective": "lmpo", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = made(tmp_path / "whole", model, **given)
    expected = logs(whole)
    resumed = made(tmp_path / "again", model, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    rows = [row for row in resumed.state.log_history if "loss" in row]
    for one, other in zip(rows, expected, strict=True):
        assert one["loss"] == other["loss"]
        assert one["unsureness"] == other["unsureness"]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    third = {**given, "objective": "simpo"}
    with pytest.raises(
        InputError, match=r"checkpoint-2 is of asft_kernels, objective lmpo, and this is .* simpo; need"
    ):
        made(tmp_path / "third", model, **third).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    (tmp_path / "whole" / "checkpoint-2" / "objective.pt").unlink()
    with pytest.raises(InputError, match=r"has no objective\.pt, need a checkpoint of the same objective"):
        made(tmp_path / "third", model, **given).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.config._name_or_path = "broken"
    config = PreferenceConfig(**options(tmp_path, objective="asft"))
    trainer = PreferenceTrainer(
        broken, args=config, train_dataset=Dataset.from_list(pairs(8)), processing_class=tiny_tokenizer()
    )
    broken.forward.head.checked, broken.forward.head.logits = True, broken.forward.head.guess
    with pytest.raises(InputError, match="the loss is nan after step 1; lower it"):
        trainer.train()


def test_no_checkpoint_is_written_after_a_loss_that_is_not_finite(tmp_path, model):
    given = {"learning_rate": 1e30, "logging_steps": 8, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    with pytest.raises(InputError, match="the loss is nan after step 4"):
        made(tmp_path / "a", model, **given).train()
    assert [path.name for path in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-2"]  # huge, not NaN
    with pytest.raises(InputError, match="the loss is nan after step 6"):
        made(tmp_path / "b", model, learning_rate=1e30, logging_strategy="no", max_steps=6).train()


REFUSED = [
    ({"loss_type": ["sigmoid"]}, "loss_type: got 'sigmoid', which is called objective here: need objective='dpo'"),
    ({"loss_type": []}, r"loss_type: got '\[\]', need objective, one of"),
    ({"loss_type": 3}, "loss_type: got 3, need objective, one of"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights: got 1 for 2 losses, need one each"),
    (
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3},
        "with ld_alpha, which objective cannot say: .*LDDPO, which w",
    ),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.5]}, "with loss_weights, which objective cannot say"),
    ({"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.5]}, "need objective='dpo .* 0.5 bco_pair'"),
    ({"loss_type": ["hinge"]}, r"need objective='hinge_norm\(gamma=0.1\)' in the place of loss_type$"),
    (
        {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.5},
        r"need objective='hinge_norm\(gamma=0.5\) \+ 0.3 sft\(normalization=token\)' in the place of loss_type, loss_w",
    ),
    ({"loss_type": ["robust"], "label_smoothing": 0.1}, r"need objective='robust\(label_smoothing=0.1\)' in the place"),
    (
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
        "lr_scheduler_kwargs: got {}, need those of the schedule 'polynomial' .*lr_end",
    ),
    ({"objective": "dpoo"}, "did you mean 'dpo'"),
    ({"objective": "asft", "objective_args": ["beta"]}, "objective_args: got 'beta', need a text NAME=VALUE"),
    ({"objective_args": [("lam", 0.5)]}, r"objective_args: got \('lam', 0.5\), need a text NAME=VALUE"),
    ({"objective_args": [{"lam": 0.5}]}, r"objective_args: got {'lam': 0.5}, need a text NAME=VALUE"),
    ({"objective_args": "lam=0.5"}, r"objective_args: got 'lam=0.5', need a list of texts such as \['beta=0.2'\]"),
    ({"objective_args": ["lam=1", "lam=2"]}, "objective_args: got lam twice, need it once"),
    ({"objective": "dpo + kto"}, r"objective: got 'dpo \+ kto', need kto by itself"),
    (
        {"objective": "mrpo", "objective_args": ["alpha=[0.5,0.5]"]},
        "objective: mrpo: alpha: got 2 weights for 1 references, need one each; ref_scores has a file",
    ),
    (
        {"objective": "mrpo(swap_weights=true) + 0.1 sft", "ref_scores": ["a", "b", "c"]},
        "objective: mrpo: swap_weights: got True with 3 references, need 2",
    ),
    ({"objective": "dpo", "ref_scores": ["a", "b"]}, "objective: DPO: got 2 references, need one; mrpo has more"),
    ({"lr_scheduler_kwargs": "{"}, r"lr_scheduler_kwargs: got '{', need JSON \("),
    ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs: got 'x', need a mapping, on the command line as JSON"),
    ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, r"got {'min_lr': 0.1}, need those of the schedule 'linear' \(.*min_lr"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "got {}, need those of the schedule 'cosine_with_min_lr' .*min_lr"),
    (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}},
        "lr_scheduler_kwargs: got {'num_cycles': 'x'}, need those of the schedule 'cosine' ",
    ),
    (
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 0.1}},
        "lr_scheduler_kwargs: got {'min_lr': 0.1}, need none: the schedule 'constant' takes none",
    ),
    (
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
        "got {'timescale': 0}, need those of the schedule 'inverse_sqrt' .*zero",
    ),
    ({"lr_scheduler_kwargs": {"last_epoch": 3}}, "got {'last_epoch': 3}, need those of the schedule 'linear'"),
    ({"train_sampling_strategy": "group_by_length"}, "got 'group_by_length', need a column 'length' of numbers in"),
    ({"accelerator_config": "no.json"}, "accelerator_config: got 'no.json', need JSON .* or a file of it"),
    ({"objective": "dpo + sft", "beta": 0.3}, r"got 'dpo \+ sft' and beta beside it, need param"),
    ({"objective": "asft", "f_divergence_type": "forward_kl"}, "asft: got the parameter 'f_divergence_type'"),
    ({"method": "sapoo"}, "method: got 'sapoo', need one of"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_what_is_not_understood_is_refused_by_name(tmp_path, model, changes, says):
    with pytest.raises(InputError, match=says):
        made(tmp_path, model, **changes)


def test_a_schedule_is_tried_with_the_rate_that_is_given(tmp_path):
    kwargs = {"lr_end": 2e-3}
    PreferenceConfig(
        **options(tmp_path, lr_scheduler_type="polynomial", learning_rate=1e-2, lr_scheduler_kwargs=kwargs)
    )


def test_a_stream_of_references_is_not_read_ahead():
    read = []

    def rows():
        for row in range(100):
            read.append(row)
            yield {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}

    features = Features({f"ref_{side}_logps": Value("float64") for side in ("chosen", "rejected")})
    require_references(DPO(), None, [IterableDataset.from_generator(rows, features=features)])
    assert len(read) < 10


def test_rows_with_sums_of_too_many_references_are_refused(tmp_path, model):
    rows = Dataset.from_list([{**row, "ref_chosen_logps": [-1.0, -2.0], "ref_rejected_logps": [-1.0, -2.0]}
                              for row in tokenised()])  # fmt: skip
    with pytest.raises(InputError, match="objective: DPO: got 2 references, need one"):
        made(tmp_path, model, rows=rows, objective="dpo")
    given = {"rows": rows, "max_steps": 1}
    alone = logs(made(tmp_path, model, **given, objective="mrpo", objective_args=["alpha=(0.5, 0.5)"]))
    both = logs(made(tmp_path, model, **given, objective="mrpo(alpha=(0.5, 0.5)) + 0.1 sft"))
    assert both[0]["loss"] == pytest.approx(alone[0]["loss"] + 0.1 * alone[0]["sft_loss"], rel=1e-5)  # fp32


def test_models_and_data_that_are_none_are_refused(tmp_path):
    unnamed, rows = tiny_model(), Dataset.from_list(pairs(2))
    args = PreferenceConfig(**options(tmp_path, objective="dpo"))
    for given, message in (
        ({"model": unnamed}, "model: got an object .* need processing_class, its tokenizer"),
        ({"model": unnamed, "processing_class": tiny_tokenizer()}, "model: got an object .* need ref_model beside it"),
        ({"model": tmp_path}, "model: got PosixPath, need the name or the folder of one, as a text"),
        ({"model": unnamed, "train_dataset": pairs(2)}, "train_dataset: got list, need a datasets.Dataset"),
        ({"model": unnamed, "train_dataset": rows.select([])}, "train_dataset: got no rows, need preference pairs"),
        (
            {
                "model": unnamed,
                "ref_model": tiny_model(),
                "processing_class": tiny_tokenizer(),
                "train_dataset": rows.rename_column("rejected", "worse"),
            },
            r"train_dataset: got the columns prompt, chosen, worse, need rejected as well; dataset\.rename_column",
        ),
    ):
        with pytest.raises(InputError, match=message):
            PreferenceTrainer(**{"train_dataset": rows, **given}, args=args)
    PreferenceTrainer(unnamed, ref_model=tiny_model(), args=args, train_dataset=rows, processing_class=tiny_tokenizer())


def test_other_kinds_of_arguments_are_refused(tmp_path, model):
    with pytest.raises(InputError, match="args: got DPOConfig, need PreferenceConfig"):
        made(tmp_path, model, config=DPOConfig)
    bmc = get_objective("bmc", base="dpo", ref_weighting="policy")
    with pytest.raises(InputError, match="precompute_ref_log_probs: got True, need False"):
        made(tmp_path, model, objective_object=bmc, precompute_ref_log_probs=True)


def test_dpos_module_is_as_it_was():
    from trl.trainer import dpo_trainer, utils

    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head
    assert dpo_trainer.create_model_from_path is utils.create_model_from_path


def test_a_name_has_the_parameters_of_the_arguments(tmp_path, model):
    """A TRL script that is moved by one line keeps its beta."""
    trainer = made(tmp_path, model, objective_object="dpo", beta=5.0)
    assert trainer.objective == DPO(beta=5.0)
    with pytest.raises(InputError, match=r"beta: got 5.0 beside an objective object, need it in that object"):
        made(tmp_path, model, objective_object=DPO(), beta=5.0)


def test_model_cards_name_what_trained(tmp_path, model):
    for objective, said in (
        (
            "dpo(beta=0.2)",
            "objective dpo(beta=0.2), a method introduced in [arXiv 2305.18290](https://huggingface.co/pap",
        ),
        ("dpo + 0.1 sft", "objective dpo + 0.1 sft."),
    ):
        trainer = made(tmp_path, model, objective=objective)
        trainer.create_model_card()
        assert f"was trained with asft_kernels, {said}" in (tmp_path / "README.md").read_text()


def test_evaluation_moves_no_statistics(tmp_path, model):
    given = {"objective": "lmpo", "max_steps": 2, "gradient_accumulation_steps": 1}
    alone = made(tmp_path / "a", model, **given)
    evaluated = made(
        tmp_path / "b", model, eval_dataset=Dataset.from_list(pairs(6)), eval_strategy="steps", eval_steps=1, **given
    )
    assert [row["loss"] for row in logs(alone)] == [row["loss"] for row in logs(evaluated)]
    assert evaluated.objective.steps == alone.objective.steps == 2


def test_a_reference_that_moves_is_in_checkpoints(tmp_path, model):
    given = {
        "objective": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 1e-2, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    expected = logs(made(tmp_path / "a", model, **given))
    resumed = made(tmp_path / "b", model, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    found = [row for row in resumed.state.log_history if "loss" in row]
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    with pytest.raises(InputError, match="sync_ref_model: got True, need False: the objective has no reference"):
        made(tmp_path, model, objective="asft", sync_ref_model=True)


def test_references_of_the_data_are_of_the_tokens_that_are_trained(tmp_path, model):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in tokenised()]
    with pytest.raises(InputError, match=r"max_length: got 20, need at least \d+ for row \d+ of training"):
        made(tmp_path, model, rows=Dataset.from_list(rows), objective="dpo", max_length=20)
    with pytest.raises(InputError, match="truncation_mode: got 'keep_end', need 'keep_start'"):
        made(tmp_path, model, rows=Dataset.from_list(rows), objective="dpo", truncation_mode="keep_end")
    rows = [{**row, "ref_chosen_token_logps": [-1.0], "ref_rejected_token_logps": [-1.0]} for row in tokenised()]
    with pytest.raises(InputError, match=r"ref_chosen_token_logps: got 1 values for an answer of \d+ tokens"):
        made(tmp_path, model, rows=Dataset.from_list(rows), objective="dpo").train()


def test_precomputed_references_follow_what_cuts_the_rows(tmp_path, model):
    """TRL's cache of them lies beside a data set on disk and knows nothing of max_length."""
    Dataset.from_list(tokenised()).save_to_disk(tmp_path / "rows")
    for max_length in (64, 20):
        trainer = made(
            tmp_path, model, rows=Dataset.load_from_disk(tmp_path / "rows"), objective="dpo", max_steps=1,
            precompute_ref_log_probs=True, max_length=max_length,
        )  # fmt: skip
        assert logs(trainer)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_given_adapter_is_compared_with_as_it_came(tmp_path, model):
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny_model(initializer_range=0.3), lora)
    assert logs(made(tmp_path, adapted, objective="dpo"))[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_bf16_starts_at_ln_2_with_precomputed_references(tmp_path, model):
    row = logs(made(tmp_path, model, objective="dpo", bf16=True, max_steps=1, precompute_ref_log_probs=True))[0]
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_the_reference_has_no_dropout(tmp_path):
    """Asked twice while the policy trains with dropout, it says the same."""
    model = str(saved_tiny_model(tmp_path / "model", attention_dropout=0.5))
    trainer = made(tmp_path, model, objective="dpo", disable_dropout=False)
    batch = trainer.collator([trainer.train_dataset[i] for i in range(2)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    trainer.model.train()
    one, other = (trainer.token_logps(trainer.model, batch, labels) for _ in range(2))
    assert torch.equal(one, other)
    assert trainer.model.training


def test_the_likelihood_on_the_prompt_needs_a_likelihood(tmp_path, model):
    with pytest.raises(InputError, match="nll_on_prompt: got True, need False"):
        made(tmp_path, model, objective="dpo", nll_on_prompt=True)


def test_objectives_may_be_given_as_objects(tmp_path, model):
    one = logs(made(tmp_path, model, objective_object=DPO(beta=0.5)))
    other = logs(made(tmp_path, model, objective="dpo", beta=0.5))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]


@dataclass(frozen=True)
class Margin(Objective):
    """One of a user's own."""

    margin: float

    def __call__(self, policy, ref_logps=None, **inputs):
        loss = torch.relu(self.margin - (policy.chosen.avg - policy.rejected.avg))
        metrics = {"chosen_reward": policy.chosen.avg.detach(), "rejected_reward": policy.rejected.avg.detach()}
        return LossTerms(loss, -policy.chosen.avg, loss, metrics)


def test_an_objective_of_ones_own_is_logged_and_knows_its_checkpoints(tmp_path, model):
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    row = logs(made(tmp_path / "one", model, objective_object=Margin(0.5), **steps))[0]
    assert row["rewards/chosen"] == pytest.approx(row["avg_logps/chosen"], rel=1e-6)
    checkpoint = str(tmp_path / "one" / "checkpoint-2")
    made(tmp_path / "two", model, objective_object=Margin(0.5), **steps).train(resume_from_checkpoint=checkpoint)
    other = made(tmp_path / "three", model, objective_object=Margin(5.0), **steps)
    with pytest.raises(InputError, match=r"objective Margin\(margin=0.5\), and this is .* Margin\(margin=5.0\); need"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_mixture_of_experts_has_its_load_balancing_loss(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, router_aux_loss_coef=0.3, max_position_embeddings=256,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    own = logs(made(tmp_path / "ours", str(tmp_path / "model"), objective="dpo", **given))
    trl = logs(made(tmp_path / "trl", str(tmp_path / "model"), trainer=DPOTrainer, config=DPOConfig, **given))
    for one, other in zip(own, trl, strict=True):
        assert one["aux_loss"] == pytest.approx(other["aux_loss"], **CLOSE)
        assert one["loss"] + 0.3 * one["aux_loss"] == pytest.approx(other["loss"], **CLOSE)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_means_of_score_files_are_over_their_own_lengths(tmp_path, model):
    """A reference with another tokenizer has another number of tokens: poft reads its mean as the file has it."""
    from asft_kernels.data import load_pairs
    from asft_kernels.score.table import tokenizer_fingerprint, write_scores

    rows, _ = load_pairs(str(write_lines(tmp_path / "pairs.jsonl", pairs(4))), tiny_tokenizer())
    sides = {"chosen_logps": -30.0, "chosen_length": 10, "rejected_logps": -8.0, "rejected_length": 4}
    metadata = {
        "model": "m", "tokenizer": tokenizer_fingerprint(tiny_tokenizer()), "data": "d", "max_length": 64,
        "token_logps": False,
    }  # fmt: skip
    write_scores(tmp_path / "m.parquet", [{"id": r["id"], "line": r["line"], **sides} for r in rows], metadata)
    trainer = made(tmp_path, model, rows=rows, objective="poft", ref_scores=[str(tmp_path / "m.parquet")])
    batch = trainer.collator([trainer.train_dataset[i] for i in range(4)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    assert trainer._reference(None, batch, labels, {}).tolist() == [-3.0] * 4 + [-2.0] * 4


def test_memory_is_logged_on_a_gpu(model, tmp_path, monkeypatch):
    """A log as it would be there; a CPU's rows have none."""
    trainer = made(tmp_path, model, objective="sft", max_steps=1)
    assert "peak_bytes" not in logs(trainer)[0]
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    one = torch.ones(())
    trainer.windows["train"].add({"loss": (one, one), "tokens": (one, one * 0)})
    trainer.window_start = 0.0
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["peak_bytes"] == 7
