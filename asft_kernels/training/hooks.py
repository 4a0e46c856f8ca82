"""What a method may need beyond its loss: hooks that do nothing by default.

A method lives in asft_kernels/methods/<name>/; its hooks.py has a class `Hooks`, a `Method`. The trainer calls these
hooks and names no method.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from asft_kernels.errors import InputError
from asft_kernels.objectives import Objective, expression_of

if TYPE_CHECKING:
    from asft_kernels.training.trainer import PreferenceTrainer

LossInputs = Callable[[], dict[str, Any]]


class Method:
    """The hooks of one method, in the order in which a run calls them.

    Attributes:
        name: as `--method` takes it.
        Arguments: a dataclass whose fields join the command's options; None for none. `arguments` is one of them.
        provides: objective inputs that `at_head` gives, and "token_weights" if it gives these.
        columns: columns of the dataset that `collate` reads.
        makes_pairs: rows reach `batches` as they are in the dataset; `trainer.collator(rows)` makes a batch of them.
        ref_tokens: `ref_logps` reads the reference's log-probabilities per token.
        live_reference: it asks the reference model for more than log-probabilities: these cannot come with the data.
        own_reference: it brings the reference's log-probabilities itself; the trainer makes no reference model.
        has_state: `state_dict` goes into checkpoints.
        of_rank: names in `state_dict` of what differs between ranks; the rest is saved once.
    """

    name: ClassVar[str] = ""
    Arguments: ClassVar[type | None] = None
    provides: ClassVar[tuple[str, ...]] = ()
    columns: tuple[str, ...] = ()
    makes_pairs: ClassVar[bool] = False
    ref_tokens: bool = False
    live_reference: bool = False
    own_reference: bool = False
    has_state: ClassVar[bool] = False
    of_rank: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        """Whether an objective needs this method, so that it is taken without being named."""
        return False

    def __init__(self, arguments: Any = None):
        """Args: arguments: of type `Arguments`; None: its defaults."""
        self.arguments = arguments if arguments is not None or self.Arguments is None else self.Arguments()

    def check(self, config: Any, objective: Objective) -> None:
        """Raises InputError where arguments, the trainer's config and the objective do not go together."""

    def start(self, trainer: "PreferenceTrainer") -> None:
        """Is called once the trainer is made: model fused, on no device yet, datasets tokenised."""

    def dataset(self, trainer: "PreferenceTrainer", dataset: Any, label: str) -> Any:
        """Returns a dataset with its own columns added. label: for progress bars."""
        return dataset

    def collate(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns its entries of a batch, from rows of the dataset and the batch that was made of them."""
        return {}

    def batches(self, trainer: "PreferenceTrainer", incoming: list[Any]) -> list[Any]:
        """Returns the micro-batches of one optimiser step, from what the data loader gave. Runs before the forward."""
        return incoming

    @contextmanager
    def at_head(
        self, trainer: "PreferenceTrainer", model: Any, inputs: Mapping[str, Tensor], entries: Mapping[str, Tensor]
    ) -> Iterator[LossInputs]:
        """Surrounds the policy's forward; gives a function, called after it, of the loss's further inputs.

        Args:
            inputs: the batch: input_ids, attention_mask, completion_mask (2B, T), ...
            entries: what `collate` made of it.

        Yields:
            What returns a dict of ref_logps, token_weights, nll_labels, objective_inputs, as
            `preference_loss_from_logps` takes them; each may be absent.
        """
        yield dict

    def ref_logps(self, tokens: Tensor, labels: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        """Returns what the objective takes as ref_logps, where `ref_tokens`.

        Args:
            tokens: (2B, T - 1) log-probabilities under the reference, that of label t + 1 at t.
            labels: (2B, T).
        """
        raise NotImplementedError

    def figures(self) -> dict[str, Tensor]:
        """Returns figures since the last call, (2,) tensors of sum and count, added over ranks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""


def installed() -> dict[str, type[Method]]:
    """Returns the hooks of every method that has some, by name."""
    import importlib

    methods: Any = importlib.import_module("asft_kernels.methods")  # at run time: its folders import this package
    return {module.Hooks.name: module.Hooks for module in methods.modules("hooks").values()}


def find_method(name: str | None, objective: Objective, arguments: dict[str, Any] | None = None) -> Method:
    """Returns the method that is named, or that serves the objective; `Method` itself, which does nothing, for none.

    Args:
        name: as `--method` takes it, or None.
        arguments: instances of `Method.Arguments` by name of the method.

    Raises:
        InputError: for a name that is none or not the method that the objective needs, and arguments of another
            method.
    """
    there = installed()
    if name is not None and name not in there:
        near = difflib.get_close_matches(name, there, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"method: got {name!r}, need one of {', '.join(map(repr, sorted(there)))}{hint}")
    serving = [kind for kind in there.values() if kind.serves(objective)]
    if name is not None and serving and there[name] not in serving:
        which = f"{serving[0].name!r}, which {expression_of(objective)} needs"
        raise InputError(f"method: got {name!r}, need {which}; or another objective")
    kind = there[name] if name is not None else (serving or [Method])[0]
    for other, given in (arguments or {}).items():
        if other != kind.name and given is not None and given != (default := type(given)()):
            field = next(x for x in vars(given) if getattr(given, x) != getattr(default, x))
            how = f"method={other!r}" if not there[other].serves(objective) else f"{other}'s objective"
            raise InputError(
                f"{field}: got {getattr(given, field)!r}, which is {other}'s, need {how} for it; leave it out"
            )
    return kind((arguments or {}).get(kind.name))
