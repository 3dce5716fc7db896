"""Sizes by name, on the command line too: a model of another size and of the recipe's kind."""

from __future__ import annotations

import pytest

from fastvlp.cli import main
from fastvlp.errors import UserError
from fastvlp.model.named_sizes import named_size, named_sizes
from fastvlp.model.sizes import flip_small, flm_base, tiny, two_towers
from fastvlp.recipes import recipe
from fastvlp.training import loop
from fastvlp.training.train_config import TrainConfig


@pytest.mark.parametrize("name", named_sizes())
def test_each_is_a_model_whose_parts_fit(name):
    named_size(name).check()


def test_the_recipe_says_which_parts_there_are():
    flm, towers = recipe("flm_photos").model, recipe("clip_photos").model
    assert named_size("tiny", like=flm) == tiny()
    assert named_size("flm_base", like=recipe("ar_photos").model) == flm_base(reconstructor=False)
    assert named_size("tiny", like=towers) == two_towers(tiny(), width=towers.embed.width)
    assert named_size("flip_small", like=towers) == flip_small()
    both = named_size("tiny", like=recipe("flip_clip_flm").model)
    assert both.fusion == tiny().fusion and both.embed is not None
    # The regions are the data's.
    single = recipe("uniter_demo").model
    assert named_size("uniter_base", like=single).single.regions == single.single.regions
    pooled = named_size("tiny", like=recipe("uniter_end2end").model)
    assert pooled.single.regions.feature == 96 and pooled.image == tiny().image
    for name, grid in (("brivl_demo", None), ("brivl_photos", 6)):
        assert named_size("brivl_tiny", like=recipe(name).model).embed.image.regions.grid == grid
    for name in ("brivl", "tiny"):
        assert named_size(name, like=towers).embed.image.regions is None


@pytest.mark.parametrize(
    ("name", "like", "part", "fitting"),
    [
        ("clip_b32", "flm_demo", "fusion", "tiny"),
        ("tiny", "uniter_demo", "single stream", "uniter_base"),
        ("uniter_base", "flm_demo", "encoders", "small"),
        ("small", "brivl_demo", "regions", "brivl_small"),
    ],
)
def test_a_size_of_another_kind_is_refused_with_those_that_fit(name, like, part, fitting):
    with pytest.raises(UserError, match=f"{name} .*{part}.*{fitting}"):
        named_size(name, like=recipe(like).model)


def test_the_command_line_takes_a_size_and_overrides_its_fields(monkeypatch, capsys):
    runs: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", lambda run, *args, **options: runs.append(run))
    assert main(["pretrain", "flm_photos", "--model", "tiny", "--model.image.patch", "6"]) == 0
    assert main(["pretrain", "flm_photos", "--model.image.patch", "6", "--model=tiny"]) == 0
    assert runs[0].model == runs[1].model == tiny(patch=6)
    assert main(["pretrain", "flm_photos", "--model", "tinny"]) == 2
    assert "tiny" in capsys.readouterr().err
    assert main(["pretrain", "flm_photos", "--model"]) == 2
    assert "flm_base" in capsys.readouterr().err
