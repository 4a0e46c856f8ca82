"""What the host must not look at: values of device tensors, between the call and the return of backward.

On a GPU each look waits for the device and ends a CUDA graph's capture (tests/test_gpu.py captures one).
Here, on a CPU, every way of looking is caught instead, inside the two operators, too; what kernels do
with their arguments in the interpreter is not the host's. The calls and launches of two batches of equal
sizes and different values must then be the same ones, in order, with the same shapes and grids.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asft_kernels import fused_asft_loss, fused_linear_logps, fused_preference_loss
from asft_kernels.backends import torch_chunked
from asft_kernels.backends.token_stats import DIFFERENTIABLE
from asft_kernels.core import linear_logps
from cases import make_case

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/test_gpu.py asks the driver"),
]

READS = ("_local_scalar_dense", "is_nonzero", "equal", "allclose")
SIZED_BY_VALUES = ("nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "unique_dim")
METHODS = ("item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__")


class Watch(TorchDispatchMode):
    """reads: what looked at a value. trace: every call and launch, with the shapes and plain arguments it had."""

    def __init__(self):
        super().__init__()
        self.reads, self.trace, self.in_kernel = [], [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, leaves = func._schema.name.split("::")[1], tree_leaves((args, kwargs))
        by_mask = name.startswith("index") and not name.startswith(
            "index_copy"
        )  # which takes no mask, but may copy one
        masks = by_mask and any(getattr(x, "dtype", None) == torch.bool for x in tree_leaves(args[1:]))
        repeats = name == "repeat_interleave" and isinstance(leaves[-1], torch.Tensor)
        if not self.in_kernel:
            if name in READS + SIZED_BY_VALUES or masks or repeats:
                self.reads.append(name)
            self.trace.append((name, *map(plain, leaves)))
        return func(*args, **(kwargs or {}))


def plain(x):
    return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x


@pytest.fixture
def watch(monkeypatch):
    """A context in which everything is watched, the operators' insides and the kernels' launches included."""
    mode = Watch()
    whole_phase = linear_logps.exact_products

    @contextmanager
    def inside(device_type):  # a mode does not see what a custom operator calls
        with whole_phase(device_type), mode:
            yield

    monkeypatch.setattr(linear_logps, "exact_products", inside)
    monkeypatch.setattr(torch_chunked, "looking_is_free", lambda x: False)  # as on a GPU
    for method in METHODS:
        original = getattr(torch.Tensor, method)

        def looked(self, *args, _original=original, _name=method, **kwargs):
            if not mode.in_kernel:
                mode.reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, looked)

    to = torch.Tensor.to

    def moved(self, *args, **kwargs):
        # By its name alone: here a tensor's own device, to which anything may go, is the CPU.
        if not mode.in_kernel and any(isinstance(x, str) and x.startswith("cpu") for x in (*args, *kwargs.values())):
            mode.reads.append("to")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: mode.reads.append("synchronize"))

    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launched(self, *args, **kwargs):
        mode.trace.append((self.fn.__name__, self.grid, *map(plain, args), *map(plain, kwargs.values())))
        mode.in_kernel = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            mode.in_kernel = False

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    return mode


def loss_of_stats(*args, **options):
    stats = fused_linear_logps(*args, return_stats=True, differentiable=DIFFERENTIABLE, **options)
    return sum(x.sum() for x in vars(stats).values() if x.requires_grad)


def step(watch, case, backend, *, loss="asft", **options) -> None:
    call = {"asft": fused_asft_loss, "stats": loss_of_stats}.get(loss, partial(fused_preference_loss, objective=loss))
    with watch:
        result = call(case.hidden, case.head, case.labels, backend=backend, **options)
        (result[0] if isinstance(result, tuple) else result).backward()


OPTIONS = [
    {},
    {"softcap": 20.0, "logit_scale": 0.5},
    {"cache_bytes": 0, "return_outputs": True},
    {"loss": "sft"},
    {"loss": "stats"},
    {"loss": "stats", "softcap": 20.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_read_when_the_caller_gives_the_count(backend, options, watch):
    case = make_case(bias=True, peaked=True)
    step(watch, case, backend, num_valid=40, chunk_size=40, **options)
    assert watch.reads == []
    assert all(x.grad is not None for x in case.leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_read_otherwise(backend, watch):
    """The facts of the batch, all in one: batch.py's."""
    step(watch, make_case(bias=True, peaked=True), backend, chunk_size=40)
    assert watch.reads == ["tolist"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_calls_and_shapes_do_not_depend_on_values(backend, options, watch):
    """Other labels, other numbers of valid ones, tokens that move their reference and none that do."""
    traces = []
    for peaked, spread, valid, seed in ((False, 1.0, 0.3, 0), (True, 4.0, 0.6, 1)):
        case = make_case(bias=True, peaked=peaked, spread=spread, valid=valid, seed=seed)
        step(watch, case, backend, num_valid=40, chunk_size=40, **options)
        traces.append(watch.trace[:])
        watch.trace.clear()
    assert traces[0] == traces[1]
    names = [name for name, *_ in traces[0]]
    assert any(kernel in names for kernel in ("logits_exp_kernel", "exps_of_logits_kernel")) == (backend == "triton")
    assert names.count("linear_logps") == names.count("linear_logps_backward") == 1


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: int(x.sum()),
        lambda x: float(x.sum()),
        lambda x: [0, 1][(x > 0).sum().clamp(max=1)],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu", dtype=torch.float64),
        lambda x: torch.cuda.synchronize(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave((x > 0).long()),
    ],
)
def test_a_look_would_be_caught(look, watch):
    with watch:
        x = torch.arange(5.0)
        x * 2
        assert watch.reads == []
        look(x)
    assert watch.reads


def test_a_look_inside_the_operators_would_be_caught(watch, monkeypatch):
    monkeypatch.setattr(torch_chunked, "looking_is_free", lambda x: True)
    step(watch, make_case(), "torch", num_valid=40, chunk_size=40)
    assert watch.reads


def test_a_shape_that_depends_on_values_would_be_caught(watch):
    """Without the count it does: the tokens are compacted to their number."""
    step(watch, make_case(seed=0), "torch")
    first = watch.trace[:]
    watch.trace.clear()
    step(watch, make_case(seed=1), "torch")
    assert watch.trace != first
