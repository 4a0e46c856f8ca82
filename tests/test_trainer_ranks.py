"""PreferenceTrainer on two ranks: pairs that fill the last batch, precomputed references, FSDP2 in bf16, resuming."""

import math

import pytest
import torch

pytest.importorskip("train_extra")

import trainer_ranks_worker as worker
from rank_processes import launch
from tiny_lm import saved_tiny_model
from train_extra import QUIET

pytestmark = QUIET


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(saved_tiny_model(folder, initializer_range=0.3, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, model):
    return launch(2, worker.plain, tmp_path_factory.mktemp("plain"), model)[0]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory, model):
    return launch(2, worker.under_fsdp2, tmp_path_factory.mktemp("fsdp2"), model)[0]


def test_pairs_that_fill_the_last_batch_count_once(plain, model, tmp_path):
    """Five pairs on two ranks, an epoch and a step: as one process. fp32's 2^-24 in sums of some 60 of size 6."""
    alone = worker.logged(worker.made(tmp_path, model, 5, per_device_train_batch_size=2, **worker.FILLED))
    assert [row["pairs"] for row in plain["filled"]] == [row["pairs"] for row in alone] == [2, 2, 1, 2]
    for row, other in zip(plain["filled"], alone, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "sft_loss"):
            assert row[name] == pytest.approx(other[name], rel=2e-5), name
    for row, other in zip(plain["resumed"], plain["filled"], strict=True):  # in the middle of an epoch
        assert (row["loss"], row["pairs"]) == (other["loss"], other["pairs"])


def test_the_mismatched_rows_of_filling_pairs_count_nowhere(plain, model, tmp_path):
    alone = worker.logged(worker.made(tmp_path, model, 5, per_device_train_batch_size=2, **worker.KTO))
    for row, other in zip(plain["kto"], alone, strict=True):
        for name in ("loss", "chosen_kl"):
            assert row[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), name
    assert max(row["chosen_kl"] for row in alone) > 0


def test_references_of_rows_in_memory_are_computed_ahead(plain, fsdp2):
    for found in (plain["precomputed"], plain["uncached"], fsdp2["precomputed"]):
        assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_batches_that_accelerate_would_tear_are_refused(plain):
    torn, uneven, *streams = plain["refused"]
    assert torn.startswith("accelerator_config: got dispatch_batches True on 2 ranks, need False")
    assert uneven.startswith("accelerator_config: got even_batches False on 2 ranks, need True")
    for said in streams:
        assert said.startswith("accelerator_config: got dispatch_batches None with a streamed data set on 2 ranks")
    assert len(streams) == 2


@pytest.mark.parametrize("way", ["gather", "stream"])
def test_bf16_under_fsdp2_begins_at_ln_2(fsdp2, way):
    """accelerate's policy would round log-probabilities of -60 to bf16: their difference would be off by 0.1."""
    assert fsdp2[way]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert fsdp2[way]["dtypes"] == [torch.float32, torch.bfloat16 if way == "stream" else None]


def test_a_moving_reference_is_resumed_under_fsdp2(fsdp2):
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert fsdp2["again"][-1][name] == fsdp2["whole"][-1][name], name
