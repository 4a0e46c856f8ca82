"""DNPO's model step, arXiv 2502.05400: SPIN's loss where the rejected answer's reference is the noisy one."""

import torch.nn.functional as F


def dnpo(chosen, rejected, lam=0.1):
    """SPIN's logistic loss; only where the rejected answer's reference comes from is DNPO's. lam is our default."""
    human = lam * (chosen.S - chosen.ref)
    generated = lam * (rejected.S - rejected.ref)  # ref: summed from noisy logits, given like any other
    return F.softplus(generated - human)


FORMULAS = {"dnpo": ("pair", dnpo)}
