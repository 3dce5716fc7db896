"""Parity with the released UNITER code: embedders, packing, encoder, every pretraining loss, transport, task heads."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch, Regions
from fastvlp.convert.uniter import HEADS, WORD_AND_MATCH, from_uniter, uniter_encoder, uniter_heads
from fastvlp.errors import UserError
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.region_embedding import RegionConfig, box_vector
from fastvlp.model.single_stream import SingleConfig, SingleStates, packing
from fastvlp.objectives.losses import token_loss
from fastvlp.objectives.mlm import masked_loss
from fastvlp.objectives.objective import combine
from fastvlp.objectives.region import MRC, MRFR, MRCConfig, MRFRConfig, class_divergence, class_nll, feature_error
from fastvlp.objectives.transport import cosine_cost, transport_distance, transport_plan
from fastvlp.objectives.wra import match_loss
from fastvlp.tasks.uniter_heads import PairAttention, answer_head, rank_loss, region_head, region_scores
from tests.golden import assert_close, load

golden = cache(load)


def model_config(c: dict, types: int) -> ModelConfig:
    layer = LayerConfig(
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        hidden=c["intermediate_size"],
        norm="post",
        eps=1e-12,
    )
    return ModelConfig(
        image=ViTConfig(size=16, patch=8, depth=0, layer=layer),
        text=TextTransformerConfig(
            vocab=c["vocab_size"],
            positions=c["max_position_embeddings"],
            depth=0,
            layer=layer,
            embed_eps=1e-12,
            bos=1,
            eos=2,
            mask=3,
        ),
        single=SingleConfig(
            depth=c["num_hidden_layers"], layer=layer, regions=RegionConfig(feature=c["img_dim"]), types=types
        ),
    )


def build(name: str, *heads: str, types: int = 2) -> VLModel:
    """The released weights; what a fine-tuned file lacks stays as it was made."""
    c, _, weights, _ = golden(name)
    config = model_config(c, types)
    model = VLModel(config)
    state = from_uniter(weights, c["num_hidden_layers"], pretrained=not heads, heads=heads)
    fresh = {key: value for key, value in model.state_dict().items() if key in WORD_AND_MATCH} if heads else {}
    model.load_state_dict(fresh | state)
    return model


def regions_of(known: dict[str, Tensor]) -> Regions:
    return Regions(box=known["in.img_pos_feat"][..., :4], count=known["in.num_bbs"])


def real_regions(known: dict[str, Tensor]) -> Tensor:
    return torch.arange(known["in.img_feat"].shape[1]) < known["in.num_bbs"][:, None]


def real_words(known: dict[str, Tensor]) -> Tensor:
    return torch.arange(known["in.input_ids"].shape[1]) < known["in.txt_lens"][:, None]


def read(model: VLModel, known: dict[str, Tensor], *, ids: str = "in.input_ids", **options) -> SingleStates:
    return model.read_regions(known["in.img_feat"], regions_of(known), known[ids], known["in.txt_lens"], **options)


def check_gradients(name: str, model: VLModel, prefix: str, **heads: Tensor | None) -> None:
    """Every stored gradient equals that of the parameter, or slice of one, that holds the tensor. `heads`: gradients of
    parameters outside the model, by their released name."""
    c, tol, _, known = golden(name)
    gradients = {key: p.grad for key, p in model.named_parameters()} | heads
    made = uniter_encoder(c["num_hidden_layers"]) | WORD_AND_MATCH | {part: (part,) for part in heads}
    owner = {part: (ours, parts) for ours, parts in made.items() for part in parts}
    checked = 0
    for key, value in known.items():
        if key.startswith(prefix):
            theirs = key.removeprefix(prefix)
            ours, parts = owner[theirs]
            mine = gradients[ours].chunk(len(parts))[parts.index(theirs)]
            assert_close(mine, value[1] if ours == "single.regions.mask" else value, tol[key], key)
            checked += 1
    assert checked >= 1


def gradients_of(head: nn.Module, prefix: str) -> dict[str, Tensor | None]:
    return {f"{prefix}{key}": p.grad for key, p in head.named_parameters()}


def check_objective_gradients(model: VLModel, objective: nn.Module, kind: str, prefix: str) -> None:
    own = dict(objective.named_parameters())
    check_gradients(PRETRAIN, model, prefix, **{part: own[ours].grad for ours, (part,) in HEADS[kind].items()})


def compare(name: str, key: str, mine: Tensor) -> None:
    _, tol, _, known = golden(name)
    assert_close(mine, known[f"out.{key}"], tol[f"out.{key}"], key)


PRETRAIN = "uniter_pretrain"


def test_every_tensor_of_a_released_checkpoint_has_a_place():
    """The base size has 230 entries, two of them second copies."""
    c, _, weights, _ = golden(PRETRAIN)
    used = {
        part
        for made in (uniter_encoder(12), WORD_AND_MATCH, *HEADS.values())
        for parts in made.values()
        for part in parts
    }
    assert len(used) + 2 == 230
    model = VLModel(model_config(c, 2))
    assert set(from_uniter(weights, 2)) == set(model.state_dict())
    assert uniter_heads(weights).keys() == {"mrfr", "mrc"}


@pytest.mark.parametrize("wrong", ["cls.predictions.decoder.weight", "feat_regress.weight"])
def test_copies_that_differ_are_refused(wrong: str):
    _, _, weights, _ = golden(PRETRAIN)
    with pytest.raises(UserError, match="not a copy"):
        from_uniter(weights | {wrong: weights[wrong] + 1}, 2)
    with pytest.raises(UserError, match="left over"):
        from_uniter(weights | {"new.weight": weights[wrong]}, 2)


def test_embedders_packing_and_encoder():
    model = build(PRETRAIN)
    _, tol, _, known = golden(PRETRAIN)
    boxes, words = real_regions(known), real_words(known)
    assert_close(box_vector(known["in.img_pos_feat"][..., :4])[boxes], known["in.img_pos_feat"][boxes], 1e-6, "box")
    box = known["in.img_pos_feat"][..., :4]
    for key, hidden in (("emb.img", None), ("emb.img_masked", known["in.mrm.img_masks"])):
        mine = model.single.regions(known["in.img_feat"], box, model.single.kinds[1], hidden)
        assert_close(mine[boxes], known[f"out.{key}"][boxes], tol[f"out.{key}"], key)
    position = torch.arange(known["in.input_ids"].shape[1])
    text = model.text.embed(known["in.input_ids"], position, model.single.kinds[0])
    assert_close(text[words], known["out.emb.txt"][words], tol["out.emb.txt"], "text")
    pack, real = packing(torch.cat([words, boxes], 1)), known["in.attn_masks"].bool()
    assert torch.equal(pack.real, real) and torch.equal(pack.source[real], known["in.gather_index"][real])
    joint = read(model, known)
    compare(PRETRAIN, "pooled_output", joint.pooled)
    for b, (n, r) in enumerate(zip(known["in.txt_lens"], known["in.num_bbs"])):
        mine = torch.cat([joint.text[b, :n], joint.region[b, :r]])
        assert_close(mine, known["out.sequence_output"][b, : n + r], tol["out.sequence_output"], "sequence")


def test_mlm():
    model = build(PRETRAIN)
    _, _, _, known = golden(PRETRAIN)
    label = known["in.mlm.txt_labels"]
    joint = read(model, known, ids="in.mlm.input_ids")
    hidden = model.single.words.hidden(joint.text[label != -1])
    table, bias = model.text.word.weight, model.single.words.bias
    compare(PRETRAIN, "mlm.scores", F.linear(hidden, table, bias))
    compare(PRETRAIN, "mlm.loss_per_token", token_loss(hidden, table, bias, label[label != -1]))
    batch = Batch(
        image=torch.empty(len(label), 0),
        ids=torch.where(label == -1, known["in.input_ids"], label),
        length=known["in.txt_lens"],
        seed=torch.zeros(len(label), dtype=torch.int64),
        regions=regions_of(known),
    )
    loss = combine({"mlm": masked_loss(model, known["in.img_feat"], batch, known["in.mlm.input_ids"], label != -1)})
    compare(PRETRAIN, "mlm.loss", loss)
    loss.backward()
    check_gradients(PRETRAIN, model, "grad.mlm.")


def region_states(model: VLModel, objective: MRFR | MRC) -> Tensor:
    _, _, _, known = golden(PRETRAIN)
    hidden = known["in.mrm.img_masks"]
    return objective.transform(read(model, known, hidden_BR=hidden).region[hidden])


def objective_of(config: MRFRConfig | MRCConfig, kind: str):
    c, _, weights, _ = golden(PRETRAIN)
    objective = config.build(model_config(c, 2), None)
    objective.load_state_dict(uniter_heads(weights)[kind])
    return objective


def test_mrfr():
    model, objective = build(PRETRAIN), objective_of(MRFRConfig(), "mrfr")
    _, _, _, known = golden(PRETRAIN)
    state = region_states(model, objective)
    predicted = F.linear(state, model.single.regions.feature.weight.T, objective.bias)
    compare(PRETRAIN, "mrfr.pred", predicted)
    loss = feature_error(predicted, known["in.mrfr.feat_targets"], "mean").mean()
    compare(PRETRAIN, "mrfr.loss", loss)
    loss.backward()
    check_objective_gradients(model, objective, "mrfr", "grad.mrfr.")


@pytest.mark.parametrize("kind", ["mrc_kl", "mrc_hard"])
def test_mrc(kind: str):
    c, _, _, known = golden(PRETRAIN)
    model, objective = build(PRETRAIN), objective_of(MRCConfig(classes=c["label_dim"]), "mrc")
    logits = objective.classify(region_states(model, objective))
    compare(PRETRAIN, "mrc.logits", logits)
    share = known["in.mrc.label_targets"]
    if kind == "mrc_kl":
        loss = class_divergence(logits, share, "mean").mean()
    else:
        nll = class_nll(logits, share)
        compare(PRETRAIN, "mrc_hard.loss_per_element", nll)
        loss = nll.mean()
    compare(PRETRAIN, f"{kind}.loss", loss)
    loss.backward()
    check_objective_gradients(model, objective, "mrc", f"grad.{kind}.")


@pytest.mark.parametrize("part", ["itm", "itm_ot_only"])
def test_matching_and_alignment(part: str):
    model = build(PRETRAIN)
    _, _, _, known = golden(PRETRAIN)
    right = known["in.itm.targets"].bool()
    joint, words, boxes = read(model, known), real_words(known), real_regions(known)
    logits = model.single.match(joint.pooled)
    compare(PRETRAIN, "itm.scores", logits)
    nll = match_loss(logits, right, "ce")
    compare(PRETRAIN, "itm.loss_per_pair", nll)
    pair = words[:, :, None] & boxes[:, None]
    cost = cosine_cost(joint.text, joint.region)
    compare(PRETRAIN, "itm.ot_cost", cost.masked_fill(~pair, 0))
    compare(PRETRAIN, "itm.ot_plan", transport_plan(cost, pair).transpose(1, 2))
    distance = transport_distance(joint.text, joint.region, words, boxes)
    compare(PRETRAIN, "itm.ot_dist", distance)
    align = torch.where(right, distance, -distance).mean()
    compare(PRETRAIN, "itm.loss_ot", align)
    compare(PRETRAIN, "itm.loss_total_lambda0.1", nll.mean() + 0.1 * align)
    (align if part == "itm_ot_only" else nll.mean() + 0.1 * align).backward()
    check_gradients(PRETRAIN, model, f"grad.{part}.")


def test_vqa():
    name = "uniter_vqa"
    c, _, weights, known = golden(name)
    model, head = build(name, "vqa_output."), answer_head(c["hidden_size"], c["n_ans"])
    head.load_state_dict({k: weights[f"vqa_output.{k}"] for k in head.state_dict()})
    logits = head(read(model, known).pooled)
    compare(name, "scores", logits)
    each = F.binary_cross_entropy_with_logits(logits, known["in.targets"], reduction="none")
    compare(name, "loss", each.mean() * c["n_ans"])
    (each.mean() * c["n_ans"]).backward()
    check_gradients(name, model, "grad.", **gradients_of(head, "vqa_output."))


def test_referring_expressions():
    name = "uniter_re"
    c, _, weights, known = golden(name)
    model, head = build(name, "re_output."), region_head(c["hidden_size"], c["re_mlp"])
    head.load_state_dict({k: weights[f"re_output.{k}"] for k in head.state_dict()})
    scores = region_scores(head, read(model, known).region, real_regions(known))
    compare(name, "scores", scores)
    loss = F.cross_entropy(scores, known["in.targets"][:, 0], reduction="sum")
    compare(name, "loss", loss)
    loss.backward()
    check_gradients(name, model, "grad.", **gradients_of(head, "re_output."))


def test_two_layers_score_regions_too():
    head, state = region_head(8, 2), torch.randn(2, 3, 8)
    real = torch.tensor([[True, True, False], [True, False, False]])
    scores = region_scores(head, state, real)
    assert (scores[~real] == -1e4).all()
    torch.testing.assert_close(scores[real], head(state[real])[:, 0])


def test_ranking():
    name = "uniter_itm_rank"
    c, _, weights, known = golden(name)
    model, head = build(name, "itm_output.", "rank_output."), nn.Linear(c["hidden_size"], 1)
    head.load_state_dict({k: weights[f"rank_output.{k}"] for k in ("weight", "bias")})
    scores = head(read(model, known).pooled)
    compare(name, "scores", scores)
    losses = rank_loss(scores.reshape(-1, int(known["in.sample_size"])))
    compare(name, "loss_unreduced", losses)
    losses.mean().backward()
    check_gradients(name, model, "grad.", **gradients_of(head, "rank_output."))


def test_nlvr2():
    name = "uniter_nlvr2"
    _, _, weights, known = golden(name)
    names = {"join": "fc.0", "weigh": "attn_pool.fc.0", "out": "nlvr2_output"}
    names |= {f"{ours}.out": f"attn{i}.out_proj" for i, ours in ((1, "to_right"), (2, "to_left"))}
    state = {f"{ours}.{kind}": weights[f"{part}.{kind}"] for ours, part in names.items() for kind in ("weight", "bias")}
    for i, ours in ((1, "to_right"), (2, "to_left")):
        for kind in ("weight", "bias"):
            query, key, value = weights[f"attn{i}.in_proj_{kind}"].chunk(3)
            state |= {f"{ours}.query.{kind}": query, f"{ours}.kv.{kind}": torch.cat([key, value])}
    model = build(name, "attn1.", "attn2.", "attn_pool.", "fc.", "nlvr2_output.", types=3)
    head = PairAttention(model.config.single.layer)
    head.load_state_dict(state)
    joint = read(model, known, slot_B=torch.tensor([0, 1]).repeat(len(known["in.targets"])))
    states = torch.cat([joint.text, joint.region], 1)
    real = torch.cat([real_words(known), real_regions(known)], 1)
    logits = head(states[0::2], real[0::2], states[1::2], real[1::2])
    compare(name, "scores", logits)
    loss = F.cross_entropy(logits, known["in.targets"])
    compare(name, "loss", loss)
    loss.backward()
    own = {key: p.grad for key, p in head.named_parameters()}
    theirs = {f"{part}.weight": own[f"{ours}.weight"] for ours, part in names.items()}
    theirs["attn1.in_proj_weight"] = torch.cat([own["to_right.query.weight"], own["to_right.kv.weight"]])
    check_gradients(name, model, "grad.", **theirs)
