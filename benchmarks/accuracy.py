"""Errors of loss, dH and dW against float64, for every contestant, on random inputs and on real text.

    python -m benchmarks.accuracy                        # the package's own demo pairs
    python -m benchmarks.accuracy --data pairs.jsonl.gz  # in one of the formats of asft_kernels.data

fp32 and bf16, 1 to 64 pairs. Real inputs are the hidden states of SmolLM2-135M over the responses, with its head; bf16
rounds both first, and float64 starts from the rounded ones. As in benchmarks.run a contestant has a process of its
own (here one for all cases), rows are written as cases end, and a run that was cut off goes on: what failed is tried
again.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

from asft_kernels.demo import DATA
from asft_kernels.models.smollm2 import ModelUnavailable, smollm2_path
from benchmarks.cases import TRAINABLE, Case, Inputs, make_inputs
from benchmarks.contestants import Contestant, contestants_of
from benchmarks.losses import IGNORE
from benchmarks.machine import about, device_slug, progress
from benchmarks.oracle import relative_error
from benchmarks.run import append, has_row, key, limit, rows_of
from benchmarks.runner import NO_ERRORS, Prepared
from benchmarks.worker import EXACT, Contender, Worker, WorkerFailed

PAIRS = (1, 8, 64)
LOSSES = {"asft": PAIRS, "simpo": PAIRS, "dpo": (8,), "orpo": (8,)}
# Contestants that answer up to so many pairs: the one is plain torch on fewer positions, the other takes dozens of
# times as long as the rest.
MOST_PAIRS = {"torch F.linear_cross_entropy": 8, "torch F.linear_cross_entropy, chunked": 1}
PROMPT, RESPONSE = 4, 16  # positions of a row at most: what comes before a response matters little, its length costs


def random_case(pairs: int, **fields) -> Case:
    """As many tokens a pair as the real ones, a vocabulary and a hidden size of the same kind."""
    rows = 2 * pairs
    return Case("accuracy", TRAINABLE, RESPONSE * rows, (PROMPT + RESPONSE) * rows, 576, 32000, pairs=pairs, **fields)


def real_inputs(case: Case, source: Path) -> Inputs:
    """The first pairs of the states that `hidden_states` left, in the case's dtype."""
    stored = torch.load(source)
    chosen, rejected = (stored["hidden"].chunk(2)[side][: case.pairs] for side in (0, 1))
    labels = torch.cat([part[: case.pairs] for part in stored["labels"].chunk(2)])
    return Inputs(torch.cat([chosen, rejected]).to(case.torch_dtype), stored["weight"].to(case.torch_dtype), labels)


def hidden_states(data: Path, pairs: int, target: Path) -> None:
    """SmolLM2's states and shifted labels, PROMPT positions before the response and its first RESPONSE, to a file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from asft_kernels.data import load_pairs, with_labels
    from asft_kernels.models import PreferenceModel

    model_folder = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    dataset, _ = load_pairs(data, tokenizer, max_length=512)
    if len(dataset) < pairs:
        raise SystemExit(f"--data: got {len(dataset)} usable pairs in {data}, need {pairs}; give a longer file")
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    model = PreferenceModel(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)).eval()
    sides: tuple[list, list] = [], []
    for index in range(pairs):  # one by one: the longest dialogue sets no other's length
        batch = with_labels(collate([dataset[index]]))
        with torch.no_grad():
            states = model.hidden_states(batch["input_ids"], batch["attention_mask"])
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        for row, side in enumerate(sides):
            first = int((labels[row] != IGNORE).nonzero()[0])
            side.append(_window(states[row], labels[row], first))
    hidden, shifted = zip(*(sides[0] + sides[1]), strict=True)
    weight = model.lm_head.weight.detach()
    torch.save({"hidden": torch.stack(hidden), "labels": torch.stack(shifted), "weight": weight}, target)


def _window(states: torch.Tensor, labels: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(PROMPT + RESPONSE) positions from PROMPT before the response's first, padded where the text is shorter."""
    part = slice(max(0, first - PROMPT), first + RESPONSE)
    missing = PROMPT + RESPONSE - len(labels[part])
    pad = torch.nn.functional.pad
    return pad(states[part], (0, 0, 0, missing)), pad(labels[part], (0, missing), value=IGNORE)


def accuracy_cases(stored: dict[str, torch.Tensor] | None, device: str) -> list[tuple[Case, str]]:
    """(case, "random" or "real"): the sizes of a real case are those of the text."""
    cases = []
    for loss, numbers in LOSSES.items():
        for dtype in ("float32", "bfloat16"):
            for pairs in numbers:
                case = random_case(pairs, loss=loss, dtype=dtype, device=device)
                cases.append((case, "random"))
                if stored is not None:
                    labels = torch.cat([side[:pairs] for side in stored["labels"].chunk(2)])
                    V, D = stored["weight"].shape
                    valid = int((labels != IGNORE).sum())
                    cases.append((replace(case, model="SmolLM2-135M", N=valid, M=labels.numel(), D=D, V=V), "real"))
    return cases


def answering(case: Case) -> list[Contestant]:
    """On ASFT all that answer, but for other settings of ours; else Liger-Kernel, and ours beside it."""
    same = ("asft_kernels torch, ", "asft_kernels triton, ")
    answer = [c for c in contestants_of(case) if c.checked and not c.name.startswith(same)]
    answer = [c for c in answer if case.pairs <= MOST_PAIRS.get(c.name, PAIRS[-1])]
    return [c for c in answer if case.loss == "asft" or c.name.startswith(("Liger-Kernel", "asft_kernels"))]


class Workers:
    """One a contestant, over all cases: nothing is timed here, and imports and compilation take longest."""

    def __init__(self, limit: float):
        self.limit, self.by_name = limit, {}

    def check(self, contestant: Contestant, case: Case, folder: Path) -> dict:
        """status, reason and errors; a worker that failed is replaced at its next case."""
        worker = self.by_name.pop(contestant.name, None)
        try:
            if worker is None:
                worker = Worker(Contender, contestant, case, folder)
                worker.ask("start", limit=self.limit)
            worker.ask("load", case, folder, limit=self.limit)
            facts = worker.ask("check", limit=self.limit)
        except WorkerFailed as failure:
            return NO_ERRORS | {"status": "failed", "reason": str(failure)}
        self.by_name[contestant.name] = worker
        return facts | {"status": "refused" if facts["reason"] else "ok"}

    def close(self) -> None:
        for worker in self.by_name.values():
            worker.close()


def rounding(case: Case, folder: Path) -> dict[str, float]:
    """What rounding the exact gradients once to the case's dtype does to them: no answer in that dtype is better."""
    exact = torch.load(folder / EXACT, map_location=case.device)
    grads = {"rounding_dh": exact["grad_hidden"], "rounding_dw": exact["grad_weight"]}
    return {name: relative_error(grad.to(case.torch_dtype), grad) for name, grad in grads.items()}


def measure(case: Case, contestants: list[Contestant], prepared: Prepared, workers: Workers) -> list[dict]:
    """A row for each contestant; those outside the tolerance keep their errors."""
    folder = prepared.folder_of(case)
    once = rounding(case, folder)
    return [
        {
            "kind": "accuracy", **case.row, "contestant": c.name, "package": c.package, "version": c.version,
            "note": c.note, "gemms": c.products(case), **workers.check(c, case, folder), **once,
        }
        for c in contestants
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "train.jsonl", help="pairs (default: the demo's)")
    parser.add_argument("--random-only", action="store_true", help="no language model, random inputs alone")
    parser.add_argument("--pairs", type=int, nargs="+", choices=PAIRS, default=PAIRS, help="cases of these alone")
    parser.add_argument("--out", type=Path, help="file of rows (default: bench_results/DATE-DEVICE.jsonl)")
    parser.add_argument("--limit", type=limit, default=300, help="seconds that one call may take (default 300)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.out or Path("bench_results") / f"{date.today()}-{device_slug(device)}.jsonl"
    facts = about(device, "benchmarks.accuracy", sys.argv[1:])
    done = {key(row) for row in rows_of(path) if row["status"] != "failed"}
    with tempfile.TemporaryDirectory(prefix="asft-accuracy-") as folder:
        file, stored = Path(folder) / "states.pt", None
        if not args.random_only:
            print(f"hidden states of SmolLM2-135M over the first {PAIRS[-1]} pairs of {args.data}", flush=True)
            try:
                hidden_states(args.data, PAIRS[-1], file)
                stored = torch.load(file)
            except (ModelUnavailable, ImportError) as error:
                print(f"no SmolLM2-135M, random inputs alone: {error}", flush=True)
        makers = {"random": make_inputs, "real": partial(real_inputs, source=file)}
        workers = Workers(args.limit)
        try:
            cases = [(case, inputs) for case, inputs in accuracy_cases(stored, device) if case.pairs in args.pairs]
            for case, inputs in progress(cases, unit="case"):
                left = [c for c in answering(case) if not has_row("accuracy", case, c, done, facts)]
                if not left:
                    continue
                prepared = Prepared(makers[inputs])
                try:
                    rows = measure(case, left, prepared, workers)
                finally:
                    prepared.close()
                source = "" if inputs == "random" else f"SmolLM2-135M over {args.data.name}, first {RESPONSE} tokens"
                extra = {"inputs": inputs, "source": source, "about": facts}
                append(path, [row | extra for row in rows])
        except WorkerFailed as failure:
            sys.exit(f"no exact answer: {failure}")
        except KeyboardInterrupt:
            sys.exit(f"\nstopped; the rows so far are in {path}, and the same command goes on")
        finally:
            workers.close()


if __name__ == "__main__":
    main()
