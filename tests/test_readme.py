"""README, quick start, cost, benchmarks: figures drawn, code that runs, sums. All pages: links lead to files."""

import re
from pathlib import Path

import pytest
import torch

from asft_kernels import fused_asft_loss, reference
from asft_kernels.backends.plan import default_cache_bytes, make_plan, token_blocks
from benchmarks import report

ROOT = Path(__file__).parents[1]
README, QUICK_START, COST = ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "cost.md"
FOLDERS = ("asft_kernels", "bench_results", "benchmarks", "docs", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]


def test_figures_are_drawn_from_the_rows():
    files = report.row_files()
    if not files:
        pytest.skip("bench_results/ has no rows yet: make bench")
    assert report.newest_rows(files), f"no rows in {', '.join(path.name for path in files)}"
    for page, text in report.drawn_pages(files).items():
        assert page.read_text() == text, "run `python -m benchmarks.report --write`"
    full = report.RESULTS / "REPORT.md"
    assert full.read_text() == report.report(files), "run `python -m benchmarks.report --write`"


def code(number: int, page: Path = QUICK_START) -> str:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[number]


def test_the_first_screen_stays_one():
    """In 40 lines what it is, its cost, the install, the code and where it has run; a screen and a half in all."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 100
    first = " ".join(lines[:42])
    assert all(
        x in first
        for x in ("2409.10571", "glance.png", "pip install", "make demo", "fused_asft_loss", "not yet on AMD")
    )


def test_the_number_of_models_is_that_of_their_page():
    models, equal = re.search(r"^causal: (\d+); (\d+) equal", (ROOT / "docs" / "models.md").read_text(), re.M).groups()
    assert f"{models} causal models [{equal} equal them]" in " ".join(README.read_text().split())


def test_the_readme_runs_as_it_stands():
    names: dict = {}
    exec(code(0, README), names)
    assert names["loss"].isfinite()
    assert names["hidden"].grad.abs().sum() > 0


def test_a_model_and_trl_as_the_readme_has_them(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    for package in ("trl", "transformers"):
        pytest.importorskip(package, reason=f"needs the train extra: {package}")
    from asft_kernels.training import unpatch_trl
    from tiny_lm import tiny_model

    names = {"model": tiny_model()}
    try:
        exec(code(1, README), names)
    finally:
        unpatch_trl()
    ids = torch.randint(3, 259, (2, 9))
    logps = names["model"](input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    assert logps.requires_grad
    assert (logps < 0).all()


def test_a_hugging_face_model_feeds_it():
    """The loss is that of the model's own logits with labels moved by one, chosen rows first.

    Relative rounding of fp32 sums of D = 16 and V = 259 terms and a few functions: below (D + V) 2^-24 = 2e-5.
    """
    pytest.importorskip("transformers", reason="needs the train extra: transformers")
    from tiny_lm import tiny_model

    model = tiny_model(initializer_range=0.5)  # logits of some units, not of hundredths
    ids = torch.randint(3, 259, (4, 9))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    names = {"fused_asft_loss": fused_asft_loss, "model": model}
    names.update(input_ids=ids, attention_mask=mask, labels=labels)
    exec(code(0), names)
    logits = model(input_ids=ids, attention_mask=mask).logits
    plain = reference.fused_asft_loss(logits[:, :-1], torch.eye(259), labels[:, 1:], shift=False)
    torch.testing.assert_close(names["loss"], plain, rtol=2e-5, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_lora_adapter_trains(tmp_path, monkeypatch):
    """Adapters move and nothing else; the pairs are the plain one of the page, in several rows."""
    for package in ("trl", "datasets", "peft"):
        pytest.importorskip(package, reason=f"needs the test extra: {package}")
    from tiny_lm import tiny_model, tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    (shown,) = re.findall(r"```json\n(.*?)```", QUICK_START.read_text(), re.S)
    Path("pairs.jsonl").write_text(4 * (shown.splitlines()[0] + "\n"))
    names = {"model": tiny_model(), "tokenizer": tiny_tokenizer(chat=True)}
    exec(code(1), names)
    trained = {name for name, p in names["trainer"].model.named_parameters() if "lora_B" in name and p.abs().sum() > 0}
    assert trained
    assert all("lora_" in name for name, p in names["trainer"].model.named_parameters() if p.requires_grad)


def test_both_kinds_of_rows_are_read(tmp_path):
    pytest.importorskip("trl", reason="needs the test extra: trl")
    from asft_kernels.data import load_pairs
    from tiny_lm import tiny_tokenizer

    (shown,) = re.findall(r"```json\n(.*?)```", QUICK_START.read_text(), re.S)
    (tmp_path / "pairs.jsonl").write_text(shown)
    found, _ = load_pairs(str(tmp_path / "pairs.jsonl"), tiny_tokenizer(chat=True))
    assert len(found) == 2


def test_a_fused_model_gives_what_the_page_names():
    pytest.importorskip("transformers", reason="needs the train extra: transformers")
    from tiny_lm import tiny_model

    ids = torch.randint(3, 259, (4, 9))
    names = {"model": tiny_model(), "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    exec(code(2), names)
    assert names["out"].log_probs.shape == names["out"].entropy.shape == (4, 8)


def test_the_worked_memory(monkeypatch):
    N, V, D, MIB = 8192, 151936, 4096, 2**20
    block, accumulators = token_blocks(N, "cpu")[0].stop, 16 * N * D // MIB

    def by_the_terms():
        """MiB of a chunk, of the chunk that is recomputed, and of all with a frozen and with a trainable head."""
        plan = make_plan(N, V, D, exp_bytes=4, chunk_size=None, cache_bytes=0, device_type="cpu")
        chunk, recomputed = 4 * block * plan.chunk // MIB, 4 * N * plan.chunk // MIB
        frozen = accumulators + 2 * chunk
        return chunk, recomputed, frozen, frozen + default_cache_bytes("cpu") // MIB + recomputed

    text = " ".join(COST.read_text().split())
    assert f"takes {4 * N * V / 2**30:.2f} GiB ({2 * N * V / 2**30:.2f} in bf16)" in text
    chunk, recomputed, frozen, trainable = by_the_terms()
    assert f"{frozen} MiB with a frozen head ({accumulators} MiB + two chunks of {chunk} MiB)" in text
    assert f"{trainable} MiB with a trainable one (+ 1 GiB of `cache_bytes` + {recomputed} MiB)" in text
    monkeypatch.setattr("asft_kernels.backends.processor.INTEL", True)
    *_, frozen, trainable = by_the_terms()
    assert f"on an Intel processor, where chunks are wider, {frozen} and {trainable} MiB" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(<?([^)\s>]+)|(?:src|href)=\"([^\"]+)\"", text)
    relative = [link for pair in links for link in pair if link and not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in relative if not (page.parent / link.split("#")[0]).exists()]
    assert not missing
