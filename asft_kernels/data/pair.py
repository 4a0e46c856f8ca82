"""One row of preference data -> prompt and answers, as TRL takes them.

    {"prompt": str, "chosen": str, "rejected": str}           plain text, used as it stands
    {"prompt": [message...], "chosen": [message...], ...}     chat; an answer may be a string or one message
    {"chosen": [message...], "rejected": [message...]}        whole chats, the prompt implicit
    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", ...}      HH-RLHF dialogues: plain text, the prompt implicit
                                                              (or given too, as their beginning)

A message is {"role": str, "content": str or list of parts, ...} or ShareGPT's {"from": str, "value": str}; ShareGPT's
`conversations` is a prompt. Beside chats a row may have `system`, `tools` and `chat_template_kwargs`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asft_kernels.data.rows import BadRow, json_type

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
BOTH = ("chosen", "rejected")
OTHER_PROMPT = "chosen and rejected have different prompts"
OTHER_ROLE = "answer with a turn of another role"

Messages = list[dict[str, Any]]
Text = str | Messages


@dataclass(frozen=True)
class Pair:
    """Holds a prompt and its answers by name, all of them plain text or all chat messages.

    Args:
        prompt: text, or the messages before the answers.
        answers: "chosen" (and "rejected") -> text, or assistant messages.
        context: `tools` and `chat_template_kwargs`, of chats, where the row has them.
    """

    prompt: Text
    answers: Mapping[str, Text]
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dialogue(self) -> bool:
        """Whether the prompt is plain text of HH-RLHF's form."""
        return isinstance(self.prompt, str) and self.prompt.startswith(HUMAN)

    @property
    def messages(self) -> Messages:
        """The prompt as chat messages: a plain one is a user turn, a dialogue its turns."""
        if not isinstance(self.prompt, str):
            return self.prompt
        if not self.is_dialogue:
            return [{"role": "user", "content": self.prompt}]
        _, *parts = TURN.split(self.prompt.rstrip().removesuffix(ASSISTANT))
        turns = zip(parts[::2], parts[1::2], strict=True)
        return [{"role": ROLES[role], "content": content.strip()} for role, content in turns]

    def text(self, side: str) -> str:
        """The text of an answer. BadRow for one that is more than a text."""
        answer = self.answers[side]
        if isinstance(answer, str):
            return answer
        if len(answer) != 1 or not isinstance(answer[0].get("content"), str) or answer[0].get("tool_calls"):
            raise BadRow("answer is not one assistant message with a text", side)
        return answer[0]["content"]

    def row(self, **answers: str) -> dict[str, Any]:
        """The row of this prompt with other answers, in the form that the prompt has."""
        plain = isinstance(self.prompt, str)
        written = {name: text if plain else _assistant(text) for name, text in answers.items()}
        return {"prompt": self.prompt, **written, **self.context}


def parse_pair(row: dict[str, Any], answers: tuple[str, ...] = BOTH) -> Pair:
    """Reads a row in one of the ways above.

    Args:
        row: as JSON has it. A null is a missing key.
        answers: the keys of the answers; ("chosen",) leaves any rejected one out.

    Raises:
        BadRow: the row holds no usable pair.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if "completion" in row and not set(answers) & set(row):
        raise BadRow("unpaired row", "need chosen and rejected; TRL's KTOTrainer takes prompt, completion and label, "
                     "on these kernels under asft_kernels.training.patch_trl()")  # fmt: skip
    for name in answers:
        if name not in row:
            raise BadRow(f"missing key '{name}'", f"the row has {', '.join(row) or 'none'}")
    given = row.get("prompt", row.get("conversations"))
    prompt = None if given is None else _text_or_messages("prompt", given)
    texts = {name: _text_or_messages(name, row[name]) for name in answers}
    if isinstance(prompt, list) or any(isinstance(text, list) for text in texts.values()):
        pair = _chat(prompt, texts)
    else:
        if prompt is None and not all(str(text).startswith(HUMAN) for text in texts.values()):
            need = "without it the answers must be whole dialogues or chats"
            raise BadRow("missing key 'prompt'", f"the row has {', '.join(row)}; {need}")
        pair = _plain(prompt, {name: str(text) for name, text in texts.items()})
    pair = _with_context(pair, row)
    for name, answer in pair.answers.items():
        if isinstance(answer, str) and not answer.strip():
            raise BadRow("empty answer", name)
    try:
        json.dumps([pair.prompt, [*pair.answers.values()], pair.context], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BadRow("text with half a surrogate pair, which no tokenizer can encode") from error
    return pair


def _text_or_messages(key: str, value: Any) -> Text:
    if isinstance(value, dict):  # ShareGPT: one message
        value = [value]
    if not isinstance(value, str | list):
        raise BadRow("wrong type", f"{key}: got {json_type(value)}, need a string or a list of messages")
    if not value and isinstance(value, list):
        raise BadRow("wrong type", f"{key}: got an empty list, need at least one message")
    return value if isinstance(value, str) else [_message(key, message) for message in value]


def _message(key: str, message: Any) -> dict[str, Any]:
    fields = {name: part for name, part in message.items() if part is not None} if isinstance(message, dict) else {}
    if "from" in fields and "role" not in fields:
        role = SHAREGPT_ROLES.get(fields["from"])
        if not role or not isinstance(fields.get("value"), str):
            got = f"{key}: from {fields['from']!r}"
            need = f"need {', '.join(SHAREGPT_ROLES)} and a string as value; write it as role and content"
            raise BadRow("ShareGPT turn that is not understood", f"{got}, {need}")
        return {"role": role, "content": fields["value"]}
    if not isinstance(fields.get("role"), str):
        raise BadRow("wrong type", f"{key}: a message needs the string 'role'")
    if "content" not in fields and (fields.get("tool_calls") or fields.get("reasoning_content")):
        fields["content"] = ""
    content = fields.get("content")
    parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    if not parts and not isinstance(content, str):
        raise BadRow("wrong type", f"{key}: a message needs 'content', a string or a list of parts with a 'type'")
    return fields


def _assistant(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def _plain(prompt: str | None, answers: dict[str, str]) -> Pair:
    given = (prompt or "").rstrip()
    if prompt is None or (given.startswith(HUMAN) and all(answer.startswith(given) for answer in answers.values())):
        pair = _dialogue(answers)  # the prompt stands in the answers already
    elif any(answer.startswith(HUMAN) for answer in answers.values()):
        raise BadRow("prompt is not how its answers begin", "and an answer begins with a human turn")
    else:
        pair = Pair(prompt, answers)
    for name, answer in pair.answers.items():
        if pair.is_dialogue and HUMAN in str(answer):
            raise BadRow(OTHER_ROLE, f"{name}: Human, which would be trained on")
    return pair


def _dialogue(answers: dict[str, str]) -> Pair:
    parts = {name: answer.rpartition(ASSISTANT) for name, answer in answers.items()}
    befores = {before + found if found else None for before, found, _ in parts.values()}
    before = befores.pop()
    if befores or before is None:
        raise BadRow(OTHER_PROMPT, "before the last 'Assistant:'")
    return Pair(before, {name: answer for name, (_, _, answer) in parts.items()})


def _chat(prompt: Text | None, answers: dict[str, Text]) -> Pair:
    chats = {name: _assistant(text) if isinstance(text, str) else text for name, text in answers.items()}
    if isinstance(prompt, list) and all(chat[: len(prompt)] == prompt for chat in chats.values()):
        prompt = None  # stands in the answers already
    whole = all(chat[0]["role"] != "assistant" for chat in chats.values())
    if prompt is None or (isinstance(prompt, str) and whole):
        same = _common(list(chats.values()))
        before = next(iter(chats.values()))[:same]
        if isinstance(prompt, str) and prompt not in (message.get("content") for message in before):
            raise BadRow("prompt is not how its answers begin")
        if not before:
            raise BadRow(OTHER_PROMPT, "and none is given beside them")
        chats = {name: chat[same:] for name, chat in chats.items()}
    else:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for name, chat in chats.items():
        if roles := [message["role"] for message in chat if message["role"] != "assistant"]:
            raise BadRow(OTHER_ROLE, f"{name}: {roles[0]}, which would be trained on")
        if not any(str(m["content"]).strip() or m.get("tool_calls") or m.get("reasoning_content") for m in chat):
            raise BadRow("empty answer", name)
    return Pair(before, chats)


def _common(chats: list[Messages]) -> int:
    """How many messages all of them begin with, of each at least its last one left over."""
    for index in range(min(map(len, chats)) - 1):
        if any(chat[index] != chats[0][index] for chat in chats):
            return index
    return min(map(len, chats)) - 1


def _with_context(pair: Pair, row: dict[str, Any]) -> Pair:
    given = {name: row[name] for name in ("system", "tools", "chat_template_kwargs") if row.get(name)}
    if not given:
        return pair
    if isinstance(pair.prompt, str):
        raise BadRow(f"{next(iter(given))} column beside plain text", "a chat template shows it: write messages")
    prompt = pair.prompt
    if system := given.pop("system", None):
        if not isinstance(system, str):
            raise BadRow("wrong type", f"system: got {json_type(system)}, need a string")
        if prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        elif prompt[0]["content"] != system:
            raise BadRow("system column and another system turn")
    for name, need in (("tools", list), ("chat_template_kwargs", dict)):
        if isinstance(value := given.get(name), str):
            try:
                given[name] = value = json.loads(value)
            except ValueError as error:
                raise BadRow("wrong type", f"{name}: a string that is not JSON ({error})") from error
        if value is not None and not isinstance(value, need):
            raise BadRow("wrong type", f"{name}: got {json_type(value)}, need {json_type(need())}")
    return Pair(prompt, pair.answers, given)
