"""Parity with BriVL 1.0: regions and both towers up to the embeddings, through the converter; and steps of training with a
copy and queues, ALBEF's too, through the objective."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch, Regions
from fastvlp.convert.brivl import IMAGE, TEXT, BriVLLayout, from_brivl
from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.interface import Release, Stated
from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.model.region_pooling import RegionPool, box_weights
from fastvlp.objectives.moco import MoCo, MoCoConfig, albef
from fastvlp.objectives.objective import combine
from tests.golden import assert_close, load


def released(weights: dict[str, Tensor], c: dict) -> Release:
    """Returns the converter's result for the release's tensors and config. The map of the image is given, not computed."""
    source = Checkpoint("brivl", None, stated={"MODEL": c})
    source.__dict__.update(weights=weights, names=frozenset(weights))
    # BERT's number of heads is in its own config, of another release.
    return BriVLLayout().read(source, Stated(heads=(c["IMG_TRANSFORMER_HEAD"], c["TEXT_TRANSFORMER_HEAD"], 4)))


def loaded() -> tuple:
    c, tol, weights, known = load("brivl_towers")
    release = released(weights, c)
    text = replace(release.config.text, vocab=c["vocab"])
    model = VLModel(replace(release.config, text=text)).eval()
    model.load_state_dict(dict(release.weights))
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


def test_states_of_real_regions_and_words():
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
    _, _, weights, _ = load("brivl_towers")
    copies = {name.replace("encoder.", "encoder_mom.", 1): x for name, x in weights.items()}
    whole = weights | copies | {"img_queue": torch.zeros(1), "text_queue_ptr": torch.zeros(1)}
    whole |= {f"{IMAGE}.backbone.conv_stem.weight": torch.zeros(1)}
    assert from_brivl(whole).keys() == from_brivl(weights).keys()
    with pytest.raises(UserError, match=r"left over .*surprise"):
        from_brivl(weights | {"surprise": torch.zeros(1)})


class Stand(nn.Module):
    """Towers of linear maps behind the names that an objective asks a model for."""

    fusion = reconstructor = head = forward_head = reverse_head = None
    config = SimpleNamespace(image=SimpleNamespace(random_patches=lambda seed_B, keep, image=None: None))

    def __init__(self, known: dict[str, Tensor], image: dict[str, str], text: dict[str, str]):
        super().__init__()
        self.image, self.text = (
            nn.ParameterDict({ours: nn.Parameter(known[theirs].clone()) for ours, theirs in names.items()})
            for names in (image, text)
        )

    def encode_image(self, x: Tensor, keep: None = None) -> Tensor:
        return x

    def embed_image(self, x: Tensor, regions: None) -> Tensor:
        return self.embed(self.image, x)

    def embed_text(self, x: Tensor, length: Tensor, keep: None, stored: None) -> Tensor:
        return self.embed(self.text, x)

    def embed(self, maps: nn.ParameterDict, x: Tensor) -> Tensor:
        x = F.linear(x, maps["w"], maps["b"])
        return F.normalize(F.linear(x, maps["w2"], maps["b2"]) if "w2" in maps else x, dim=1)


def rows_of(known: dict[str, Tensor], step: str, image: str, text: str) -> Batch:
    x, ids = known[f"in.{step}.{image}"], known[f"in.{step}.{text}"]
    return Batch(image=x, ids=ids, length=torch.ones(len(x), dtype=torch.long), seed=torch.arange(len(x)))


def begun(config: MoCoConfig, model: Stand, slow: Stand, queues: list[Tensor]) -> MoCo:
    """With the copy and the queues that the original began with, where the copy differs from the towers: it follows once."""
    objective = MoCo(config, queues[0].shape[0])
    objective.begin(model)
    objective.slow.load_state_dict(slow.state_dict())
    for mine, known in zip((objective.image_queue, objective.text_queue), queues):
        mine.copy_(known.T)
    objective.follow(model)
    return objective


def test_three_steps_as_released():
    c, tol, _, known = load("brivl_step")
    image, text = ({"w": f"in.{side}_w0", "b": f"in.{side}_b0"} for side in ("img", "txt"))
    model = Stand(known, image, text)
    slow = Stand(known, *({k: f"{v}_mom" for k, v in names.items()} for names in (image, text)))
    config = MoCoConfig(
        queue=c["QUEUE_SIZE"], momentum=c["MOMENTUM"], temperature=c["TEMPERATURE"], equal_pairs="negatives"
    )
    objective = begun(config, model, slow, [known["in.img_queue0"], known["in.text_queue0"]])
    for step in ("step1", "step2", "step3"):
        batch = rows_of(known, step, "img_x", "txt_x")
        rows, keys = objective.embed(model, batch.image, batch), objective.constants(model, batch)
        for row in rows:
            row.retain_grad()
        losses = objective.score(*rows, *keys)
        found = dict(zip(("img_q", "txt_q", "img_k", "txt_k"), (*rows, *keys)))
        queues = {"i2t": (rows[0], keys[1], objective.text_queue), "t2i": (rows[1], keys[0], objective.image_queue)}
        for name, (query, key, queue) in queues.items():
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / objective.temperature
            found[f"{name}_logits"] = logits
        found |= {"loss_i2t": losses["image"].total / c["step_B"], "loss_t2i": losses["text"].total / c["step_B"]}
        found["loss"] = combine(losses)
        found |= {"img_w_mom": objective.slow.image["w"], "txt_w_mom": objective.slow.text["w"]}
        found["txt_b_mom"] = objective.slow.text["b"]
        for name, mine in found.items():
            assert_close(mine, known[f"out.{step}.{name}"], tol[f"out.{step}.{name}"], f"{step} {name}")
        found["loss"].backward()
        grads = {"img_q": rows[0].grad, "txt_q": rows[1].grad}
        grads |= {
            f"{side}_{k}": p.grad for side, maps in (("img", model.image), ("txt", model.text)) for k, p in maps.items()
        }
        for name, grad in grads.items():
            assert_close(grad, known[f"grad.{step}.{name}"], tol[f"grad.{step}.{name}"], f"{step} gradient of {name}")
        descend(model, known["in.lr"].item())
        objective.after_step(model)
        after = {"img_queue": objective.image_queue.T, "text_queue": objective.text_queue.T}
        after |= {"img_w_after_sgd": model.image["w"], "txt_w_after_sgd": model.text["w"]}
        for name, mine in after.items():
            assert_close(mine, known[f"out.{step}.{name}"], tol[f"out.{step}.{name}"], f"{step} {name}")
        place = objective.written % config.queue
        assert place == known[f"out.{step}.img_queue_ptr"] == known[f"out.{step}.text_queue_ptr"]


def descend(model: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
    model.zero_grad()


def test_two_steps_of_albef():
    c, tol, _, known = load("albef_ita_step")
    names = [("visual_encoder{}.fc", "vision_proj{}"), ("text_encoder{}.fc", "text_proj{}")]

    def stand(suffix: str) -> Stand:
        maps = [
            {f"{kind}{n}": f"in.w0.{tower.format(suffix)}.{full}" for kind, full in (("w", "weight"), ("b", "bias"))}
            for side in names
            for n, tower in zip(("", "2"), side)
        ]
        return Stand(known, maps[0] | maps[1], maps[2] | maps[3])

    model = stand("")
    options = {"momentum": c["momentum"], "temperature": c["temp"], "alpha": c["alpha"], "equal_pairs": "negatives"}
    config = replace(albef(queue=c["K"]), **options)
    objective = begun(config, model, stand("_m"), [known["in.image_queue0"], known["in.text_queue0"]])
    for step in ("step1", "step2"):
        batch = rows_of(known, step, "image_x", "text_x")
        rows, keys = objective.embed(model, batch.image, batch), objective.constants(model, batch)
        for row in rows:
            row.retain_grad()
        loss = combine(objective.score(*rows, *keys))
        features = ("image_feat", "text_feat", "image_feat_m", "text_feat_m")
        for name, mine in {**dict(zip(features, (*rows, *keys))), "loss_ita": loss}.items():
            assert_close(mine, known[f"out.{step}.{name}"], tol[f"out.{step}.{name}"], f"{step} {name}")
        loss.backward()
        grads = {"image_feat": rows[0].grad, "text_feat": rows[1].grad, "temp": objective.temperature.grad}
        for maps, (tower, head) in ((model.image, names[0]), (model.text, names[1])):
            for kind, full in (("w", "weight"), ("b", "bias")):
                grads[f"{tower.format('')}.{full}"] = maps[kind].grad
                grads[f"{head.format('')}.{full}"] = maps[f"{kind}2"].grad
        for name, grad in grads.items():
            assert_close(grad, known[f"grad.{step}.{name}"], tol[f"grad.{step}.{name}"], f"{step} gradient of {name}")
        rate = known["in.lr"].item()
        descend(model, rate)
        with torch.no_grad():
            objective.temperature -= 0.01 * rate * objective.temperature.grad
        objective.zero_grad()
        objective.after_step(model)
        after = {"image_queue": objective.image_queue.T, "text_queue": objective.text_queue.T}
        after["temp_after_sgd"] = objective.temperature
        for name, mine in after.items():
            assert_close(mine, known[f"out.{step}.{name}"], tol[f"out.{step}.{name}"], f"{step} {name}")
        assert objective.written % config.queue == known[f"out.{step}.queue_ptr"]
