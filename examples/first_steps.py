"""First steps, cell by cell: `pip install -e ".[train]"`, then run this file, or its cells in an editor or notebook.

A tiny model with random weights stands for a real one, so that nothing is downloaded and all takes seconds on a CPU.
What it writes goes into a temporary folder, whose name it prints.
"""

# %% A loss of pairs, straight from hidden states
import torch

from asft_kernels import fused_asft_loss, fused_preference_loss

hidden = torch.randn(4, 12, 64, requires_grad=True)  # (2B, T, D): two chosen rows, then their two rejected ones
lm_head = torch.nn.Linear(64, 1000, bias=False)
labels = torch.randint(1000, (4, 12))  # as input_ids lie: not shifted
labels[:, :5] = -100  # the prompt carries no loss

loss, out = fused_asft_loss(hidden, lm_head, labels, return_outputs=True)
loss.backward()
print(f"ASFT {loss:.3f}; log-odds chosen minus rejected {out.margins.tolist()}; accuracy {out.accuracy:.2f}")

for objective in ("orpo", "simpo", "asft + 0.1 sft"):  # of those that need no reference model
    print(f"{objective}: {fused_preference_loss(hidden, lm_head, labels, objective):.3f}")

# %% A model and a tokenizer, of transformers
try:
    from datasets import load_dataset
except ModuleNotFoundError as error:
    raise SystemExit(f'{error}: from here on this needs pip install -e ".[train]"') from error
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import asft_kernels

FOLDER = asft_kernels.__path__[0] + "/demo_data"
train, held_out = (
    load_dataset("json", data_files=f"{FOLDER}/{name}.jsonl", split="train") for name in ("train", "eval")
)

texts = [message["content"] for side in ("prompt", "chosen", "rejected") for chat in train[side] for message in chat]
words = Tokenizer(models.BPE())
words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
words.train_from_iterator(
    texts,
    trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)  # fmt: skip
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )
)  # fmt: skip

# %% Its log-probabilities, without its logits
from asft_kernels.models import fuse, unfuse

chat = train[0]["prompt"] + train[0]["chosen"]
ids = torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])
fuse(model, outputs=("log_probs", "entropy"))  # the first batch is held against the model's own logits
fused = model(input_ids=ids, labels=ids, fused_lm_head=True)
plain = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
print(f"{ids.shape[1]} tokens: loss {fused.loss:.3f}, largest difference {(fused.log_probs - plain).abs().max():.1e}")
unfuse(model)  # the trainer below fuses by itself

# %% Some steps of training, with TRL's trainer
from pathlib import Path
from tempfile import mkdtemp

from asft_kernels.training import PreferenceConfig, PreferenceTrainer

written = Path(mkdtemp(prefix="first_steps-"))
trainer = PreferenceTrainer(
    model,
    args=PreferenceConfig(
        str(written / "run"), objective="asft", max_steps=20, per_device_train_batch_size=4, learning_rate=2e-3,
        max_length=256, logging_steps=4, report_to="none", disable_tqdm=True, save_strategy="no",
    ),
    train_dataset=train,
    eval_dataset=held_out,
    processing_class=tokenizer,
)  # fmt: skip
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
for name in ("eval_loss", "eval_accuracy", "eval_log_odds/margins"):
    print(f"{name}: {before[name]:.3f} -> {after[name]:.3f}")

# %% A picture of it
from matplotlib.figure import Figure

rows = [row for row in trainer.state.log_history if "avg_logps/chosen" in row]
figure = Figure(figsize=(6, 3.5), layout="constrained")
axes = figure.subplots()
for side in ("chosen", "rejected"):
    axes.plot([row["step"] for row in rows], [row[f"avg_logps/{side}"] for row in rows], label=side)
axes.set(xlabel="step", ylabel="log-probability of a token, nats", title="ASFT on a tiny model")
axes.legend()
figure.savefig(written / "first_steps.png", dpi=150)
print(written / "first_steps.png")
