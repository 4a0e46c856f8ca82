"""Store a reference model's pooled features of both answers of every pair, for FPO, once.

asft data features --model_name_or_path FOLDER --dataset_name pairs.jsonl.gz --sae sae.safetensors --output ref.arrow

The file appears when it is complete.
"""

import argparse
import os

import torch

from asft_kernels.data import load_pairs
from asft_kernels.data_commands.fields import whole
from asft_kernels.methods.fpo.cache import write_reference_features
from asft_kernels.methods.fpo.files import read_sae
from asft_kernels.methods.fpo.hidden import HEAD_INPUT
from asft_kernels.models.loading import fitted_length, load_causal_lm, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("--model_name_or_path", "--model", dest="model", required=True, help="folder or hub name of the reference")
    add("--dataset_name", "--data", dest="data", required=True, nargs="+", help="preference pairs: a name, or several")
    add("--sae", required=True, help="autoencoder: .npz or .safetensors")
    add("--output", required=True, help="file to write, .arrow")
    add("--layer", type=int, default=HEAD_INPUT, help="-1: the head's input; 0, 1, ...: that block's output")
    add("--max_length", type=whole(2), default=1024, help="tokens of prompt and answer, as in training")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "auto"], help="of the model")
    add("--batch_size", type=whole(1), default=8, help="pairs")


def run(options: argparse.Namespace) -> None:
    """Computes and writes the features.

    Args:
        options: of `add_arguments`.

    Raises:
        InputError: for what was given and cannot be used.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = read_sae(options.sae).to(device)
    tokenizer, config = load_tokenizer(options.model)
    options.max_length = fitted_length(config, options.max_length)
    vocab_size = config.get_text_config().vocab_size
    pairs, report = load_pairs(options.data, tokenizer, max_length=options.max_length, vocab_size=vocab_size)
    print(report)
    model = load_causal_lm(options.model, options.dtype).to(device).eval()
    write_reference_features(
        options.output, model, sae, pairs, layer=options.layer, max_length=options.max_length,
        batch_size=options.batch_size,
    )  # fmt: skip
    size = os.path.getsize(options.output)
    print(f"{options.output}: {len(pairs)} pairs, {size / len(pairs) / 1024:.1f} KiB a pair")
