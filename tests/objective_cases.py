"""What each objective needs beside log-probabilities, made up at random for any batch."""

from typing import Any

import torch
from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives import (
    AOT,
    BMC,
    CPO,
    DPO,
    IPO,
    KTO,
    LDDPO,
    LMPO,
    MRPO,
    ORPO,
    RPO,
    SFT,
    WPO,
    AOTUnpaired,
    DiscoPOP,
    ExoPair,
    HingeNorm,
    Robust,
    SigmoidNorm,
    SimPO,
    get_objective,
)


def lmpo_held() -> LMPO:
    """In evaluation, with statistics so wide that z is 1 whatever the pair: the margin carries no gradient, and the
    derivative of the value must not see it either. test_neighbour_objectives.py has LMPO in training.
    """
    objective = LMPO().eval()
    objective.load_state_dict(
        {"running_mean": torch.tensor(-1e8), "running_std": torch.tensor(1e8), "steps": torch.tensor(1)}
    )
    return objective


# Objects whose defaults cannot run, or that have more than one form: name of the test -> objective.
FORMS: dict[str, Any] = {
    "sft_sum": lambda: SFT("sum"),
    "sft_token": lambda: SFT("token"),
    "cdpo": lambda: DPO(label_smoothing=0.2),
    "robust_at_0.3": lambda: Robust(label_smoothing=0.3),
    "orpo_tempered": lambda: ORPO(lam=0.7, beta=0.3),
    "cpo_align_only": lambda: CPO(alpha=0),
    "cpo_token_nll": lambda: CPO(alpha=0.7, nll_normalization="token"),
    "cpo_smoothed": lambda: CPO(label_smoothing=0.2),
    "orpo_token_nll": lambda: ORPO(lam=0.7, nll_normalization="token"),
    "simpo_smoothed": lambda: SimPO(label_smoothing=0.2),
    "sft_smoothed": lambda: SFT("token", label_smoothing=0.1),
    "sft_with_z_loss": lambda: SFT(lse_square_scale=1e-2, label_smoothing=0.1, token_accuracy=True),
    "aot_smoothed": lambda: AOT(0.3, 0.2),
    "aot_unpaired_smoothed": lambda: AOTUnpaired(0.3, 0.2),
    "dpo_forward_kl": lambda: DPO(label_smoothing=0.1, f_divergence_type="forward_kl"),
    "robust_js": lambda: Robust(0.3, 0.1, f_divergence_type="js_divergence"),
    "ipo_alpha": lambda: IPO(0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
    "sigmoid_norm_js": lambda: SigmoidNorm(2.0, f_divergence_type="js_divergence"),
    "hinge_norm_js": lambda: HingeNorm(f_divergence_type="js_divergence"),
    "exo_pair_alpha": lambda: ExoPair(0.3, 0.1, f_divergence_type="alpha_divergence"),
    "discopop_js": lambda: DiscoPOP(0.3, 0.5, f_divergence_type="js_divergence"),
    "ld_dpo": lambda: get_objective("dpo", ld_alpha=0.3),
    "ld_of_a_sum": lambda: LDDPO("ipo + 0.5 apo_zero", 0.0),
    "wpo": lambda: get_objective("dpo", use_weighting=True),
    "wpo_of_a_sum": lambda: WPO("simpo + 0.1 sft"),
    "ld_wpo": lambda: get_objective("sigmoid_norm", use_weighting=True, ld_alpha=0.5),
    "kto_weighted": lambda: KTO(desirable_weight=0.7, undesirable_weight=1.3),
    "dpo + 0.005 sft": lambda: get_objective("dpo + 0.005 sft"),
    "asft + 0.5 ipo + kto": lambda: get_objective("asft + 0.5 ipo + kto"),
    "lmpo": lmpo_held,
    "bmc": lambda: BMC("dpo"),
    "bmc_of_ipo_by_policy": lambda: BMC("ipo", ref_weighting="policy"),
    "bmc_of_simpo": lambda: BMC("simpo", delta=3.0),
    "bmc_of_orpo": lambda: BMC("orpo"),
    "mrpo_fixed": lambda: MRPO(alpha=(0.5, 0.3, 0.2)),
    "mrpo_unclipped": lambda: MRPO(clip=None),
    "mrpo_swapped": lambda: MRPO(swap_weights=True),
    "rpo_sequence": lambda: RPO(eta=0.2, normalization="sequence"),
    "rpo_token": lambda: RPO(eta=0.2, normalization="token"),
}


def objective_of(name: str) -> Any:
    return FORMS[name]() if name in FORMS else get_objective(name)


def policy_of(objective: Any, sums: Tensor, lengths: Tensor) -> Logps:
    """With terms, if the objective has some: of figures made up at random, the same for each row of a length."""
    g = torch.Generator().manual_seed(2)
    table = 1 + torch.rand(int(lengths.max()) + 1, len(objective.stats), generator=g, dtype=torch.float64)
    stats = dict(zip(objective.stats, table[lengths].unbind(dim=1), strict=True))
    terms = objective.per_token(torch.zeros(len(sums), dtype=torch.float64), stats)
    return Logps(sums, lengths, terms={name: values * lengths for name, values in terms.items()})


def sums_like(lengths: Tensor, generator: torch.Generator, *lead: int) -> Tensor:
    """Sums of log-probabilities of -0.5 to -3 a token, for rows of these lengths, float64."""
    each = -0.5 - 2.5 * torch.rand(*lead, len(lengths), generator=generator, dtype=torch.float64)
    return each * lengths


INPUTS = {  # by the names of Objective.inputs and .optional_inputs: rows, generator -> tensor
    "desirable": lambda rows, g: torch.rand(rows, generator=g) < 0.5,
    "feature_distance": lambda rows, g: torch.rand(rows, generator=g, dtype=torch.float64),
}


def direct_inputs(objective: Any, lengths: Tensor, seed: int = 0) -> dict[str, Any]:
    """Keywords for objective(policy, **...)."""
    g = torch.Generator().manual_seed(seed)
    keywords = {name: INPUTS[name](len(lengths), g) for name in objective.inputs}
    if objective.needs_reference:
        lead = (2 if objective.swap_weights else 3,) if isinstance(objective, MRPO) else ()
        keywords["ref_logps"] = sums_like(lengths, g, *lead)
    return keywords


def call_inputs(objective: Any, labels: Tensor, seed: int = 0) -> dict[str, Any]:
    """Keywords for fused_preference_loss(hidden, head, labels, objective, **...), labels (R, T)."""
    g = torch.Generator().manual_seed(seed + 1)
    keywords = direct_inputs(objective, (labels != -100).sum(dim=1), seed)
    ref = keywords.pop("ref_logps", None)
    call: dict[str, Any] = {"objective_inputs": keywords} if keywords else {}
    if ref is not None:
        per_token = -3 * torch.rand(labels.shape, generator=g, dtype=torch.float64)
        call["ref_logps"] = per_token if objective.ref_per_token else ref
    if objective.needs_token_weights:
        call["token_weights"] = (torch.rand(labels.shape, generator=g) < 0.5).float()
        if objective.uses_nll_labels:
            call["nll_labels"] = labels[: len(labels) // 2]  # a likelihood without weights, as the authors have it
    return call
