"""One row of preference data -> prompt and two answers, as text that a model was made to read.

Four ways to write a pair are understood:

    {"prompt": str, "chosen": str, "rejected": str}     plain strings
    {"prompt": [message...], "chosen": [message], ...}  chat messages; answers may be strings
    {"chosen": [message...], "rejected": [message...]}  whole chats, the prompt implicit
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", ...}  HH-RLHF dialogues, the prompt implicit
                                                        (or given too, as their beginning)

A message is {"role": str, "content": str}. With a tokenizer that has a chat template all four go
through it: a plain prompt becomes one user turn, a dialogue its turns. Without one, plain strings
and dialogues are taken as they stand, and chat messages are refused.
"""

import re
from dataclasses import dataclass
from typing import Any

from asft_kernels.data.rows import BadRow, json_type

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Pair:
    """`prompt` as text (None: it came as chat messages) and as messages; the answers as text."""

    text: str | None
    messages: Messages
    chosen: str
    rejected: str


def parse_pair(row: dict[str, Any]) -> Pair:
    """The pair that `row` holds in one of the four ways above. BadRow where it holds none."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"missing key '{key}'", f"the row has {', '.join(row) or 'none'}")
    prompt = row.get("prompt")
    if "prompt" in row and not isinstance(prompt, str | list):
        raise BadRow("wrong type", f"prompt: got {json_type(prompt)}, need a string or a list of messages")
    chosen, rejected = (_answer(row, key) for key in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and (len(chosen) > 1 or len(rejected) > 1):
        pair = _whole_chats(prompt, chosen, rejected)
    elif prompt is None:
        pair = _dialogues(chosen, rejected)
    else:
        chosen, rejected = (_one_message(answer) for answer in (chosen, rejected))
        given = prompt.rstrip() if isinstance(prompt, str) else ""
        if given.startswith(HUMAN) and chosen.startswith(given) and rejected.startswith(given):
            pair = _dialogues(chosen, rejected)  # the prompt stands in both answers already
        elif chosen.startswith(HUMAN) or rejected.startswith(HUMAN):
            raise BadRow("prompt is not how its answers begin", "and an answer begins with a human turn")
        elif isinstance(prompt, list):
            pair = Pair(None, _messages("prompt", prompt), chosen, rejected)
        elif given.startswith(HUMAN) and given.endswith(ASSISTANT):
            pair = _dialogues(given + chosen, given + rejected)
        else:
            pair = Pair(prompt, [{"role": "user", "content": prompt}], chosen, rejected)
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer.strip():
            raise BadRow("empty answer", name)
    for text in (
        pair.text or "",
        *(m["content"] for m in pair.messages),
        pair.chosen,
        pair.rejected,
    ):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise BadRow("text with half a surrogate pair, which no tokenizer can encode")
    return pair


def _answer(row: dict[str, Any], key: str) -> str | Messages:
    value = row[key]
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _messages(key, value)
    raise BadRow("wrong type", f"{key}: got {json_type(value)}, need a string or a list of messages")


def _messages(key: str, value: list[Any]) -> Messages:
    if not value:
        raise BadRow("wrong type", f"{key}: got an empty list, need at least one message")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise BadRow("wrong type", f"{key}: a message needs the strings 'role' and 'content'")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _one_message(answer: str | Messages) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise BadRow("answer is not one assistant message", f"got the roles {[m['role'] for m in answer]}")
    return answer[0]["content"]


def _whole_chats(prompt: str | list[Any] | None, chosen: Messages, rejected: Messages) -> Pair:
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("dialogues differ before the last assistant turn")
    before = chosen[:-1]
    if isinstance(prompt, list) and _messages("prompt", prompt) != before:
        raise BadRow("prompt is not how its answers begin")
    if isinstance(prompt, str) and prompt not in (message["content"] for message in before):
        raise BadRow("prompt is not how its answers begin")
    return Pair(None, before, _one_message(chosen[-1:]), _one_message(rejected[-1:]))


def _dialogues(chosen: str | Messages, rejected: str | Messages) -> Pair:
    if not isinstance(chosen, str) or not isinstance(rejected, str) or not chosen.startswith(HUMAN):
        raise BadRow("missing key 'prompt'", "without it both answers must be whole dialogues or chats")
    before, found, answer = chosen.rpartition(ASSISTANT)
    other_before, _, other_answer = rejected.rpartition(ASSISTANT)
    if not found or before != other_before:
        raise BadRow("dialogues differ before the last assistant turn")
    _, *parts = TURN.split(before)
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = [{"role": ROLES[role], "content": content.strip()} for role, content in turns]
    return Pair(before + found, messages, answer, other_answer)


def render_pair(pair: Pair, tokenizer: Any) -> tuple[str, str, str, bool]:
    """(prompt, chosen, rejected, templated): texts to encode one after the other.

    templated: whether the chat template wrote them, special tokens included. Its answers end with
    the end of the turn, at the tokenizer's EOS where the template writes that.
    """
    if not getattr(tokenizer, "chat_template", None):
        if pair.text is None:
            raise BadRow("chat messages, and the tokenizer has no chat template")
        return pair.text, pair.chosen, pair.rejected, False
    prompt = _template(tokenizer, pair.messages, add_generation_prompt=True)
    answers = []
    for answer in (pair.chosen, pair.rejected):
        whole = _template(tokenizer, [*pair.messages, {"role": "assistant", "content": answer.strip()}])
        if not whole.startswith(prompt):
            raise BadRow("the chat template rewrites the prompt once an answer follows it")
        eos = tokenizer.eos_token
        end = whole.rfind(eos) + len(eos) if eos and whole.rfind(eos) >= len(prompt) else len(whole)
        answers.append(whole[len(prompt) : end])
    return prompt, answers[0], answers[1], True


def _template(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    from jinja2.exceptions import TemplateError  # transformers has rendered with it by now

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise BadRow("the chat template refuses the dialogue", str(error)) from error
