"""A model to start from, made of public encoders: CLIP's image encoder and RoBERTa's first layers under new fusion layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fastvlp.convert.bert_layers import from_roberta
from fastvlp.convert.clip_image import from_clip
from fastvlp.convert.weight_files import find_file, read_weights
from fastvlp.convert.weight_map import layer_numbers
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import flm_base, with_tokenizer


def start_from_towers(
    *,
    out: Path,
    clip: str = "openai/clip-vit-base-patch32",
    roberta: str = "FacebookAI/roberta-base",
    tokenizer: str | None = None,
) -> VLModel:
    """Make a model to start from of public encoders: CLIP ViT-B/32's image encoder and RoBERTa-base's first 6 layers, as FLM
    does. Each is a file, a folder, or owner/repository of the Hugging Face hub.

    Args:
        out: Folder to write; `vlp pretrain flm_base --from` reads it.
        clip: model.safetensors (or a state dict) of CLIP.
        roberta: The same of RoBERTa.
        tokenizer: RoBERTa's tokenizer.json; by default from where RoBERTa is.
    """
    image, text = (find_file(source, "model.safetensors") for source in (clip, roberta))
    words = find_file(tokenizer or roberta, "tokenizer.json")
    # CLIP ViT-B/32 was trained at 224 px; a run at another size resizes the positions.
    return join_towers(replace(flm_base(size=224), reconstructor=None), image, text, words, out)


def join_towers(config: ModelConfig, clip: Path, roberta: Path, tokenizer: Path, out: Path) -> VLModel:
    """Writes a folder that a run can start from: the encoders of `config` from two files, everything else drawn from seed 0.

    `clip` is in OpenAI's or transformers' names. The text encoder gets RoBERTa's embeddings and as many of its first layers
    as `config` has (arXiv 2303.14038; TencentARC/FLM). Raises UserError where weights have other shapes than the model's.
    """
    words = Tokenizer.load(tokenizer)
    torch.manual_seed(0)
    model = VLModel(with_tokenizer(config, words))
    state = model.state_dict()
    encoders = from_clip(read_weights(clip), len(layer_numbers(state, "image.blocks.")))
    encoders |= from_roberta(read_weights(roberta), config.text.depth)
    for name, value in encoders.items():
        if state[name].shape != value.shape:
            raise UserError(
                f"{name} is {tuple(value.shape)} in the file and {tuple(state[name].shape)} in the model: "
                "is the tokenizer the text tower's own, and the size that of these towers?"
            )
    model.load_state_dict(state | encoders)
    save_model(out, model, words, {"name": out.name, "reading": "full", "step": 0})
    return model
