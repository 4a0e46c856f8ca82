"""Rows with images: read and named, trained as TRL's DPOTrainer trains them, or refused by name."""

import json
import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("train_extra")

from datasets import Audio, Dataset, Image, List
from trl import DPOConfig, DPOTrainer

from asft_kernels.cli import main as asft
from asft_kernels.data import load_pairs
from asft_kernels.errors import InputError
from asft_kernels.training import PreferenceConfig, PreferenceTrainer
from tiny_lm import CHAT_TEMPLATE, pairs, saved_tiny_model, tiny_tokenizer, write_lines
from tiny_vlm import TEMPLATE, picture, picture_pairs, said, saved_tiny_llava, tiny_idefics3, tiny_processor
from train_extra import QUIET

pytestmark = QUIET
# fp32 log-probabilities of 13 tokens of size 6 in sums of some -80, over steps that Adam's rounding moves apart.
CLOSE: dict[str, Any] = {"rel": 2e-4, "abs": 2e-4}
SAME_STEPS: dict[str, Any] = dict(
    max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True, bf16=False,
    disable_tqdm=True, save_strategy="no", seed=3, gradient_checkpointing=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and pairs.jsonl beside the images that it names."""
    folder = tmp_path_factory.mktemp("images")
    saved_tiny_llava(folder / "model")
    write_lines(folder / "pairs.jsonl", picture_pairs(folder / "pictures", 7))
    return folder


def of_trl(folder):
    """The rows as TRL documents them: messages, and PIL images in the dataset."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["images"] = [str(folder / name) for name in row["images"]]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def of(folder):
    return folder / "model", folder / "pairs.jsonl"


def words(model, data, out, *more):
    options = {**SAME_STEPS, "report_to": "none", "output_dir": out, "model_name_or_path": model, "dataset_name": data}
    given = (str(x).lower() if isinstance(x, bool) else str(x) for pair in options.items() for x in pair)
    return ["train", *(f"--{x}" if i % 2 == 0 else x for i, x in enumerate(given)), *more]


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def trls(folder, tmp_path_factory):
    """TRL's own trainer on these rows: losses of three steps, final weights."""
    args = DPOConfig(str(tmp_path_factory.mktemp("trl")), logging_steps=1, **SAME_STEPS)
    trainer = DPOTrainer(
        str(folder / "model"), args=args, train_dataset=of_trl(folder), processing_class=tiny_processor()
    )
    model: Any = trainer.model
    return losses(trainer), model.state_dict()


def test_the_command_trains_as_trl(folder, trls, tmp_path, capsys):
    assert asft(words(*of(folder), tmp_path / "out", "--objective", "dpo", "--save_strategy", "steps")) == 0
    said = capsys.readouterr().out
    assert "7 rows, 7 kept, 6 of them with images, 0 left out" in said
    assert "output head checked" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["kind"] == "train"] == pytest.approx(trls[0], **CLOSE)
    import transformers

    trained = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    for name, weight in trained.state_dict().items():
        assert (weight - trls[1][name]).abs().mean() <= 1e-5, name  # a hundredth of a step of Adam
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "out").image_token == "<image>"


def test_pil_images_in_a_dataset_train_as_trl(folder, trls, tmp_path):
    args = PreferenceConfig(str(tmp_path), objective="dpo", **SAME_STEPS)
    trainer = PreferenceTrainer(
        str(folder / "model"), args=args, train_dataset=of_trl(folder), processing_class=tiny_processor()
    )
    assert losses(trainer) == pytest.approx(trls[0], **CLOSE)


def test_a_model_that_cuts_images_into_tiles_trains_as_trl(folder, tmp_path):
    """Idefics3: images nested by row, some rows without, a mask of pixels, more tokens than parts."""
    model, processor = tiny_idefics3()
    model.save_pretrained(tmp_path / "model")
    read, report = load_pairs(folder / "pairs.jsonl", processor)
    assert report.images == 6
    assert len(set(read["prompt_tokens"])) > 2, "pictures of other widths have other numbers of tiles"
    kinds: Any = {
        "trl": (DPOTrainer, DPOConfig, {}),
        "ours": (PreferenceTrainer, PreferenceConfig, {"objective": "dpo"}),
    }
    found = {}
    for name, (kind, config, own) in kinds.items():
        args = config(str(tmp_path / name), logging_steps=1, **SAME_STEPS, **own)
        rows = of_trl(folder) if name == "trl" else read
        trainer = kind(str(tmp_path / "model"), args=args, train_dataset=rows, processing_class=processor)
        found[name] = losses(trainer)
    assert found["ours"] == pytest.approx(found["trl"], **CLOSE)


def test_images_matter_evaluation_and_lora(folder, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    more = ("--objective", "asft", "--eval_every_nth", "3", "--use_peft", "true", "--lora_r", "2")
    more = (*more, "--lora_target_modules", "q_proj", "lm_head", "--gradient_accumulation_steps", "2")
    assert asft(words(*of(folder), tmp_path / "out", *more)) == 0
    again = shutil.copytree(folder, tmp_path / "again")
    for name in (again / "pictures").glob("*.png"):
        picture("white").save(name)
    assert asft(words(*of(again), tmp_path / "other", *more)) == 0
    both = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("out", "other")
    ]
    assert len(both[0]) == 5  # an evaluation, three steps, an evaluation
    assert all(abs(one - other) > 1e-4 for one, other in zip(*both, strict=True))


def test_a_run_goes_on_and_ends_with_its_best(folder, tmp_path, capsys):
    """transformers saves LLaVA's weights under other names than the model has."""
    more = ("--objective", "dpo", "--save_strategy", "steps", "--save_steps", "1", "--lr_scheduler_type", "constant")
    assert asft(words(*of(folder), tmp_path / "whole", *more)) == 0
    assert asft(words(*of(folder), tmp_path / "part", *more, "--max_steps", "2")) == 0
    assert asft(words(*of(folder), tmp_path / "part", *more, "--resume")) == 0
    whole, part = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part"))
    assert whole == part
    best = (
        "--eval_every_nth",
        "3",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--load_best_model_at_end",
        "true",
    )
    worse = ("--learning_rate", "0.3", "--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss")
    assert asft(words(*of(folder), tmp_path / "best", *more, *best, *worse)) == 0
    said = capsys.readouterr().out
    step = int(said.partition("best after step ")[2].partition(":")[0])
    assert step < 3, "else nothing would have been loaded"
    best, final = (tmp_path / "best" / x / "model.safetensors" for x in (f"checkpoint-{step}", "."))
    assert best.read_bytes() == final.read_bytes()


def test_weights_of_another_model_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from asft_kernels.models.loading import load_renamed
    from tiny_vlm import tiny_llava

    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert load_renamed(tiny_llava(seed=1), str(tmp_path / "model"))
    del weights["language_model.lm_head.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"got a checkpoint of another model: lm_head\.weight"):
        load_renamed(tiny_llava(), str(tmp_path / "model"))


def test_an_adapter_is_gone_on_with(folder, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    lora = ("--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj")
    more = ("--objective", "simpo", "--save_strategy", "steps")
    assert asft(words(*of(folder), tmp_path / "first", *more, *lora)) == 0
    assert asft(words(tmp_path / "first", folder / "pairs.jsonl", tmp_path / "second", *more)) == 0


def test_dry_run_counts_images_and_shows_the_first_pair(folder, tmp_path, capsys):
    assert asft(words(*of(folder), tmp_path / "out", "--dry_run")) == 0
    said = capsys.readouterr().out
    assert "images: 8 in 6 of 7 pairs, read batch by batch" in said
    assert "first pair, chosen" in said
    assert "<image> x4Colour 0?" in said
    counted = load_pairs(folder / "pairs.jsonl", tiny_processor())[0]
    tokens = 2 * sum(counted["prompt_tokens"]) + sum(counted["chosen_tokens"]) + sum(counted["rejected_tokens"])
    assert f"tokens: {tokens:,} in 7 pairs" in said
    assert not (tmp_path / "out").exists()


def test_counts_are_those_of_trls_batches(folder):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    read, _ = load_pairs(folder / "pairs.jsonl", tiny_processor(), max_length=40)
    batch = DataCollatorForVisionPreference(tiny_processor(), max_length=40)([dict(row) for row in read])
    answers = torch.tensor([*read["chosen_tokens"], *read["rejected_tokens"]])
    assert torch.equal(batch["completion_mask"].sum(1), answers)
    assert torch.equal(batch["attention_mask"].sum(1) - answers, torch.tensor(read["prompt_tokens"][:]).repeat(2))


GOOD = {"prompt": said("user", "What?", 1), "chosen": said("assistant", "a"), "rejected": said("assistant", "b")}
TEXT = [{"role": "user", "content": "What?"}]
BAD = [
    ("image that is missing", {"images": ["nowhere.png"]}),
    ("image that cannot be read", {"images": ["text.png"]}),
    ("image that cannot be read", {"image": "half.png"}),
    ("image that is an address", {"images": ["https://example.org/a.png"]}),
    ("image and images in one row", {"image": "good.png", "images": ["good.png"]}),
    ("wrong type", {"images": [3]}),
    ("wrong type", {"images": ""}),
    ("wrong type", {"image": "", "images": []}),
    ("wrong type", {"images": [""]}),
    ("column videos", {"images": ["good.png"], "videos": ["a.mp4"]}),
    ("column audio", {"audio": {"path": "a.wav"}, "images": ["good.png"]}),
    ("image of more than 8 bits a colour", {"image": "deep.png"}),
    ("image of more than 8 bits a colour", {"image": "real.tiff"}),
    ("images that do not fit the chat", {"images": ["good.png", "good.png"]}),
    ("images that do not fit the chat", {}),
    ("plain text in data with images", {"prompt": "What?", "chosen": "a", "rejected": "b", "images": ["good.png"]}),
    ("image inside a message", {"prompt": [{"role": "user", "content": [{"type": "image", "path": "good.png"}]}]}),
    ("image in an answer", {"chosen": said("assistant", "a", 1), "images": ["good.png"]}),
    ("text that holds the token of an image", {"prompt": said("user", "<image>What?"), "images": ["good.png"]}),
    ("content parts that are neither text nor image", {"prompt": [{"role": "user", "content": [{"type": "video"}]}]}),
    ("chosen equals rejected", {"chosen": said("assistant", "b"), "images": ["good.png"]}),
    ("prompt fills max_length", {"prompt": said("user", "What?" * 20, 1), "images": ["good.png"]}),
    ("reference's log-probabilities in data with images", {"images": ["good.png"], "ref_chosen_logps": -1.0}),
    ("wrong type", {"prompt": None, "images": ["good.png"], "chosen": 3}),
]  # fmt: skip


def in_folder(folder, rows):
    picture("red").save(folder / "good.png")
    (folder / "text.png").write_text("no image")
    picture("red").convert("L").convert("I;16").save(folder / "deep.png")
    picture("red").convert("F").save(folder / "real.tiff")
    whole = folder / "whole.png"
    picture("red", 400, 400).save(whole)
    (folder / "half.png").write_bytes(whole.read_bytes()[:200])
    return write_lines(folder / "rows.jsonl", rows)


def test_a_path_of_the_hub_has_no_folder(monkeypatch):
    rows = Dataset.from_list([{**GOOD, "image": "a.png"}])
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(InputError, match=r"image that is a path: image: a\.png; need a column of datasets\.Image"):
        load_pairs("org/name", tiny_processor())
    sounds = rows.remove_columns("image").add_column("audio", [{"bytes": b"RIFF", "path": None}])
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: sounds.cast_column("audio", Audio()))
    with pytest.raises(InputError, match="column audio: need text, or text and images"):
        load_pairs("org/name", tiny_processor())


def test_every_row_left_out_is_named(tmp_path):
    good = {**GOOD, "images": ["good.png"]}
    rows = [good, *({**GOOD, **changes} for _, changes in BAD), {**GOOD, "prompt": TEXT, "image": "good.png"}]
    read, report = load_pairs(in_folder(tmp_path, rows), tiny_processor(), max_length=60)
    assert read["line"][:] == [1, len(rows)]
    assert report.images == 2
    found = {line: kind for kind, lines in report.bad.items() for line in lines}
    assert found == {line: kind for line, (kind, _) in enumerate(BAD, start=2)}
    missing = f"line 2: image that is missing: {tmp_path / 'nowhere.png'}; relative paths begin in the folder of"
    assert missing in report.first_bad
    assert read["prompt"][1] == read["prompt"][0], "an image of a text goes before it, as TRL has it"
    assert read["id"][1] != read["id"][0]


def test_what_is_not_seen_of_an_image_is_said(tmp_path):
    """Each made by Pillow; grey and a palette are seen whole."""
    red, blue = picture("red"), picture("blue")
    red.convert("CMYK").save(tmp_path / "print.tiff")
    red.save(tmp_path / "moves.gif", save_all=True, append_images=[blue])
    for mode in ("RGBA", "L", "P", "1"):
        red.convert(mode).save(tmp_path / f"{mode}.png")
    names = ["print.tiff", "moves.gif", "RGBA.png", "L.png", "P.png", "1.png"]
    data = write_lines(tmp_path / "rows.jsonl", [{**GOOD, "image": name} for name in names])
    _, report = load_pairs(data, tiny_processor())
    assert report.kept == len(names)
    assert report.notes == {
        "image of mode CMYK, trained as RGB": [1],
        "image of several frames, of which the first is trained": [2],
        "image with transparency, trained without": [3],
    }


def test_an_image_of_other_content_is_another_pair(tmp_path):
    data = in_folder(tmp_path, [{**GOOD, "images": ["good.png"]}])
    before = load_pairs(data, tiny_processor())[0]["id"][0]
    picture("blue").save(tmp_path / "good.png")
    assert load_pairs(data, tiny_processor())[0]["id"][0] != before


def test_images_inside_the_data(tmp_path, folder, monkeypatch):
    """Parquet with bytes, and a data set of the hub: datasets.Image, whatever the column's name."""
    dataset = of_trl(folder)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "pairs.parquet")
    expected, _ = load_pairs(folder / "pairs.jsonl", tiny_processor())
    for name in ("saved", "pairs.parquet"):
        read, report = load_pairs(tmp_path / name, tiny_processor())
        assert (report.kept, report.images) == (7, 6)
        assert read["id"][:] == expected["id"][:]
        assert [image.tobytes() for image in read[0]["images"]] == [image.tobytes() for image in expected[0]["images"]]
    single = dataset.select([0, 1]).map(lambda row: {"image": row["images"][0]}).remove_columns("images")
    single = single.cast_column("image", Image())
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: single)
    read, report = load_pairs("org/name", tiny_processor())
    assert report.images == 2
    assert read[1]["images"][0].tobytes() == expected[1]["images"][0].tobytes()


def test_what_cannot_be_is_refused(tmp_path, folder):
    data = in_folder(tmp_path, [{**GOOD, "images": ["good.png"]}, *pairs(1)])
    _, report = load_pairs(data, tiny_tokenizer())
    assert report.bad == {"row with images": [1]}
    assert "need text alone; asft train takes images, with a model that takes them" in report.first_bad
    with pytest.raises(InputError, match="shows no image of a user's message"):
        load_pairs(data, tiny_processor(TEMPLATE.replace("'<image>'", "''")))
    dataset = of_trl(folder)
    for changes, text in (
        ({"objective": "dnpo"}, "objective: got 'dnpo' with rows that have images, need one without a method"),
        ({"objective": "kto"}, "objective: got 'kto' with rows that have images, need one without a method"),
        ({"method": "sapo"}, "method: got 'sapo' with rows that have images, need one without a method"),
        ({"objective": "orpo", "nll_on_prompt": True}, "nll_on_prompt: got True with rows that have images"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True with rows that have images, need"),
        ({"truncation_mode": "keep_end"}, "truncation_mode: got 'keep_end' with rows that have images, need 'keep_st"),
    ):
        args = PreferenceConfig(str(tmp_path / "out"), **{**SAME_STEPS, **changes})
        with pytest.raises(InputError, match=text):
            PreferenceTrainer(
                str(folder / "model"), args=args, train_dataset=dataset, processing_class=tiny_processor()
            )


def test_a_message_that_shows_an_image_without_one_is_left_out(tmp_path):
    """In data of text alone the image's token would be trained as a word."""
    with pytest.raises(InputError, match="content part without what it shows: image"):
        load_pairs(write_lines(tmp_path / "rows.jsonl", [GOOD]), tiny_processor())


def test_text_alone_through_a_processor(folder, tmp_path, capsys):
    """An image-text model on text: token ids as of any other, and evaluation rows of the same kind."""
    rows = [{"prompt": said("user", f"Say {i}"), "chosen": said("assistant", "a" * (1 + i)),
             "rejected": said("assistant", "no")} for i in range(6)]  # fmt: skip
    data = write_lines(tmp_path / "text.jsonl", rows)
    model, images = of(folder)
    assert asft(words(model, data, tmp_path / "a", "--objective", "simpo", "--eval_dataset_name", str(data))) == 0
    assert asft(words(model, data, tmp_path / "b", "--eval_dataset_name", str(images))) == 2
    assert "eval_dataset_name: got rows with images, need text alone" in capsys.readouterr().err
    assert asft(words(model, images, tmp_path / "c", "--objective", "simpo", "--eval_dataset_name", str(data))) == 0


def test_a_text_model_names_the_rows(folder, tmp_path, capsys):
    saved_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    assert asft(words(tmp_path / "model", folder / "pairs.jsonl", tmp_path / "out", "--strict")) == 2
    assert "line 1: row with images: need text alone; asft train takes images, with a model" in capsys.readouterr().err
    score = ["score", "--model", str(tmp_path / "model"), "--data", str(folder / "pairs.jsonl")]
    assert asft([*score, "--output", str(tmp_path / "scores.jsonl")]) == 0
    assert "left out, row with images: 6 (lines 1, 2, 3, 5, 6, 7)" in capsys.readouterr().out
