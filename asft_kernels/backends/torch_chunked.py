"""Both phases in ATen calls, in place, on CPU, CUDA or ROCm: the default on CPU, the path for float64.

    stage               formula (one vocabulary chunk of rows k)                  tensor
    label logit         z_y = logit(H[t] . W[y])                                  (N,)
    exponentials        E = exp(z - r), label's own entry 0;  s += sum E          (N, k)
    hidden, unscaled    O += E' W_k,  E' = E * c,  c = (1 - (z/softcap)^2)        (N, D)
    close               total = s + exp(z_y - r);  logp = -softplus(r + log s - z_y)
    label entries       E'[t, y] = -s * c_y                                       cached or recomputed E'
    dH                  scale * g * ((1 - p_y) c_y W[y] - O / total)              (M, D)
    dW_k                -E'^T diag(scale * g / total) H                           (k, D)

r starts at the label's logit and moves up only where a logit passes it by more than MOVE. The label
entries make one product give dW whole: softmax and label parts meet in the accumulator, before the
one rounding into the head's dtype. Low-precision heads are upcast chunk by chunk, so everything
between the inputs and the returned tensors is fp32 (fp64 for fp64 input).
"""

import torch
from torch import Tensor

from asft_kernels.backends import Logits, Saved
from asft_kernels.backends.plan import Plan

MOVE = 30.0  # exp(30) = 1e13: room for 1e25 such entries in fp32, and 13 digits below the reference


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    logits: Logits,
    plan: Plan,
    *,
    needs_acc: bool,
    needs_exps: bool,
) -> Saved:
    H = _rows(hidden, rows)
    z_y, label_slope = _label_logits(H, weight, bias, labels, logits)
    ref, others = z_y.clone(), torch.zeros_like(z_y)
    acc = H.new_empty(H.shape if needs_acc else 0)
    cached = plan.cached if needs_exps else 0
    exps: list[Tensor] = []
    refs: list[Tensor] = []
    chunks = _Chunks(H, weight, bias, logits, plan, cached)

    for k, (start, _) in enumerate(plan.slices):
        weight_k, z, slope = chunks.logits(k)
        _set_label_entries(z, labels, start, -torch.inf)

        highest = z.amax(dim=1)
        moved = torch.where(highest > ref + MOVE, highest, ref)
        base = torch.where(moved == -torch.inf, 0, moved)  # no finite logit so far: exp(-inf - 0) is 0
        shrink = torch.exp(ref - base)
        ref = moved
        E = z.sub_(base[:, None]).exp_()
        others.mul_(shrink).add_(E.sum(dim=1))
        if slope is not None:
            E.mul_(slope)
        if needs_acc:
            if k:
                acc.mul_(shrink[:, None])
            torch.addmm(acc, E, weight_k, beta=min(k, 1), out=acc)  # beta 0 does not read acc
        if k < cached:
            exps.append(E)
            refs.append(ref)

    total = others + torch.exp(z_y - ref)
    x = ref + others.log() - z_y
    logps = -(x.clamp(min=0) + torch.exp(-x.abs()).log1p())  # -softplus(x), exact at both ends
    label_entry = -others if label_slope is None else -others * label_slope
    for (start, _), E, written_at in zip(plan.slices, exps, refs, strict=False):
        # On a GPU the comparison would stop the stream: there the rescale always runs.
        if E.device.type != "cpu" or not torch.equal(written_at, ref):
            E.mul_(torch.exp(written_at - ref)[:, None])
        _set_label_entries(E, labels, start, label_entry)
    return Saved(logps, others / total, total.reciprocal(), ref, acc, exps)


def backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    saved: Saved,
    logits: Logits,
    plan: Plan,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    H = _rows(hidden, rows)
    not_p = saved.one_minus_p
    if logits.softcap is not None:
        _, label_slope = _label_logits(H, weight, bias, labels, logits)
        not_p = not_p if label_slope is None else not_p * label_slope
    g = logits.scale * grad_logps.to(H.dtype)
    coef = g * saved.inv_total
    grad_hidden = None
    if needs_hidden:
        pull = g * not_p
        grad_rows = weight.index_select(0, labels).to(H.dtype).mul_(pull[:, None])
        grad_rows.addcmul_(saved.acc, coef[:, None], value=-1)
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        grad_hidden.index_copy_(0, rows, grad_rows.to(hidden.dtype))
        del grad_rows
    if not (needs_weight or needs_bias):
        return grad_hidden, None, None

    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    grad_bias = torch.empty_like(bias) if needs_bias and bias is not None else None
    scaled = H * -coef[:, None] if needs_weight else H
    rounds = needs_weight and weight.dtype != H.dtype
    chunks = _Chunks(H, weight, bias, logits, plan, len(saved.exps))
    label_entry = -not_p / saved.inv_total
    for k, (start, stop) in enumerate(plan.slices):
        if k < len(saved.exps):
            E = saved.exps[k]
        else:
            _, z, slope = chunks.logits(k)
            E = z.sub_(saved.ref[:, None]).exp_()
            if slope is not None:
                E.mul_(slope)
            _set_label_entries(E, labels, start, label_entry)
        if grad_weight is not None:
            # E is done with the chunk's upcast rows: their buffer takes the product.
            grad_k = torch.mm(E.T, scaled, out=chunks.upcast[: stop - start] if rounds else grad_weight[start:stop])
            if rounds:
                grad_weight[start:stop] = grad_k  # the one rounding
        if grad_bias is not None:
            # A sum, not a matrix-vector product: BLAS adds the tokens one by one, sum() pairwise.
            grad_bias[start:stop] = (E * -coef[:, None]).sum(dim=0)
    return grad_hidden, grad_weight, grad_bias


class _Chunks:
    """Logits of one vocabulary chunk after another, in buffers that live for one phase."""

    def __init__(self, H: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits, plan: Plan, cached: int) -> None:
        self.H, self.weight, self.bias, self.softcap, self.scale = H, weight, bias, logits.softcap, logits.scale
        self.slices, self.cached = plan.slices, cached
        self.workspace = H.new_empty(len(H) if cached < len(self.slices) else 0, plan.chunk)
        self.slope = H.new_empty(len(H) if self.softcap is not None else 0, plan.chunk)
        self.upcast = H.new_empty(plan.chunk if weight.dtype != H.dtype else 0, H.shape[1])

    def logits(self, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(W_k (rows, D), z (N, rows), c (N, rows) or None): z is fresh memory for the chunks that are cached."""
        start, stop = self.slices[k]
        width = stop - start
        weight_k = self.weight[start:stop]
        if weight_k.dtype != self.H.dtype:
            weight_k = self.upcast[:width].copy_(weight_k)
        z = self.H.new_empty(len(self.H), width) if k < self.cached else self.workspace[:, :width]
        torch.mm(self.H, weight_k.T, out=z)
        if self.bias is not None:
            z += self.bias[start:stop]
        slope = _transform(z, self.scale, self.softcap, self.slope[:, :width])
        return weight_k, z, slope


def _rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """The valid rows, in the dtype that everything is computed in."""
    H = hidden.index_select(0, rows)
    return H if H.dtype == torch.float64 else H.float()


def _label_logits(
    H: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logits: Logits
) -> tuple[Tensor, Tensor | None]:
    """(z_y, c_y or None without a softcap)."""
    z = torch.linalg.vecdot(H, weight.index_select(0, labels).to(H.dtype))
    if bias is not None:
        z += bias.index_select(0, labels)
    return z, _transform(z, logits.scale, logits.softcap, torch.empty_like(z))


def _transform(u: Tensor, scale: float, softcap: float | None, slope: Tensor) -> Tensor | None:
    """u becomes z in place; with a softcap, slope becomes c = 4 q / (1 + q)^2, q = exp(-2 |scale u / softcap|).

    1 - (z / softcap)^2 is the same number, but where tanh saturates its digits are gone.
    """
    if scale != 1.0:
        u.mul_(scale)
    if softcap is None:
        return None
    u.div_(softcap)
    torch.abs(u, out=slope)
    slope.mul_(-2).exp_()
    slope.div_((1 + slope).square_()).mul_(4)
    u.tanh_().mul_(softcap)
    return slope


def _set_label_entries(E: Tensor, labels: Tensor, start: int, value: float | Tensor) -> None:
    """E[t, y_t - start] = value[t] for the labels inside this chunk, without looking which they are."""
    column = (labels - start).clamp_(0, E.shape[1] - 1)[:, None]
    inside = (labels >= start) & (labels < start + E.shape[1])
    own = E.gather(1, column)[:, 0]
    E.scatter_(1, column, torch.where(inside, value, own)[:, None])
