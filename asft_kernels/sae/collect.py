"""Hidden states of preference pairs, token by token, for an autoencoder to learn from."""

from typing import Any

import torch
from torch import Tensor

from asft_kernels.data import PairCollator
from asft_kernels.sae.hidden import hidden_states

SEQUENCES_AT_ONCE = 8
SORTED_AT_ONCE = 128  # sequences of like length go together, within so many of the shuffled order


@torch.no_grad()
def collect_tokens(model: Any, pairs: Any, count: int, *, layer: int, seed: int, label: str) -> Tensor:
    """(N, D) fp32 on the CPU, N <= count: states of prompt and answer, of pairs in a shuffled order.

    Each pair gives one sequence, chosen and rejected answers in turn, without its first position: many models
    put a huge state there, which answers never see. label: of the progress bar.
    """
    from tqdm import tqdm

    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(pairs["prompt"], pairs["chosen"], strict=True)]
    blocks = (order[start : start + SORTED_AT_ONCE] for start in range(0, len(order), SORTED_AT_ONCE))
    order = [i for block in blocks for i in sorted(block, key=lengths.__getitem__)]
    collate, device = PairCollator(0), next(model.parameters()).device
    parts, found = [], 0
    with tqdm(total=count, desc=label, unit="token") as bar:
        for start in range(0, len(order), SEQUENCES_AT_ONCE):
            rows = [pairs[i] for i in order[start : start + SEQUENCES_AT_ONCE]]
            batch = collate(rows)  # (2B, T): row i the chosen answer, row B + i the rejected one
            taken = torch.arange(len(rows)) + len(rows) * (torch.arange(len(rows)) % 2)
            ids, mask = (batch[name][taken].to(device) for name in ("input_ids", "attention_mask"))
            _, hidden = hidden_states(model, ids, mask, layer)
            part = hidden[:, 1:][mask[:, 1:].bool()].float().cpu()[: count - found]
            parts.append(part)
            found += len(part)
            bar.update(len(part))
            if found == count:
                break
    return torch.cat(parts)
