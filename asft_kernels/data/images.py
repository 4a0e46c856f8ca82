"""Images of rows, and chats with images as TRL's DPOTrainer trains them.

TRL's vision collator makes the batches, image by image as they are needed. What it gets is made here: prompt and
answers as the chat template writes them, and images of `datasets.Image`. Each image is opened once here, so that the
report names the rows whose images cannot be read, and lengths are known before training.
"""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_kernels.data.limits import SlowTemplate, rendering
from asft_kernels.data.pair import BOTH, Messages, Pair
from asft_kernels.data.rows import BadRow, json_type
from asft_kernels.data.tokens import PROBE, PairTokenizer, Tokens, compare, cut
from asft_kernels.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("image", "images")
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # columns that nothing here reads
OF_RGB = ("RGB", "RGBA", "L", "LA", "P", "PA", "1")  # modes of Pillow whose colours RGB holds
Stored = dict[str, Any]  # of one image as datasets stores it: its "bytes", or None and its "path"


def take_images(row: dict[str, Any], folder: Path | None) -> list[Stored]:
    """Takes the images out of a row.

    Args:
        row: its `image`, or its list `images`, are paths, bytes, or bytes and path as datasets stores an image.
        folder: where relative paths begin; None where there is no file that names them.

    Raises:
        BadRow: for what is none of these, and for video and audio.
    """
    for name in OTHER_MEDIA:
        if row.get(name):
            raise BadRow(f"column {name}", "need text, or text and images: nothing else is read")
    given = {name: value for name in COLUMNS if (value := row.pop(name, None)) is not None and value != []}
    if len(given) > 1:
        raise BadRow("image and images in one row", "need one of both")
    return [
        _stored(name, image, folder)
        for name, value in given.items()
        for image in (value if isinstance(value, list) else [value])
    ]


def undecoded(rows: "Dataset") -> "Dataset":
    """Returns rows whose images, videos and sounds are bytes and paths, as they are stored."""
    from datasets import Audio, Image, List, Video

    for name in {*COLUMNS, *OTHER_MEDIA} & {*rows.column_names}:
        feature = rows.features[name]
        several = getattr(feature, "feature", None)
        for kind in (Image, Audio, Video):
            if isinstance(feature, kind):
                rows = rows.cast_column(name, kind(decode=False))
            elif isinstance(several, kind):
                rows = rows.cast_column(name, List(kind(decode=False)))
    return rows


def images_in(pairs: "Dataset") -> tuple[int, int]:
    """(images, rows that have one), without opening any."""
    column = pairs.with_format("arrow")[:]["images"]
    counts = [len(images) for chunk in column.chunks for images in chunk]
    return sum(counts), sum(count > 0 for count in counts)


def _stored(name: str, image: Any, folder: Path | None) -> Stored:
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    if isinstance(path, bytes):
        content, path = path, None
    if isinstance(content, bytes) and content:
        return {"bytes": content, "path": None}
    if not isinstance(path, str) or not path:
        got = "an empty path" if path == "" else json_type(image)
        raise BadRow("wrong type", f"{name}: got {got}, need a path, or bytes as datasets stores an image")
    if "://" in path:
        raise BadRow("image that is an address", f"{name}: {path}; need a file: nothing is fetched")
    if folder is None and not Path(path).is_absolute():
        raise BadRow("image that is a path", f"{name}: {path}; need a column of datasets.Image on the hub")
    return {"bytes": None, "path": str((folder or Path()) / path)}


@dataclass
class ImageTokens(Tokens):
    """Holds, beside ids, what TRL's collator reads: texts of prompt and answers by name, images as they are stored."""

    texts: dict[str, str] = field(default_factory=dict)
    images: list[Stored] = field(default_factory=list)

    def columns(self) -> dict[str, Any]:
        counts = {"prompt_tokens": len(self.prompt), **{f"{x}_tokens": len(ids) for x, ids in self.answers.items()}}
        return {**self.texts, **counts, "images": self.images}

    def digests(self) -> list[str]:
        """sha256 (hex) of each image's file."""
        return [hashlib.sha256(x["bytes"] or Path(x["path"]).read_bytes()).hexdigest() for x in self.images]


class ImagePairTokenizer:
    """Renders chats with images with TRL's own helpers, and counts their tokens.

    Args:
        processing_class: the processor of a model that takes images.
        max_length: tokens of prompt and answer together, an image's tokens among them; None does not cut.

    Raises:
        InputError: the chat template shows no image.
    """

    def __init__(self, processing_class: Any, max_length: int | None = None):
        self.of_text = PairTokenizer(processing_class)
        self.tokenizer, self.processor, self.max_length = self.of_text.tokenizer, processing_class, max_length
        from trl.data_utils import apply_chat_template, prepare_multimodal_messages

        self._render, self._place = apply_chat_template, prepare_multimodal_messages
        text = {"type": "text", "text": PROBE}
        shown = [self._shown([text]), self._shown([{"type": "image"}, text])]
        if shown[0] == shown[1]:
            raise InputError("processing_class: its chat template shows no image of a user's message; need one that "
                             "does")  # fmt: skip

    def features(self, answers: tuple[str, ...]) -> dict[str, Any]:
        """The columns of `ImageTokens.columns`, as datasets stores them."""
        from datasets import List, Value

        texts = {name: Value("string") for name in ("prompt", *answers)}
        counts = {f"{name}_tokens": Value("int32") for name in texts}
        return {**texts, **counts, "images": List({"bytes": Value("binary"), "path": Value("string")})}

    def nothing(self, answers: tuple[str, ...]) -> dict[str, Any]:
        """The columns of a row that is left out."""
        empty = {name: [] for name in answers}
        return ImageTokens([], empty, texts=dict.fromkeys(("prompt", *answers), "")).columns()

    def __call__(self, pair: Pair, images: list[Stored]) -> ImageTokens:
        """Encodes one pair. BadRow where nothing could be learned from it, or not what its row says."""
        if isinstance(pair.prompt, str):
            raise BadRow("plain text in data with images", "the chat template places images: need messages")
        if set(pair.answers) != set(BOTH):
            raise BadRow("row with images", "need text alone: answers to images are not made anew")
        self._check_parts(pair)
        opened = [_opened(image) for image in images]
        notes = self.of_text(_without_images(pair)).notes  # what holds of the text holds of the whole
        notes += dict.fromkeys(note for image in opened for note in _changes(image))
        try:
            prompt = self._place(pair.prompt, images=opened)
        except ValueError as error:
            raise BadRow("images that do not fit the chat", str(error)) from error
        texts = self._rendered(prompt, pair)
        ids = {name: self._ids(text, opened if name == "prompt" else []) for name, text in texts.items()}
        tokens = ImageTokens(ids.pop("prompt"), ids, notes, texts, images)
        cut(tokens, self.max_length)
        compare(pair, tokens)
        return tokens

    def _check_parts(self, pair: Pair) -> None:
        token = getattr(self.processor, "image_token", None)
        answers = [message for answer in pair.answers.values() for message in answer if isinstance(message, dict)]
        for message in [*pair.prompt, *answers]:
            assert isinstance(message, dict)
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                if part["type"] not in ("text", "image"):
                    raise BadRow("content parts that are neither text nor image", part["type"])
                if part["type"] == "image" and set(part) != {"type"}:
                    raise BadRow("image inside a message", "need {'type': 'image'} there, and the image in `images`")
                if part["type"] == "image" and any(message is other for other in answers):
                    raise BadRow("image in an answer", "need images in the prompt alone")
                if isinstance(token, str) and token in part.get("text", ""):
                    raise BadRow("text that holds the token of an image", f"{token}; need {{'type': 'image'}} there")

    def _rendered(self, prompt: Messages, pair: Pair) -> dict[str, str]:
        from jinja2.exceptions import TemplateError

        example = {name: self._place(answer) for name, answer in pair.answers.items() if isinstance(answer, list)}
        kwargs = pair.context.get("chat_template_kwargs", {})
        try:
            with rendering():
                return self._render({"prompt": prompt, **example}, self.processor, pair.context.get("tools"), **kwargs)
        except SlowTemplate:
            raise
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRow("the chat template refuses the chat", str(error)) from error

    def _ids(self, text: str, images: list[Any]) -> list[int]:
        """As TRL's vision collator encodes a part of a row."""
        with_images = {"images": [images]} if images else {}
        try:
            return list(self.processor(text=[text], add_special_tokens=False, **with_images)["input_ids"][0])
        except (TypeError, ValueError) as error:
            raise BadRow("images that the processor refuses", str(error)) from error

    def _shown(self, parts: list[dict[str, str]]) -> str | None:
        try:
            with rendering():
                return self.processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        except SlowTemplate as error:
            raise InputError(f"processing_class: {error}") from error
        except Exception:  # whatever a template raises on a form that it does not take
            return None


def _without_images(pair: Pair) -> Pair:
    def texts(message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, str):
            return message
        return {**message, "content": [part for part in content if part["type"] == "text"]}

    return Pair([texts(message) for message in pair.prompt if isinstance(message, dict)], pair.answers, pair.context)


def _changes(image: Any) -> Iterator[str]:
    """What a processor, which takes RGB, does not see of a PIL image. BadRow where it would see nonsense."""
    if image.mode.startswith(("I", "F")):
        raise BadRow("image of more than 8 bits a colour", f"mode {image.mode}: need it scaled to 8 bits, as RGB or L")
    if getattr(image, "is_animated", False):
        yield "image of several frames, of which the first is trained"
    if image.has_transparency_data:
        yield "image with transparency, trained without"
    if image.mode not in OF_RGB:
        yield f"image of mode {image.mode}, trained as RGB"


def _opened(image: Stored) -> Any:
    """The PIL image, as datasets decodes it in training."""
    from datasets import Image
    from PIL.Image import DecompressionBombWarning

    where = image["path"] or f"{len(image['bytes']):,} bytes"
    if image["path"] and not Path(image["path"]).is_file():
        raise BadRow("image that is missing", f"{where}; relative paths begin in the folder of the data's file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DecompressionBombWarning)
            return Image().decode_example(image)
    except Exception as error:  # whatever Pillow's decoders raise on bytes that are no image
        raise BadRow("image that cannot be read", f"{where} ({type(error).__name__})") from error
