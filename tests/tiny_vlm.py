"""Tiny image-text models with their processors, and pairs about pictures of one colour, made on the spot."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)  # fmt: skip
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from tiny_lm import tiny_config, tiny_tokenizer

SIDE, PATCH = 8, 4  # pixels: 4 patches an image
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n"
    "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def tiny_processor(template: str = TEMPLATE) -> LlavaProcessor:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def tiny_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=16,
    )  # fmt: skip
    tokenizer = tiny_processor().tokenizer
    text = tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=False)
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    return LlavaForConditionalGeneration(config).float()


def saved_tiny_llava(folder: Path) -> Path:
    """A folder that `--model` takes."""
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def picture(colour: str, width: int = 12, height: int = 9) -> Image.Image:
    return Image.new("RGB", (width, height), COLOURS[colour])


def said(role: str, text: str, images: int = 0) -> list[dict]:
    return [{"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}]


def picture_pairs(folder: Path, count: int = 6) -> list[dict]:
    """Rows that name files in folder, which are made: rows 3, 7, ... (from 0) have no image, rows 2, 6, ... two."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        colours = [[*COLOURS][(i + j) % 4] for j in range({2: 2, 3: 0}.get(i % 4, 1))]
        for j, colour in enumerate(colours):
            picture(colour, 12 + i).save(folder / f"{i}-{j}.png")
        right = " ".join(colours) or "none"
        rows.append(
            {
                "prompt": said("user", f"Colour {i}?", len(colours)),
                "chosen": said("assistant", right),
                "rejected": said("assistant", "no idea" * (1 + i % 2)),
                "images": [f"{folder.name}/{i}-{j}.png" for j in range(len(colours))],
            }
        )
    return rows


def tiny_idefics3() -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """Cuts an image into tiles, each with a token of its own before it."""
    tokenizer = tiny_tokenizer()
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, *tiles]})
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = tiny_config(vocab_size=len(tokenizer), tie_word_embeddings=False, max_position_embeddings=512)
    torch.manual_seed(0)
    made: Any = Idefics3Config
    config = made(
        text_config=text.to_dict(), vision_config=vision, scale_factor=2, pad_token_id=0,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=TEMPLATE)
    return Idefics3ForConditionalGeneration(config).float(), processor
