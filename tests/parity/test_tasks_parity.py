"""Parity of VQA, NLVR2 and retrieval with the released FLM code: logits, losses, gradients through the whole model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastvlp.convert import flm as convert
from fastvlp.model.model import VLModel
from fastvlp.tasks.heads import HeadObjective
from fastvlp.tasks.nlvr2 import NLVR2, NLVR2Config
from fastvlp.tasks.retrieval import Retrieval, RetrievalConfig, choice_loss
from fastvlp.tasks.vqa import VQA, VQAConfig
from tests.golden import assert_close
from tests.parity.test_flm_parity import batch_of, build, check_gradients, golden

NAME = "flm_downstream"


def load_head(task: HeadObjective, classifier: str) -> None:
    """The pooler of FLM's reconstructor row 0 and one classifier: everything of the task, nothing left over."""
    _, _, weights, _ = golden(NAME)
    state = {f"pool.{kind}": weights[f"cross_modal_text_pooler_f.dense.{kind}"] for kind in ("weight", "bias")}
    state |= {
        f"head.{k.removeprefix(classifier + '.')}": v for k, v in weights.items() if k.startswith(f"{classifier}.")
    }
    task.load_state_dict(state)


def check_head_gradients(task: HeadObjective, prefix: str, classifier: str) -> None:
    _, tol, _, known = golden(NAME)
    pool = f"{prefix}cross_modal_text_pooler_f.dense.weight"
    assert_close(task.pool.weight.grad, known[pool], tol[pool], pool)
    first = f"{prefix}{classifier}.0.weight"
    if first in known:
        assert_close(task.head[0].weight.grad, known[first], tol[first], first)


def check(model: VLModel, task: HeadObjective, loss: Tensor, name: str, classifier: str) -> None:
    _, tol, _, known = golden(NAME)
    key = f"out.{name}.loss"
    assert_close(loss, known[key], tol[key], key)
    loss.backward()
    check_gradients(model, model.config, known, tol, f"grad.{name}.")
    check_head_gradients(task, f"grad.{name}.", classifier)


def test_vqa():
    model, config = build(NAME)
    _, tol, _, known = golden(NAME)
    target = known["in.vqa_targets"]
    task = VQA(VQAConfig(reading="flm", bos="official", answers=target.shape[1]), config)
    load_head(task, "vqa_classifier")
    batch = replace(batch_of(known, "in.image_0"), target=target)
    image = model.encode_image(batch.image)
    assert_close(task.logits(model, image, batch), known["out.vqa.logits"], tol["out.vqa.logits"], "vqa logits")
    loss = task(model, image, batch)["answer"]
    check(model, task, loss.total / loss.count, "vqa", "vqa_classifier")


def test_nlvr2():
    model, config = build(NAME)
    _, tol, _, known = golden(NAME)
    task = NLVR2(NLVR2Config(reading="flm", bos="official"), config)
    load_head(task, "nlvr2_classifier")
    one = batch_of(known, "in.image_0")
    batch = replace(
        one,
        image=torch.stack([known["in.image_0"], known["in.image_1"]], 1).flatten(0, 1),
        ids=one.ids.repeat_interleave(2, 0),
        length=one.length.repeat_interleave(2),
        seed=one.seed.repeat_interleave(2),
        slot=torch.tensor([0, 1]).repeat(len(one)),
        target=known["in.nlvr2_answers"],
    )
    image = model.encode_image(batch.image)
    assert_close(task.logits(model, image, batch), known["out.nlvr2.logits"], tol["out.nlvr2.logits"], "nlvr2 logits")
    (loss,) = task(model, image, batch).values()
    check(model, task, loss.total / loss.count, "nlvr2", "nlvr2_classifier")


def test_retrieval():
    """The first of four texts is the image's own; the others are given here, and drawn from the batch otherwise."""
    model, config = build(NAME)
    _, tol, _, known = golden(NAME)
    task = Retrieval(RetrievalConfig(reading="flm", bos="official", loss="cross-entropy", candidates=4), config)
    load_head(task, "rank_output")
    batch = batch_of(known, "in.image_0")
    names = ("in.text", *(f"in.false_text_{k}" for k in range(3)))
    ids, length = (
        torch.stack([part[name] for name in names], 1).flatten(0, 1)
        for part in (
            {name: known[f"{name}_ids"] for name in names},
            {name: known[f"{name}_masks"].sum(1) for name in names},
        )
    )
    score_BC = task.scores(model, model.encode_image(batch.image), ids, length, None).unflatten(0, (-1, 4))
    assert_close(score_BC, known["out.irtr.scores"], tol["out.irtr.scores"], "scores")
    loss = choice_loss(score_BC, torch.ones_like(score_BC, dtype=torch.bool)).mean()
    check(model, task, loss, "irtr", "rank_output")
    key = "grad.irtr.rank_output.weight"
    assert_close(task.head.weight.grad, known[key], tol[key], key)


def test_every_tensor_of_a_released_checkpoint_has_a_place():
    """Loading leaves nothing over but what is listed as an alias, unread, or a head."""
    _, _, weights, _ = golden(NAME)
    _, config = build(NAME)
    assert set(convert.from_flm(weights, config)) == set(VLModel(config).state_dict())
