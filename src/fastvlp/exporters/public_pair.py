"""Models of two encoders in the layout of transformers: which one a model of ours fits, and its config and tensors there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from torch import Tensor

from fastvlp.convert.bert_encoders import ChineseCLIPTexts
from fastvlp.convert.clip_encoders import CLIPImages, CLIPTexts
from fastvlp.convert.encoder_family import ImageFamily, TextFamily
from fastvlp.convert.siglip_encoders import SigLIPImages, SigLIPTexts
from fastvlp.convert.two_encoders import joined
from fastvlp.model.joint_space import EmbedConfig
from fastvlp.model.model import ModelConfig
from fastvlp.model.saving import Saved

# What similarities are multiplied by where no objective learned it (arXiv 2103.00020, section 2.5).
SCALE = log(1 / 0.07)


@dataclass(frozen=True, kw_only=True)
class PairLayout:
    """A kind of model in transformers.

    Attributes:
        model_type: As in config.json.
        model_class: Its class there.
        image: Family of its image encoder.
        text: Family of its text encoder.
    """

    model_type: str
    model_class: str
    image: ImageFamily
    text: TextFamily


LAYOUTS = (
    PairLayout(model_type="clip", model_class="CLIPModel", image=CLIPImages(), text=CLIPTexts()),
    PairLayout(model_type="siglip", model_class="SiglipModel", image=SigLIPImages(), text=SigLIPTexts()),
    PairLayout(model_type="chinese_clip", model_class="ChineseCLIPModel", image=CLIPImages(), text=ChineseCLIPTexts()),
)


@dataclass(frozen=True, kw_only=True)
class PublicPair:
    """A model of ours in such a layout.

    Attributes:
        layout: The layout.
        config: Its config.json.
        tensors: Its tensors.
    """

    layout: PairLayout
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def find_layout(model: ModelConfig) -> PairLayout | None:
    """Returns the layout that a model fits; None if it fits none."""
    normed = with_last_norm(model)
    return next((layout for layout in LAYOUTS if _settings(layout, normed) is not None), None)


def public_settings(model: ModelConfig) -> dict[str, Any] | None:
    """Returns the config.json of the layout that a model fits; None if it fits none."""
    layout = find_layout(model)
    return None if layout is None else _settings(layout, with_last_norm(model))


def public_pair(saved: Saved) -> PublicPair | None:
    """Returns a model in the layout that it fits, with the temperature and bias that an objective learned; None if it fits
    none."""
    layout = find_layout(saved.model.config)
    if layout is None:
        return None
    config = with_last_norm(saved.model.config)
    settings = _settings(layout, config)
    assert settings is not None
    state = last_norm_state(saved)
    image, text = (part(state, f"{name}.") for name in ("image", "text"))
    tensors = {
        f"{theirs}.{name}": x
        for theirs, family, own, depth in (
            ("vision_model", layout.image, image, settings["vision_config"]["num_hidden_layers"]),
            ("text_model", layout.text, text, settings["text_config"]["num_hidden_layers"]),
        )
        for name, x in family.tensors(own, depth).items()
    }
    tensors |= layout.image.head_tensors(part(state, "embed.image."))
    tensors |= layout.text.head_tensors(part(state, "embed.text."))
    learned = learned_scale(saved)
    tensors["logit_scale"] = learned.get("log_scale", torch.tensor(SCALE)).reshape(())
    if layout.model_type == "siglip":
        scale, bias = tensors["logit_scale"], learned.get("bias", torch.tensor(0.0))
        tensors |= {"logit_scale": scale.reshape(1), "logit_bias": bias.reshape(1)}
    return PublicPair(layout=layout, config=settings, tensors={k: x.contiguous() for k, x in tensors.items()})


def learned_scale(saved: Saved) -> dict[str, Tensor]:
    """Returns what the first objective that has a temperature learned: `log_scale`, and `bias` where it has one."""
    for name in saved.info.get("objectives", {}):
        learned = saved.learned(name)
        if "log_scale" in learned:
            return {key: learned[key].float() for key in ("log_scale", "bias") if key in learned}
    return {}


def with_last_norm(model: ModelConfig) -> ModelConfig:
    """Returns the config with the norm of the text's head as the last one of its encoder, where public models have it."""
    text: Any = model.text
    if not _norm_moves(model):
        return model
    assert model.embed is not None
    head = replace(model.embed.text, norm=False)
    return replace(model, text=replace(text, last_norm=True), embed=replace(model.embed, text=head))


def _norm_moves(model: ModelConfig) -> bool:
    embed, text = model.embed, model.text
    has_place = getattr(text, "last_norm", None) is False
    return embed is not None and has_place and embed.text.norm and embed.text.eps == text.norm_eps


def last_norm_state(saved: Saved) -> dict[str, Tensor]:
    """Returns a model's parameters in fp32, by the names of `with_last_norm`."""
    state = {name: x.detach().float() for name, x in saved.model.state_dict().items()}
    if not _norm_moves(saved.model.config):
        return state
    old = "embed.text.norm."
    return {(name.replace(old, "text.last_norm.") if name.startswith(old) else name): x for name, x in state.items()}


def _settings(layout: PairLayout, model: ModelConfig) -> dict[str, Any] | None:
    """The config.json of a model whose text encoder has its last norm; None if the layout does not fit."""
    image, text, embed = layout.image.settings(model.image), layout.text.settings(model.text), model.embed
    if image is None or text is None or embed is None:
        return None
    # What padding has, where it is seen.
    text |= {} if embed.text_pad is None else {"pad_token_id": embed.text_pad}
    if not _same_joint_space(layout, model, embed, image, text):
        return None
    parts = {"vision_config": image, "text_config": text}
    width = {} if layout.model_type == "siglip" else {"projection_dim": embed.width}
    names = {"vision_config": f"{layout.model_type}_vision_model", "text_config": f"{layout.model_type}_text_model"}
    stated = {name: {**settings, "model_type": names[name]} for name, settings in parts.items()}
    return {"model_type": layout.model_type, "architectures": [layout.model_class], **width, **stated}


def _same_joint_space(
    layout: PairLayout, model: ModelConfig, embed: EmbedConfig, image: Mapping[str, Any], text: Mapping[str, Any]
) -> bool:
    reading = layout.text.reading(text)
    public = joined(model.image, model.text, layout.image.head(image), reading, embed.width).embed
    assert public is not None
    # The epsilon of a norm that is not there has no effect.
    own = embed if embed.text.norm else replace(embed, text=replace(embed.text, eps=public.text.eps))
    return public == own


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the parameters whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
