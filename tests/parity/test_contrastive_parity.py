"""Parity with open_clip (CLIP and SigLIP losses), ALBEF (batch and queue, soft targets) and BriVL 1.0 (own key and queue).

ALBEF and BriVL were run for some steps with linear towers, momentum copies, queues and plain SGD: they are run again here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.objectives.contrastive import info_nce, queue_nce, sigmoid_loss
from tests.golden import assert_close, load

# Everything kept, and tiles of one row.
WHOLE = pytest.mark.parametrize("whole_logits", [None, 1], ids=["whole", "tiled"])


@WHOLE
def test_clip_loss(whole_logits):
    _, tol, weights, known = load("clip_openclip")
    image, text = (known[f"out.{name}_features"].requires_grad_() for name in ("image", "text"))
    log_scale, own = weights["logit_scale"].requires_grad_(), torch.arange(len(image))
    scale = log_scale.exp()
    loss = sum(
        info_nce(*pair, own, scale, whole_logits=whole_logits).mean() / 2 for pair in ((image, text), (text, image))
    )
    assert_close(loss, known["out.clip_loss"], tol["out.clip_loss"], "loss")
    loss.backward()
    for name, x in (("image_features", image), ("text_features", text), ("logit_scale", log_scale)):
        assert_close(x.grad, known[f"grad.clip.{name}"], tol[f"grad.clip.{name}"], name)


@WHOLE
def test_siglip_loss(whole_logits):
    _, tol, _, known = load("clip_openclip")
    inputs = {name: known[f"out.{name}"] for name in ("image_features", "text_features")}
    inputs |= {name: known[f"in.{name}"] for name in ("siglip_logit_scale", "siglip_logit_bias")}
    image, text, log_scale, bias = (x.requires_grad_() for x in inputs.values())
    loss = sigmoid_loss(image, text, torch.arange(len(image)), log_scale.exp(), bias, whole_logits=whole_logits).mean()
    assert_close(loss, known["out.siglip_loss"], tol["out.siglip_loss"], "loss")
    loss.backward()
    for name, x in inputs.items():
        assert_close(x.grad, known[f"grad.siglip.{name}"], tol[f"grad.siglip.{name}"], name)


def enqueue(queue_KE: Tensor, key_BE: Tensor, first: int) -> Tensor:
    place = (first + torch.arange(len(key_BE))) % len(queue_KE)
    return queue_KE.index_copy(0, place, key_BE.detach())


def follow(momentum: dict[str, Tensor], learned: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: share * x + (1 - share) * learned[name].detach() for name, x in momentum.items()}


def descend(learned: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    return {name: (x - rate * x.grad).detach().requires_grad_() for name, x in learned.items()}


@WHOLE
def test_brivl_steps(whole_logits):
    c, tol, _, known = load("brivl_step")
    rate, scale, own = known["in.lr"].item(), torch.tensor(1 / c["TEMPERATURE"]), torch.arange(c["step_B"])
    sides = ("img", "txt")
    learned = {f"{side}_{kind}": known[f"in.{side}_{kind}0"].requires_grad_() for side in sides for kind in "wb"}
    momentum = {name: known[f"in.{name}0_mom"] for name in learned}
    image_queue, text_queue = (known[f"in.{name}_queue0"].T for name in ("img", "text"))

    def embed(weights: dict[str, Tensor], step: str) -> tuple[Tensor, ...]:
        parts = (F.linear(known[f"in.{step}.{side}_x"], weights[f"{side}_w"], weights[f"{side}_b"]) for side in sides)
        return tuple(F.normalize(x, dim=1) for x in parts)

    for number in range(sum(key.endswith(".loss") for key in known)):
        step = f"step{number + 1}"
        image, text = embed(learned, step)
        image.retain_grad(), text.retain_grad()
        momentum = follow(momentum, learned, c["MOMENTUM"])
        image_key, text_key = embed(momentum, step)
        i2t = queue_nce(image, text_key, text_queue, own, scale, "pos+queue", whole_logits=whole_logits)
        t2i = queue_nce(text, image_key, image_queue, own, scale, "pos+queue", whole_logits=whole_logits)
        for name, rows in (("i2t", i2t), ("t2i", t2i)):
            logits = known[f"out.{step}.{name}_logits"]
            assert_close(rows, -logits.log_softmax(1)[:, 0], tol[f"out.{step}.{name}_logits"], f"{step} rows of {name}")
            assert_close(
                rows.mean(), known[f"out.{step}.loss_{name}"], tol[f"out.{step}.loss_{name}"], f"{step} {name}"
            )
        (i2t.mean() + t2i.mean()).backward()
        grads = {"img_q": image.grad, "txt_q": text.grad} | {name: x.grad for name, x in learned.items()}
        for name, grad in grads.items():
            assert_close(grad, known[f"grad.{step}.{name}"], tol[f"grad.{step}.{name}"], f"{step} gradient of {name}")
        learned = descend(learned, rate)
        image_queue, text_queue = (
            enqueue(queue, key, number * c["step_B"])
            for queue, key in ((image_queue, image_key), (text_queue, text_key))
        )
        for name, queue in (("img", image_queue), ("text", text_queue)):
            assert_close(
                queue.T, known[f"out.{step}.{name}_queue"], tol[f"out.{step}.{name}_queue"], f"{step} {name} queue"
            )


TOWERS = ("visual_encoder.fc", "vision_proj", "text_encoder.fc", "text_proj")


@WHOLE
def test_albef_steps(whole_logits):
    c, tol, _, known = load("albef_ita_step")
    names = [f"{tower}.{kind}" for tower in TOWERS for kind in ("weight", "bias")]
    learned = {name: known[f"in.w0.{name}"].requires_grad_() for name in names}
    momentum = {name: known[f"in.w0.{name.replace('.', '_m.', 1)}"] for name in names}
    temperature, rate, own = torch.tensor(c["temp"]), known["in.lr"].item(), torch.arange(c["B"])
    image_queue, text_queue = (known[f"in.{name}_queue0"].T for name in ("image", "text"))

    def embed(weights: dict[str, Tensor], step: str) -> list[Tensor]:
        parts = []
        for x, towers in ((known[f"in.{step}.image_x"], TOWERS[:2]), (known[f"in.{step}.text_x"], TOWERS[2:])):
            for tower in towers:
                x = F.linear(x, weights[f"{tower}.weight"], weights[f"{tower}.bias"])
            parts.append(F.normalize(x, dim=1))
        return parts

    for number in range(c["steps"]):
        step = f"step{number + 1}"
        temperature = temperature.detach().clamp(0.001, 0.5).requires_grad_()
        image, text = embed(learned, step)
        image.retain_grad(), text.retain_grad()
        momentum = follow(momentum, learned, c["momentum"])
        image_key, text_key = embed(momentum, step)
        directions = {
            "i2t": (image, text_key, text_queue, image_key),
            "t2i": (text, image_key, image_queue, text_key),
        }
        loss = torch.zeros(())
        for name, (query, key, queue, soft) in directions.items():
            args = (query, key, queue, own, 1 / temperature, "batch+queue")
            hard = queue_nce(*args, whole_logits=whole_logits)
            logits, most = known[f"out.{step}.sim_{name}"], tol[f"out.{step}.sim_{name}"]
            assert_close(hard, F.cross_entropy(logits, own, reduction="none"), most, f"{step} hard rows of {name}")
            loss = loss + queue_nce(*args, soft, c["alpha"], whole_logits=whole_logits).mean() / 2
        assert_close(loss, known[f"out.{step}.loss_ita"], tol[f"out.{step}.loss_ita"], f"{step} loss")
        loss.backward()
        grads = {"image_feat": image.grad, "text_feat": text.grad, "temp": temperature.grad}
        for name, grad in (grads | {name: x.grad for name, x in learned.items()}).items():
            assert_close(grad, known[f"grad.{step}.{name}"], tol[f"grad.{step}.{name}"], f"{step} gradient of {name}")
        learned, temperature = descend(learned, rate), temperature - 0.01 * rate * temperature.grad
        assert_close(temperature, known[f"out.{step}.temp_after_sgd"], tol[f"out.{step}.temp_after_sgd"], step)
        image_queue, text_queue = (
            enqueue(queue, key, number * c["B"]) for queue, key in ((image_queue, image_key), (text_queue, text_key))
        )
        for name, queue in (("image", image_queue), ("text", text_queue)):
            assert_close(
                queue.T, known[f"out.{step}.{name}_queue"], tol[f"out.{step}.{name}_queue"], f"{step} {name} queue"
            )
