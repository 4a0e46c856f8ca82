"""`asft data features`: a reference model's pooled features of both answers of every pair, once.

One Arrow file, memory-mapped when read: a row a pair, keyed by the pair's id (`load_pairs`), each answer as the
indices and values of its features that are not 0. All of them: FPO compares the reference at the policy's top k
too, which the reference's own top k does not hold. Values are float16: off by 2^-11 of themselves, they move D by
less than a drift of a thousandth would. 4 bytes a feature that is active somewhere in the answer (6 with more than
65536 features), against 2 F for the whole vector.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asft_kernels.data import with_labels
from asft_kernels.errors import InputError
from asft_kernels.files import replacing
from asft_kernels.methods.fpo.autoencoder import SparseAutoencoder
from asft_kernels.methods.fpo.features import pooled_features
from asft_kernels.methods.fpo.hidden import HEAD_INPUT, check_layer, hidden_states

SIDES = ("chosen", "rejected")
LARGEST = torch.finfo(torch.float16).max
MADE_BY = b"asft_kernels.methods.fpo"  # key of the file's metadata


def encoder_digest(sae: SparseAutoencoder) -> str:
    """sha256 of what features depend on."""
    digest = hashlib.sha256()
    for tensor in (sae.W_enc, sae.b_enc, sae.floor):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def answer_length(pair: Any, side: str, max_length: int | None) -> int:
    """Tokens of an answer that are trained: TRL's collator cuts it where prompt and answer exceed max_length."""
    length = len(pair[f"{side}_ids"])
    return length if max_length is None else max(0, min(length, max_length - len(pair["prompt_ids"])))


@torch.no_grad()
def write_reference_features(
    path: str | os.PathLike[str],
    model: Any,
    sae: SparseAutoencoder,
    pairs: Any,
    *,
    layer: int = HEAD_INPUT,
    max_length: int | None = None,
    batch_size: int = 8,
) -> None:
    """Features of `pairs` (rows with id, prompt_ids, chosen_ids, rejected_ids, as load_pairs makes them) under `model`.

    layer: `asft_kernels.methods.fpo.hidden`. max_length: tokens of prompt and answer, as in training, None for all;
    longer answers are cut. batch_size: pairs at a time. The file appears when it is complete.
    """
    import pyarrow as pa
    from tqdm import tqdm
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    check_layer(model, layer)
    index_type = pa.uint16() if sae.features <= 2**16 else pa.uint32()
    fields = [pa.field("id", pa.string())]
    for side in SIDES:
        fields += [pa.field(f"{side}_tokens", pa.int32()), pa.field(f"{side}_features", pa.list_(index_type))]
        fields += [pa.field(f"{side}_values", pa.list_(pa.float16()))]
    made_by = {"encoder": encoder_digest(sae), "features": sae.features, "layer": layer}
    schema = pa.schema(fields, metadata={MADE_BY: json.dumps(made_by).encode()})
    collate, device = DataCollatorForPreference(pad_token_id=0, max_length=max_length), sae.W_enc.device
    columns = (pairs[f"{name}_ids"] for name in ("prompt", *SIDES))
    lengths = [len(prompt) + max(len(c), len(r)) for prompt, c, r in zip(*columns, strict=True)]
    order = sorted(range(len(pairs)), key=lambda i: -lengths[i])  # little padding, and too large a batch shows at once
    with replacing(path) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for start in tqdm(range(0, len(order), batch_size), desc="reference features", unit="batch"):
            rows = [pairs[i] for i in order[start : start + batch_size]]
            batch = {name: tensor.to(device) for name, tensor in with_labels(collate(rows)).items()}
            _, hidden = hidden_states(model, batch["input_ids"], batch["attention_mask"], layer)
            pooled = pooled_features(sae, hidden, batch["labels"]).float().cpu()
            if not pooled.max() <= LARGEST:
                raise InputError(f"sae: gives a pooled feature of {pooled.max():g}, need at most {LARGEST:g} (float16)")
            out: dict[str, list[Any]] = {"id": [row["id"] for row in rows]}
            for side, half in zip(SIDES, pooled.chunk(2), strict=True):
                active = [vector.nonzero().squeeze(1) for vector in half]
                out[f"{side}_tokens"] = [answer_length(row, side, max_length) for row in rows]
                out[f"{side}_features"] = [index.numpy().astype(index_type.to_pandas_dtype()) for index in active]
                out[f"{side}_values"] = [v[index].half().numpy() for v, index in zip(half, active, strict=True)]
            file.write_batch(pa.record_batch(out, schema=schema))


class ReferenceFeatures:
    """A file of `write_reference_features`, for batches of pairs by their ids.

    sae, layer, max_length: those of the run. pairs: the run's, all of which the file must hold with answers of the same
    length; None leaves that to the look-up. Raises InputError, beginning with the path, where one does not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sae: SparseAutoencoder,
        *,
        layer: int = HEAD_INPUT,
        pairs: Any = None,
        max_length: int | None = None,
    ):
        import pyarrow as pa

        self.path, self.features = Path(path), sae.features
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; asft data features makes one")
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
            made_by = json.loads((self.table.schema.metadata or {})[MADE_BY])
        except (pa.ArrowInvalid, KeyError) as error:
            need = "a file that asft data features wrote"
            raise InputError(f"{self.path}: got another file ({error}), need {need}") from error
        for name, own in (("encoder", encoder_digest(sae)), ("layer", layer)):
            if made_by[name] != own:
                raise InputError(f"{self.path}: made with the {name} {made_by[name]}, need {own}; make it anew")
        self.row_of = {key: row for row, key in enumerate(self.table["id"].to_pylist())}
        if pairs is not None:
            self._check(pairs, max_length)

    def _check(self, pairs: Any, max_length: int | None) -> None:
        lengths = {side: self.table[f"{side}_tokens"].to_pylist() for side in SIDES}
        for pair in pairs:
            row = self._row(pair["id"])
            for side in SIDES:
                need = answer_length(pair, side, max_length)
                if lengths[side][row] != need:
                    raise InputError(
                        f"{self.path}: pair {pair['id']} has {lengths[side][row]} tokens in its {side} answer, "
                        f"need {need}; make the file with this run's tokenizer and lengths"
                    )

    def _row(self, key: str) -> int:
        if key not in self.row_of:
            raise InputError(f"{self.path}: no pair {key} among its {len(self.row_of)}; make the file with this data")
        return self.row_of[key]

    def pooled(self, ids: Sequence[str]) -> Tensor:
        """(2B, F) fp32, chosen rows first: `ref_pooled` of `fpo_inputs` for the pairs with these ids."""
        rows = [self._row(key) for key in ids]
        dense = torch.zeros(2 * len(rows), self.features)
        for half, side in enumerate(SIDES):
            for at, row in enumerate(rows):
                features, values = (
                    self.table[f"{side}_{what}"][row].values.to_numpy() for what in ("features", "values")
                )
                index = torch.from_numpy(features.astype("int64"))
                dense[half * len(rows) + at, index] = torch.from_numpy(values.astype("float32"))
        return dense
