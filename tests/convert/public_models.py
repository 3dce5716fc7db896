"""Small random models of transformers in folders, as they are published: weights, config, tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers as hf
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import nn

from tests.towers.public import VIT, randomised

TEXTS = ["a red circle", "two small green triangles above a large yellow star on the left", "stars"]
WORDS = sorted({word for text in TEXTS for word in text.split()})
VISION = {**VIT, "num_hidden_layers": 2}
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
}
# Special tokens of each kind of tokenizer: those before the words, and those after them.
SPECIAL: dict[str, tuple[list[str], list[str]]] = {
    "clip": ([], ["<|startoftext|>", "<|endoftext|>"]),
    "siglip": (["<pad>", "</s>", "<unk>"], []),
    "bert": (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], []),
    "roberta": (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], []),
}
ENDS = {"clip": ("<|startoftext|>", "<|endoftext|>"), "bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}
# Model -> kind of its tokenizer; None for an image encoder alone.
KINDS: dict[str, str | None] = {
    "clip": "clip",
    "siglip": "siglip",
    "chinese_clip": "bert",
    "clip_bert": "bert",
    "vit_roberta": "roberta",
    "dinov2_bert": "bert",
    "vit": None,
    "deit": None,
    "dinov2": None,
    "convnext": None,
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "electra": "bert",
}
PAIRS = ("clip", "siglip", "chinese_clip", "clip_bert", "vit_roberta", "dinov2_bert")
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


class Public(NamedTuple):
    """A folder, and the model and tokenizer that were saved there."""

    folder: Path
    model: Any
    tokenizer: Any


def words_of(kind: str) -> hf.PreTrainedTokenizerFast:
    """A tokenizer like that of the kind."""
    before, after = SPECIAL[kind]
    vocabulary = {word: i for i, word in enumerate([*before, *WORDS, *after])}
    unknown = next((word for word in vocabulary if "unk" in word.lower()), WORDS[0])
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.normalizer = normalizers.Lowercase()
    inner.add_special_tokens([*before, *after])
    roles: dict[str, Any] = {
        "pad_token": "</s>" if kind == "siglip" else before[kind == "roberta"] if before else after[1]
    }
    template, special = "$A </s>", [("</s>", 1)]
    if kind in ENDS:
        bos, eos = ENDS[kind]
        roles |= {"bos_token": bos, "eos_token": eos}
        template, special = f"{bos} $A {eos}", [(bos, vocabulary[bos]), (eos, vocabulary[eos])]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=12, unk_token=unknown, **roles)


def made_model(name: str, words: Any) -> nn.Module:
    """The random model of that name; sizes, activations and epsilons are none of the defaults."""
    text = dict(TEXT)
    if words is not None:
        text |= {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    clip = {**VISION, "hidden_act": "gelu", "layer_norm_eps": 1e-3}
    post = {**text, "layer_norm_eps": 1e-4, "hidden_act": "gelu_new"}
    if name == "clip":
        own = {**text, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "hidden_act": "gelu"}
        return hf.CLIPModel(
            hf.CLIPConfig(text_config={**own, "layer_norm_eps": 1e-4}, vision_config=clip, projection_dim=24)
        )
    if name == "siglip":
        own = {**text, "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 1, "eos_token_id": 1}
        return hf.SiglipModel(hf.SiglipConfig(text_config={**own, "layer_norm_eps": 1e-4}, vision_config=VISION))
    if name == "chinese_clip":
        return hf.ChineseCLIPModel(
            hf.ChineseCLIPConfig(
                text_config=post, vision_config={**clip, "hidden_act": "quick_gelu"}, projection_dim=24
            )
        )
    if name == "clip_bert":
        parts = hf.CLIPVisionConfig(**clip), hf.BertConfig(**post)
    elif name == "vit_roberta":
        parts = hf.ViTConfig(**VISION, layer_norm_eps=1e-4), hf.RobertaConfig(**{**post, "max_position_embeddings": 14})
    elif name == "dinov2_bert":
        parts = hf.Dinov2Config(**DINO), hf.BertConfig(**post)
    else:
        return one_model(name, text, post)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(*parts, projection_dim=24)
    return hf.VisionTextDualEncoderModel(config)


def one_model(name: str, text: dict[str, Any], post: dict[str, Any]) -> nn.Module:
    """An encoder alone."""
    longer = {**post, "max_position_embeddings": 14}
    makers = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**VISION, layer_norm_eps=1e-4, hidden_act="gelu_new")),
        "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**VISION)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)),
        "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])),
        # With the heads of pretraining: most BERTs are published so.
        "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**post)),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**longer)),
        "xlm-roberta": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**longer)),
        "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**post, embedding_size=16)),
    }
    return makers[name]()


def write_model(name: str, folder: Path, *, shards: str | None = None, safe: bool = True) -> Public:
    """A folder with the model of that name. `shards`: largest size of a file of weights. `safe`: as safetensors."""
    kind = KINDS[name]
    words = None if kind is None else words_of(kind)
    torch.manual_seed(0)
    model = randomised(made_model(name, words), seed=3)
    sizes = {} if shards is None else {"max_shard_size": shards}
    model.save_pretrained(folder, **sizes)  # type: ignore[operator]
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if words is not None:
        words.save_pretrained(folder)
    if name == "siglip":
        hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    elif name in ("vit", "vit_roberta"):
        hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    elif name in (*PAIRS, "dinov2"):
        hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return Public(folder, model, words)
