"""Numbers of each pair, and what they amount to: means with standard errors, differences of models pair by pair."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

RESAMPLES = 1000  # a bootstrap standard error is known to 1 / sqrt(2 * 1000) = 2 % of itself
MOMENTS = 10  # of a corpus: 4 counts, 4 totals, both lengths

# name -> what it is; all but the last are means over pairs.
MEANINGS = {
    "accuracy": "share of pairs whose chosen answer has the larger log-probability (ties do not count)",
    "accuracy_mean": "the same by the mean log-probability of a token",
    "margin": "log-probability of chosen minus rejected, nats",
    "margin_mean": "the same of the mean over tokens",
    "log_odds_margin": "log-odds of chosen minus rejected, of p = exp(mean log-probability): ASFT's and ORPO's",
    "chosen_length": "tokens of the chosen answer",
    "rejected_length": "tokens of the rejected answer",
    "generated_length": "tokens of the generated answer, end of turn included",
    "ended": "share of generated answers that ended by themselves",
    "rouge_l": "ROUGE-L F1 of the generated answer against the chosen one, 0 to 100",
    "bleu": "BLEU-4 of all generated answers as one corpus, 0 to 100; standard error by bootstrap",
}


class _Words:
    """rouge-score's own words of English text, and those of other scripts, which it drops."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def of_pairs(rows: Sequence[dict[str, Any]], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Computes the numbers of each pair under one model.

    Args:
        rows: n rows of `answers.fill`.
        references: n chosen answers as text.

    Returns:
        By the names of MEANINGS, (n,) float64 each, and "bleu" (n, 10): BLEU's counts, totals and lengths; NaN where
        there is no generated answer, the names that need one left out where there is none at all.
    """
    logps, lengths = (
        {side: np.array([float(row[f"{side}_{what}"]) for row in rows]) for side in ("chosen", "rejected")}
        for what in ("logps", "length")
    )
    mean = {side: logps[side] / lengths[side].clip(min=1) for side in logps}
    out = {
        "margin": logps["chosen"] - logps["rejected"],
        "margin_mean": mean["chosen"] - mean["rejected"],
        "log_odds_margin": _log_odds(mean["chosen"]) - _log_odds(mean["rejected"]),
        "chosen_length": lengths["chosen"],
        "rejected_length": lengths["rejected"],
    }
    out["accuracy"], out["accuracy_mean"] = (1.0 * (out[name] > 0) for name in ("margin", "margin_mean"))
    if any(row.get("generated") is not None for row in rows):
        rouge, bleu = RougeScorer(["rougeL"], tokenizer=_Words()), BLEU(effective_order=True)
        out |= {name: np.full(len(rows), np.nan) for name in ("generated_length", "ended", "rouge_l")}
        out["bleu"] = np.full((len(rows), MOMENTS), np.nan)
        for index, (row, reference) in enumerate(zip(rows, references, strict=True)):
            text = row.get("generated")
            if text is None:
                continue
            out["generated_length"][index], out["ended"][index] = row["generated_length"], row["ended"]
            out["rouge_l"][index] = 100 * rouge.score(reference, text)["rougeL"].fmeasure
            found = bleu.sentence_score(text, [reference])
            out["bleu"][index] = [*found.counts, *found.totals, found.sys_len, found.ref_len]
    return out


def _log_odds(logp: np.ndarray) -> np.ndarray:
    """log p / (1 - p); p next to 1 is held a rounding of it away."""
    logp = np.minimum(logp, -np.finfo(np.float64).eps)
    return logp - np.log(-np.expm1(logp))


def corpus_bleu(moments: np.ndarray) -> float:
    """Computes BLEU-4 of a corpus.

    Args:
        moments: (n, 10), as `of_pairs` gives them, without NaN.

    Returns:
        sacrebleu's corpus score, 0 to 100.
    """
    total = [int(x) for x in moments.sum(axis=0)]
    return BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9], smooth_method="exp").score


def summary(numbers: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Summarises one model.

    Args:
        numbers: of `of_pairs`.

    Returns:
        name -> {"value", "standard_error" (NaN for one pair), "pairs"}.
    """
    return {name: _with_error(numbers[name], name) for name in MEANINGS if name in numbers}


def comparison(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Compares two models on the same pairs, pair by pair.

    Args:
        one, other: of `of_pairs`, for the same pairs in the same order.

    Returns:
        name -> {"value": one's minus other's, "standard_error" of that difference, "pairs"}.
    """
    out = {}
    for name in MEANINGS:
        if name not in one or name not in other:
            continue
        if name == "bleu":
            both = np.concatenate([one[name], other[name]], axis=1)
            out[name] = _of_corpus(both, lambda x: corpus_bleu(x[:, :MOMENTS]) - corpus_bleu(x[:, MOMENTS:]))
        else:
            out[name] = _with_error(one[name] - other[name], name)
    return out


def _with_error(values: np.ndarray, name: str) -> dict[str, float]:
    if name == "bleu":
        return _of_corpus(values, corpus_bleu)
    values = values[~np.isnan(values)]
    n = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return {"value": float(values.mean()) if n else math.nan, "standard_error": error, "pairs": n}


def _of_corpus(moments: np.ndarray, score: Callable[[np.ndarray], float]) -> dict[str, float]:
    """A score of all rows together, which is no mean: its error from samples of the rows, drawn with replacement."""
    moments = moments[~np.isnan(moments).any(axis=1)]
    n, random = len(moments), np.random.default_rng(0)
    samples = [score(moments[random.integers(n, size=n)]) for _ in range(RESAMPLES)] if n > 1 else [math.nan, math.nan]
    value = score(moments) if n else math.nan
    return {"value": value, "standard_error": float(np.std(samples, ddof=1)), "pairs": n}
