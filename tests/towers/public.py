"""Small random public models, as `save_pretrained` of transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from torch import nn

from fastvlp.data.tokenize import Tokenizer

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {name: x for name, x in VIT.items() if name != "intermediate_size"}
BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
ROBERTA = {**BERT, "max_position_embeddings": 26, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
CLIP_TEXT = {**BERT, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}


def image_models() -> dict[str, nn.Module]:
    """Vision models by name. Those of `MAPS` give a feature map."""
    return {
        "clip": hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)),
        "siglip": hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)),
        "vit": hf.ViTModel(hf.ViTConfig(**VIT)),
        "deit": hf.DeiTModel(hf.DeiTConfig(**VIT)),
        "dinov2": hf.Dinov2Model(hf.Dinov2Config(**DINO)),
        "dinov2_with_registers": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO)),
        "convnext": hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])),
        "efficientnet": hf.EfficientNetModel(
            hf.EfficientNetConfig(image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320)
        ),
        "resnet": hf.ResNetModel(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
        ),
    }


MAPS = ("convnext", "efficientnet", "resnet")


def text_models() -> dict[str, nn.Module]:
    """Text encoders by name."""
    return {
        "bert": hf.BertModel(hf.BertConfig(**BERT)),
        "roberta": hf.RobertaModel(hf.RobertaConfig(**ROBERTA)),
        "xlm-roberta": hf.XLMRobertaModel(hf.XLMRobertaConfig(**ROBERTA)),
        "electra": hf.ElectraModel(hf.ElectraConfig(**BERT, embedding_size=16)),
        "mpnet": hf.MPNetModel(hf.MPNetConfig(**ROBERTA)),
        "distilbert": hf.DistilBertModel(
            hf.DistilBertConfig(dim=32, hidden_dim=64, n_layers=3, n_heads=4, vocab_size=99, max_position_embeddings=24)
        ),
        "clip_text_model": hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)),
    }


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with large random weights and statistics, in evaluation mode, so that every dependency shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if not x.is_floating_point():
            continue
        noise = torch.randn(x.shape, generator=generator)
        wide = x.ndim > 1 and "embed" not in name
        with torch.no_grad():
            x.copy_(
                1 + 0.2 * noise.abs()
                if name.endswith(("norm.weight", "running_var"))
                else noise * (0.2 if wide else 0.3)
            )
    return model.eval()


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


PAIR = {"clip": hf.CLIPModel, "siglip": hf.SiglipModel, "chinese_clip": hf.ChineseCLIPModel}


def pair_models() -> dict[str, nn.Module]:
    """Models of two encoders with a joint space, by name."""
    text = {name: x for name, x in BERT.items() if name != "vocab_size"}
    clip_text = {**CLIP_TEXT, "hidden_size": 48, "num_attention_heads": 3}
    vision = {**VIT, "num_hidden_layers": 2}
    siglip_text = {**text, "vocab_size": 99, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 1}
    return {
        "clip": hf.CLIPModel(hf.CLIPConfig(text_config=clip_text, vision_config=vision, projection_dim=24)),
        "siglip": hf.SiglipModel(hf.SiglipConfig(text_config=siglip_text, vision_config=vision)),
        "chinese_clip": hf.ChineseCLIPModel(
            hf.ChineseCLIPConfig(text_config={**text, "vocab_size": 99}, vision_config=vision, projection_dim=24)
        ),
    }


TEXTS = [
    "a red circle left of a blue square",
    "two small green triangles above a large yellow star",
    "the picture shows a white cross and three purple rings",
]


def write_tokenizer(kind: str, folder: Path) -> int:
    """A tokenizer.json like that of BERT (wordpiece), RoBERTa (bpe), CLIP or SigLIP, and how many tokens it has."""
    if kind in ("wordpiece", "bpe"):
        tokenizer = Tokenizer.train(TEXTS * 3, kind, vocab_size=300)
        tokenizer.save(folder / "tokenizer.json")
        return tokenizer.vocab_size
    words = sorted({word for text in TEXTS for word in text.split()})
    special = {"clip": ["<|startoftext|>", "<|endoftext|>"], "siglip": ["<pad>", "</s>"]}[kind]
    vocabulary = ["[UNK]", *words, *special] if kind == "clip" else [*special, "[UNK]", *words]
    raw = RawTokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(special)
    raw.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


def write_public(name: str, folder: Path) -> str:
    """The folder of a small random public model: weights, config, tokenizer and preprocessing."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if name in ("resnet", "efficientnet", "vit", "dinov2", "convnext"):
        save(image_models()[name], folder)
        hf.ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(folder)
        return str(folder)
    kind = {"clip": "clip", "siglip": "siglip", "bert": "wordpiece", "chinese_clip": "wordpiece"}.get(name, "bpe")
    size = write_tokenizer(kind, folder)
    vision = {**VIT, "num_hidden_layers": 2}
    if name == "clip":
        clip_text = {**CLIP_TEXT, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
        config = hf.CLIPConfig(text_config={**clip_text, "hidden_size": 48}, vision_config=vision, projection_dim=24)
        hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
        save(hf.CLIPModel(config), folder)
    elif name == "siglip":
        siglip_text = {**BERT, "vocab_size": size, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1}
        hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        save(hf.SiglipModel(hf.SiglipConfig(text_config=siglip_text, vision_config=vision)), folder)
    elif name == "bert":
        save(hf.BertModel(hf.BertConfig(**{**BERT, "vocab_size": size})), folder)
    else:
        kinds = {
            "roberta": (hf.RobertaModel, hf.RobertaConfig),
            "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig),
            "mpnet": (hf.MPNetModel, hf.MPNetConfig),
        }
        model, config = kinds[name]
        save(model(config(**{**ROBERTA, "vocab_size": size})), folder)
    return str(folder)
