"""The losses, by name: one family, one file; one paper's loss, one frozen dataclass of its constants."""

import difflib
import inspect
from collections.abc import Callable

from asft_kernels.objectives.aot import AOT, AOTUnpaired
from asft_kernels.objectives.apo import ApoDown, ApoZero
from asft_kernels.objectives.asft import ASFT
from asft_kernels.objectives.base import LossTerms, Objective
from asft_kernels.objectives.bco import BcoPair
from asft_kernels.objectives.bmc import BMC, weighted_reference
from asft_kernels.objectives.composite import WeightedSum
from asft_kernels.objectives.cpo import CPO
from asft_kernels.objectives.discopop import DiscoPOP
from asft_kernels.objectives.dnpo import DNPO
from asft_kernels.objectives.dpo import DPO, IPO, Robust, SigmoidNorm
from asft_kernels.objectives.exo import ExoPair
from asft_kernels.objectives.fpo import FPO
from asft_kernels.objectives.grammar import is_plain, read_terms
from asft_kernels.objectives.hinge import Hinge, HingeNorm
from asft_kernels.objectives.kto import KTO, kto_kl
from asft_kernels.objectives.ld_dpo import LDDPO
from asft_kernels.objectives.lmpo import LMPO
from asft_kernels.objectives.mrpo import MRPO
from asft_kernels.objectives.nca import NcaPair
from asft_kernels.objectives.orpo import ORPO
from asft_kernels.objectives.poft import PoFT
from asft_kernels.objectives.rpo import RPO
from asft_kernels.objectives.sft import SFT
from asft_kernels.objectives.simpo import SimPO
from asft_kernels.objectives.sppo import SppoHard
from asft_kernels.objectives.wpo import WPO

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "asft": ASFT,
    "sft": SFT,
    "dpo": DPO,
    "robust": Robust,
    "ipo": IPO,
    "sigmoid_norm": SigmoidNorm,
    "hinge": Hinge,
    "hinge_norm": HingeNorm,
    "exo_pair": ExoPair,
    "nca_pair": NcaPair,
    "bco_pair": BcoPair,
    "sppo_hard": SppoHard,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "apo_zero": ApoZero,
    "apo_down": ApoDown,
    "discopop": DiscoPOP,
    "orpo": ORPO,
    "simpo": SimPO,
    "cpo": CPO,
    "kto": KTO,
    "dnpo": DNPO,
    "lmpo": LMPO,
    "poft": PoFT,
    "fpo": FPO,
    "bmc": BMC,
    "rpo": RPO,
    "mrpo": MRPO,
}


def get_objective(name: str, /, **parameters) -> Objective:
    """Makes the objective called `name`, with its paper's defaults where a parameter is not given.

    Args:
        name: One of `OBJECTIVES`, or a weighted sum of them: "dpo + 0.005 sft", "0.5 dpo". Parameters may stand behind
            a name, those of a sum there alone: "dpo(beta=0.2) + 0.005 sft". `WeightedSum` takes objects.
        **parameters: The objective's own, as on docs/api.md; and two of TRL's DPO trainer: ld_alpha, 0 to 1 or None
            (default), for paired losses on log-ratios (`LDDPO`); use_weighting, default False, for paired ones (`WPO`).

    Returns:
        An `Objective`, for `fused_preference_loss`.

    Raises:
        ValueError: A name or parameter that does not exist, or a value that is not allowed.
    """
    if not isinstance(name, str):
        raise ValueError(f"objective: got {name!r}, need a name, such as 'dpo', or a sum of names")
    if not is_plain(name):
        if parameters:
            raise ValueError(
                f"objective: got {name!r} and {', '.join(parameters)} beside it, need parameters behind the name that "
                "they are of, as in 'dpo(beta=0.2) + 0.005 sft'"
            )
        terms = [(weight, get_objective(term, **own)) for weight, term, own in read_terms(name)]
        if len(terms) == 1 and terms[0][0] is None:
            return terms[0][1]
        return WeightedSum(tuple((1.0 if weight is None else weight, term) for weight, term in terms))
    if name not in OBJECTIVES:
        trls = {"sigmoid": "dpo"}  # nearest in letters is sigmoid_norm, which is another loss
        near = [trls[name]] if name in trls else difflib.get_close_matches(name.lower(), OBJECTIVES, n=1)
        raise ValueError(
            f"objective: got {name!r}, need one of {', '.join(map(repr, OBJECTIVES))}, a sum such as "
            "'asft + 0.1 sft', or an objective object (get_objective(name, beta=...) for other parameters)"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    ld_alpha, use_weighting = parameters.pop("ld_alpha", None), parameters.pop("use_weighting", False)
    if not isinstance(use_weighting, bool):
        raise ValueError(f"{name}: use_weighting: got {use_weighting!r}, need True or False")
    own = list(inspect.signature(OBJECTIVES[name]).parameters)
    unknown = [key for key in parameters if key not in own]
    if unknown:
        known = [*own, "ld_alpha", "use_weighting"] if getattr(OBJECTIVES[name], "paired", False) else own
        near = difflib.get_close_matches(unknown[0], known, n=1)
        takes = f"need one of {', '.join(known)}" if known else "it takes none"
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: got the parameter {unknown[0]!r}, {takes}{hint}")
    made = OBJECTIVES[name](**parameters)
    made = WPO(made) if use_weighting else made
    return made if ld_alpha is None else LDDPO(made, ld_alpha)


def expression_of(objective: Objective) -> str:
    """Returns what `get_objective` makes an equal objective of, as "dpo(beta=0.2) + 0.005 sft"; its class without one.

    Args:
        objective: of `OBJECTIVES`, or one made of these.
    """
    objective = getattr(objective, "single", objective)  # of an unpaired one on pairs
    if isinstance(objective, WeightedSum):
        alone = len(objective.terms) == 1
        texts = (
            ("" if weight == 1 and not alone else repr(float(weight)).removesuffix(".0") + " ") + expression_of(term)
            for weight, term in objective.terms
        )
        return " + ".join(texts)
    named, further = objective, {}
    while isinstance(named, WPO | LDDPO):
        further |= {"use_weighting": True} if isinstance(named, WPO) else {"ld_alpha": named.ld_alpha}
        named = named.base
    name = next((name for name, kind in OBJECTIVES.items() if kind is type(named)), None)
    if name is None:
        return type(objective).__name__
    declared = inspect.signature(OBJECTIVES[name]).parameters.values()
    given = {x.name: getattr(named, x.name) for x in declared if getattr(named, x.name) != x.default} | further
    shown = (expression_of(value) if isinstance(value, Objective) else value for value in given.values())
    parameters = ", ".join(f"{key}={value!r}" for key, value in zip(given, shown, strict=True))
    return f"{name}({parameters})" if parameters else name


__all__ = [
    "AOT",
    "ASFT",
    "BMC",
    "CPO",
    "DNPO",
    "DPO",
    "FPO",
    "IPO",
    "KTO",
    "LDDPO",
    "LMPO",
    "MRPO",
    "OBJECTIVES",
    "ORPO",
    "RPO",
    "SFT",
    "WPO",
    "AOTUnpaired",
    "ApoDown",
    "ApoZero",
    "BcoPair",
    "DiscoPOP",
    "ExoPair",
    "Hinge",
    "HingeNorm",
    "LossTerms",
    "NcaPair",
    "Objective",
    "PoFT",
    "Robust",
    "SigmoidNorm",
    "SimPO",
    "SppoHard",
    "WeightedSum",
    "expression_of",
    "get_objective",
    "kto_kl",
    "weighted_reference",
]
