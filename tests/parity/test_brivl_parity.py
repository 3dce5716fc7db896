"""Parity with BriVL 1.0: region pooling and both towers up to the embeddings, through the converter, and training steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model.convert_brivl import IMAGE, TEXT, from_brivl
from fastvlp.model.embed import EmbedConfig, HeadConfig
from fastvlp.model.image import ImageConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.pooling import RegionPool, box_weights
from fastvlp.model.text import TextConfig
from tests.golden import assert_close, load


def config(c: dict) -> ModelConfig:
    """The golden towers: the map of the image is given, and its tower is a stand-in that never runs."""
    width, text_width, joint = c["IMG_FEATURE_DIM"], c["TEXT_FEATURE_DIM"], c["IMG_FEATURE_DIM"]
    attend = {"hidden": 2048, "norm": "post", "activation": "relu"}
    head = {"pool": "mean", "hidden": joint, "bias": True}
    bert = LayerConfig(width=text_width, heads=c["TEXT_TRANSFORMER_HEAD"], hidden=c["bert_ffn"], norm="post", eps=1e-12)
    return ModelConfig(
        image=ImageConfig(
            size=c["map"],
            patch=1,
            depth=0,
            layer=LayerConfig(width=width, heads=1, hidden=1),
            class_token=False,
        ),
        text=TextConfig(positions=16, depth=c["bert_layers"], layer=bert, vocab=c["vocab"], embed_eps=1e-12),
        embed=EmbedConfig(
            width=joint,
            image=HeadConfig(
                **head,
                regions=RegionPool(samples=c["GRID_SIZE"]),
                depth=c["IMG_TRANSFORMER_LAYER"],
                layer=LayerConfig(width=width, heads=c["IMG_TRANSFORMER_HEAD"], **attend),
            ),
            text=HeadConfig(
                **head,
                depth=c["TEXT_TRANSFORMER_LAYER"],
                layer=LayerConfig(width=text_width, heads=c["TEXT_TRANSFORMER_HEAD"], **attend),
            ),
            text_mask="none",
        ),
    )


def loaded() -> tuple:
    c, tol, weights, known = load("brivl_towers")
    model = VLModel(config(c)).eval()
    model.load_state_dict(model.state_dict() | from_brivl(weights, model.config))
    regions = Regions(box=known["in.image_boxs"] / c["IMG_SIZE"], count=known["in.maskImages"].sum(1).long())
    return model, regions, c, tol, known


def test_regions_are_pooled_as_released():
    model, regions, c, tol, known = loaded()
    assert (regions.mask == known["in.maskImages"].bool()).all()
    states = known["in.feature_map"].flatten(2).mT
    head = model.embed.image.regions
    mine, real = head(states, regions)
    assert_close(mine[real], known["out.region_feats"][real], tol["out.region_feats"], "released")
    weight = box_weights(regions.box, c["map"], RegionPool(samples=c["GRID_SIZE"], place="corners"))
    name = "out.region_feats_align_corners_true"
    assert_close(head.project(weight @ states)[real], known[name][real], tol[name], "corners")


def test_towers_embed_as_released_with_equal_gradients():
    model, regions, c, tol, known = loaded()
    feature_map = known["in.feature_map"].requires_grad_()
    image = model.embed_image(feature_map.flatten(2).mT, regions)
    text = model.embed_text(known["in.texts"], known["in.maskTexts"].sum(1).long())
    similarity = image @ text.T
    logits, own = similarity / c["TEMPERATURE"], torch.arange(len(image))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    found = {"img_emb": image, "text_emb": text, "similarity": similarity, "probe_loss": loss}
    for name, mine in found.items():
        assert_close(mine, known[f"out.{name}"], tol[f"out.{name}"], name)
    loss.backward()
    theirs = {
        f"{IMAGE}.learnable.imgAtt.layers.0.self_attn.in_proj_weight": "image.blocks.0.attend.qkv.weight",
        f"{IMAGE}.learnable.imgFC.fc1.weight": "image.hidden.weight",
        f"{IMAGE}.learnable.max_pool.0.weight": "image.regions.project.weight",
        f"{TEXT}.learnable.textAtt.layers.0.linear2.bias": "text.blocks.0.mlp_out.bias",
        f"{TEXT}.learnable.textFC.fc2.weight": "text.out.weight",
    }
    grads = {name: model.embed.get_parameter(ours).grad for name, ours in theirs.items()}
    grads |= {"in.feature_map": feature_map.grad}
    assert {f"grad.{name}" for name in grads} == {name for name in known if name.startswith("grad.")}
    for name, grad in grads.items():
        assert_close(grad.reshape(known[f"grad.{name}"].shape), known[f"grad.{name}"], tol[f"grad.{name}"], name)


def test_attention_sees_what_is_there():
    """The two towers' states before they are averaged, at real regions and words."""
    model, regions, _, tol, known = loaded()
    states: dict[str, torch.Tensor] = {}
    for name in ("image", "text"):
        head = getattr(model.embed, name)
        head.blocks[-1].register_forward_hook(lambda *args, name=name: states.update({name: args[-1]}))
    bert: list[torch.Tensor] = []
    model.text.blocks[-1].register_forward_hook(lambda *args: bert.append(args[-1]))
    model.embed_image(known["in.feature_map"].flatten(2).mT, regions)
    model.embed_text(known["in.texts"], known["in.maskTexts"].sum(1).long())
    assert_close(bert[0], known["out.bert_hidden"], tol["out.bert_hidden"], "bert_hidden")
    for name, ours, real in (("img_att", "image", "maskImages"), ("text_att", "text", "maskTexts")):
        real = known[f"in.{real}"].bool()
        assert_close(states[ours][real], known[f"out.{name}"][real], tol[f"out.{name}"], name)


def test_a_whole_checkpoint_is_read_and_nothing_else():
    c, _, weights, _ = load("brivl_towers")
    copies = {name.replace("encoder.", "encoder_mom.", 1): x for name, x in weights.items()}
    whole = weights | copies | {"img_queue": torch.zeros(1), "text_queue_ptr": torch.zeros(1)}
    whole |= {f"{IMAGE}.backbone.conv_stem.weight": torch.zeros(1)}
    assert from_brivl(whole, config(c)).keys() == from_brivl(weights, config(c)).keys()
    with pytest.raises(UserError, match=r"left over .*surprise"):
        from_brivl(weights | {"surprise": torch.zeros(1)}, config(c))
