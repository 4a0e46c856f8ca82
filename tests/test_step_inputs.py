"""asft-train with fpo and kto: what the model makes at every step, against plain computations of it."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("accelerate", reason="needs the train extra: accelerate")

from asft_kernels.train.on_pairs import on_pairs

from asft_kernels import fused_preference_loss
from asft_kernels.data import PairCollator, load_pairs
from asft_kernels.errors import InputError
from asft_kernels.methods.fpo import SparseAutoencoder, feature_distance, pooled_features, read_sae, write_sae
from asft_kernels.methods.fpo.cache import ReferenceFeatures, write_reference_features
from asft_kernels.methods.fpo.hidden import hidden_states
from asft_kernels.models import PreferenceModel
from asft_kernels.objectives import FPO, KTO
from asft_kernels.train import main
from asft_kernels.train.reference import ObjectiveCollator, with_reference
from asft_kernels.train.step_inputs import FeatureInputs, MismatchInputs
from bounds import fp32_bound, relative_error
from tiny_lm import pairs, saved_sae, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

MAX_LENGTH = 20  # some answers are cut


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(7))
    return load_pairs(path, tiny_tokenizer(), max_length=MAX_LENGTH)[0]


def plain_sums(model, prompt, answer):
    """(S, m) of one answer from the model's own logits."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(answer))


@pytest.fixture
def kto_batch(loaded):
    """(PreferenceModel with moved weights, the reference, three collated pairs)."""
    model = PreferenceModel(tiny_model().double(), on_pairs(KTO()), step_inputs=MismatchInputs())
    options = {"scores": [], "tokenizer": tiny_tokenizer(), "batch_size": 3, "label": "reference"}
    scored = with_reference(loaded, model, **options, max_length=MAX_LENGTH)
    return model, scored, ObjectiveCollator(0)([scored[i] for i in (4, 0, 6)])


def test_the_reference_point_is_that_of_other_pairs_answers(loaded, kto_batch):
    model, _, batch = kto_batch
    reference = tiny_model().double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # towards the answers, so that the mean is above 0
        for weight in model.model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    model.eval()
    gains = []
    for row in (4, 0, 6):
        prompt, other = loaded[row]["prompt"], loaded[(row + 3) % 7]
        for side in ("chosen", "rejected"):
            answer = other[side][: MAX_LENGTH - len(prompt)]
            gains.append((plain_sums(model.model, prompt, answer) - plain_sums(reference, prompt, answer)).item())
    mean = sum(gains) / len(gains)
    entries = {name: batch[name] for name in MismatchInputs.batch_entries}
    with model.step_inputs(model, batch["labels"], **entries) as made:
        inputs = made(None)
    # fp64 throughout: sums of 60 tokens.
    assert inputs["kl"].item() == pytest.approx(max(mean, 0), rel=1e-9, abs=1e-9)
    swapped = {**entries, "mismatched_ref_logps": entries["mismatched_ref_logps"] + 2 * mean}
    with model.step_inputs(model, batch["labels"], **swapped) as made:
        other = made(None)
    assert other["kl"].item() == pytest.approx(max(-mean, 0), rel=1e-9, abs=1e-9)
    assert {inputs["kl"].item(), other["kl"].item()} > {0.0}, "one of the two must be held at 0, one not"


def test_the_loss_takes_the_reference_point(kto_batch):
    model, _, batch = kto_batch
    batch = {**batch, "mismatched_ref_logps": batch["mismatched_ref_logps"] - 5.0}
    out = model(**batch)
    # The policy still is the reference: ratios are 0, so kl = 5 alone moves the two halves.
    good, bad = 1 - torch.tensor(-0.5).sigmoid(), 1 - torch.tensor(0.5).sigmoid()
    assert out["loss"].item() == pytest.approx((good.item() + bad.item()) / 2, rel=1e-6)
    assert out["metrics"]["chosen_kl"].item() == pytest.approx(5.0, rel=1e-9)
    out["loss"].backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_mismatched_answers_fit_and_are_of_other_pairs(loaded, kto_batch):
    _, scored, _ = kto_batch
    assert any(len(scored[row]["mismatched_chosen"]) < len(loaded[(row + 3) % 7]["chosen"]) for row in range(7))
    for row in range(7):
        for side in ("chosen", "rejected"):
            answer, other = scored[row][f"mismatched_{side}"], loaded[(row + 3) % 7][side]
            assert answer == other[: len(answer)]
            assert len(answer) == min(len(other), MAX_LENGTH - len(scored[row]["prompt"]))


def test_one_pair_has_no_other_answers(loaded):
    model = PreferenceModel(tiny_model(), on_pairs(KTO()), step_inputs=MismatchInputs())
    options = {"scores": [], "tokenizer": tiny_tokenizer(), "batch_size": 2, "label": "reference"}
    with pytest.raises(InputError, match="got 1 pair, need at least 2"):
        with_reference(loaded.select([0]), model, **options, max_length=MAX_LENGTH)


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fpo_of_the_model_is_that_of_its_parts(loaded, tmp_path, layer, checkpointing):
    sae = read_sae(saved_sae(tmp_path / "sae.npz"))
    reference, batch = tiny_model(seed=3), PairCollator(0)([loaded[i] for i in (5, 1, 2)])
    write_reference_features(tmp_path / "ref.arrow", reference, sae, loaded, layer=layer, batch_size=2)
    features = ReferenceFeatures(tmp_path / "ref.arrow", sae, layer=layer)
    objective = FPO(beta=0.7, alpha=50.0, top_k=4)  # alpha: large enough that the features' part of the gradient shows
    model = PreferenceModel(tiny_model(), objective, step_inputs=FeatureInputs(sae, layer, 4))
    model.train()
    ref_logps = -torch.rand(6, dtype=torch.float64) * 20
    given = ObjectiveCollator(0, features=features)([loaded[i] for i in (5, 1, 2)])
    if checkpointing:
        model.activation_checkpointing_enable()
    model(**given, ref_logps=ref_logps)["loss"].backward()
    got = {name: weight.grad for name, weight in model.model.named_parameters()}

    plain = tiny_model()
    plain.train()
    with torch.no_grad():
        _, ref_hidden = hidden_states(reference, batch["input_ids"], batch["attention_mask"], layer)
        ref_pooled = pooled_features(sae, ref_hidden, batch["labels"])
    # float16 in the file: 2^-11 of each entry, and fp32 sums of 16 terms in batches of other padding.
    torch.testing.assert_close(given["ref_pooled"], ref_pooled, rtol=2**-11 + 1e-5, atol=1e-5)
    last, hidden = hidden_states(plain, batch["input_ids"], batch["attention_mask"], layer)
    distance = feature_distance(pooled_features(sae, hidden, batch["labels"]), given["ref_pooled"], 4)
    assert distance.min() > 0
    fused_preference_loss(
        last, plain.lm_head, batch["labels"], objective, ref_logps=ref_logps,
        objective_inputs={"feature_distance": distance},
    ).backward()  # fmt: skip
    for name, weight in plain.named_parameters():
        # The same operations, but the gradients of loss and features may be added in another order.
        assert relative_error(got[name], weight.grad) <= fp32_bound(1)


def test_a_resumed_run_of_fpo_keeps_its_autoencoder(tmp_path, capsys):
    model, data = saved_tiny_model(tmp_path / "model"), write_lines(tmp_path / "pairs.jsonl", pairs(8))
    common = ["--model", str(model), "--data", str(data), "--max-length", "64", "--max-prompt-length", "32"]
    common += ["--disable-tqdm", "true", "--objective", "fpo", "--objective-args", "top_k=4"]
    common += ["--per-device-train-batch-size", "4", "--save-steps", "2", "--output-dir", str(tmp_path / "run")]
    common += ["--learning-rate", "1e-2", "--lr-scheduler-type", "constant"]
    sae, other = (str(saved_sae(tmp_path / name)) for name in ("sae.npz", "other.npz"))
    assert main([*common, "--sae", sae, "--max-steps", "2"]) == 0
    capsys.readouterr()
    assert main([*common, "--sae", other, "--max-steps", "4", "--resume"]) == 2
    assert "--resume: --sae was" in capsys.readouterr().err
    assert main([*common, "--sae", sae, "--max-steps", "4", "--resume"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    distances = [row["rejected_feature_distance"] for row in rows if row["kind"] == "train"]
    assert len(distances) == 4
    assert distances[0] < 1e-6 < distances[-1], "the reference is the model as it came, in the resumed run too"


@pytest.mark.parametrize(
    ("size", "features", "arguments", "text"),
    [
        (16, 3, [], "--objective-args: top_k: got 50, need at most 3"),
        (8, 60, [], "is of hidden size 8, need 16"),
        (16, 60, ["--sae-layer", "9"], "--sae-layer: layer: got 9"),
    ],
)
def test_autoencoders_that_do_not_fit(tmp_path, capsys, size, features, arguments, text):
    model, data = saved_tiny_model(tmp_path / "model"), write_lines(tmp_path / "pairs.jsonl", pairs(8))
    zeros = torch.zeros(size, features)
    write_sae(SparseAutoencoder(zeros, zeros[0], zeros.T, zeros[:, 0]), tmp_path / "a.npz")
    given = ["--model", str(model), "--data", str(data), "--objective", "fpo", "--sae", str(tmp_path / "a.npz")]
    given += ["--output-dir", str(tmp_path / "run"), "--max-length", "64"]
    assert main([*given, *arguments]) == 2
    assert text in capsys.readouterr().err
