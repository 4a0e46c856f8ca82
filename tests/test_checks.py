"""What the user got wrong: a ValueError with the argument, what it was and what it must be."""

import re

import pytest
import torch
from torch import nn

from asft_kernels import FusedASFTLoss, fused_asft_loss, fused_linear_logps, fused_preference_loss
from asft_kernels.backends import choose_backend, interpreter_fault
from asft_kernels.objectives import ASFT, get_objective
from cases import make_case


def call(message, *, hidden=None, head=None, labels=None, fn=fused_asft_loss, **keywords):
    case = make_case()
    hidden = case.hidden if hidden is None else hidden
    head = case.weight if head is None else head
    labels = case.labels if labels is None else labels
    with pytest.raises(ValueError, match=re.escape(message)):
        fn(hidden, head, labels, **keywords)


def test_odd_number_of_rows():
    call(
        "hidden: got 3 rows, need an even number: B chosen ones",
        hidden=torch.randn(3, 5, 24),
        labels=torch.ones(3, 5).long(),
    )
    call(
        "cu_seqlens: got 3 sequences, need an even number",
        hidden=torch.randn(6, 24),
        labels=torch.ones(6).long(),
        cu_seqlens=torch.tensor([0, 2, 4, 6]),
    )


@pytest.mark.parametrize("bad", [97, 10**6, -1, -99])
def test_label_out_of_range(bad):
    labels = make_case().labels.clone()
    labels[1, 3] = bad
    call("need 0 to 96 (the rows of lm_head) or ignore_index", labels=labels)


def test_label_range_is_named():
    labels = make_case().labels.clone()
    labels[1, 3] = 500
    call("labels: got values from 3 to 500", labels=labels)


def test_other_ignore_index_makes_minus_100_an_error():
    call("labels: got values from -100", ignore_index=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reduction": "avg"}, "reduction: got 'avg', need one of 'mean', 'sum', 'none'"),
        ({"backend": "cuda"}, "backend: got 'cuda', need one of 'torch', 'triton' or None"),
        ({"logit_scale": 0.0}, "logit_scale: got 0.0, need a finite number other than 0"),
        ({"softcap": 0.0}, "softcap: got 0.0, need a finite number > 0"),
        ({"softcap": -3}, "softcap: got -3, need a finite number > 0"),
        ({"cache_bytes": -1}, "cache_bytes: got -1, need an integer >= 0"),
        ({"cache_bytes": 1e9}, "cache_bytes: got 1000000000.0, need an integer >= 0"),
        ({"chunk_size": 0}, "chunk_size: got 0, need an integer >= 1"),
        ({"num_valid": True}, "num_valid: got True, need an integer >= 0"),
        ({"shift": "no"}, "shift: got 'no', need True"),
        ({"softcap": True}, "softcap: got True, need a finite number > 0"),
        ({"lam": "1"}, "asft: lam: got '1', need a finite number >= 0"),
        ({"ignore_index": None}, "ignore_index: got None, need an integer"),
        ({"lam": -0.5}, "asft: lam: got -0.5, need a finite number >= 0"),
        ({"beta": 0.0}, "asft: beta: got 0.0, need a finite number > 0"),
    ],
)
def test_options(keywords, message):
    call(message, **keywords)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.ones(4, 13, 24, dtype=torch.int64), "hidden: got dtype torch.int64, need one of torch.float32"),
        (torch.randn(4, 13, 25), "hidden: got size 25 in its last dimension, need 24"),
        (
            torch.randn(4, 13, 2, 24),
            "hidden: got shape (4, 13, 2, 24), need (R, T, D), R rows of T positions, or packed (M, D) with",
        ),
        (torch.randn(52, 24), "labels: got shape (4, 13), need (52,)"),
        ([[1.0]], "hidden: got list, need a tensor"),
        (torch.randn(4, 13, 24).double(), "lm_head weight: got torch.float32, need torch.float64, the dtype of hidden"),
        (torch.randn(4, 13, 24, device="meta"), "hidden: got a tensor on the meta device, need one with data"),
    ],
)
def test_hidden(hidden, message):
    call(message, hidden=hidden)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(4, 12).long(), "labels: got shape (4, 12), need (4, 13)"),
        (torch.ones(4, 13), "labels: got dtype torch.float32, need an integer one"),
        (torch.ones(4, 13).bool(), "labels: got dtype torch.bool, need an integer one"),
        ([1, 2], "labels: got list, need an integer tensor of shape (4, 13)"),
        (torch.ones(4, 13, device="meta").long(), "labels: got a tensor on meta, need cpu"),
    ],
)
def test_labels(labels, message):
    call(message, labels=labels)


@pytest.mark.parametrize("fn", [fused_asft_loss, fused_linear_logps])
@pytest.mark.parametrize(
    ("borders", "message"),
    [
        (None, "cu_seqlens: got None with packed hidden (M, D), need the borders of its R sequences, (R+1,) integers"),
        (torch.tensor([0, 3, 5]), "cu_seqlens: got borders in order up to 5, need 0 first, never decreasing, and 6"),
        (torch.tensor([0, 3, 9]), "cu_seqlens: got borders in order up to 9"),
        (torch.tensor([1, 3, 6]), "cu_seqlens: got borders out of order or not from 0 up to 6"),
        (torch.tensor([0, 4, 3, 5, 6]), "cu_seqlens: got borders out of order"),
        (torch.tensor([0.0, 3, 6]), "cu_seqlens: got (3,) torch.float32, need a tensor (R+1,) of int32 or int64"),
        ([0, 3, 6], "cu_seqlens: got list, need a tensor (R+1,)"),
    ],
)
def test_borders(fn, borders, message):
    call(message, fn=fn, hidden=torch.randn(6, 24), labels=torch.ones(6).long(), cu_seqlens=borders)


@pytest.mark.parametrize("lengths", [[1, 2, 2, 1], [3, 3], [0, 2, 4, 6], [2, 2, 2]])
def test_lengths_in_the_place_of_borders(lengths):
    """As many as pairs have rows is an even number of borders; what is wrong is another thing."""
    message = "need 0 first, never decreasing, and 8 (the packed tokens) last; of lengths: torch.nn.functional.pad("
    call(message, hidden=torch.randn(8, 24), labels=torch.ones(8).long(), cu_seqlens=torch.tensor(lengths))


def test_the_cure_for_lengths_is_one():
    lengths = torch.tensor([1, 3, 2, 2])
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    case = make_case()
    assert fused_asft_loss(torch.randn(8, 24), case.weight, torch.ones(8).long(), cu_seqlens=borders).isfinite()


def test_borders_elsewhere():
    borders = torch.tensor([0, 3, 6], device="meta")
    call(
        "cu_seqlens: got a tensor on meta, need cpu",
        hidden=torch.randn(6, 24),
        labels=torch.ones(6).long(),
        cu_seqlens=borders,
    )


def test_borders_with_padded_hidden():
    call("cu_seqlens: got borders with padded hidden (4, 13, 24)", cu_seqlens=torch.tensor([0, 13, 52]))


def test_a_whole_model_for_a_head():
    class Model(nn.Module):
        def get_output_embeddings(self):
            raise AssertionError

    call("lm_head: got Model, need an nn.Linear or nn.Embedding, a (V, D) tensor", head=Model())
    call("of tensors; pass the model's .lm_head", head=Model())


class Wrapped(nn.Linear):
    """Like a quantised or adapted head: a Linear that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


class HasWeight(nn.Module):
    weight = nn.Parameter(torch.ones(97, 24))


def partitioned():
    weight = nn.Parameter(torch.empty(0))
    weight.ds_id = 3
    return weight


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            Wrapped(24, 97),
            "Wrapped, need an nn.Linear or nn.Embedding, a (V, D) tensor or a (weight, bias) pair, or PEFT's LoRA",
        ),
        (HasWeight(), "HasWeight, need an nn.Linear"),
        ("lm_head", "lm_head: got str, need an nn.Linear"),
        (torch.randn(97), "lm_head: got a weight of shape (97,), need (V, D)"),
        (torch.randn(0), "lm_head: got a weight of shape (0,), need (V, D)"),
        (nn.Linear(24, 97, device="meta"), "lm_head weight: got a tensor on the meta device"),
        (torch.ones(97, 24).long(), "lm_head weight: got dtype torch.int64"),
        ((torch.randn(97, 24), torch.randn(96)), "lm_head: got a bias of shape (96,), need (97,)"),
        ((torch.randn(97, 24), torch.randn(97).half()), "lm_head bias: got torch.float16, need torch.float32"),
        ((torch.randn(97, 24), 0.5), "lm_head bias: got float, need a tensor"),
        (
            torch.randn(24, 97),
            "hidden: got size 24 in its last dimension, with a head (V, D) of (24, 97), need the hidden states that go "
            "into the head, of size 97: these look like its logits; or, if your head is (D, V), transpose it with .t()",
        ),
        (nn.Linear(97, 24), "hidden: got size 24 in its last dimension, with a head (V, D) of (24, 97)"),
        (
            (torch.randn(24, 97), torch.randn(97)),
            "lm_head: got a bias of shape (97,), need (24,), one entry a row of the weight (24, 97), which is",
        ),
        (partitioned(), "lm_head weight: got a DeepSpeed ZeRO-3 parameter that is partitioned, need it whole"),
    ],
)
def test_heads(head, message):
    call(message, head=head)


def patched(**changes):
    linear = nn.Linear(24, 97)
    if "forward" in changes:
        linear.forward = changes["forward"]
    if "hook" in changes:
        linear.register_forward_hook(changes["hook"])
    return linear


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (patched(forward=lambda x: x), "lm_head: got an nn.Linear with a forward of its own, need a plain one"),
        (patched(hook=lambda *_: None), "lm_head: got an nn.Linear with forward hooks, need a plain one"),
    ],
)
def test_patched_heads(head, message):
    call(message, head=head)


def test_the_module_checks_at_once():
    with pytest.raises(ValueError, match="asft: lam: got -1"):
        FusedASFTLoss(lam=-1)
    with pytest.raises(ValueError, match="reduction: got 'avg'"):
        FusedASFTLoss(reduction="avg")


def test_default_backend_by_device():
    cuda = torch.device("cuda")
    assert choose_backend(None, cuda, torch.bfloat16) == "triton"
    assert choose_backend(None, cuda, torch.float64) == "torch"
    assert choose_backend(None, torch.device("cpu"), torch.float32) == "torch"
    assert choose_backend("torch", cuda, torch.float32) == "torch"


def test_subclass_of_linear_that_computes_the_same_is_fine():
    class Named(nn.Linear):
        pass

    case = make_case()
    assert fused_asft_loss(case.hidden, Named(24, 97), case.labels).isfinite()


def test_triton_on_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("ASFT_KERNELS_EMULATOR", raising=False)
    call(
        "backend: got 'triton' with tensors on cpu, need CUDA or ROCm tensors; move them, use backend='torch'",
        backend="triton",
    )


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [((3, 6), "2.4.0", False), ((3, 6), "2.5.0rc1", False), ((3, 6), "2.3.5", True), ((3, 7), "2.5.0", True)],
)
def test_an_interpreter_that_cannot_run_says_why(triton, numpy, works, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr("asft_kernels.kernels.configs.triton_release", lambda: triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    fault = interpreter_fault()
    assert (fault == "") == works
    assert works or f"with NumPy {numpy}, whose arrays its interpreter cannot take" in fault
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("asft_kernels.backends.interpreter_fault", lambda: fault)
    if works:
        assert choose_backend("triton", torch.device("cpu"), torch.float32) == "triton"
    else:
        call(fault, backend="triton")


def test_triton_with_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = make_case(dtype=torch.float64)
    call("backend: got 'triton' with float64 tensors", hidden=case.hidden, head=case.head, backend="triton")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"objective": "dpo2"}, "objective: got 'dpo2', need one of 'asft', 'sft'"),
        ({"objective": ASFT}, "objective: got the class ASFT, need an object: ASFT(...)"),
        (
            {"objective": "asft", "token_weights": torch.ones(4, 13, device="meta")},
            "token_weights: got a tensor on meta, need cpu",
        ),
        (
            {"objective": "asft", "nll_labels": torch.ones(2, 13).bool()},
            "nll_labels: got (2, 13) torch.bool, need integers",
        ),
        (
            {"objective": 3},
            "objective: got int without paired, needs_reference, uses_nll_labels, need a name or an object",
        ),
        (
            {"objective": "asft", "ref_logps": torch.zeros(4)},
            "ref_logps: got a tensor, need None: ASFT has no reference",
        ),
        (
            {"objective": get_objective("dpo", ld_alpha=0.5), "ref_logps": torch.zeros(4, 12)},
            "ref_logps: got (4, 12) torch.float32, need a floating tensor (4, 13) as fused_linear_logps returns, "
            "one value a label",
        ),
        (
            {"objective": "dpo", "ref_logps": torch.zeros(3)},
            "ref_logps: got (3,) torch.float32, need a floating tensor (4,), or (K, 4) where the objective takes "
            "several references, one sum a row of hidden",
        ),
        (
            {"objective": "asft", "token_weights": torch.ones(4, 12)},
            "token_weights: got (4, 12) torch.float32, need a floating tensor of shape (4, 13)",
        ),
        ({"objective": "asft", "token_weights": 2.0}, "token_weights: got float"),
        (
            {"objective": "asft", "nll_labels": torch.ones(4, 13).long()},
            "nll_labels: got (4, 13) torch.int64, need integers of shape (2, 13)",
        ),
        (
            {"objective": "sft", "nll_labels": torch.ones(2, 13).long()},
            "nll_labels: got labels, need None: SFT has no separate",
        ),
    ],
)
def test_preference_loss(keywords, message):
    case = make_case()
    objective = keywords.pop("objective")
    with pytest.raises(ValueError, match=re.escape(message)):
        fused_preference_loss(case.hidden, case.head, case.labels, objective, **keywords)


def test_logps_take_any_number_of_rows():
    case = make_case(rows=3)
    assert fused_linear_logps(case.hidden, case.head, case.labels).shape == (3, 13)


def test_nothing_is_lost_by_an_error():
    case = make_case()
    before = [x.clone() for x in case.leaves]
    with pytest.raises(ValueError, match="reduction"):
        fused_asft_loss(case.hidden, case.head, case.labels, reduction="avg")
    assert all(torch.equal(a, b) for a, b in zip(before, case.leaves, strict=True))
    assert ASFT() == ASFT(1.0, 1.0, 1.0)


def test_a_tensor_of_another_kind_is_refused():
    """A subclass may stand for other numbers than those that its memory holds."""

    class Odd(torch.Tensor):
        pass

    case = make_case()
    weight = case.weight.detach().as_subclass(Odd)
    with pytest.raises(ValueError, match=r"lm_head weight: got a Odd, need a plain tensor; dequantise a quantised one"):
        fused_linear_logps(case.hidden, weight, case.labels)
    assert fused_linear_logps(case.hidden, torch.nn.Parameter(case.weight.detach()), case.labels).requires_grad
