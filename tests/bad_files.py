"""The table of docs/trust.md: bad files, and what a command says of each.

python -m tests.bad_files            prints the table
python -m tests.bad_files --write    writes it into docs/trust.md
"""

import argparse
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from asft_kernels.cli import main as asft
from asft_kernels.score.run import score_path
from tiny_lm import pairs, saved_sae, saved_tiny_model, stored, write_lines

PAGE = Path(__file__).parents[1] / "docs" / "trust.md"
START, END = "<!-- bad files -->", "<!-- end -->"
ROWS = pairs(12)


class World(NamedTuple):
    """Good files, and a place for a bad one."""

    model: Path
    data: Path
    scores: Path
    sae: Path
    run: Path  # the folder of a finished run with two checkpoints
    bad: Path  # not there yet
    out: Path  # for what the command writes


class BadFile(NamedTuple):
    """kind and what: the row's first columns. make: world -> words of the command. says: part of its line."""

    kind: str
    what: str
    make: Callable[[World], list[str]]
    code: int
    says: str


class Payload:
    """What pickle would run."""

    def __reduce__(self) -> Any:
        return (print, ("the payload ran",))


TRAIN = ["--max_length", "64", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true",
         "--per_device_train_batch_size", "2", "--gradient_checkpointing", "false", "--max_steps", "2",
         "--save_steps", "1"]  # fmt: skip


def good(folder: Path) -> World:
    """Makes the good files once."""
    model, data = saved_tiny_model(folder / "model"), write_lines(folder / "pairs.jsonl", ROWS)
    run, out = folder / "run", folder / "scores"
    words = ["--model", str(model), "--data", str(data), "--output_dir"]
    assert asft(["score", *words, str(out)]) == 0
    assert asft(["train", *words, str(run), *TRAIN]) == 0
    sae = saved_sae(folder / "sae.safetensors")
    return World(model, data, score_path(out, str(model)), sae, run, folder / "bad", folder / "out")


def fresh(world: World, folder: Path) -> World:
    """The same with places of its own for the bad file and for what is written."""
    return world._replace(bad=folder / "bad", out=folder / "out")


def _score(world: World, model: Path | None = None, data: Path | None = None) -> list[str]:
    return ["score", "--model", str(model or world.model), "--data", str(data or world.data),
            "--output_dir", str(world.out)]  # fmt: skip


def _train(world: World, *more: str) -> list[str]:
    return ["train", "--model", str(world.model), "--data", str(world.data), "--output_dir", str(world.out),
            *TRAIN, *more]  # fmt: skip


def of_data(content: bytes | Callable[[Path], Any]) -> Callable[[World], list[str]]:
    """`asft score` of data with these bytes, or made by a function of the path."""

    def make(world: World) -> list[str]:
        world.bad.write_bytes(content) if isinstance(content, bytes) else content(world.bad)
        return _score(world, data=world.bad)

    return make


def of_stored(kind: str, damage: Callable[[Path], None]) -> Callable[[World], list[str]]:
    def make(path: Path) -> None:
        made = stored(ROWS, path.parent, kind)
        made.rename(path)
        damage(path)

    return of_data(make)


def of_scores(damage: Callable[[Path], Any]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        shutil.copy(world.scores, world.bad)
        damage(world.bad)
        return _train(world, "--objective", "dpo", "--ref_scores", str(world.bad))

    return make


def of_checkpoint(damage: Callable[[Path], Any]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        shutil.copytree(world.run, world.out)
        damage(world.out / "checkpoint-2")
        return _train(world, "--resume", str(world.out / "checkpoint-2"), "--max_steps", "3")

    return make


def of_model(damage: Callable[[Path], Any]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        shutil.copytree(world.model, world.bad)
        damage(world.bad)
        return _score(world, model=world.bad)

    return make


def of_sae(damage: Callable[[Path], Any], suffix: str = ".safetensors") -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        path = world.bad.with_suffix(suffix)
        shutil.copy(world.sae, path)
        damage(path)
        return ["data", "features", "--model", str(world.model), "--data", str(world.data), "--sae", str(path),
                "--output", str(world.out)]  # fmt: skip

    return make


def of_config(content: bytes | Callable[[Path], Any]) -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        world.bad.write_bytes(content) if isinstance(content, bytes) else content(world.bad)
        return _train(world, "--config", str(world.bad))

    return make


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, at: float = 0.5) -> None:
    """Flips a bit at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("pairs.jsonl", LINES)


def _with_notes(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a score file with other metadata."""
    from pyarrow import parquet

    from asft_kernels.score.table import METADATA

    table = parquet.read_table(path)
    notes = change(json.loads(table.schema.metadata[METADATA]))
    notes = notes if isinstance(notes, bytes) else json.dumps(notes).encode()
    parquet.write_table(table.replace_schema_metadata({METADATA: notes}), path)


def _nan_score(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(path)
    values = [float("nan"), *table["rejected_logps"].to_pylist()[1:]]
    place = table.column_names.index("rejected_logps")
    parquet.write_table(table.set_column(place, "rejected_logps", pa.array(values)), path)


def _bit_of_a_score(path: Path) -> None:
    from pyarrow import parquet

    column = parquet.read_metadata(path).row_group(0).column(2)  # chosen_logps
    flip(path, (column.data_page_offset - 8) / path.stat().st_size)  # the last value of its dictionary


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Rewrites the tensors of a model's folder, or of a file."""

    def damage(path: Path) -> None:
        file = path / "model.safetensors" if path.is_dir() else path
        tensors = load_file(file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})

    return damage


def _pickled_model(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload()}, model / "pytorch_model.bin")


def _pickled_checkpoint(checkpoint: Path) -> None:
    from asft_kernels.training.checkpoints import what_trained, write_digests

    torch.save({"state": Payload()}, checkpoint / "optimizer.pt")
    write_digests(checkpoint, str(what_trained(checkpoint)))


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def _own_code(model: Path) -> None:
    (model / "modeling_own.py").write_text("print('the payload ran')\n")
    names = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    _config(model_type="own", auto_map=names)(model)


def _npz(**tensors: Any) -> Callable[[Path], None]:
    return lambda path: np.savez_compressed(path, **tensors)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ADAPTER = "adapter_config.json"
UNREADABLE = "cannot be read beyond"
NO_MODEL = "cannot be loaded as a causal language model"
LONG = json.dumps({**ROWS[0], "prompt": "x" * (5 << 20)}).encode() + b"\n"
DATA, SCORES, CHECKPOINT, MODEL, SAE, CONFIG = (
    "data", "scores", "checkpoint", "model", "autoencoder", "config"
)  # fmt: skip

BAD_FILES = [
    BadFile(DATA, "no such file", of_data(lambda path: None), 2, "no such file"),
    BadFile(DATA, "an empty folder", of_data(folder), 2, "a folder in which no file"),
    BadFile(DATA, "an empty file", of_data(b""), 2, "has no rows"),
    BadFile(DATA, "random bytes", of_data(np.random.default_rng(0).bytes(4000)), 2, "binary file"),
    BadFile(DATA, "UTF-16", of_data(LINES.decode().encode("utf-16")), 2, "binary file or UTF-16"),
    BadFile(DATA, "Latin-1 in a line", of_data(b'{"prompt": "\xe9"}\n' + LINES), 0, "not UTF-8: 1 (line 1)"),
    BadFile(DATA, "CSV", of_data(b"prompt,chosen,rejected\na,b,c\n"), 2, "is CSV"),
    BadFile(DATA, "a ZIP archive", of_data(_zip), 2, "a ZIP archive"),
    BadFile(DATA, "bzip2", of_data(bz2.compress(LINES)), 2, "compressed with bzip2"),
    BadFile(DATA, "xz", of_data(lzma.compress(LINES)), 2, "compressed with xz"),
    BadFile(DATA, "a pickle", of_data(pickle.dumps(Payload(), 5)), 2, "binary file"),
    BadFile(DATA, "a gzip of nothing known", of_data(b"\x1f\x8b" + 20 * b"?"), 2, UNREADABLE),
    BadFile(DATA, "half of a gzip", of_data(gzip.compress(LINES)[:150]), 2, UNREADABLE),
    BadFile(DATA, "half a JSON array", of_data(json.dumps(ROWS).encode()[:300]), 2, UNREADABLE),
    BadFile(DATA, "an array of numbers", of_data(b"[1, 2]"), 2, "not a JSON object"),
    BadFile(DATA, "a line of 100,000 brackets", of_data(LINES + b'{"a":' * 100_000 + b"\n"), 0, "unreadable JSON: 1"),
    BadFile(DATA, "a last line cut off", of_data(LINES[:-20]), 0, "unreadable JSON: 1 (line 12)"),
    BadFile(DATA, "a line of 5 MiB", of_data(LINES + LONG), 0, "row over 4,194,304 bytes: 1 (line 13)"),
    BadFile(DATA, "200,000 empty lines", of_data(b"\n" * 200_000), 2, "more than 100,000 empty lines"),
    BadFile(DATA, "200,000 numbers", of_data(b"0\n" * 200_000), 2, "more than 100,000 rows up to 100001"),
    BadFile(DATA, "a gzip of 80 MiB of x", of_data(gzip.compress(b"x" * (80 << 20), 1)), 2, "200 times as large"),
    BadFile(DATA, "half of a Parquet file", of_stored("parquet", half), 2, UNREADABLE),
    BadFile(DATA, "half of an Arrow file", of_stored("arrow file", half), 2, UNREADABLE),
    BadFile(DATA, "half of an Arrow stream", of_stored("arrow stream", half), 2, UNREADABLE),
    BadFile(DATA, "a saved folder without a file", of_stored("folder", lambda p: remove(min(p.glob("*.arrow")))), 2,
            UNREADABLE),
    BadFile(SCORES, "no such file", of_scores(remove), 2, "no such file"),
    BadFile(SCORES, "a folder", of_scores(folder), 2, "is a folder"),
    BadFile(SCORES, "JSON", of_scores(lambda path: path.write_text("{}")), 2, "is no Parquet file"),
    BadFile(SCORES, "half of it", of_scores(half), 2, "is no Parquet file"),
    BadFile(SCORES, "a bit of a score", of_scores(_bit_of_a_score), 2, "cannot be read (could not verify"),
    BadFile(SCORES, "another Parquet file", of_scores(lambda p: stored(ROWS, p.parent, "parquet").rename(p)), 2,
            "without the notes of asft score"),
    BadFile(SCORES, "notes that are no JSON", of_scores(lambda path: _with_notes(path, lambda _: b"{")), 2,
            "has damaged notes"),
    BadFile(SCORES, "notes without a key", of_scores(lambda path: _with_notes(path, lambda _: {})), 2,
            "has notes without model, tokenizer"),
    BadFile(SCORES, "of another tokenizer",
            of_scores(lambda path: _with_notes(path, lambda notes: {**notes, "tokenizer": "0"})), 2,
            "made with another tokenizer"),
    BadFile(SCORES, "NaN on one side", of_scores(_nan_score), 2, "rejected_logps that is not a finite number"),
    BadFile(CHECKPOINT, "no such folder", of_checkpoint(remove), 2, "no such folder"),
    BadFile(CHECKPOINT, "an empty folder", of_checkpoint(lambda c: (remove(c), c.mkdir())), 2, "trainer_state.json is"),
    BadFile(CHECKPOINT, "no optimizer.pt", of_checkpoint(lambda c: remove(c / "optimizer.pt")), 2,
            "optimizer.pt is missing"),
    BadFile(CHECKPOINT, "a bit of optimizer.pt", of_checkpoint(lambda c: flip(c / "optimizer.pt")), 2,
            "optimizer.pt is damaged"),
    BadFile(CHECKPOINT, "a bit of model.safetensors", of_checkpoint(lambda c: flip(c / "model.safetensors")), 2,
            "model.safetensors is damaged"),
    BadFile(CHECKPOINT, "half of model.safetensors", of_checkpoint(lambda c: half(c / "model.safetensors")), 2,
            "model.safetensors is damaged"),
    BadFile(CHECKPOINT, "a bit of rng_state.pth", of_checkpoint(lambda c: flip(c / "rng_state.pth")), 2,
            "rng_state.pth is damaged"),
    BadFile(CHECKPOINT, "half of trainer_state.json", of_checkpoint(lambda c: half(c / "trainer_state.json")), 2,
            "trainer_state.json is missing or damaged"),
    BadFile(CHECKPOINT, "half of digests.json", of_checkpoint(lambda c: half(c / "digests.json")), 2,
            "digests.json is damaged"),
    BadFile(CHECKPOINT, "a pickle that runs code, with digests that fit", of_checkpoint(_pickled_checkpoint), 2,
            "could run code"),
    BadFile(CHECKPOINT, "half of run.json", of_checkpoint(lambda c: half(c.parent / "run.json")), 2,
            "run.json is damaged"),
    BadFile(MODEL, "an empty folder", of_model(lambda model: (remove(model), model.mkdir())), 2, NO_MODEL),
    BadFile(MODEL, "a file", of_model(lambda model: (remove(model), model.write_text(""))), 2, "a file"),
    BadFile(MODEL, "config.json that is no JSON", of_model(lambda m: half(m / "config.json")), 2, NO_MODEL),
    BadFile(MODEL, "config.json of an unknown type", of_model(_config(model_type="none")), 2, NO_MODEL),
    BadFile(MODEL, "code of its own", of_model(_own_code), 2, "contains custom code"),
    BadFile(MODEL, "no weights", of_model(lambda m: remove(m / "model.safetensors")), 2, NO_MODEL),
    BadFile(MODEL, "half of model.safetensors", of_model(lambda m: half(m / "model.safetensors")), 2, NO_MODEL),
    BadFile(MODEL, "a bit of its header", of_model(lambda m: flip(m / "model.safetensors", 0)), 2, NO_MODEL),
    BadFile(MODEL, "weights without a tensor", of_model(_weights(lambda t: t.pop("model.norm.weight"))), 2,
            "weights without model.norm.weight"),
    BadFile(MODEL, "a tensor of another shape",
            of_model(_weights(lambda t: t.update({"model.norm.weight": torch.ones(3)}))), 2, NO_MODEL),
    BadFile(MODEL, "a weight that is NaN",
            of_model(_weights(lambda t: t["model.norm.weight"].fill_(float("nan")))), 2, "not a finite number"),
    BadFile(MODEL, "a pickle that runs code", of_model(_pickled_model), 2, NO_MODEL),
    BadFile(MODEL, "half of tokenizer.json", of_model(lambda m: half(m / "tokenizer.json")), 2, NO_MODEL),
    BadFile(MODEL, "adapter_config.json that is no JSON", of_model(lambda m: (m / ADAPTER).write_text("{")),
            2, "adapter_config.json is damaged"),
    BadFile(SAE, "no such file", of_sae(remove), 2, "no such file"),
    BadFile(SAE, "a folder", of_sae(folder), 2, "is a folder"),
    BadFile(SAE, "a name with another ending", of_sae(lambda path: None, ".pt"), 2, "need .npz or .safetensors"),
    BadFile(SAE, "half of it", of_sae(half), 2, "cannot be read as .safetensors"),
    BadFile(SAE, "a tensor missing", of_sae(_weights(lambda t: t.pop("b_enc"))), 2, "no b_enc among its keys"),
    BadFile(SAE, "a tensor too many", of_sae(_weights(lambda t: t.update(more=torch.ones(2)))), 2, "got the key more"),
    BadFile(SAE, "another shape", of_sae(_weights(lambda t: t.update(b_enc=torch.ones(2)))), 2, "b_enc"),
    BadFile(SAE, "NaN", of_sae(_weights(lambda t: t["W_enc"].fill_(float("nan")))), 2, "finite"),
    BadFile(SAE, "safetensors called .npz", of_sae(lambda path: None, ".npz"), 2, "cannot be read as .npz"),
    BadFile(SAE, "an .npz with a pickle", of_sae(_npz(W_enc=np.array([Payload()], object)), ".npz"), 2, "pickle"),
    BadFile(SAE, "an .npz of 80 MB of 0", of_sae(_npz(W_enc=np.zeros(10_000_000)), ".npz"), 2, "200 times as large"),
    BadFile(CONFIG, "no such file", of_config(lambda path: None), 2, "config:"),
    BadFile(CONFIG, "a folder", of_config(folder), 2, "config:"),
    BadFile(CONFIG, "random bytes", of_config(np.random.default_rng(0).bytes(400)), 2, "config:"),
    BadFile(CONFIG, "a list", of_config(b"- 1\n"), 2, "is not what an option is called"),
    BadFile(CONFIG, "a YAML tag that runs code", of_config(b"a: !!python/object/apply:print ['the payload ran']\n"), 2,
            "could not determine a constructor"),
    BadFile(CONFIG, "a misspelt name", of_config(b"lerning_rate: 1\n"), 2, "did you mean learning_rate?"),
    BadFile(CONFIG, "a value of another type", of_config(b"learning_rate: [1]\n"), 2, "learning_rate"),
]  # fmt: skip


def outcome(bad: BadFile, world: World) -> tuple[int, str, str]:
    """(exit code, the line that says it, all that was written)."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = asft(bad.make(world))
    lines = [line.strip() for line in (error if code else out).getvalue().splitlines()]
    said = next((line for line in reversed(lines) if bad.says in line), lines[-1] if lines else "")
    return code, said, out.getvalue() + error.getvalue()


def page(world: World) -> str:
    counts = f"{len(BAD_FILES)} bad files. `python -m tests.bad_files --write` writes this.\n"
    lines = [f"\n{counts}", "| file | what is bad | exit | what is said |", "| --- | --- | --- | --- |"]
    for bad in BAD_FILES:
        with tempfile.TemporaryDirectory() as place:
            code, said, _ = outcome(bad, fresh(world, Path(place)))
            said = said.replace(place, "").replace(str(world.model.parent), "")
        said = re.sub(r"0x[0-9a-f]+", "...", re.sub(r"[^ -~]", " ", said)).replace("|", "/").replace("<", "&lt;")
        lines.append(f"| {bad.kind} | {bad.what} | {code} | {said[:260]}{'...' if len(said) > 260 else ''} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/trust.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        table = page(good(Path(place)))
    if args.write:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(before + START + table + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
