"""Autoencoders on a tiny language model: layers, reference features by pair, training, FPO end to end."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from trl.trainer.dpo_trainer import DataCollatorForPreference

from asft_kernels import fused_preference_loss
from asft_kernels.cli.data import main as data_main
from asft_kernels.data import load_pairs, with_labels
from asft_kernels.methods.fpo import SparseAutoencoder, fpo_inputs, pooled_features, read_sae, write_sae
from asft_kernels.methods.fpo.cache import ReferenceFeatures, write_reference_features
from asft_kernels.methods.fpo.collect import collect_tokens
from asft_kernels.methods.fpo.hidden import hidden_states
from asft_kernels.methods.fpo.training import Trainer, quality
from asft_kernels.objectives import get_objective
from test_sae import make_sae, plain_distance, plain_pooled
from tiny_lm import pairs, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

D, F = 16, 40


@pytest.fixture
def data(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", pairs(32))


@pytest.fixture
def loaded(data):
    return load_pairs(data, tiny_tokenizer(), max_length=64)[0]


def test_layers_are_what_transformers_gives():
    model = tiny_model(num_hidden_layers=3).eval()
    ids = torch.randint(3, 200, (2, 9))
    own = model(ids, output_hidden_states=True).hidden_states  # embeddings, blocks 0 and 1, the head's input
    for layer, expected in ((0, own[1]), (1, own[2]), (-1, own[-1])):
        last, hidden = hidden_states(model, ids, layer=layer)
        assert torch.equal(last, own[-1])
        assert torch.equal(hidden, expected)
    _, before_norm = hidden_states(model, ids, layer=2)
    assert torch.equal(model.model.norm(before_norm), own[-1])
    before_norm.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=rf"layer: got {wrong}, need -1 .* 0 to 2, a block of LlamaForCausalLM"):
            hidden_states(model, ids, layer=wrong)


@pytest.mark.parametrize("layer", [-1, 0])
def test_reference_features_come_back(tmp_path, loaded, layer):
    jump = layer == -1  # an untrained block's output is too small for a threshold
    model, sae, path = tiny_model().eval(), make_sae(jump, D, F), tmp_path / "ref.arrow"
    write_reference_features(path, model, sae, loaded, layer=layer, batch_size=5)
    stored = ReferenceFeatures(path, sae, layer=layer, pairs=loaded)
    some = [loaded[i] for i in (7, 0, 30)]
    batch = with_labels(DataCollatorForPreference(0)(some))
    with torch.no_grad():
        _, hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"], layer)
        pooled = pooled_features(sae, hidden, batch["labels"])
    got = stored.pooled([pair["id"] for pair in some])
    # Rounded once to fp16; other shapes of the same fp32 sums, so a feature at its threshold may flip.
    assert torch.isclose(got, pooled, rtol=2**-11 + 1e-5, atol=1e-6).double().mean() > 0.99
    assert got.count_nonzero() > 100
    assert not (tmp_path / "ref.arrow.partial").exists()


def test_reference_features_of_something_else_are_refused(tmp_path, loaded):
    model, sae, path = tiny_model().eval(), make_sae(True, D, F), tmp_path / "ref.arrow"
    write_reference_features(path, model, sae, loaded.select(range(4)))
    with pytest.raises(ValueError, match=r"ref\.arrow: made with the encoder [0-9a-f]{64}, need [0-9a-f]{64}"):
        ReferenceFeatures(path, make_sae(False, D, F))
    with pytest.raises(ValueError, match=r"made with the layer -1, need 1; make it anew"):
        ReferenceFeatures(path, sae, layer=1)
    missing = loaded[4]["id"]
    with pytest.raises(ValueError, match=rf"no pair {missing} among its 4; make the file with this data"):
        ReferenceFeatures(path, sae, pairs=loaded)
    with pytest.raises(ValueError, match=rf"no pair {missing}"):
        ReferenceFeatures(path, sae).pooled([missing])
    limit = len(loaded[0]["prompt_ids"]) + 1
    with pytest.raises(ValueError, match=r"has 4 tokens in its chosen answer, need 1; .*tokenizer and lengths"):
        ReferenceFeatures(path, sae, pairs=loaded.select([0]), max_length=limit)
    huge = SparseAutoencoder(*(1e6 * x for x in make_sae(False, D, F).parameters()))
    with pytest.raises(ValueError, match=r"a pooled feature of [\d.e+]+, need at most 65504 \(float16\)"):
        write_reference_features(path, model, huge, loaded)
    path.write_text("something else")
    with pytest.raises(ValueError, match=r"ref\.arrow: got another file .*, need a file that asft data"):
        ReferenceFeatures(path, sae)
    with pytest.raises(ValueError, match="no such file; asft data features makes one".replace(".", r"\.")):
        ReferenceFeatures(tmp_path / "none.arrow", sae)


def test_cache_command(tmp_path, data, loaded, capsys):
    folder, sae = saved_tiny_model(tmp_path / "model"), make_sae(False, D, F)
    write_sae(sae, tmp_path / "sae.npz")
    command = ["--model", folder, "--data", data, "--sae", tmp_path / "sae.npz", "--output", tmp_path / "ref.arrow"]
    assert data_main(["features", *(str(x) for x in (*command, "--max-length", "64"))]) == 0
    assert re.search(r"32 pairs, [\d.]+ KiB a pair", capsys.readouterr().out)
    assert ReferenceFeatures(tmp_path / "ref.arrow", sae, pairs=loaded).pooled([loaded[3]["id"]]).shape == (2, F)
    assert data_main(["features", *(str(x) for x in (*command, "--max-length", "64", "--layer", "9"))]) == 2
    assert "layer: got 9, need -1 (the head's input) or 0 to 1" in capsys.readouterr().err


def test_tokens_are_collected_without_padding_and_first_positions(loaded):
    model = tiny_model().eval()
    two = loaded.select([1, 3])
    tokens = collect_tokens(model, two, 10**6, layer=-1, seed=0, label="")

    def states(pair, side):
        ids = torch.tensor([[*pair["prompt_ids"], *pair[f"{side}_ids"]]])
        return hidden_states(model, ids)[1][0, 1:].detach()

    # One pair gives its chosen answer, the other its rejected one: which is the seed's affair. Longest first.
    sequences = [(states(two[i], "chosen"), states(two[1 - i], "rejected")) for i in (0, 1)]
    expected = [torch.cat(sorted(pair, key=len, reverse=True)) for pair in sequences]
    same = [x.shape == tokens.shape and torch.allclose(x, tokens, rtol=1e-5, atol=1e-6) for x in expected]
    assert any(same)
    assert len(collect_tokens(model, loaded, 100, layer=0, seed=0, label="")) == 100


def sparse_tokens(count, seed):
    """Each token is two of 24 directions, plus a mean far from 0: an autoencoder can find them."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(9)), dim=1)
    which = torch.rand(count, 24, generator=g).topk(2, dim=1).indices
    amount = 1 + torch.rand(count, 2, generator=g)
    return 5 + (directions[which] * amount.unsqueeze(-1)).sum(dim=1)


def test_training_finds_sparse_directions():
    trainer = Trainer(
        sparse_tokens(4000, 0), 64, steps=600, batch_size=256, learning_rate=3e-3, l1=1.0, seed=0, device="cpu"
    )
    held_out = sparse_tokens(1000, 1)
    before = quality(trainer.finished(), held_out)
    while trainer.done < trainer.steps:
        trainer.step()
    sae = trainer.finished()
    after = quality(sae, held_out)
    assert before.explained_variance < 0.5 < 0.9 < after.explained_variance
    assert after.l0 < 8 < before.l0  # two directions made each token
    assert after.tokens == 1000
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert not any(p.requires_grad for p in sae.parameters())
    # what is finished computes what was trained, in the units of h
    x = (held_out - trainer.mean) * trainer.scale
    torch.testing.assert_close(sae(held_out), trainer.mean + trainer.sae(x) / trainer.scale, rtol=1e-4, atol=1e-4)


def test_quality_worked_by_hand():
    eye = torch.eye(2)
    sae = SparseAutoencoder(eye, torch.zeros(2), 0.5 * eye, torch.zeros(2))
    # tokens (2, 0) and (0, 0), rebuilt as (1, 0) and (0, 0): error 1 of a variance 2; feature 0 alive, half the tokens
    got = quality(sae, torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert (got.explained_variance, got.l0, got.dead, got.tokens) == (0.5, 0.5, 0.5, 2)


SMALL = ["--features", "64", "--tokens", "500", "--steps", "20", "--batch-size", "64", "--max-length", "64"]


def test_train_command(tmp_path, data, capsys):
    folder, output = saved_tiny_model(tmp_path / "model"), tmp_path / "sae.safetensors"
    command = ["--model", str(folder), "--data", str(data), "--output", str(output), *SMALL]
    assert data_main(["sae", *command]) == 0
    assert re.search(r"20 steps; on \d+ held-out tokens explained variance", capsys.readouterr().out)
    sae, metrics = read_sae(output), json.loads((tmp_path / "sae.safetensors.json").read_text())
    assert (sae.hidden_size, sae.features) == (16, 64)
    assert metrics["steps_done"] == 20
    assert set(metrics["held_out"]) == {"explained_variance", "l0", "dead", "tokens"}
    assert data_main(["sae", *command, "--layer", "5"]) == 2
    assert "layer: got 5, need" in capsys.readouterr().err
    assert data_main(["sae", *command, "--batch-size", "501"]) == 2
    assert "--batch_size: got 501, need at most 500" in capsys.readouterr().err
    by_default = [*command[: command.index("--batch-size")], "--max-length", "64", "--steps", "1"]
    assert data_main(["sae", *by_default]) == 0
    assert json.loads((tmp_path / "sae.safetensors.json").read_text())["settings"]["batch_size"] == 500
    assert data_main(["sae", *command, "--output", "x.pt"]) == 2
    assert "need .npz or .safetensors" in capsys.readouterr().err


def test_ctrl_c_writes_what_there_is(tmp_path, data, capsys, monkeypatch):
    step = Trainer.step

    def interrupted(self):
        if self.done == 7:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    folder, output = saved_tiny_model(tmp_path / "model"), tmp_path / "sae.npz"
    assert data_main(["sae", "--model", str(folder), "--data", str(data), "--output", str(output), *SMALL]) == 0
    assert "stopped after step 7; writing what there is" in capsys.readouterr().err
    assert json.loads((tmp_path / "sae.npz.json").read_text())["steps_done"] == 7
    read_sae(output)


@pytest.mark.parametrize("layer", [-1, 0])
def test_fpo_end_to_end(loaded, layer):
    """Loss and the gradient of every parameter against Eq. 4 and 8 to 11 in plain float64."""
    model = tiny_model().double().eval()
    sae = make_sae(layer == -1, D, F, dtype=torch.float64)
    batch = with_labels(DataCollatorForPreference(0)([loaded[i] for i in range(4)]))
    ref_model = tiny_model(seed=3).double().eval()
    beta, alpha, k = 0.7, 0.5, 6

    def sides(lm):
        last, hidden = hidden_states(lm, batch["input_ids"], batch["attention_mask"], layer)
        logps = (last @ lm.lm_head.weight.T).log_softmax(-1)[:, :-1]
        labels = batch["labels"][:, 1:]
        valid = labels != -100
        sums = (logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * valid).sum(1)
        return last, hidden, sums, valid.sum(1)

    with torch.no_grad():
        _, ref_hidden, ref_sums, _ = sides(ref_model)
        ref_pooled = pooled_features(sae, ref_hidden, batch["labels"])
    last, hidden, sums, lengths = sides(model)
    inputs = fpo_inputs(sae, hidden, batch["labels"], ref_pooled, k)
    loss = fused_preference_loss(
        last, model.lm_head, batch["labels"], get_objective("fpo", beta=beta, alpha=alpha, top_k=k),
        ref_logps=ref_sums, objective_inputs=inputs,
    )  # fmt: skip
    distance = plain_distance(plain_pooled(sae, hidden, batch["labels"]), ref_pooled, k)
    margin = ((sums - ref_sums) / lengths).chunk(2)
    drift = alpha * (distance.chunk(2)[1] - distance.chunk(2)[0].detach())
    plain = -torch.nn.functional.logsigmoid(beta * (margin[0] - margin[1] - drift)).mean()
    assert distance.min() > 0
    torch.testing.assert_close(loss, plain, rtol=1e-11, atol=0)
    weights = list(model.parameters())
    for got, right in zip(
        *(torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (loss, plain)), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-13)


def test_without_its_constraint_fpo_is_length_normalised_dpo(loaded):
    model, sae = tiny_model().eval(), make_sae(True, D, F)
    batch = with_labels(DataCollatorForPreference(0)([loaded[i] for i in range(4)]))
    last, hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"])
    inputs = fpo_inputs(sae, hidden, batch["labels"], torch.rand(8, F), 6)
    ref = -torch.rand(8) * 20
    fpo = fused_preference_loss(
        last, model.lm_head, batch["labels"], get_objective("fpo", beta=0.3, alpha=0.0), ref_logps=ref,
        objective_inputs=inputs,
    )  # fmt: skip
    norm = fused_preference_loss(
        last, model.lm_head, batch["labels"], get_objective("sigmoid_norm", beta=0.3), ref_logps=ref
    )
    torch.testing.assert_close(fpo, norm, rtol=1e-6, atol=0)
