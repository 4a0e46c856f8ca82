"""Which files hold a split: the names of folders and files say so, by the words that datasets knows."""

import re
from pathlib import Path

from asft_kernels.errors import InputError

SHARDS = (".jsonl", ".json", ".gz", ".parquet", ".arrow")
WHOLE = "train"  # the split of data that names none
NUMBER = re.compile(r"([-_. ]+\d+([-_. ]of[-_. ]\d+(-[0-9a-f]{16})?)?)+$")  # of a shard: -00000-of-00002


def files_of(path: Path, split: str) -> list[Path] | None:
    """Finds the files of a split.

    Args:
        path: a file, a folder of shards, a folder that datasets saved, or a name on the hub.
        split: "train", "test", ..., and what follows the word in the names: "train_sft". Of files that name no split,
            all are "train".

    Returns:
        Files, or folders that datasets saved; None for a name on the hub.

    Raises:
        InputError: path has no such split, or a file's path names two.
    """
    if (path / "dataset_dict.json").is_file():
        found = {part.name: [part] for part in sorted(path.iterdir()) if part.is_dir()}
    elif path.is_dir() and not (path / "state.json").is_file():
        found = _of_folder(path)
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and path.suffix not in SHARDS:
        return None
    elif not path.exists() or split == WHOLE:
        return [path]
    else:
        raise InputError(f"split: got {split!r}, and {str(path)!r} has no splits; need {WHOLE!r}, all of it")
    if split not in found:
        raise InputError(
            f"split: got {split!r}, and {str(path)!r} holds {', '.join(map(repr, sorted(found)))}; need one of these, "
            "or name files"
        )
    return found[split]


def _of_folder(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files. Files that name none are left out where others do, as datasets leaves them out."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in SHARDS and file.is_file())
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not visible:
        ends = f"no file that ends in {', '.join(SHARDS)}"
        raise InputError(f"data: got {str(folder)!r}, a folder in which {ends}; need a folder of shards, or name files")
    found: dict[str, list[Path]] = {}
    for file in visible:
        names = sorted({name for part in file.relative_to(folder).parts for name in _named(part)})
        if len(names) > 1:
            raise InputError(f"split: {file} may be of {' or '.join(map(repr, names))}; name files instead of {folder}")
        for name in names:
            found.setdefault(name, []).append(file)
    return found or {WHOLE: visible}


def _named(part: str) -> set[str]:
    """The splits that a folder's or file's name may mean: its word for one, with what follows but a shard's number."""
    from datasets.data_files import SPLIT_KEYWORDS

    known = {word for words in SPLIT_KEYWORDS.values() for word in words}
    while (suffix := Path(part).suffix) in SHARDS:
        part = part.removesuffix(suffix)
    words = re.split(r"[-_. ]+", NUMBER.sub("", part))
    bare = [word.lower().strip("0123456789") for word in words]
    return {"_".join([bare[at], *words[at + 1 :]]) for at in range(len(words)) if bare[at] in known}
