"""The parser of `asft train`: TRL's, its options in groups, what is wrong with them in one line."""

import argparse
import difflib
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from asft_kernels.errors import InputError, of_a_library
from asft_kernels.training.arguments import DataArguments, ModelArguments
from asft_kernels.training.config import OF_THE_LOSS, PreferenceConfig

# Names of earlier releases of transformers that are not close to today's.
RENAMED = {"torch_dtype": "dtype", "warmup_ratio": "warmup_steps (below 1: a share of all steps)"}
OF_ADAPTERS = ("use_", "lora_", "load_in_", "bnb_")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option, the description as it stands."""


class TrainParser(TrlParser):
    """TRL's parser of dataclasses and `--config FILE` for what a run takes.

    Args:
        of_methods: method -> dataclass of its options.
        options: those of ArgumentParser.
    """

    def __init__(self, of_methods: dict[str, Any], **options: Any):
        kinds: Any = [DataArguments, PreferenceConfig, ModelArguments, *of_methods.values()]
        super().__init__(kinds, formatter_class=_Help, allow_abbrev=False, **options)
        self._of_file: dict[str, Any] = {}
        for action in self._actions:  # `read` turns dashes into underscores
            action.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        titles = _titles(of_methods)
        groups = {title: self.add_argument_group(title) for title in dict.fromkeys(titles.values())}
        for action in self._actions:
            if action.dest in titles:
                self._optionals._group_actions.remove(action)
                groups[titles[action.dest]]._group_actions.append(action)

    def read(self, words: Iterable[str]) -> tuple[Any, ...]:
        """Reads the words of a command.

        Args:
            words: options with `-` or `_` in their names.

        Returns:
            (DataArguments, PreferenceConfig, ModelArguments, then one of each method's dataclass).

        Raises:
            InputError: for what is wrong with them or with the file of --config.
        """
        words = [part for word in words for part in _parts(word)]
        if "--config" in words:
            _check_config(words)
        try:
            return self.parse_args_and_config(words)
        except InputError:
            raise
        except PackageNotFoundError as error:
            if "deepspeed" not in str(error):
                raise
            need = "it for a DeepSpeed config; pip install deepspeed, or shard with --fsdp true"
            raise InputError(f"deepspeed: not installed, need {need}") from error
        except (OSError, TypeError, ValueError) as error:  # of TRL's and transformers' own checks of arguments
            if not of_a_library(error):
                raise
            raise InputError(_in_one_line(error)) from error

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            word = next((word for word in rest if word.startswith("-")), None)
            raise self._unknown(word.partition("=")[0]) if word else InputError(f"got {rest[0]!r} behind no option")
        said = {word.partition("=")[0].removeprefix("--") for word in args or ()}
        before = self._of_file.get("objective", found.objective)
        for name in ("objective_args", *OF_THE_LOSS):
            if before != found.objective and self._of_file.get(name) is not None and name not in said:
                got = f"{self._of_file[name]!r} in the file of --config, for its objective {before!r}"
                need = f"--{name} on the command line, too, for --objective {found.objective!r}"
                raise InputError(f"{name}: got {got}, need {need}")
        return found, rest

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        for action in self._actions:
            if action.nargs == "+" and isinstance(config.get(action.dest), str):  # one value needs no brackets
                config[action.dest] = [config[action.dest]]
        self._of_file = config
        rest = super().set_defaults_with_config(**config)
        if rest:
            raise self._unknown(rest[0].removeprefix("--"), "config: ")
        return rest

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def _unknown(self, word: str, where: str = "") -> InputError:
        name, dashes = word.removeprefix("--"), "--" if word.startswith("--") else ""
        by_name = {option[2:]: action for option, action in self._option_string_actions.items()}
        close = [name] if name in by_name else difflib.get_close_matches(name, by_name, 1)
        need = RENAMED.get(name) or (close and (close[0] if dashes else by_name[close[0]].dest).replace("-", "_"))
        hint = f"did you mean {dashes}{need}?" if need else "asft train --help lists the options"
        return InputError(f"{where}{word}: no such option; {hint}")


def _titles(of_methods: dict[str, Any]) -> dict[str, str]:
    """Option -> title of its group, in the order in which they are shown."""
    of_model = [field.name for field in fields(ModelArguments)]
    titles = {name: "model" for name in of_model if not name.startswith(OF_ADAPTERS)}
    titles |= {field.name: "data and run" for field in fields(DataArguments)} | {"output_dir": "data and run"}
    of_trainer = {field.name for field in fields(TrainingArguments)}
    titles |= {name: "objective and head" for name in PreferenceConfig.__annotations__ if name not in of_trainer}
    for method, kind in of_methods.items():
        titles |= {field.name: f"method {method}" for field in fields(kind)}
    further = dict.fromkeys(of_model, "adapters and quantisation")
    for field in sorted(fields(PreferenceConfig), key=lambda field: field.name in of_trainer):
        further[field.name] = "transformers' TrainingArguments" if field.name in of_trainer else "TRL's DPOConfig"
    return titles | {name: title for name, title in further.items() if name not in titles}


def _parts(word: str) -> list[str]:
    """--max-length and --max_length are the same option; --config=FILE is two words, the only way TRL knows it."""
    name, equals, value = word.partition("=")
    if not word.startswith("--"):
        return [word]
    name = name.replace("-", "_").replace("__", "--", 1)
    return [name, value] if equals and name == "--config" else [name + equals + value]


def _check_config(words: list[str]) -> None:
    """Says what is wrong with the file of --config, of which TRL reads one."""
    paths = words[words.index("--config") + 1 :]
    if not paths or "--config" in paths:
        raise InputError("config: got none, or several; need one file in YAML")
    try:
        with Path(paths[0]).open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config: {paths[0]} cannot be read: {_in_one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"config: {paths[0]} is not what an option is called, a colon and its value, line by line")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
