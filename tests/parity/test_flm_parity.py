"""Parity with the released FLM code: streams, reconstructor, losses, gradients, one-stream baselines, task heads."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.convert import flm as convert
from fastvlp.model import masks
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.fusion import FusionConfig, ReconstructorConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.ar import AR, ARConfig
from fastvlp.objectives.flm import FLM, official_flm
from fastvlp.objectives.mlm import masked_loss
from fastvlp.objectives.objective import combine
from tests.golden import assert_close, load


def model_config(c: dict) -> ModelConfig:
    vit = LayerConfig(
        width=c["vit_width"], heads=c["vit_width"] // 64, hidden=4 * c["vit_width"], activation="quick_gelu"
    )
    text = LayerConfig(
        width=c["hidden_size"], heads=c["num_heads"], hidden=c["text_intermediate"], norm="post", eps=1e-5
    )
    cross = LayerConfig(
        width=c["hidden_size"], heads=c["num_heads"], hidden=c["mlp_ratio"] * c["hidden_size"], norm="post", eps=1e-12
    )
    return ModelConfig(
        image=ViTConfig(
            size=c["image_size"],
            patch=c["vit_patch"],
            depth=c["vit_nominal_layers"] - 1,
            layer=vit,
            embed_norm=True,
            patch_bias=False,
        ),
        text=TextTransformerConfig(
            vocab=c["vocab_size"],
            positions=c["text_positions"] - 2,
            depth=c["num_bottom_layer"],
            layer=text,
            pad=1,
            bos=0,
            eos=2,
            mask=c["mask_id"],
            position_offset=2,
            pad_position=1,
        ),
        fusion=FusionConfig(depth=c["num_top_layer"], layer=cross),
        reconstructor=ReconstructorConfig(
            bottom=c["num_reconstructor_bottom_layer"], top=c["num_reconstructor_top_layer"], layer=cross
        ),
    )


@cache
def golden(name: str = "flm_three_stream"):
    return load(name)


def build(name: str = "flm_three_stream", head: str = "lm_score") -> tuple[VLModel, ModelConfig]:
    c, _, weights, _ = golden(name)
    config = model_config(c)
    model = VLModel(config)
    model.load_state_dict(convert.from_flm(weights, config, head=head))
    return model, config


def batch_of(known: dict[str, Tensor], image: str = "in.image", ids: str = "in.text_ids") -> Batch:
    length = known["in.text_masks"].sum(1)
    return Batch(image=known[image], ids=known[ids], length=length, seed=torch.zeros_like(length))


def check_gradients(model: VLModel, config: ModelConfig, known: dict[str, Tensor], tol: dict, prefix: str) -> None:
    """Every stored gradient equals that of the parameter, or slice of a parameter, that holds the tensor."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    sources = convert.flm_map(config, len(model.image.blocks)).sources
    owner = {part: (ours, parts) for ours, parts in sources.items() for part in parts}
    tables = {
        "token_type_embeddings.weight": lambda: torch.cat(
            [gradients["fusion.text_type"][None], gradients["fusion.image_type"]]
        ),
        "token_type_embeddings_flm.weight": lambda: torch.stack(
            [gradients[f"reconstructor.{kind}_type"] for kind in ("reverse", "query")]
        ),
        "mlm_score.bias": lambda: gradients["head.vocabulary.bias"],  # the map below names FLM's head
    }
    checked = 0
    for key, value in known.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith(("vqa_", "nlvr2_", "rank_", "cross_modal_text_pooler")):
            continue
        if name in tables:
            mine = tables[name]()
            mine = mine[: len(value)]
        else:
            ours, parts = owner[name]
            mine = gradients[ours].chunk(len(parts))[parts.index(name)]
        assert_close(mine.reshape(value.shape), value, tol[key], key)
        checked += 1
    assert checked >= 4


def test_streams_and_masks_equal_the_released_code():
    model, _ = build()
    _, tol, _, known = golden()
    batch = batch_of(known)
    image = model.encode_image(batch.image)
    assert_close(image, known["out.image_feats"], tol["out.image_feats"], "image")
    L, real = batch.ids.shape[1], known["in.text_masks"].bool()
    forward, reverse = masks.causal_official(batch.length, L)[:, 0], masks.anticausal_official(batch.length, L)[:, 0]
    assert torch.equal(forward, known["out.r0.mask_forward"]) and torch.equal(reverse, known["out.r0.mask_reverse"])
    streams = model.streams(image, batch.ids, batch.length, bos="official")
    top = streams.top[-1].unflatten(0, (len(batch), 2))
    for i, name in enumerate(("forward_feats", "reverse_feats")):
        key = f"out.r0.{name}"
        assert_close(top[:, i][real], known[key][real], tol[key], name)


@pytest.mark.parametrize(("tag", "rate"), [("r0", 0.0), ("r50", 0.5), ("r90", 0.9)])
def test_reconstruction_losses_and_gradients(tag: str, rate: float):
    model, config = build()
    _, tol, _, known = golden()
    batch = batch_of(known)
    L = batch.ids.shape[1]
    objective = FLM(official_flm("centred", rate) if rate else official_flm())
    position = torch.arange(L).expand(len(batch), L)
    start = known.get(f"in.{tag}.span_start", position).clone()
    end = known.get(f"in.{tag}.span_end", position + 1).clone()
    image = model.encode_image(batch.image)
    streams = model.streams(image, batch.ids, batch.length, bos="official")
    rows = known["in.text_masks"].bool()[:, 1:]
    empty = known.get(f"in.{tag}.empty_rows", torch.zeros_like(known["in.text_masks"], dtype=torch.bool))[:, 1:]
    mask, mine_empty = masks.bridge(
        start[:, 1:], end[:, 1:], batch.length, streams.forward_L, streams.reverse_BL, first=streams.first
    )
    known_mask = known.get(f"in.{tag}.mask_recon", known["out.r0.mask_recon"])[:, 1:]
    assert torch.equal(mine_empty[rows], empty[rows])
    assert torch.equal(mask[:, 0][rows & ~empty], known_mask[rows & ~empty])

    state = objective.queries(batch, (start, end), streams, model)
    key = f"out.{tag}.recon_feats"
    assert_close(state[rows], known[key][:, 1:][rows], tol[key], key)
    key = f"out.{tag}.recon_logits"
    assert_close(model.head(state)[rows], known[key][rows], tol[key], key)

    losses = objective(model, image, batch, (start, end))
    named = {"reconstruct": "recon", "forward": "forward", "reverse": "reverse"}
    for term, theirs in named.items():
        key = f"out.{tag}.loss_{theirs}"
        assert_close(losses[term].total / losses[term].count, known[key], tol[key], key)
    counts = torch.stack([losses[term].count for term in named])
    assert torch.equal(counts, known[f"out.{tag}.num_targets"])
    total = combine(losses)
    assert_close(total, known[f"out.{tag}.loss_total"], tol[f"out.{tag}.loss_total"], "total")
    total.backward()
    check_gradients(model, config, known, tol, f"grad.{tag}.")


def test_one_stream_mlm():
    model, config = build(head="mlm_score")
    _, tol, weights, known = golden()
    batch = batch_of(known)
    ids, labels = known["in.text_ids_mlm"], known["in.text_labels_mlm"]
    image = model.encode_image(batch.image)
    state = model.read(image, ids, mask=masks.full(batch.length, ids.shape[1]))
    real = known["in.text_masks"].bool()
    assert_close(state[real], known["out.mlm.text_feats"][real], tol["out.mlm.text_feats"], "mlm states")
    assert_close(model.head(state)[real], known["out.mlm.logits"][real], tol["out.mlm.logits"], "mlm logits")
    weight, bias = (weights[f"cross_modal_text_pooler.dense.{kind}"] for kind in ("weight", "bias"))
    pooled = torch.tanh(torch.nn.functional.linear(state[:, 0], weight, bias))
    assert_close(pooled, known["out.mlm.pooled"], tol["out.mlm.pooled"], "mlm pooled")
    loss = masked_loss(model, image, batch, ids, labels != -100)
    assert_close(loss.total / loss.count, known["out.mlm.loss"], tol["out.mlm.loss"], "mlm loss")
    (loss.total / loss.count).backward()
    check_gradients(model, config, known, tol, "grad.mlm.")


def test_one_stream_ar():
    model, config = build()
    _, tol, _, known = golden()
    batch = batch_of(known)
    image = model.encode_image(batch.image)
    state = model.read(image, batch.ids, mask=masks.causal_official(batch.length, batch.ids.shape[1]))
    real = known["in.text_masks"].bool()
    assert_close(state[real], known["out.ar.text_feats"][real], tol["out.ar.text_feats"], "ar states")
    loss = AR(ARConfig(bos="official"))(model, image, batch)["next"]
    assert_close(loss.total / loss.count, known["out.ar.loss"], tol["out.ar.loss"], "ar loss")
    (loss.total / loss.count).backward()
    check_gradients(model, config, known, tol, "grad.ar.")


def test_summary_query_alone_equals_the_pooled_vector():
    for name, image in (("flm_three_stream", "in.image"), ("flm_downstream", "in.image_0")):
        model, _ = build(name)
        _, tol, weights, known = golden(name)
        batch = batch_of(known, image)
        summary = model.summarise(
            model.encode_image(batch.image), batch.ids, batch.length, reading="flm", bos="official"
        )
        weight, bias = (weights[f"cross_modal_text_pooler_f.dense.{kind}"] for kind in ("weight", "bias"))
        pooled = torch.tanh(torch.nn.functional.linear(summary, weight, bias))
        key = "out.r0.cls_feats" if name == "flm_three_stream" else "out.cls_feats"
        assert_close(pooled, known[key], tol[key], key)
