"""Statistical rejection sampling: candidates with rewards -> preference pairs as if from the best policy.

arXiv 2309.06657 (RSO), Algorithm 1. Responses y with rewards r(y), sampled from the SFT policy, are
accepted as if drawn, without replacement, from

    pi(y|x) = pi_sft(y|x) * exp(r(y) / beta) / Z(x)

and ranked into pairs by their rewards. Rows: prompt, responses (list of texts), rewards (list of
numbers). Written: prompt, chosen, rejected, chosen_score, rejected_score.
"""

import argparse
import math
from random import Random
from typing import Any

from asft_kernels.data import BadRow, parse_pair
from asft_kernels.data.rows import json_type
from asft_kernels.data_commands.fields import field_of, finite, parse_prompt, whole
from asft_kernels.data_commands.report import Report
from asft_kernels.data_commands.stream import by_row, run_stream


def accept(rewards: list[float], count: int, beta: float, random: Random) -> list[int]:
    """Indices of up to `count` candidates, in the order of acceptance (Algorithm 1).

    A pass draws u ~ U[0, 1) for each remaining candidate in order and accepts it if
    u < exp((r - r_max) / beta), with r_max over those remaining as the pass begins. Passes go on
    until `count` are accepted or none is left. beta 0 takes the best, beta infinite the first.
    """
    remaining, accepted = list(range(len(rewards))), []
    while remaining and len(accepted) < count:
        best = max(rewards[index] for index in remaining)
        left = []
        for index in remaining:
            if len(accepted) < count and random.random() < acceptance(rewards[index] - best, beta):
                accepted.append(index)
            else:
                left.append(index)
        remaining = left
    return accepted


def acceptance(below_best: float, beta: float) -> float:
    """exp((r - r_max) / beta), 1 for the best at any beta."""
    if below_best == 0:
        return 1.0
    return math.exp(below_best / beta) if beta else 0.0


def first_round(candidates: list[int], rewards: list[float], random: Random) -> list[tuple[int, int]]:
    """Random disjoint pairs; with an odd number one candidate stays alone."""
    shuffled = random.sample(candidates, len(candidates))
    return list(zip(shuffled[::2], shuffled[1::2], strict=False))


def tournament(candidates: list[int], rewards: list[float], random: Random) -> list[tuple[int, int]]:
    """Rounds of random disjoint pairs whose winners go on until one is left: len(candidates) - 1 pairs."""
    pairs, players = [], candidates
    while len(players) > 1:
        games = first_round(players, rewards, random)
        playing = {player for game in games for player in game}
        pairs += games
        players = [max(game, key=rewards.__getitem__) for game in games] + [p for p in players if p not in playing]
    return pairs


RANKINGS = {"first-round": first_round, "tournament": tournament}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accept", type=whole(2), default=8, help="responses accepted for each prompt")
    parser.add_argument("--beta", type=_beta, default=0.5, help="temperature in units of the reward; 0: the best")
    parser.add_argument("--ranking", choices=RANKINGS, default="first-round", help="how they are paired")
    parser.add_argument("--seed", type=int, default=0, help="with the line number it decides every draw")


def run(args: argparse.Namespace) -> None:
    run_stream(args, by_row(lambda line, row, report: pairs_of(line, row, report, args)))


def pairs_of(line: int, row: dict[str, Any], report: Report, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The row's pairs, the better response as chosen; equal rewards give none."""
    prompt, responses, rewards = _candidates(line, row, report)
    random = Random(f"{args.seed}:{line}")  # the same draws whichever run comes to this line
    accepted = accept(rewards, args.accept, args.beta, random)
    report.note(line, "fewer candidates than --accept, all taken", int(len(accepted) < args.accept))
    rows = []
    for pair in RANKINGS[args.ranking](accepted, rewards, random):
        worse, better = sorted(pair, key=rewards.__getitem__)
        if rewards[worse] == rewards[better]:
            report.note(line, "pairs left out, equal rewards")
            continue
        rows.append(
            {
                "prompt": prompt,
                "chosen": responses[better],
                "rejected": responses[worse],
                "chosen_score": rewards[better],
                "rejected_score": rewards[worse],
            }
        )
    return rows


def _candidates(line: int, row: dict[str, Any], report: Report) -> tuple[Any, list[str], list[float]]:
    """(prompt, responses, rewards): responses that differ and are not empty, the first of each text."""
    prompt, responses, rewards = (field_of(row, name) for name in ("prompt", "responses", "rewards"))
    parse_prompt(prompt)
    for name, value in (("responses", responses), ("rewards", rewards)):
        if not isinstance(value, list):
            raise BadRow("wrong type", f"{name}: got {json_type(value)}, need a list")
    if len(responses) != len(rewards):
        raise BadRow("responses and rewards differ in number", f"{len(responses)} and {len(rewards)}")
    unique: dict[str, float] = {}
    empty = 0
    for index, (response, reward) in enumerate(zip(responses, rewards, strict=True)):
        if not isinstance(response, str):
            raise BadRow("wrong type", f"responses[{index}]: got {json_type(response)}, need a string")
        number = finite(reward, f"rewards[{index}]")
        if not response.strip():
            empty += 1
            continue
        parse_pair({"prompt": prompt, "chosen": response, "rejected": response})
        unique.setdefault(response, number)
    if len(unique) < 2:
        raise BadRow("fewer than two different responses", f"{len(unique)} of {len(responses)}")
    report.note(line, "empty responses removed", empty)
    report.note(line, "duplicate responses removed", len(responses) - empty - len(unique))
    return prompt, list(unique), list(unique.values())


def _beta(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a number >= 0")
    return value
