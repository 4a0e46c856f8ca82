"""docs/grpo.md: its code runs as it stands, and gives what plain torch gives from whole logits."""

import re
from pathlib import Path

import torch

from bounds import fp32_bound, relative_error
from cases import IGNORE, make_case

PAGE = Path(__file__).parents[1] / "docs" / "grpo.md"


def plain_loss(hidden, weight, labels, old_logps, rewards, *, group, clip, entropy_weight):
    logp = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    labels, old_logps = labels[:, 1:], old_logps[:, :-1]
    loss = 0.0
    for row, (reward, start) in enumerate((rewards[r], r // group * group) for r in range(len(labels))):
        others = rewards[start : start + group]
        advantage = (reward - others.mean()) / (others.std() + 1e-4)
        terms = []
        for t in (labels[row] != IGNORE).nonzero()[:, 0]:
            ratio = (logp[row, t, labels[row, t]] - old_logps[row, t]).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            terms.append(gain + entropy_weight * torch.distributions.Categorical(logits=logp[row, t]).entropy())
        loss = loss - torch.stack(terms).mean() / len(labels)
    return loss


def test_the_page_is_grpo_with_an_entropy_bonus():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len([line for line in block.splitlines() if line]) <= 20
    names = {}
    exec(block, names)
    case = make_case(rows=4, T=15, D=24, V=97)
    exact = case.to(torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.9])
    old_logps = names["fused_linear_logps"](case.hidden, case.weight, case.labels).detach()
    old_logps = old_logps + 0.3 * torch.randn(old_logps.shape)  # ratios on both sides of the clip
    loss = names["grpo_loss"](
        case.hidden, case.weight, case.labels, old_logps, rewards, group=2, entropy_weight=0.1, clip=0.2
    )
    truth = plain_loss(
        exact.hidden, exact.weight, case.labels, old_logps.double(), rewards.double(), group=2, entropy_weight=0.1,
        clip=0.2,
    )  # fmt: skip
    assert relative_error(loss, truth) <= 2 * fp32_bound(1)
    grads = torch.autograd.grad(loss, case.leaves)
    for got, want in zip(grads, torch.autograd.grad(truth, exact.leaves), strict=True):
        assert relative_error(got, want) <= 2 * fp32_bound(1)
