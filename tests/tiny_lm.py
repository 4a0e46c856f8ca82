"""A tiny language model with its tokenizer, and pairs, made on the spot: no download."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
ARROW_KINDS = ["parquet", "arrow file", "arrow stream", "folder"]
SPECIAL = ["<pad>", "<eos>", "<turn>"]


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(**changes) -> LlamaConfig:
    options = dict(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaConfig(**{**options, **changes})


def tiny_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).float()


def saved_tiny_model(folder: Path, **changes) -> Path:
    """A folder that `--model` takes."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pairs(count: int) -> list[dict[str, str]]:
    """Answers of different lengths; the chosen one says the word of the prompt."""
    words = ["red", "green", "violet", "blue", "white"]
    return [
        {
            "prompt": f"Say {words[i % 5]} {i}: ",
            "chosen": words[i % 5] * (1 + i % 3),
            "rejected": "no" * (1 + i % 4),
        }
        for i in range(count)
    ]


def write_lines(path: Path, rows: list) -> Path:
    """Rows as JSON lines; a str row is written as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def stored(rows: list[dict], folder: Path, kind: str) -> Path:
    """Rows as a file or folder of one of ARROW_KINDS, several batches long."""
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    dataset = datasets.Dataset.from_list(rows)
    path = folder / kind
    table = dataset.with_format("arrow")[:]
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=10)
    elif kind == "arrow file":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    elif kind == "arrow stream":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    else:
        dataset.save_to_disk(path, num_shards=min(3, len(rows)))
    return path


def saved_sae(path: Path, features: int = 24) -> Path:
    """A random ReLU autoencoder of the tiny model's hidden states."""
    from asft_kernels.methods.fpo import SparseAutoencoder, write_sae

    generator = torch.Generator().manual_seed(0)
    size = tiny_config().hidden_size
    encoder = torch.randn(size, features, generator=generator)
    write_sae(SparseAutoencoder(encoder, torch.zeros(features), encoder.T, torch.zeros(size)), path)
    return path
