"""Validation measures the model as it will be used, and its losses do not depend on how training cuts its batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastvlp.data.records.shards import ShardWriter
from fastvlp.model.sizes import joint_space
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.objectives.simclr import SimCLRConfig
from fastvlp.training.loop import start, train, validate
from tests.training.runs import OBJECTIVES, made_pairs, made_records, made_run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def validated(run, **changes):
    return validate(start(replace(run, **changes)))


def test_images_and_texts_are_whole_in_validation_unless_it_is_masked(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "clip")
    run = replace(run, model=replace(run.model, embed=replace(joint_space(run.model, width=16), text_length=12)))

    def with_shares(keep, text_keep):
        objectives = {
            "clip": CLIPConfig(text_keep=text_keep),
            "moco": MoCoConfig(queue=8, key_keep=keep, text_keep=text_keep),
            "simclr": SimCLRConfig(width=8, keep=keep),
        }
        return replace(run, keep=keep, objectives=objectives)

    whole, part = validated(with_shares(1.0, 1.0)), with_shares(0.5, 0.5)
    assert validated(part) == whole
    masked = validated(part, masked_validation=True)
    assert masked.keys() == whole.keys() and all(masked[name] != whole[name] for name in whole)
    # Training still encodes a share.
    state = start(part)
    assert next(state.train.batches())[0].seed is not None and state.pretraining.training
    batch = next(state.train.batches())[0]
    assert state.pretraining.encode_image(batch).shape[1] < state.pretraining.eval().encode_image(batch).shape[1]


@pytest.mark.parametrize("objective", ["clip", "siglip", "simclr", "moco", "albef", "itm"])
def test_a_validation_loss_does_not_depend_on_the_batch_size(pairs, tmp_path, objective):
    run = made_run(pairs, tmp_path / "a", *([objective] if objective != "itm" else ["mlm"]))
    if objective == "itm":
        run = replace(run, objectives={"itm": ITMConfig()})
    losses = [validated(run, data=replace(run.data, batch_size=rows)) for rows in (2, 3, 5, 8)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_rows_are_told_apart_among_a_fixed_number(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "clip", batch_size=4)
    state = start(replace(run, validation_rows=3))
    module = state.pretraining.eval()
    batch, _ = next(state.val.once(6))
    wanted = []
    with torch.no_grad():
        image, text, *_ = module.objectives["clip"].embed(state.model, state.model.encode_image(batch.image), batch)
        for part in (slice(0, None, 2), slice(1, None, 2)):
            logits = module.objectives["clip"].scale() * image[part] @ text[part].T
            wanted += torch.nn.functional.cross_entropy(logits, torch.arange(3), reduction="none").tolist()
    assert validate(state)["clip/image"] == pytest.approx(sum(wanted) / 6, rel=1e-5)
    assert validate(start(replace(run, validation_rows=300)))["clip/image"] != pytest.approx(sum(wanted) / 6)


@pytest.mark.parametrize("objective", ["clip", "siglip", "moco", "itm"])
def test_one_row_is_no_validation(pairs, tmp_path, objective, capsys):
    with ShardWriter(tmp_path / "one") as writer:
        writer.write(made_records(1, seed=5)[0])
    run = made_run(pairs, tmp_path / "a", *([objective] if objective in OBJECTIVES else ["mlm"]), steps=1)
    run = replace(run, data=replace(run.data, val=str(tmp_path / "one")))
    if objective == "itm":
        run = replace(run, objectives={"itm": ITMConfig()})
    state = train(run)
    assert state.best == math.inf and not (tmp_path / "a/best.safetensors").exists()
    assert "no validation" in capsys.readouterr().out
    # Beside an objective that one row is enough for, it counts alone.
    both = validated(run, objectives=run.objectives | {"mlm": OBJECTIVES["mlm"]}, out=str(tmp_path / "b"))
    assert both.keys() == {"loss", "mlm/masked"} and both["loss"] == both["mlm/masked"]


def test_a_batch_that_does_not_divide_the_rows_leaves_no_row_alone(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", batch_size=5)
    run = replace(run, objectives={"itm": ITMConfig()})
    rows = [len(batch) for batch, _ in start(run).val.once(4)]
    assert rows == [3, 3]
