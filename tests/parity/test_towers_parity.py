"""Parity of the towers with transformers' CLIP image tower and RoBERTa, through the converters."""

from __future__ import annotations

import pytest
import torch

from fastvlp.convert.bert_layers import from_roberta
from fastvlp.convert.clip_image import from_clip
from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.encoders.text_transformer import TextTransformer, TextTransformerConfig
from fastvlp.model.encoders.vit import ViT, ViTConfig
from fastvlp.model.layers import LayerConfig
from tests.golden import assert_close, load


def test_clip_image_tower():
    c, tol, weights, known = load("hf_clip")
    v = c["vision_config"]
    layer = LayerConfig(
        width=v["hidden_size"],
        heads=v["num_attention_heads"],
        hidden=v["intermediate_size"],
        activation="quick_gelu" if v["hidden_act"] == "quick_gelu" else "gelu",
    )
    depth = v["num_hidden_layers"]
    config = ViTConfig(
        size=v["image_size"], patch=v["patch_size"], depth=depth, layer=layer, embed_norm=True, patch_bias=False
    )
    tower = ViT(config)
    state = from_clip(weights, depth)
    tower.load_state_dict({k.removeprefix("image."): t for k, t in state.items()})
    states: list[torch.Tensor] = []
    tower.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    pooled = tower(known["in.pixel_values"])[:, 0]
    assert_close(states[0], known["out.vision.last_hidden_state"], tol["out.vision.last_hidden_state"], "states")
    assert_close(pooled, known["out.vision.pooler_output"], tol["out.vision.pooler_output"], "pooled")


def test_roberta():
    c, tol, weights, known = load("hf_roberta")
    layer = LayerConfig(
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        norm="post",
        eps=c["layer_norm_eps"],
    )
    config = TextTransformerConfig(
        vocab=c["vocab_size"],
        positions=c["max_position_embeddings"] - 2,
        depth=c["num_hidden_layers"],
        layer=layer,
        pad=1,
        bos=0,
        eos=2,
        mask=4,
        position_offset=2,
        pad_position=1,
    )
    tower = TextTransformer(config)
    state = from_roberta({f"roberta.{k}": t for k, t in weights.items()}, config.depth)
    tower.load_state_dict({k.removeprefix("text."): t for k, t in state.items()})
    ids, real = known["in.input_ids"], known["in.attention_mask"].bool()
    x = tower.embed(ids, torch.arange(ids.shape[1])[None])
    assert_close(x[real], known["out.embedding_output"][real], tol["out.embedding_output"], "embedding")
    mask = masks.full(real.sum(1), ids.shape[1])
    for block in tower.blocks:
        x = block(x, mask=mask)
    assert_close(x[real], known["out.last_hidden_state"][real], tol["out.last_hidden_state"], "states")


def test_what_is_missing_or_left_over_is_named():
    _, _, weights, _ = load("hf_roberta")
    with pytest.raises(UserError, match=r"left over .*surprise"):
        from_roberta({**weights, "surprise.weight": torch.zeros(1)}, 2)
    del weights["embeddings.LayerNorm.bias"]
    with pytest.raises(UserError, match=r"missing .*LayerNorm\.bias"):
        from_roberta(weights, 2)
