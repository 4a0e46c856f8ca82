"""A plain Trainer saves and resumes a `PreferenceModel` around tied weights; from_pretrained reads what it saved."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("trl", reason="needs the train extra: trl")

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl.trainer.dpo_trainer import DataCollatorForPreference

from asft_kernels.data import load_pairs, with_labels
from asft_kernels.models import PreferenceModel
from tiny_lm import pairs, tiny_model, tiny_tokenizer, write_lines


class SaveModel(TrainerCallback):
    """That of docs/models.md."""

    def on_save(self, args, state, control, model, **_):
        model.save_pretrained(f"{args.output_dir}/checkpoint-{state.global_step}/model")


def trainer(tmp_path) -> Any:
    rows = load_pairs(write_lines(tmp_path / "pairs.jsonl", pairs(8)), tiny_tokenizer())[0]
    model = PreferenceModel(tiny_model(tie_word_embeddings=True), "simpo")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=1e-2,
        disable_tqdm=True, report_to=[], remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    collate = DataCollatorForPreference(0)
    return Trainer(
        model, arguments, train_dataset=rows, data_collator=lambda rows: with_labels(collate(rows)),
        callbacks=[SaveModel()],
    )  # fmt: skip


def test_saved_resumed_and_read(tmp_path):
    whole = trainer(tmp_path)
    whole.train()
    expected = whole.model.model.state_dict()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4" / "model")
    assert read.lm_head.weight is read.get_input_embeddings().weight
    for name, tensor in expected.items():
        # The same batches from the same weights and optimizer: the same numbers.
        torch.testing.assert_close(again.model.model.state_dict()[name], tensor, rtol=0, atol=0)
        assert read.state_dict()[name].equal(tensor), name


def test_tied_weights_stand_once_in_the_state():
    model, other = (PreferenceModel(tiny_model(tie_word_embeddings=True)) for _ in range(2))
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.load_state_dict(state)  # strict
    assert other.lm_head.weight.equal(model.lm_head.weight)
    untied = PreferenceModel(tiny_model(tie_word_embeddings=False))
    assert "model.lm_head.weight" in untied.state_dict()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # of a machine without a GPU
def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", page, re.S) if "SaveModel" in x]
    write_lines(tmp_path / "pairs.jsonl", pairs(8))
    monkeypatch.chdir(tmp_path)
    names = {"model": tiny_model(tie_word_embeddings=True), "tokenizer": tiny_tokenizer()}
    exec(code, names)
    for folder in ("out/model", "out/checkpoint-2/model"):
        assert AutoModelForCausalLM.from_pretrained(folder).state_dict().keys() == names["model"].state_dict().keys()
