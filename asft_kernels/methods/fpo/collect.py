"""Hidden states of preference pairs, token by token, for an autoencoder to learn from."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asft_kernels.methods.fpo.hidden import hidden_states

SEQUENCES_AT_ONCE = 8


@torch.no_grad()
def collect_tokens(model: Any, pairs: Any, count: int, *, layer: int, seed: int, label: str) -> Tensor:
    """(N, D) fp32 on the CPU, N <= count: states of prompt and answer, of pairs drawn at random.

    Each pair gives one sequence, chosen and rejected answers in turn, without its first position: many models
    put a huge state there, which answers never see. label: of the progress bar.
    """
    from tqdm import tqdm

    sequences, found = [], 0
    for place, i in enumerate(torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()):
        pair = pairs[i]
        sequences.append(torch.tensor([*pair["prompt_ids"], *pair[("chosen_ids", "rejected_ids")[place % 2]]]))
        found += len(sequences[-1]) - 1
        if found >= count:
            sequences[-1] = sequences[-1][: len(sequences[-1]) - (found - count)]
            break
    sequences.sort(key=len, reverse=True)  # little padding, and too long a batch shows at once
    device = next(model.parameters()).device
    parts = []
    with tqdm(total=min(found, count), desc=label, unit="token") as bar:
        for start in range(0, len(sequences), SEQUENCES_AT_ONCE):
            batch = sequences[start : start + SEQUENCES_AT_ONCE]
            ids = pad_sequence(batch, batch_first=True)
            mask = pad_sequence([torch.ones_like(x) for x in batch], batch_first=True)
            _, hidden = hidden_states(model, ids.to(device), mask.to(device), layer)
            parts.append(hidden[:, 1:].cpu()[mask[:, 1:].bool()].float())
            bar.update(len(parts[-1]))
    return torch.cat(parts)
