"""Train a sparse autoencoder on the hidden states of a causal language model, for FPO.

asft data sae --model_name_or_path FOLDER --dataset_name pairs.jsonl.gz --output sae.safetensors

Writes the autoencoder (--output) and, beside it, OUTPUT.json with the settings and its quality on pairs that were
held out (every 8th line). Ctrl-C ends training early and writes what there is.
"""

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from asft_kernels.data import load_pairs, split_every_nth
from asft_kernels.data_commands.fields import whole
from asft_kernels.errors import InputError
from asft_kernels.files import write_json
from asft_kernels.methods.fpo.collect import collect_tokens
from asft_kernels.methods.fpo.files import check_suffix, write_sae
from asft_kernels.methods.fpo.hidden import HEAD_INPUT, check_layer
from asft_kernels.methods.fpo.training import Trainer, quality
from asft_kernels.models.loading import fitted_length, load_causal_lm, load_tokenizer

BATCH_SIZE = 1024
HELD_OUT_NTH, HELD_OUT_SHARE = 8, 0.1  # lines; evaluation tokens for each training token
SHOWN_EVERY = 10  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add = parser.add_argument
    add("--model_name_or_path", "--model", dest="model", required=True, help="folder or hub name of a causal LM")
    add("--dataset_name", "--data", dest="data", required=True, nargs="+", help="preference pairs: a name, or several")
    add("--output", required=True, help="file to write: .safetensors, or .npz as Gemma Scope's")
    add("--layer", type=int, default=HEAD_INPUT, help="-1: the head's input; 0, 1, ...: that block's output")
    add("--features", type=whole(1), default=4096, help="F")
    add("--tokens", type=whole(1), default=60_000, help="to train on, kept in memory in fp32")
    add("--steps", type=whole(1), default=600, help="of training")
    add("--batch_size", type=whole(1), help=f"tokens a step; default {BATCH_SIZE}, or all where there are fewer")
    add("--learning_rate", type=float, default=1e-3, help="of Adam")
    add("--l1", type=float, default=5.0, help="weight of the sparsity penalty")
    add("--max_length", type=whole(2), default=512, help="tokens of prompt and answer")
    add("--seed", type=int, default=0, help="of everything drawn")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "auto"], help="of the model")


def run(options: argparse.Namespace) -> None:
    """Trains and writes; Ctrl-C ends training early with a file.

    Args:
        options: of `add_arguments`.

    Raises:
        InputError: for what was given and cannot be used.
    """
    check_suffix(options.output)
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, config = load_tokenizer(options.model)
    options.max_length = fitted_length(config, options.max_length)
    vocab_size = config.get_text_config().vocab_size
    pairs, report = load_pairs(options.data, tokenizer, max_length=options.max_length, vocab_size=vocab_size)
    print(report)
    train_pairs, held_out_pairs = split_every_nth(pairs, HELD_OUT_NTH)
    model = load_causal_lm(options.model, options.dtype).to(device).eval()
    check_layer(model, options.layer)
    collect: dict[str, Any] = {"layer": options.layer, "seed": options.seed}
    tokens = collect_tokens(model, train_pairs, options.tokens, label="hidden states", **collect)
    wanted = max(1, int(HELD_OUT_SHARE * options.tokens))
    held_out = collect_tokens(model, held_out_pairs, wanted, label="held-out states", **collect)
    del model
    options.batch_size = options.batch_size or min(BATCH_SIZE, len(tokens))
    if options.batch_size > len(tokens):
        raise InputError(f"--batch_size: got {options.batch_size}, need at most {len(tokens)}, the tokens of the data")
    collected = time.perf_counter()
    trainer = Trainer(
        tokens, options.features, steps=options.steps, batch_size=options.batch_size, seed=options.seed,
        learning_rate=options.learning_rate, l1=options.l1, device=device,
    )  # fmt: skip
    _train(trainer)
    sae = trainer.finished()
    figures = asdict(quality(sae, held_out))
    write_sae(sae, options.output)
    settings = {name: value for name, value in vars(options).items() if name != "command"}
    metrics = {
        "settings": settings, "steps_done": trainer.done, "training_tokens": len(tokens), "held_out": figures,
        "seconds": {"collecting": collected - begin, "training": time.perf_counter() - collected},
    }  # fmt: skip
    write_json(f"{options.output}.json", metrics)
    print(
        f"{options.output}: {trainer.done} steps; on {len(held_out)} held-out tokens explained variance "
        f"{figures['explained_variance']:.3f}, {figures['l0']:.1f} features a token, {figures['dead']:.1%} dead"
    )


def _train(trainer: Trainer) -> None:
    from tqdm import tqdm

    try:
        with tqdm(total=trainer.steps, desc="autoencoder", unit="step") as bar:
            while trainer.done < trainer.steps:
                loss = trainer.step()
                bar.update()
                if trainer.done % SHOWN_EVERY == 0:
                    bar.set_postfix(loss=f"{loss:.1f}")
    except KeyboardInterrupt:
        if not trainer.done:
            raise
        print(f"\nstopped after step {trainer.done}; writing what there is", file=sys.stderr)
