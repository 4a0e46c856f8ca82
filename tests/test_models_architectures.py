"""docs/models.md's table: a dozen architectures always, every one of them in the slow part."""

from collections import Counter

import pytest

pytest.importorskip("transformers", reason="needs the train extra: transformers")

import transformers

from architectures import MAPPINGS, PAGE, judge, rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about configs that nobody trains

DOZEN = {
    "causal": ["llama", "qwen2", "gemma2", "cohere", "granite", "minicpm3", "gpt2", "bert", "falcon_h1", "mixtral"],
    "image-text": ["aya_vision", "gemma3"],
}


@pytest.mark.parametrize(("kind", "model_type"), [(kind, name) for kind, names in DOZEN.items() for name in names])
def test_a_dozen(kind, model_type):
    for config_class, model_class in MAPPINGS[kind].items():
        if config_class.model_type == model_type:
            found = judge(kind, config_class, model_class)
            assert found.outcome == "equal", found.why


@pytest.mark.slow
def test_every_architecture():
    table = list(rows(list(MAPPINGS), []))
    counts = Counter((found.kind, found.outcome) for found in table)
    assert not [found for found in table if found.outcome in ("WRONG", "crash")]
    assert counts["causal", "equal"] >= 183
    assert counts["image-text", "equal"] >= 51
    if f"transformers {transformers.__version__}." in PAGE.read_text():
        shown = [
            line.split(" | ")[1:4] for line in PAGE.read_text().splitlines() if line.startswith(("| causal", "| im"))
        ]
        assert shown == [[found.model_type, found.name, found.outcome] for found in table]
