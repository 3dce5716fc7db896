"""Preprocessing files for other libraries: a tokenizer that adds its own special tokens, and the settings of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import normalizers, processors
from torch import Tensor

from fastvlp.data.records.transform import CENTRE, Fit
from fastvlp.data.tokenize import Tokenizer
from fastvlp.exporters.interface import ExportSource
from fastvlp.exporters.sample_inputs import SampleInputs
from fastvlp.files import write_whole
from fastvlp.model.encoders.interface import ImageEncoderConfig
from fastvlp.model.model import ModelConfig

# As `data.records.schema.clean_text` cleans a text.
CLEAN = (
    normalizers.Replace(tokenizers.Regex("[\\x00-\\x1f\\x7f-\\x9f\\ufeff]+"), " "),
    normalizers.Replace(tokenizers.Regex("\\s+"), " "),
    normalizers.Strip(),
)
# Pillow's number of bicubic resampling.
BICUBIC = 3
# How open_clip, and Immich after it, call the ways in which an image becomes a square.
RESIZE = {"crop": "shortest", "squash": "squash", "letterbox": "longest"}


def whole_tokenizer(tokenizer: Tokenizer, *, start: bool = True) -> tokenizers.Tokenizer:
    """Returns a tokenizer that cleans a text and adds </s>, and <s> if `start`; ours leaves that to others."""
    own = tokenizer.copy()
    spec = json.loads(own.to_str())
    before = [] if own.normalizer is None else [own.normalizer]
    first = spec["normalizer"] or {}
    cleaned = json.loads(normalizers.Sequence(list(CLEAN)).__getstate__())["normalizers"]
    if first.get("normalizers", [])[: len(cleaned)] != cleaned:
        own.normalizer = normalizers.Sequence([*CLEAN, *before])
    bos, eos = tokenizer.token(tokenizer.bos), tokenizer.token(tokenizer.eos)
    template = f"{bos} $A {eos}" if start else f"$A {eos}"
    pair = f"{template} $B:1 {eos}:1"
    own.post_processor = processors.TemplateProcessing(
        single=template, pair=pair, special_tokens=[(bos, tokenizer.bos), (eos, tokenizer.eos)]
    )
    return own


def write_tokenizer(folder: Path, tokenizer: Tokenizer, model: ModelConfig, length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers reads them.

    Args:
        folder: Where to.
        tokenizer: The model's.
        model: Says what the joint space reads.
        length: The most tokens of a text, <s> and </s> included.
    """
    embed = model.embed
    start = embed is None or embed.text_start
    pads = tokenizer.pad if embed is None or embed.text_pad is None else embed.text_pad
    roles = {"eos_token": tokenizer.eos, "pad_token": pads, "mask_token": tokenizer.mask}
    roles |= {"bos_token": tokenizer.bos} if start else {}
    own = whole_tokenizer(tokenizer, start=start)
    sees_padding = embed is not None and embed.text_mask == "none"
    unknown = json.loads(own.to_str())["model"].get("unk_token")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids"] if sees_padding else ["input_ids", "attention_mask"],
        **{role: tokenizer.token(i) for role, i in roles.items()},
        **({"unk_token": unknown} if unknown else {}),
    }
    write_whole(folder / "tokenizer.json", own.to_str(pretty=True).encode())
    write_json(folder / "tokenizer_config.json", settings)


def longest_text(model: ModelConfig, max_length: int) -> int:
    """Returns the most tokens that the exported tokenizer gives of a text that has at most `max_length` with <s> and </s>."""
    embed = model.embed
    if embed is not None and embed.text_special and embed.text_length is not None:
        # Padding is seen, and the tokenizer pads to the length that it cuts to.
        return embed.text_length
    return max_length - int(embed is not None and not embed.text_start)


def write_processor(source: ExportSource, folder: Path) -> int:
    """Writes the settings of images and the tokenizer. Returns the most tokens of a text."""
    config, data = source.saved.model.config, source.config.data
    settings = image_settings(config.image, data.fit)
    assert settings is not None
    write_json(folder / "preprocessor_config.json", settings)
    length = longest_text(config, source.max_length)
    write_tokenizer(folder, source.saved.tokenizer, config, length)
    return length


def read_texts(
    folder: Path, inputs: SampleInputs, rows: Sequence[int] | None = None, *, whole: bool = False
) -> dict[str, Tensor]:
    """Returns the sample texts as tokenizer.json alone encodes them: `input_ids` and `attention_mask`, int64 [n L].

    Args:
        rows: The texts to take; None for all.
        whole: Whether texts are padded to the length at which they are cut, and not to the longest of them.
    """
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    own, pad = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), settings["pad_token"]
    length = settings["model_max_length"]
    own.enable_truncation(length)
    own.enable_padding(pad_id=own.token_to_id(pad), pad_token=pad, length=length if whole else None)
    texts = inputs.texts if rows is None else [inputs.texts[i] for i in rows]
    encodings = own.encode_batch(list(texts))
    columns = {"input_ids": [e.ids for e in encodings], "attention_mask": [e.attention_mask for e in encodings]}
    return {name: torch.tensor(values) for name, values in columns.items()}


def image_misfit(source: ExportSource) -> str | None:
    """Says why the images of a run cannot be prepared by a processor of transformers; None if they can."""
    fit = source.config.data.fit
    if image_settings(source.saved.model.config.image, fit) is not None:
        return None
    return f"images are made square by {fit}, which no image processor of transformers does"


def image_settings(image: ImageEncoderConfig, fit: Fit) -> dict[str, Any] | None:
    """Returns a preprocessor_config.json; None for a fit that transformers has no processor for."""
    size = image.size
    if fit == "letterbox":
        return None
    squashed = fit == "squash"
    kind = "SiglipImageProcessor" if squashed else "CLIPImageProcessor"
    shown = {"height": size, "width": size}
    short = round(size / CENTRE) if fit == "centre" else size
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": shown if squashed else {"shortest_edge": short},
        "resample": BICUBIC,
        "do_center_crop": not squashed,
        **({} if squashed else {"crop_size": shown}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False).encode())
