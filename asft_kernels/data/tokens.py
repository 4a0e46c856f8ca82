"""A pair -> token ids as TRL's DPOTrainer makes them, and what is worth saying about the row.

TRL encodes the prompt and the prompt with each answer, and takes what all begin with as the prompt. Ours differ in
one thing: where a tokenizer writes its BOS before a text that begins with it, or its EOS twice, one of the two goes.
"""

from dataclasses import dataclass, field
from typing import Any

from asft_kernels.data.limits import SlowTemplate, rendering
from asft_kernels.data.pair import Messages, Pair, Text
from asft_kernels.data.rows import BadRow
from asft_kernels.errors import INSTALL, InputError

WITHOUT_CONTENT = ("image", "image_url", "video", "audio")  # parts of a message that a text cannot stand for
PROBE = "Qx7"  # a text that no template holds


@dataclass
class Tokens:
    """Holds the ids of a prompt and of its answers by name, the answers without their prompt; notes for the report."""

    prompt: list[int]
    answers: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)

    def columns(self) -> dict[str, Any]:
        """Returns prompt_ids, chosen_ids, ...: what TRL's collator reads."""
        return {"prompt_ids": self.prompt, **{f"{name}_ids": ids for name, ids in self.answers.items()}}

    def digests(self) -> list[str]:
        """Returns those of its images."""
        return []

    def largest(self) -> int:
        return max(map(max, (self.prompt, *self.answers.values())))


def cut(tokens: Tokens, max_length: int | None) -> None:
    """Cuts answers at max_length tokens of prompt and answer. BadRow where nothing is left of one."""
    if max_length is not None:
        room = max_length - len(tokens.prompt)
        if room <= 0:
            raise BadRow("prompt fills max_length", f"{len(tokens.prompt)} tokens, max_length is {max_length}")
        if any(len(answer) > room for answer in tokens.answers.values()):
            tokens.notes.append(f"answer cut at max_length {max_length}")
        tokens.answers = {name: answer[:room] for name, answer in tokens.answers.items()}
    for name, answer in tokens.answers.items():
        if not answer:
            raise BadRow("answer without a token", name)


def compare(pair: Pair, tokens: Tokens) -> None:
    """Raises BadRow for answers that are the same, as written or as trained."""
    if len(pair.answers) < 2:
        return
    chosen, rejected = pair.answers.values()
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    if len({tuple(answer) for answer in tokens.answers.values()}) == 1:
        was_cut = any(note.startswith("answer cut") for note in tokens.notes)
        raise BadRow("chosen equals rejected up to max_length" if was_cut else
                     "the template does not show the difference", "between chosen and rejected")  # fmt: skip
    if "".join(str(chosen).split()) == "".join(str(rejected).split()):
        tokens.notes.append("answers that differ in white space alone")


class PairTokenizer:
    """Tokenises pairs with TRL's own helpers.

    Args:
        processing_class: a tokenizer, or the processor of a model that takes images.
        max_length: tokens of prompt and answer together; None does not cut. Answers are cut at their end, as TRL's
            collator cuts them.

    Raises:
        InputError: TRL is not installed, or the chat template shows no text of a message.
    """

    def __init__(self, processing_class: Any, max_length: int | None = None):
        try:
            from trl.data_utils import _tokenize, common_prefix_length
        except ImportError as error:
            raise InputError(f"data: needs {error.name or 'trl'}; {INSTALL}") from error
        self._encode, self._common = _tokenize, common_prefix_length
        self.processing_class, self.max_length = processing_class, max_length
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.has_template = bool(getattr(processing_class, "chat_template", None))
        self.special = set(self.tokenizer.all_special_tokens) | {
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        self.template_error: Exception | None = None
        is_processor = self.tokenizer is not processing_class
        self.takes_text = self.has_template and not is_processor and self._shows(PROBE)
        self.takes_parts = is_processor or (self.has_template and self._shows([{"type": "text", "text": PROBE}]))
        if self.has_template and not (self.takes_text or self.takes_parts):
            what = "shows neither the text nor the parts of a user's message"
            if self.template_error is not None:
                what = f"refuses a user's message: {self.template_error} ({type(self.template_error).__name__})"
            raise InputError(f"processing_class: its chat template {what}; need one that shows it")

    def features(self, answers: tuple[str, ...]) -> dict[str, Any]:
        """The columns of `Tokens.columns`, as datasets stores them."""
        from datasets import List, Value

        return {f"{name}_ids": List(Value("int32")) for name in ("prompt", *answers)}

    def nothing(self, answers: tuple[str, ...]) -> dict[str, Any]:
        """The columns of a row that is left out."""
        return Tokens([], {name: [] for name in answers}).columns()

    def __call__(self, pair: Pair, images: list[Any] | tuple[()] = ()) -> Tokens:
        """Encodes one pair. BadRow where nothing could be learned from it, or not what its row says."""
        if images:
            raise BadRow("row with images", "need text alone; asft train takes images, with a model that takes them")
        plain = isinstance(pair.prompt, str)
        if not plain and not self.has_template:
            raise BadRow(
                "chat messages, and the tokenizer has no chat template",
                "need one; name an instruct model, put a chat_template.jinja beside the tokenizer's files, or give "
                "prompt and answers as plain text",
            )
        prompt, wholes = self._plain(pair) if plain else self._chat(pair)
        shared = min(self._common(prompt, whole) for whole in wholes.values())
        tokens = Tokens(prompt[:shared], {name: whole[shared:] for name, whole in wholes.items()})
        if prompt and not shared:
            if plain:
                need = "end the prompt in a space or a new line, or begin the answer with one"
                raise BadRow("prompt whose first token merges with the answer's", need)
            raise BadRow("prompt that the template rewrites from its first token", "need a beginning that both share")
        if not tokens.prompt:
            raise BadRow("prompt without a token", "the first token of an answer has nothing to be predicted from")
        cut(tokens, self.max_length)
        if shared < len(prompt):
            tokens.notes.append("prompt ids are no beginning of the whole: the template rewrites it, or tokens merge")
        compare(pair, tokens)
        tokens.notes += self._plain_notes(pair) if plain else self._chat_notes(pair, wholes)
        return tokens

    def _plain(self, pair: Pair) -> tuple[list[int], dict[str, list[int]]]:
        eos = self.tokenizer.eos_token or ""
        texts = {"": pair.prompt, **{side: f"{pair.prompt}{answer}" for side, answer in pair.answers.items()}}
        encoded = {}
        for side, text in texts.items():
            if side and not text.endswith(eos):
                text += eos
            ids = list(self._encode(self.processing_class, text)["input_ids"])
            bos, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            if side and end is not None and ids[-2:] == [end, end]:
                ids = ids[:-1]
            encoded[side] = ids
        return encoded.pop(""), encoded

    def _chat(self, pair: Pair) -> tuple[list[int], dict[str, list[int]]]:
        assert isinstance(pair.prompt, list)
        prompt = self._templated(pair.prompt, pair, add_generation_prompt=True)
        return prompt, {side: self._whole(pair, side) for side in pair.answers}

    def _whole(self, pair: Pair, side: str, **changes: Any) -> list[int]:
        """Ids of prompt and answer. changes: fields of the answer's messages, None takes one away."""
        assert isinstance(pair.prompt, list)
        answer = [
            {name: part for name, part in {**message, **changes}.items() if part is not None}
            for message in pair.answers[side]
            if isinstance(message, dict)
        ]
        return self._templated(pair.prompt + answer, pair)

    def _templated(self, messages: Messages, pair: Pair, **options: Any) -> list[int]:
        context = {"tools": pair.context.get("tools"), **pair.context.get("chat_template_kwargs", {})}
        messages = [{**message, "content": self._content(message["content"])} for message in messages]
        from jinja2.exceptions import TemplateError  # transformers has rendered with it by now

        try:
            with rendering():
                return list(self._encode(self.processing_class, messages, **context, **options)["input_ids"])
        except (TemplateError, TypeError, ValueError, KeyError) as error:  # what templates raise on odd rows
            raise BadRow("the chat template refuses the chat", str(error)) from error

    def _content(self, content: Text) -> Text:
        """The content in a form that the template takes."""
        if isinstance(content, str):
            return content if self.takes_text or not self.has_template else [{"type": "text", "text": content}]
        if shown := [part["type"] for part in content if part["type"] in WITHOUT_CONTENT]:
            raise BadRow("content part without what it shows", f"{shown[0]}; need it in the column images")
        if self.takes_parts:
            return content
        if any(part["type"] != "text" for part in content):
            raise BadRow("content parts that are no text", "the chat template takes text alone")
        return "".join(part["text"] for part in content)

    def _shows(self, content: Text) -> bool:
        """Whether the template shows a user's message, alone or behind a system's, which some want first."""
        before = "s" if isinstance(content, str) else [{"type": "text", "text": "s"}]
        user, system = {"role": "user", "content": content}, {"role": "system", "content": before}
        for messages in ([user], [system, user]):
            try:
                with rendering():
                    shown = self.processing_class.apply_chat_template(messages, tokenize=False)
            except SlowTemplate as error:
                raise InputError(f"processing_class: {error}") from error
            except Exception as error:  # whatever a template raises on a form that it does not take
                self.template_error = error
                continue
            if PROBE in shown and "'type'" not in shown and '"type"' not in shown:
                return True
        return False

    def _plain_notes(self, pair: Pair) -> list[str]:
        notes = []
        if pair.is_dialogue:
            notes.append("HH-RLHF dialogues read as plain text, the prompt up to the last 'Assistant:'")
        elif self.has_template:
            notes.append("plain text taken as it stands, without the tokenizer's chat template")
        texts = [str(text) for text in (pair.prompt, *pair.answers.values())]
        if any(token in text for token in self.special for text in texts):
            notes.append("plain text that holds special tokens, used as it stands")
        asked = texts[0].strip()
        if asked and not pair.is_dialogue and all(text.lstrip().startswith(asked) for text in texts[1:]):
            notes.append("plain prompt that its answers begin with once more")
        others = tuple(self.special - {self.tokenizer.eos_token})
        if any(text.rstrip().endswith(others) for text in texts[1:]):
            notes.append("answer that ends in another special token than EOS, which follows it")
        return notes

    def _chat_notes(self, pair: Pair, wholes: dict[str, list[int]]) -> list[str]:
        """BadRow where tools or calls would be dropped without a word."""
        assert isinstance(pair.prompt, list)
        messages = [*pair.prompt, *(m for answer in pair.answers.values() for m in answer if isinstance(m, dict))]
        notes = []
        side = next(iter(wholes))
        if pair.context.get("tools") and self._whole(Pair(pair.prompt, pair.answers), side) == wholes[side]:
            raise BadRow("the template does not show the tools", "need a template that does, or rows without tools")
        for side, whole in wholes.items():
            answer = [message for message in pair.answers[side] if isinstance(message, dict)]
            if any(m.get("tool_calls") for m in answer) and self._whole(pair, side, tool_calls=None) == whole:
                raise BadRow("the template does not show tool_calls", f"{side}: need a template that does")
            if (
                any("reasoning_content" in m for m in answer)
                and self._whole(pair, side, reasoning_content=None) == whole
            ):
                notes.append("reasoning_content that the template does not show")
            text = answer[-1]["content"]
            edges = isinstance(text, str) and text != text.strip() and len(answer) == 1
            if edges and self._whole(pair, side, content=text.strip()) == whole:
                notes.append("white space around the answer, which the template strips")
        if any(token in str(message["content"]) for token in self.special for message in messages):
            notes.append("chat messages that hold special tokens already: a template in a template")
        return list(dict.fromkeys(notes))
