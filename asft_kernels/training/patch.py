"""`patch_trl`: TRL's own trainers on fused heads.

Most of them give their models a fused head by one function, `add_fused_lm_head`: `fuse` takes its place. ORPO and CPO
make logits in `concatenated_forward`: their trainers get another one as they are made.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from asft_kernels.functional import fused_linear_logps
from asft_kernels.models.fused import fuse, fused_forward
from asft_kernels.models.head import FusedHead
from asft_kernels.models.seam import causal_lm, output_head

SEAM = "add_fused_lm_head"
TAKES = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
NEED = "need 1.15 or a later 1.x; run: pip install 'trl>=1.15,<2'"
_undo: ExitStack | None = None  # what takes the patch back, while there is one


def patch_trl() -> AbstractContextManager[Any]:
    """Makes TRL's trainers compute log-probabilities by `asft_kernels.models.fuse`, without logits.

    SFT, DPO, KTO, GRPO, RLOO and AsyncGRPO use `fuse` where they had TRL's `add_fused_lm_head`, for policy and
    reference alike. The experimental ORPO and CPO (SimPO) trainers no longer make logits; for an encoder-decoder they
    stay as they are. Losses and metrics are TRL's. It counts for trainers that are made afterwards, whether they were
    imported before or not, and they keep it. Calling it again changes nothing.

    Returns:
        A context manager that calls `unpatch_trl` at its end, if this call has patched; a plain call may ignore it.

    Raises:
        ImportError: if TRL is missing, or is a version whose trainers are made otherwise.
    """
    global _undo
    if _undo is not None:
        return nullcontext()
    utils, pair_trainers = _trl()
    theirs = getattr(utils, SEAM)
    with ExitStack() as undo:
        _rename(theirs, fuse)
        undo.callback(_rename, fuse, theirs)
        for trainer, nll_on_prompt in pair_trainers:
            undo.callback(setattr, trainer, "__init__", trainer.__init__)
            trainer.__init__ = _fusing_init(trainer, nll_on_prompt)
        _undo = undo.pop_all()
    taken_back = ExitStack()
    taken_back.callback(unpatch_trl)
    return taken_back


def unpatch_trl() -> None:
    """Takes back what `patch_trl` did, for trainers that are made afterwards; nothing to do without it."""
    global _undo
    if _undo is not None:
        _undo.close()
        _undo = None


def _trl() -> tuple[Any, list[tuple[Any, bool]]]:
    """TRL's module with the seam, and the trainers that make logits, each with whether its NLL is on prompts too."""
    try:
        import trl
        from packaging.version import Version
    except ImportError as error:
        raise ImportError(f"trl: not installed, {NEED}") from error
    if not Version("1.15") <= Version(trl.__version__) < Version("2"):
        raise ImportError(f"trl: got {trl.__version__}, {NEED}")
    with warnings.catch_warnings():  # who patches has not chosen these two, which TRL warns of at import
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        from trl.experimental.cpo.cpo_trainer import CPOTrainer
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer import utils

    takes = tuple(inspect.signature(getattr(utils, SEAM)).parameters)
    if takes != TAKES:
        raise ImportError(
            f"trl: got {trl.__version__}, whose {SEAM} takes {', '.join(takes)}, need one that takes "
            f"{', '.join(TAKES)}; run: pip install trl==1.16.0"
        )
    return utils, [(ORPOTrainer, True), (CPOTrainer, False)]


def _rename(of: Callable[..., None], by: Callable[..., None]) -> None:
    """Each trainer's module has the function by name; one imported later takes it from trl.trainer.utils."""
    for name, module in list(sys.modules.items()):
        # vars: a lazy module would import what it is asked for
        if name.startswith("trl.") and vars(module).get(SEAM) is of:
            setattr(module, SEAM, by)


def _fusing_init(trainer: Any, nll_on_prompt: bool) -> Callable[..., None]:
    """The trainer's __init__, which fuses the model at its end."""
    own = trainer.__init__
    replaced = {name: getattr(trainer, name, None) for name in ("concatenated_forward", "get_batch_logps")}

    @functools.wraps(own)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        # A subclass may have one of its own.
        if self.is_encoder_decoder or any(getattr(type(self), name, None) is not x for name, x in replaced.items()):
            return
        inner = causal_lm(self.model)
        fuse(inner)
        forward: Any = fused_forward(inner)
        # Of the instance: a trainer keeps it, as the others keep their fused models.
        self.concatenated_forward = functools.partial(_concatenated_forward, self, inner, forward.head, nll_on_prompt)

    return init


def _concatenated_forward(
    trainer: Any, inner: Any, fused: FusedHead, nll_on_prompt: bool, model: Any, batch: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What TRL's returns, with one mean logit in the place of all logits of the chosen and of the rejected rows.

    Args:
        trainer: an ORPOTrainer or a CPOTrainer.
        inner: its model, unwrapped.
        fused: how that model's head is computed.
        nll_on_prompt: whether the NLL of the chosen rows is on their prompts as well: ORPO's, which also leaves the
            last position out of the mean logit.
        model: what to call, around `inner`.
        batch: from the collator.

    Returns:
        (logps of the chosen rows (B,), of the rejected rows (B,), mean logit of either, NLL), and the load-balancing
        loss where it is enabled.
    """
    padding = trainer.padding_value if nll_on_prompt else trainer.pad_token_id
    rows = trainer.concatenated_inputs(batch, padding_value=padding, device=trainer.accelerator.device)
    ids, mask, answers = (rows[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    chosen = len(batch["chosen_labels"])
    labels = answers.clone()
    if nll_on_prompt:
        labels[:chosen] = ids[:chosen].masked_fill(mask[:chosen] != 1, -100)
    router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    with _mean_logits(inner, fused, ids.shape[1] - nll_on_prompt) as mean_logits:
        out = model(ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True, **router)
    in_answer = (answers[:, 1:] != -100).to(out.log_probs.device)
    logps = (out.log_probs * in_answer).sum(-1)
    if nll_on_prompt or trainer.loss_type in ("ipo", "simpo"):
        logps = logps / in_answer.sum(-1)
    nll = torch.zeros((), device=trainer.accelerator.device)
    if nll_on_prompt or trainer.cpo_alpha != 0:
        nll = -out.log_probs[:chosen].sum() / out.label_mask[:chosen].sum()
    found = (logps[:chosen], logps[chosen:], *mean_logits, nll)
    return (*found, out.aux_loss) if trainer.aux_loss_enabled else found


@contextmanager
def _mean_logits(inner: Any, fused: FusedHead, positions: int) -> Iterator[list[Tensor]]:
    """Fills the list with the mean logit of the first and of the second half of the rows, once the model has run.

    TRL's metric is over all positions, prompts and padding too. Without a cap logits are linear: their mean is that of
    the mean hidden state, one row of the head a half.
    """
    found: list[Tensor] = []

    @torch.no_grad()
    def look(head: Any, inputs: tuple[Any, ...]) -> None:  # before the head's forward, where FSDP has its weight whole
        if fused.logits is None:  # a pass of the check, which finds the scale
            return
        hidden = inputs[0].detach()[:, :positions]
        halves = hidden.unflatten(0, (2, -1)).flatten(1, 2)
        if fused.logits.softcap is None:
            halves = halves.mean(1, keepdim=True, dtype=torch.float32).to(hidden.dtype)
        anything = torch.zeros(halves.shape[:2], dtype=torch.long, device=halves.device)
        with fused.precision(hidden):
            stats: Any = fused_linear_logps(
                halves, head, anything, shift=False, return_stats=("mean_logits",), **fused.keywords
            )
        found[:] = stats.mean_logits.mean(1)

    handle = output_head(inner).register_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()
