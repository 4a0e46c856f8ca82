"""What `PreferenceTrainer` refuses by name: it would fail far away, or be computed wrongly in silence."""

from typing import Any

from asft_kernels.errors import InputError
from asft_kernels.objectives import expression_of
from asft_kernels.training.hooks import Method


def refuse_other_data(dataset: Any) -> None:
    """InputError for a training set that is none, or has no row or no pairs."""
    if not hasattr(dataset, "column_names"):
        raise InputError(f"train_dataset: got {type(dataset).__name__}, need a datasets.Dataset of preference pairs")
    columns = dataset.column_names or ()
    if "completion" in columns and "chosen" not in columns:
        raise InputError(
            "train_dataset: got unpaired rows (completion), need pairs (chosen, rejected); TRL's KTOTrainer takes "
            "them, on these kernels under asft_kernels.training.patch_trl()"
        )
    if next(iter(dataset), None) is None:
        raise InputError("train_dataset: got no rows, need preference pairs")


def refuse_torn_batches(args: Any, *datasets: Any) -> None:
    """InputError for what makes accelerate slice batches, or leave ranks without one, on several ranks.

    Args:
        datasets: each a data set, or several by name; None and a name are none.
    """
    if args.world_size == 1:
        return
    given = args.accelerator_config
    every = [x for one in datasets for x in (one.values() if isinstance(one, dict) else [one])]
    streamed = any(x is not None and not hasattr(x, "__len__") for x in every)
    if given.dispatch_batches or (given.dispatch_batches is None and streamed):
        got = f"dispatch_batches {given.dispatch_batches!r}" + (" with a streamed data set" if streamed else "")
        raise InputError(
            f"accelerator_config: got {got} on {args.world_size} ranks, need False: accelerate would slice batches "
            "between a chosen answer and its rejected one"
        )
    if not given.even_batches:
        raise InputError(
            f"accelerator_config: got even_batches False on {args.world_size} ranks, need True: those without a last "
            "batch would be waited for; pairs that fill it up count nowhere"
        )


def refuse_other_order(args: Any, dataset: Any) -> None:
    """InputError for a train_sampling_strategy that transformers refuses far away, or that ranks differ under."""
    strategy = args.train_sampling_strategy
    if strategy == "batch_rebalance" and args.world_size > 1:
        raise InputError(
            f"train_sampling_strategy: got {strategy!r} on {args.world_size} ranks, need 'random', 'sequential' or "
            "'group_by_length': which pairs fill a batch could not be told"
        )
    known = args.length_column_name in (dataset.column_names or ())
    if strategy in ("group_by_length", "batch_rebalance") and not known:
        raise InputError(
            f"train_sampling_strategy: got {strategy!r}, need a column {args.length_column_name!r} of numbers in "
            "train_dataset, or 'random': a pair has no one length"
        )


def refuse_unnamed_model(model: Any, processing_class: Any, makes_reference: bool) -> None:
    """InputError for a model object of which tokenizer or reference cannot be loaded, and for what is no model.

    Args:
        model: as the trainer was given it.
        makes_reference: whether a reference model is loaded beside it.
    """
    if isinstance(model, str):
        return
    if not hasattr(model, "config"):
        need = "the name or the folder of one, as a text, or a model of transformers or PEFT"
        raise InputError(f"model: got {type(model).__name__}, need {need}")
    if getattr(model.config, "_name_or_path", ""):
        return
    what = "model: got an object that was not loaded from a folder or the hub"
    if processing_class is None:
        raise InputError(f"{what}, need processing_class, its tokenizer, beside it")
    if makes_reference:
        raise InputError(f"{what}, need ref_model beside it, such as copy.deepcopy(model)")


def refuse_beside_images(method: Method, args: Any, brings_reference: bool) -> None:
    """InputError for what reads tokens before TRL's collator makes them, image by image, of chats."""
    for name, got, need in (
        ("method" if args.method else "objective", method.name, "one without a method of its own"),
        ("nll_on_prompt", args.nll_on_prompt, "False"),
        ("ref_scores", brings_reference, "a reference model: the data brings log-probabilities"),
        ("precompute_ref_log_probs", args.precompute_ref_log_probs, "False: the reference is asked at every step"),
        ("truncation_mode", args.truncation_mode != "keep_start" and args.truncation_mode,
         "'keep_start': the images stand in the prompt"),
    ):  # fmt: skip
        if got:
            raise InputError(f"{name}: got {got!r} with rows that have images, need {need}; or rows of text alone")


def refuse_missing_inputs(objective: Any, method: Method) -> None:
    """InputError for an objective that reads what neither the trainer nor the method makes."""
    needed = {**objective.inputs, **objective.optional_inputs}
    if objective.needs_token_weights:
        needed["token_weights"] = "a weight of each token"
    for name, what in needed.items():
        if name not in method.provides:
            raise InputError(
                f"objective: {expression_of(objective)} needs {name} ({what}), which nothing here makes; need another "
                "objective or --method"
            )
