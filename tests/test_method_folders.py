"""A method's folder can be deleted: the rest imports and trains, and what needs it is refused by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra: trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from tiny_lm import saved_tiny_model

# What needs the folder that is missing, and what is then said.
NEEDS = {
    "kto": ({"objective": "kto"}, "needs kl"),
    "bmc": ({"objective": "bmc", "objective_args": ["base=dpo"]}, "needs token_weights"),
    "fpo": ({"objective": "fpo"}, "needs feature_distance"),
    "sapo": ({"method": "sapo"}, "method: got 'sapo', need"),
    "dnpo": ({"method": "dnpo"}, "method: got 'dnpo', need"),
}
# Imports what is slow once; each copy of the package is loaded by a process of its own.
WITHOUT = """
import json, os, sys
import datasets, peft, tiny_lm, transformers.models.llama.modeling_llama, trl.trainer.dpo_trainer

needs = json.loads(sys.argv[3])
for name in sys.argv[4:]:
    if not os.fork():
        sys.path.insert(0, os.path.join(sys.argv[1], name))
        from asft_kernels.errors import InputError
        from asft_kernels.training import PreferenceConfig, PreferenceTrainer
        from tiny_lm import pairs, tiny_tokenizer
        import asft_kernels

        assert asft_kernels.__file__.startswith(os.path.join(sys.argv[1], name))
        common = dict(output_dir=sys.argv[1], max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no")
        made = lambda **given: PreferenceTrainer(
            sys.argv[2], args=PreferenceConfig(**common, **given), processing_class=tiny_tokenizer(),
            train_dataset=datasets.Dataset.from_list(pairs(4)))
        made(objective="asft").train()
        given, text = needs.get(name, [None, None])
        if given is not None:
            try:
                made(**given)
            except InputError as error:
                assert text in str(error), error
            else:
                raise AssertionError(f"{name}: trains without its folder")
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"failed without methods/{name}")
"""


def test_any_method_can_be_deleted(tmp_path):
    package, tests = Path(__file__).parents[1] / "asft_kernels", Path(__file__).parent
    model = str(saved_tiny_model(tmp_path / "model"))
    names = [folder.name for folder in (package / "methods").iterdir() if (folder / "__init__.py").is_file()]
    for name in names:
        shutil.copytree(
            package, tmp_path / name / "asft_kernels", ignore=lambda path, found, name=name: [
                x for x in found if x == "__pycache__" or (x == name and Path(path).name == "methods")
            ],
        )  # fmt: skip
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), model, json.dumps(NEEDS), *names]
    environment = {**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(NEEDS) <= set(names)
