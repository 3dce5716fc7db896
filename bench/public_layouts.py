"""Public encoders of published sizes as folders in the layout of transformers, with random weights: there is no hub here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

SPECIALS = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
# As google/efficientnet-b5 states it: pixels are divided by the standard deviation twice.
EFFICIENTNET_PIXELS = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "include_top": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.47853944, 0.4732864, 0.47434163],
}


def published_config(name: str) -> Any:
    """The config of a public model, as published."""
    match name:
        case "clip-vit-base-patch32":
            return hf.CLIPConfig(
                vision_config={"patch_size": 32}, text_config={"eos_token_id": 49407, "bos_token_id": 49406}
            )
        case "roberta-base":
            return hf.RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
            )
        case "bert-base-cased":
            return hf.BertConfig(vocab_size=28996)
        case "chinese-roberta-wwm-ext":
            return hf.BertConfig(vocab_size=21128)
        case "efficientnet-b5":
            return hf.EfficientNetConfig(
                image_size=456,
                width_coefficient=1.6,
                depth_coefficient=2.2,
                hidden_dim=2048,
                dropout_rate=0.4,
                batch_norm_momentum=0.99,
                depthwise_padding=[13, 27],
            )
    raise ValueError(f"no public model is called {name} here")


def write_config(name: str, folder: Path) -> Any:
    """Writes what a public model states beside its weights, and returns its config."""
    config = published_config(name)
    config.save_pretrained(folder)
    if name.startswith("efficientnet"):
        size = {"height": config.image_size, "width": config.image_size}
        pixels = json.dumps({**EFFICIENTNET_PIXELS, "size": size})
        (folder / "preprocessor_config.json").write_text(pixels, encoding="utf-8")
    return config


def write_layout(name: str, folder: Path, texts: Iterable[str] = ()) -> Path:
    """Writes the folder of a public model with random weights. A text encoder has a tokenizer with as many tokens as published,
    the words of `texts` among them."""
    folder.mkdir(parents=True)
    config = write_config(name, folder)
    torch.manual_seed(0)
    kind = {"bert-base-cased": hf.BertForPreTraining}.get(name)
    model = kind(config) if kind else hf.AutoModel.from_config(config)
    if norms := [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]:
        set_statistics(model, norms)
    model.save_pretrained(folder)
    if hasattr(config, "vocab_size"):
        write_tokenizer(folder, "roberta" if name.startswith("roberta") else "bert", config.vocab_size, texts)
    return folder


def set_statistics(model: nn.Module, norms: Iterable[nn.BatchNorm2d]) -> None:
    """Gives batch norms weights of one and the statistics of noise. As transformers draws them, a deep CNN gives next to
    nothing."""
    for norm in norms:
        norm.reset_parameters()
        norm.momentum = None  # the mean of all batches, of which there is one
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 128, 128))


def write_tokenizer(folder: Path, kind: str, size: int, texts: Iterable[str]) -> None:
    specials = SPECIALS[kind]
    characters = {character for text in texts for character in text.lower()} - {" "}
    words = sorted({word for text in texts for word in text.lower().split()} | characters)
    tokens = [*specials, *words]
    tokens += [f"unused{i}" for i in range(size - len(tokens))]
    inner = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token=specials[1 if kind == "bert" else 3])
    )
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(specials)
    inner.save(str(folder / "tokenizer.json"))
