"""Reward-augmented data: scored pairs -> twice as many pairs, each conditioned on a goal.

arXiv 2410.08067. A pair (x, y_w, y_l) with scores r_w > r_l becomes

    (x with goal r_w, chosen y_w, rejected y_l)
    (x with goal r_l, chosen y_l, rejected y_w)

since an answer's reward under the goal g is -(g - r)^2. A score is a number, or an object of named
numbers that both answers share. With --goal, rows that need only a prompt get it conditioned on
that goal: what a model so trained is asked with.
"""

import argparse
import json
from typing import Any

from asft_kernels.data import BadRow, parse_pair
from asft_kernels.data.pair import Messages
from asft_kernels.data_commands.fields import field_of, finite, parse_prompt, prompt_of
from asft_kernels.data_commands.report import Report
from asft_kernels.data_commands.stream import by_row, run_stream

Goal = float | dict[str, float]
LOWEST, HIGHEST = 1, 10  # the scale that the text states
FIELDS = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score")


def goal_text(goal: Goal) -> str:
    """The instruction that states the goal; a bare number is the overall score."""
    named = goal if isinstance(goal, dict) else {"overall": goal}
    scores = []
    for name, value in named.items():
        value = int(value) if value == int(value) else value
        name = name.replace("_", " ")
        scores.append(f"{name[:1].upper()}{name[1:]} score: {value}.")
    return (
        "Write the answer that would be rated as follows, without mentioning the rating. "
        f"Ratings go from {LOWEST} (worst) to {HIGHEST} (best).\n" + "\n".join(scores)
    )


def condition_prompt(prompt: str | Messages, goal: Goal, *, system_role: bool = True) -> str | Messages:
    """`prompt` with the goal stated before it.

    prompt: a text, or chat messages.
    goal: a score from 1 to 10, or named scores as the model was trained with.
    system_role: True writes a system message (in front of what a present one says), so a text becomes
        a chat; False writes into the first user turn, and a text stays a text.

    >>> condition_prompt([{"role": "user", "content": "Hello"}], 10)[1]
    {'role': 'user', 'content': 'Hello'}
    """
    text = goal_text(goal)
    if isinstance(prompt, str):
        if not system_role:
            return f"{text}\n\n{prompt}"
        prompt = [{"role": "user", "content": prompt}]
    if system_role and (not prompt or prompt[0]["role"] != "system"):
        return [{"role": "system", "content": text}, *prompt]
    into = "system" if system_role else "user"
    for index, message in enumerate(prompt):
        if message["role"] == into:
            stated = {**message, "content": f"{text}\n\n{message['content']}"}
            return [*prompt[:index], stated, *prompt[index + 1 :]]
    raise ValueError("prompt: has no user turn to write the goal into; need one, or system_role=True")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in FIELDS:
        parser.add_argument(f"--{name.replace('_', '-')}-field", default=name, metavar="NAME", help="its column")
    parser.add_argument("--no-system-role", action="store_true", help="state the goal in the first user turn")
    parser.add_argument(
        "--keep-ties", action="store_true", help="keep pairs of equal scores (they pull the margin to 0)"
    )
    parser.add_argument("--goal", type=_goal_option, help="condition prompts on this: a number or a JSON object")


def run(args: argparse.Namespace) -> None:
    convert = doubled if args.goal is None else conditioned
    run_stream(args, by_row(lambda line, row, report: convert(line, row, report, args)))


def conditioned(line: int, row: dict[str, Any], report: Report, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The row with its prompt conditioned on `args.goal`, all else as it was."""
    _scale(line, args.goal, report)
    prompt = prompt_of(parse_prompt(field_of(row, args.prompt_field)))
    return [{**row, args.prompt_field: _condition(prompt, args.goal, args)}]


def doubled(line: int, row: dict[str, Any], report: Report, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The pair under the goal of each of its answers; nothing for ties and for scores the other way round."""
    plain = {name: field_of(row, getattr(args, f"{name}_field")) for name in ("chosen", "rejected")}
    if args.prompt_field in row:
        plain["prompt"] = row[args.prompt_field]
    pair = parse_pair(plain)
    names = args.chosen_score_field, args.rejected_score_field
    high, low = (_goal(field_of(row, name), name) for name in names)
    both = list(zip(_values(high, low, names), _values(low, high, names), strict=True))
    if all(ours == other for ours, other in both):
        report.note(line, "kept ties" if args.keep_ties else "left out, equal scores")
        if not args.keep_ties:
            return []
    elif all(ours <= other for ours, other in both):
        report.note(line, "left out, rejected has the better score")
        return []
    for goal in (high, low):
        _scale(line, goal, report)
    prompt = prompt_of(pair)
    rows = []
    for goal, other, chosen, rejected in (
        (high, low, pair.text("chosen"), pair.text("rejected")),
        (low, high, pair.text("rejected"), pair.text("chosen")),
    ):
        stated = _condition(prompt, goal, args)
        texts = (chosen, rejected) if isinstance(stated, str) else (_message(chosen), _message(rejected))
        rows.append(dict(zip(FIELDS, (stated, *texts, goal, other), strict=True)))
    return rows


def _goal(value: Any, name: str) -> Goal:
    if not isinstance(value, dict):
        return finite(value, name)
    if not value or not all(attribute.strip() for attribute in value):
        raise BadRow("score without a name", f"{name}: need an object of named numbers")
    return {attribute: finite(number, f"{name}.{attribute}") for attribute, number in value.items()}


def _values(goal: Goal, other: Goal, names: tuple[str, str]) -> list[float]:
    """The numbers of `goal`, in an order that is the same for both answers."""
    attributes = [sorted(g) if isinstance(g, dict) else None for g in (goal, other)]
    if attributes[0] != attributes[1]:
        raise BadRow("answers scored by different attributes", f"{names[0]}, {names[1]}")
    return [goal[name] for name in sorted(goal)] if isinstance(goal, dict) else [goal]


def _scale(line: int, goal: Goal, report: Report) -> None:
    numbers = goal.values() if isinstance(goal, dict) else [goal]
    outside = not all(LOWEST <= number <= HIGHEST for number in numbers)
    report.note(line, f"goals outside the stated {LOWEST} to {HIGHEST}, written as they are", int(outside))


def _condition(prompt: str | Messages, goal: Goal, args: argparse.Namespace) -> str | Messages:
    try:
        return condition_prompt(prompt, goal, system_role=not args.no_system_role)
    except ValueError as error:
        raise BadRow("no user turn to write the goal into") from error


def _message(answer: str) -> Messages:
    return [{"role": "assistant", "content": answer.strip()}]


def _goal_option(text: str) -> Goal:
    try:
        return _goal(json.loads(text), "--goal")
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, need a number or a JSON object of named numbers ({error})"
        ) from error
