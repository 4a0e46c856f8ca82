"""The written GPU model: its schedule is the backend's, its sums are right, and its document is up to date."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from asft_kernels.backends import Logits, triton_fused
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan
from asft_kernels.kernels import configs, label_gradient, logit_strips
from asft_kernels.kernels.configs import FORMS, WHOLE, Strips, tiles
from benchmarks import gpu_model
from benchmarks.cases import FROZEN, NO_GRADIENT, TRAINABLE
from benchmarks.gpu_schedule import Call, Step, extra_bytes, schedule

TILE = tiles("sm_90", torch.bfloat16, softcap=False)[0]
STRIPS = Strips(0, 8, 16, 4, "a test's: two to a chunk")
LAUNCHES = (
    "label_logits", "logits_exp", "settle", "resettle", "close_statistics", "row_factors", "grad_hidden",
    "scaled_hidden", "label_rows",
)  # fmt: skip
KERNELS = {"exps_of_logits": logit_strips, "label_columns": label_gradient, "label_gradient": label_gradient}
OPERATIONS = {"mm": "product", "addmm": "product", "copy_": "copy", "sort": "sort"}


class Small(Call):
    """Four chunks, the last one narrower, of which one is kept."""

    @property
    def plan(self) -> Plan:
        return Plan(vocab=100, chunk=30, cached=1)


class Recorder(TorchDispatchMode):
    """Counts what the backend asks of torch, and its launches; what a kernel's interpreter does is not counted."""

    def __init__(self):
        super().__init__()
        self.seen, self.inside = Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = OPERATIONS.get(func._schema.name.removeprefix("aten::"))
        if name and not self.inside:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    def counted(self, name, launch):
        def call(*args, **kwargs):
            self.seen[name] += 1
            self.inside = True
            try:
                return launch(*args, **kwargs)
            finally:
                self.inside = False

        return call

    def kernel(self, name, kernel):
        """A kernel, of which kernel[grid] is what launches."""

        class Launcher:
            def __getitem__(_, grid):
                return self.counted(name, kernel[grid])

        return Launcher()


@pytest.mark.interpreter
@pytest.mark.parametrize("tile", [TILE, STRIPS], ids=["tile", "strips"])
@pytest.mark.parametrize(
    ("work", "form"), [(NO_GRADIENT, None), (FROZEN, None), *((TRAINABLE, form) for form in FORMS)]
)
def test_launches_are_the_backend_s(work, form, tile, monkeypatch, device):
    call, recorder = Small(N=33, V=100, D=16, work=work, form=form), Recorder()
    for name in LAUNCHES:
        strips = name == "logits_exp" and tile is STRIPS  # their launches are counted below
        if not strips:
            monkeypatch.setattr(triton_fused, name, recorder.counted(name, getattr(triton_fused, name)))
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, f"{name}_kernel", recorder.kernel(name, getattr(module, f"{name}_kernel")))
    monkeypatch.setattr(triton_fused, "best_form", lambda *args, **options: form)
    if tile is STRIPS:
        monkeypatch.setattr(triton_fused, "best_tile", lambda *args, **options: tile)
    monkeypatch.setattr(triton_fused, "rounded_product", recorder.counted("product", triton_fused.rounded_product))
    hidden, weight = (torch.randn(n, call.D, device=device).bfloat16() for n in (call.N, call.V))
    labels = torch.randint(call.V, (call.N,), device=device)
    inputs = (hidden, HeadRows(weight), None, torch.arange(call.N, device=device), labels)
    needs = {"needs_acc": work != NO_GRADIENT, "needs_exps": work == TRAINABLE}
    with recorder:
        saved = triton_fused.forward(*inputs, Logits(), call.plan, **needs)
        if work != NO_GRADIENT:
            triton_fused.backward(
                torch.ones(call.N, device=device), *inputs, saved, Logits(), call.plan,
                needs_hidden=True, needs_weight=work == TRAINABLE, needs_low_rank=False, needs_bias=False,
            )  # fmt: skip
    assert recorder.seen == Counter(step.name for step in schedule(call, tile))


@pytest.mark.parametrize("tile", [TILE, STRIPS], ids=["tile", "strips"])
@pytest.mark.parametrize(("work", "expected"), [(NO_GRADIENT, 1), (FROZEN, 2), (TRAINABLE, 3.7)])
def test_operations_are_the_products_and_what_is_recomputed(work, expected, tile):
    """And, beside dW that is rounded whole, the rows of the labels once more: a fifth of 100 if tokens share them."""
    call = Small(N=33, V=100, D=16, work=work, form="slices")  # 30 of 100 vocabulary rows are kept
    assert sum(step.flops for step in schedule(call, tile)) == pytest.approx(expected * 2 * 33 * 100 * 16)
    if work == TRAINABLE:
        whole = Small(N=33, V=100, D=16, work=work, form=WHOLE, distinct=20 / 33)
        assert sum(step.flops for step in schedule(whole, tile)) == pytest.approx((expected + 0.2) * 2 * 33 * 100 * 16)


def test_time_of_a_step_by_hand():
    chip = gpu_model.Chip("sm_90", peak=1e15, bandwidth=1e12, multiprocessors=100, library=0.5, triton=(0.2, 0.4))
    launch = gpu_model.LAUNCH
    assert gpu_model.seconds(Step(1, "product", flops=1e12), chip, 0.4) == pytest.approx(2e-3 + launch)
    assert gpu_model.seconds(Step(1, "logits_exp", flops=1e12, engine="triton"), chip, 0.4) == pytest.approx(
        2.5e-3 + launch
    )
    assert gpu_model.seconds(Step(1, "copy", flops=1e9, bytes=9e9), chip, 0.4) == pytest.approx(1e-2 + launch)
    returning = gpu_model.seconds(Step(1, "label_columns", programs=1600), chip, 0.4)
    assert returning == pytest.approx(gpu_model.PROGRAM + launch)
    # 150 tiles take two turns of 100 where 1.5 would do; 50 tiles one, unless the library cuts their sums as well.
    for tiles_, engine, tail in (
        (150, "triton", 4 / 3),
        (50, "triton", 2),
        (150, "library", 4 / 3),
        (50, "library", 1),
    ):
        step = Step(1, "a product", flops=1e12, engine=engine, tiles=tiles_)
        rate = 0.4e15 if engine == "triton" else 0.5e15
        assert gpu_model.seconds(step, chip, 0.4) == pytest.approx(tail * 1e12 / rate + launch)


def test_memory_by_hand():
    """Qwen3, N = 8192: chunks of 16896 rows, whose E is 264 MiB; O 128, dH and Hs 64 each, dW 1187, and beside it the
    labels' columns 128, or a slice 32. Strips have 32 of logits and the tokens' rows, 64, but four times fewer sums."""
    mib, vectors = 2**20, 64 * 8192
    frozen = extra_bytes(Call(8192, 151936, 4096, FROZEN))
    assert frozen == (264 + 128 + 8.25) * mib + vectors
    assert extra_bytes(Call(8192, 151936, 4096, FROZEN), configs.STRIPS[0]) == (264 + 128 + 2.0625 + 96) * mib + vectors
    kept = extra_bytes(Call(8192, 151936, 4096, TRAINABLE, 2**40))
    assert kept == 2 * 8192 * 151936 + (128 + 64 + 64 + 128 + 1187) * mib + vectors
    sliced = extra_bytes(Call(8192, 151936, 4096, TRAINABLE, 2**40, form="slices"))
    assert sliced == 2 * 8192 * 151936 + (128 + 64 + 64 + 32 + 1187) * mib + vectors
    bounded = extra_bytes(Call(8192, 151936, 4096, TRAINABLE, 2**30))
    assert bounded == (3 * 264 + 264 + 128 + 64 + 64 + 128 + 1187) * mib + vectors


def test_rate_needed_is_where_the_limit_is_met():
    call, chip = Call(8192, 151936, 4096, FROZEN), gpu_model.H100
    share = gpu_model.share_needed(call, chip, 1.2)
    assert share is not None
    assert gpu_model.predict(call, chip, share) == pytest.approx(1.2 * gpu_model.bare(call, chip), rel=1e-6)
    assert gpu_model.share_needed(call, chip, 0.99) is None
    fastest = gpu_model.predict(call, chip, chip.library) / gpu_model.bare(call, chip)
    assert gpu_model.share_needed(call, chip, fastest + 1e-6) == pytest.approx(chip.library, rel=1e-4)


def test_what_is_left_beside_the_products_by_hand():
    """Every launch, and all of the steps that are no product and no rounding."""
    call, chip = Small(N=33, V=100, D=16, work=FROZEN), gpu_model.H100
    steps = list(schedule(call, TILE))
    whole = sum(gpu_model.seconds(step, chip, 0.5) for step in steps)
    multiply = [step for step in steps if step.flops]
    products = sum(gpu_model.seconds(step, chip, 0.5) - gpu_model.LAUNCH for step in multiply)
    assert len(multiply) == 8  # two a chunk
    assert gpu_model.rest(call, chip, 0.5) == pytest.approx(1 - products / whole)
    every = [
        gpu_model.rest(c, gpu_model.CHIPS["B200"], 0.6)
        for c in gpu_model.calls("Llama-3-8B", 8192, gpu_model.CHIPS["B200"]).values()
    ]
    least, most = gpu_model.rest_sentence().split(" % on B200")[0].split()[-1].split("–")
    assert float(least) - 0.05 <= 100 * min(every) <= 100 * max(every) <= float(most) + 0.05
    assert "stay below" not in gpu_model.DOC.read_text()


def test_document_has_the_tables_of_the_model():
    text = gpu_model.DOC.read_text()
    assert gpu_model.written(text) == text, "run `python -m benchmarks.gpu_model --write`"
