"""Text generation where a method needs it: one small interface, and Hugging Face transformers behind it.

Anything with `Generator.generate` will do. With vLLM, for example, whose `LLM` is `llm` and whose
`SamplingParams` takes the same names (messages go to `llm.chat`, texts to `llm.generate`):

    class VLLMGenerator:
        def generate(self, prompts, *, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0):
            sampling = SamplingParams(
                max_tokens=max_new_tokens, temperature=temperature, top_k=top_k or -1, top_p=top_p, seed=seed)
            call = llm.generate if isinstance(prompts[0], str) else llm.chat
            return [request.outputs[0].text for request in call(prompts, sampling)]
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch

from asft_kernels.models.loading import load_causal_lm, load_tokenizer

Messages: TypeAlias = list[dict[str, str]]


class PromptTooLong(ValueError):
    """`prompts[index]` and max_new_tokens together pass the model's positions."""

    def __init__(self, index: int, tokens: int, max_new_tokens: int, positions: int):
        super().__init__(
            f"prompts[{index}]: {tokens} tokens and max_new_tokens {max_new_tokens}, "
            f"need at most {positions} together: the model has no more positions"
        )
        self.index = index


class Generator(Protocol):
    """What the data commands and SAPO ask of a language model."""

    def generate(
        self,
        prompts: Sequence[str | Messages],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """One continuation for each prompt, in order, without prompt and special tokens.

        prompts: texts, taken as they stand, or chats, which go through the model's chat template;
            a chat that ends with an assistant message has that message continued.
        max_new_tokens: at most so many tokens; less where the model ends its answer.
        temperature: 0 takes the most likely token each time; top_k (0: off) and top_p (1: off)
            limit what is sampled above 0.
        seed: the same call gives the same texts.
        """
        ...


class TransformersGenerator:
    """`Generator` by `model.generate` of Hugging Face transformers.

    model, tokenizer: a causal LM, used as it is at each call (a training one is set to evaluation
        meanwhile), and its tokenizer.
    batch_size: prompts generated together, padded on the left.

    With temperature > 0 a text depends on seed, batch_size and the prompts beside it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 8):
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, need at least 1")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def from_pretrained(cls, name: str, *, batch_size: int = 8) -> "TransformersGenerator":
        """name: a folder that from_pretrained reads, or a hub name. On a GPU if there is one.

        Raises InputError for what cannot be loaded, ModuleNotFoundError without transformers.
        """
        tokenizer, _ = load_tokenizer(name)
        model = load_causal_lm(name, "auto")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), tokenizer, batch_size=batch_size)

    def generate(
        self,
        prompts: Sequence[str | Messages],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """As `Generator.generate`. Raises PromptTooLong before anything is generated."""
        rows = self.generate_ids(
            [self._encode(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
        ends = self.ends()
        texts = (row[:-1] if row and row[-1] in ends else row for row in rows)
        return [
            self.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in texts
        ]

    def generate_ids(
        self,
        encoded: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """The same on token ids: what follows each prompt, with the id that ended it (`ends`) where one did."""
        sampling = _sampling(max_new_tokens, temperature, top_k, top_p)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for index, ids in enumerate(encoded):
            if not ids:
                raise ValueError(f"prompts[{index}]: has no token, need at least one to generate from")
            if positions and len(ids) + max_new_tokens > positions:
                raise PromptTooLong(index, len(ids), max_new_tokens, positions)
        device, training = self.model.device, self.model.training
        rows: list[list[int]] = []
        self.model.eval()
        try:
            # The caller's random numbers go on as if nothing had been drawn here.
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
                torch.manual_seed(seed)
                for start in range(0, len(encoded), self.batch_size):
                    rows += self._batch(encoded[start : start + self.batch_size], sampling)
        finally:
            self.model.train(training)
        return rows

    def _encode(self, prompt: str | Messages) -> list[int]:
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            templated = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
            ids = tokenizer(prompt, add_special_tokens=not templated, verbose=False)["input_ids"]
            closed = ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token)
            return ids[:-1] if closed else ids  # some tokenizers close every text; a prompt goes on
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("prompts: got chat messages, and the tokenizer has no chat template; need plain texts")
        goes_on = prompt[-1]["role"] == "assistant"
        text = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _batch(self, encoded: Sequence[list[int]], sampling: dict[str, Any]) -> list[list[int]]:
        ends = self.ends()
        longest = max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else next(iter(ends), 0)  # masked in prompts, cut off after an end
        padding = [longest - len(ids) for ids in encoded]
        input_ids = torch.tensor([[pad] * n + ids for n, ids in zip(padding, encoded, strict=True)])
        mask = torch.tensor([[0] * n + [1] * len(ids) for n, ids in zip(padding, encoded, strict=True)])
        device = self.model.device
        out = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            **sampling,
        )
        rows = out[:, longest:].tolist()
        return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]

    def ends(self) -> set[int]:
        """Ids that end an answer: the model's own (chat models name several) and the tokenizer's."""
        own = self.model.generation_config.eos_token_id
        ids = {own} if isinstance(own, int) else set(own or ())
        return ids | {self.tokenizer.eos_token_id} - {None}


def _sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, need at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, need a number >= 0 (0 takes the most likely token)")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k, top_p: got {top_k}, {top_p}; need top_k >= 0 (0: off) and 0 < top_p <= 1 (1: off)")
    if temperature == 0:  # None: what the model's own generation config says of sampling means nothing then
        return dict(max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_k=None, top_p=None)
    return dict(max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
