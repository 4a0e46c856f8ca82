"""asft-train with every objective: what needs a reference, marks or state gets it, live or from files of asft-score."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("accelerate", reason="needs the train extra: accelerate")
pytest.importorskip("matplotlib", reason="needs the train extra: matplotlib")

from asft_kernels.train.arguments import JobArguments
from asft_kernels.train.on_pairs import OnPairs, on_pairs

from asft_kernels import fused_linear_logps
from asft_kernels.cli.score import main as score
from asft_kernels.data import PairCollator, load_pairs
from asft_kernels.methods.bmc.diff_marks import diff_marks
from asft_kernels.models import PreferenceModel
from asft_kernels.objectives import BMC, KTO, MRPO, OBJECTIVES, SFT, PoFT, get_objective
from asft_kernels.sequence import Logps
from asft_kernels.train import main
from asft_kernels.train.reference import ObjectiveCollator, with_reference
from tiny_lm import pairs, saved_sae, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

LIMITS = ["--max-length", "64", "--max-prompt-length", "32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model, data): no dropout, so that policy and reference agree before the first step."""
    folder = tmp_path_factory.mktemp("files")
    return saved_tiny_model(folder / "model"), write_lines(folder / "pairs.jsonl", pairs(12))


def trained(files, folder, *options, steps=2):
    """Training rows of metrics.jsonl."""
    model, data = files
    common = ["--model", str(model), "--data", str(data), *LIMITS, "--disable-tqdm", "true", "--learning-rate", "1e-2"]
    common += ["--per-device-train-batch-size", "4", "--max-steps", str(steps), "--eval-every-nth", "4"]
    assert main([*common, "--output-dir", str(folder), *options]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


OWN_COMMANDS = {"dnpo"}
ARGUMENTS = {"bmc": ["base=dpo"], "fpo": ["top_k=4"]}
# -log sigmoid(0): all of these look at log-ratios alone, and at the start every one is 0.
AT_LOG_2 = ["dpo", "robust", "sigmoid_norm", "mrpo", "poft", "fpo"]


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in OWN_COMMANDS])
def test_every_objective_trains(files, tmp_path, name):
    given = ARGUMENTS.get(name, [])
    sae = ["--sae", str(saved_sae(tmp_path / "sae.npz"))] if name == "fpo" else []
    rows = trained(files, tmp_path, "--objective", name, *sae, *(["--objective-args", *given] if given else []))
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    if name in AT_LOG_2:
        # Margins are differences of fp32 sums of 30 tokens at 5.6 nats: 1e-5 at most, a tenth of it in the loss.
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[1]["loss"] != pytest.approx(math.log(2), abs=1e-5)
    if name == "kto":
        assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)


def test_ld_alpha_begins_at_log_2_and_goes_on_as_another_loss(files, tmp_path):
    """The reference's tokens weigh what the policy's do."""
    losses = [
        [row["loss"] for row in trained(files, tmp_path / name, "--objective", "dpo", *given)]
        for name, given in (("ld", ["--objective-args", "ld_alpha=0.2"]), ("dpo", []))
    ]
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[0][1] != pytest.approx(losses[1][1], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dpo", ["use_weighting=True"]),
        ("ipo", ["use_weighting=True", "ld_alpha=0.5"]),
        ("sft", ["label_smoothing=0.1", "lse_square_scale=0.01"]),
    ],
)
def test_losses_of_figures_per_token_train(files, tmp_path, name, arguments):
    figures, plain = (
        trained(files, tmp_path / str(i), "--objective", name, *(["--objective-args", *given] if given else []))
        for i, given in enumerate((arguments, []))
    )
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in figures)
    assert figures[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)


def test_ld_alpha_takes_one_reference(files, tmp_path, capsys):
    model, data = files
    given = ["--objective", "dpo", "--objective-args", "ld_alpha=0.5", "--ref-scores", "a", "b"]
    assert main(["--model", str(model), "--data", str(data), "--output-dir", str(tmp_path / "x"), *given]) != 0
    assert "--ref-scores: got 2 files, need one: dpo has one reference" in capsys.readouterr().err


@pytest.mark.parametrize("weighting", ["own", "policy"])
def test_bmc_begins_at_log_2_with_either_weighting(files, tmp_path, weighting):
    """The reference's weighted sums are the policy's: each log-probability stands at its token, with its own mark."""
    options = ["--objective", "bmc", "--objective-args", "base=dpo", "delta=1.5", f"ref_weighting={weighting}"]
    assert trained(files, tmp_path, *options)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dpo", []),
        ("poft", []),
        ("bmc", ["base=dpo"]),
        ("bmc", ["base=dpo", "ref_weighting=policy"]),
        ("dpo", ["ld_alpha=0.5"]),
    ],
)
def test_scores_of_a_file_are_those_of_the_model(files, tmp_path, name, arguments):
    model, data = files
    scored = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "scores"), "--token-logps"]
    assert score([*scored, *LIMITS]) == 0
    (file,) = (tmp_path / "scores").glob("*.parquet")
    objective = ["--objective", name, *(["--objective-args", *arguments] if arguments else [])]
    live = trained(files, tmp_path / "live", *objective)
    from_file = trained(files, tmp_path / "file", *objective, "--ref-scores", str(file))
    for one, other in zip(live, from_file, strict=True):  # batches of another order round otherwise
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_two_references_reach_mrpo(files, tmp_path):
    model, data = files
    other = saved_tiny_model(tmp_path / "other", initializer_range=0.5)
    names = ["--model", str(model), "--model", str(other)]
    assert score([*names, "--data", str(data), "--output", str(tmp_path / "scores"), *LIMITS]) == 0
    found = sorted(map(str, (tmp_path / "scores").glob("*.parquet")))
    own = next(path for path in found if path.endswith("model.parquet"))
    both = [own, *(path for path in found if path != own)]
    loss = trained(files, tmp_path / "two", "--objective", "mrpo", "--ref-scores", *both)[0]["loss"]
    assert abs(loss - math.log(2)) > 1e-3


def test_marks_and_prompt_labels_stand_at_their_tokens():
    data = {"prompt": [5, 6], "chosen": [7, 8, 9], "rejected": [7, 4]}
    marks = diff_marks(data["chosen"], data["rejected"])
    pair = {**data, "chosen_marks": marks[0], "rejected_marks": marks[1]}
    pair |= {"ref_chosen_token_logps": [-1.0, -2.0, -3.0], "ref_rejected_token_logps": [-4.0, -5.0]}
    batch = ObjectiveCollator(0, nll_on_prompt=True)([pair])
    assert batch["token_weights"][:, :6].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]
    assert batch["ref_logps"][:, :6].tolist() == [[0, -1, -2, -3, 0, 0], [0, -4, -5, 0, 0, 0]]
    assert batch["nll_labels"][:, :6].tolist() == [[5, 6, 7, 8, 9, -100]]


def test_bmc_weighs_no_token_of_the_likelihood_term(files, tmp_path):
    """The authors' code for ORPO: ours reports -avg of the chosen answers, whatever delta, and trains on that."""
    objective = ["--objective", "bmc", "--objective-args", "base=orpo"]
    weighted = trained(files, tmp_path / "bmc", *objective, "delta=9.0")[0]
    plain = trained(files, tmp_path / "orpo", "--objective", "orpo")[0]
    assert weighted["sft"] == pytest.approx(plain["sft"], rel=1e-5)
    assert weighted["align"] != pytest.approx(plain["align"], rel=1e-2)
    assert weighted["loss"] - plain["loss"] == pytest.approx(0.1 * (weighted["align"] - plain["align"]), rel=1e-3)


def test_reference_per_token_has_the_layout_of_the_fused_call(tmp_path):
    dataset, _ = load_pairs(write_lines(tmp_path / "p.jsonl", pairs(3)), tiny_tokenizer())
    model = PreferenceModel(tiny_model(), BMC("dpo", ref_weighting="policy"))
    options = {"scores": [], "tokenizer": tiny_tokenizer(), "batch_size": 2, "label": "reference", "max_length": 64}
    rows = [with_reference(dataset, model, **options)[i] for i in range(3)]
    batch = ObjectiveCollator(0)(rows)
    plain = PairCollator(0)(rows)
    hidden = model.hidden_states(plain["input_ids"], plain["attention_mask"])
    own = fused_linear_logps(hidden, model.lm_head, plain["labels"])
    # The same products in batches of other padding: fp32 sums of 16 terms, and V = 259.
    torch.testing.assert_close(batch["ref_logps"], own.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lmpo", "lmpo + 0.1 sft", "bmc"])
def test_state_of_an_objective_is_resumed(files, tmp_path, name):
    given = ["--objective-args", "base=lmpo"] if name == "bmc" else []
    objective = ["--objective", name, *given, "--save-steps", "2", "--lr-scheduler-type", "constant"]
    whole = trained(files, tmp_path / "whole", *objective, steps=4)
    trained(files, tmp_path / "cut", *objective, steps=2)
    resumed = trained(files, tmp_path / "cut", *objective, "--resume", steps=4)
    for one, other in zip(whole, resumed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["target_margin"] == pytest.approx(other["target_margin"], rel=1e-6)


@pytest.mark.parametrize("name", ["poft + sft", "simpo + 0.1 poft"])
def test_a_sum_with_poft_reads_means_per_token(tmp_path, name):
    """As poft alone: the columns hold means, of -5.6 nats a token at random weights, and not sums of some 30 tokens."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    data = write_lines(tmp_path / "pairs.jsonl", pairs(4))
    dataset, _ = load_pairs(data, tokenizer, max_length=64, max_prompt_length=32)
    options = {"scores": [], "tokenizer": tokenizer, "batch_size": 2, "label": "reference", "max_length": 64}
    columns = [
        with_reference(dataset, PreferenceModel(model, on_pairs(get_objective(x))), **options) for x in ("poft", name)
    ]
    for side in ("ref_chosen_logps", "ref_rejected_logps"):
        assert columns[0][side] == columns[1][side]
        assert all(-10 < value < -1 for row in columns[1][side] for value in row)


@pytest.mark.parametrize(("given", "expected"), [("false", False), ("False", False), ("true", True), ("TRUE", True)])
def test_truth_values_among_the_parameters(given, expected):
    job = JobArguments(model="m", data="d", objective="mrpo", objective_args=[f"swap_weights={given}", "clip=none"])
    assert job.build_objective() == MRPO(swap_weights=expected, clip=None)


def test_single_answers_on_pairs_see_pairs_that_count():
    sums = torch.tensor([-3.0, -8.0, -5.0, 0.0], dtype=torch.float64)  # the second pair has an empty rejected answer
    policy = Logps(sums, torch.tensor([2, 4, 5, 0]))
    assert OnPairs(SFT("token"))(policy).loss[0].item() == 3.0 / 2
    ref = torch.tensor([-1.0, -2.0, -9.0, -9.0], dtype=torch.float64)
    assert OnPairs(PoFT())(policy, ref).loss[0].item() == pytest.approx(math.log1p(math.exp(1.5 - 1)), rel=1e-12)
    kto = OnPairs(KTO(beta=1.0, undesirable_weight=2.0))(policy, policy.sum - 1.0).loss[0].item()
    good, bad = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(-1))
    assert kto == pytest.approx((good + 2 * bad) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--objective", "fpo"], "--sae: fpo needs the file of an autoencoder"),
        (["--objective", "fpo", "--sae", "nosuch.npz"], "--sae: nosuch.npz: no such file"),
        (["--objective", "dpo", "--sae", "a.npz"], "--sae: got a.npz, need none: dpo reads no features"),
        (["--objective", "bmc", "--objective-args", "base=fpo"], "bmc has fpo for its base"),
        (["--objective", "dpo + kto"], "got dpo + kto, need kto by itself"),
        (["--objective", "kto + 0.1 sft"], "got kto + 0.1 sft, need kto by itself"),
        (["--objective", "kto", "--ref-scores", "a.parquet"], "its reference is --model as it comes"),
        (["--objective", "dnpo"], "python -m asft_kernels.methods.dnpo"),
        (["--objective", "dnpo + sft"], "python -m asft_kernels.methods.dnpo"),
        (["--objective", "bmc", "--objective-args", "base=dnpo + sft"], "python -m asft_kernels.methods.dnpo"),
        (["--objective", "bmc"], "--objective: bmc: base: got None, need a name such as 'dpo'"),
        (["--objective", "dpo + poft"], "--objective: weighted sum: got DPO, whose ref_logps are sums and PoFT"),
        (["--objective", "mrpo", "--objective-args", "swap_weights=no"], "mrpo: swap_weights: got 'no', need True or"),
        (["--objective", "nosuch"], "--objective: got 'nosuch', need one of 'asft'"),
        (["--objective", "dpo", "--objective-args", "beta"], "--objective-args: got 'beta', need NAME=VALUE"),
        (["--objective", "dpo + sft", "--objective-args", "beta=1"], "--objective: got the sum 'dpo + sft' and values"),
        (["--objective", "dpo", "--lam", "2"], "dpo: got the parameter 'lam', need one of beta, label_smoothing"),
        (["--ref-scores", "a.parquet"], "--ref-scores: got files, need none: asft has no reference"),
        (["--objective", "dpo", "--nll-on-prompt"], "--nll-on-prompt: dpo has no separate likelihood term"),
        (["--objective", "dpo", "--ref-scores", "nosuch.parquet"], "nosuch.parquet"),
    ],
)
def test_errors(files, tmp_path, capsys, arguments, text):
    model, data = files
    assert main(["--model", str(model), "--data", str(data), "--output-dir", str(tmp_path), *LIMITS, *arguments]) == 2
    assert text in capsys.readouterr().err
