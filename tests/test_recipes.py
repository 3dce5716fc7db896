"""Recipes: every one that ships can be made, and a wrong name is answered with the nearest."""

from __future__ import annotations

import pytest

from fastvlp.cli import main
from fastvlp.config import show, to_json
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import with_tokenizer
from fastvlp.recipes import names, recipe
from fastvlp.training.train_config import check


@pytest.mark.parametrize("name", names())
def test_every_recipe_describes_a_run_of_its_name(name):
    run = recipe(name)
    assert run.name == name
    check(run)
    assert to_json(run)["objectives"] and "optim: OptimConfig(lr=" in show(run)


def test_the_paper_run_is_the_papers():
    run = recipe("flm_base")
    assert (run.optim.lr, run.optim.warmup, run.optim.weight_decay, run.optim.betas) == (8e-5, 0.05, 0.01, (0.9, 0.98))
    assert run.steps == 30_000 and run.data.batch_size * run.accumulate * 8 == 4096
    assert (run.optim.cross_multiplier, run.optim.head_multiplier, run.optim.clip) == (5, 5, None)


def test_uniter_is_pretrained_as_released():
    run = recipe("uniter_base")
    assert (run.data.max_tokens, run.data.fill, run.data.group, run.accumulate) == (10_240, "official", 8192, 6)
    assert (run.optim.lr, run.optim.eps, run.optim.betas, run.optim.clip) == (5e-5, 1e-6, (0.9, 0.98), 5.0)
    assert (run.optim.cross_multiplier, run.optim.head_multiplier, run.optim.weight_decay) == (1, 1, 0.01)
    assert run.steps == 200_000 and run.steps * run.optim.warmup == 10_000 and run.seed == 42
    assert run.mix == {"itm": 6, "mlm": 8, "mrfr": 4, "mrc_kl": 4}
    assert run.data.regions.stored and (run.data.regions.least, run.data.regions.most) == (10, 100)
    layer = run.model.single.layer
    assert (run.model.single.depth, layer.width, layer.heads, layer.hidden, layer.norm) == (12, 768, 12, 3072, "post")
    assert run.model.single.regions.feature == 2048 and run.objectives["mrc_kl"].classes == 1601


def test_an_unknown_recipe_is_answered_with_the_nearest(capsys):
    with pytest.raises(UserError, match="did you mean flm_demo"):
        recipe("flm_dmo")
    assert main(["pretrain", "flm_dmo"]) == 2
    assert "did you mean flm_demo" in capsys.readouterr().err


def test_an_unknown_field_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "flm_demo", "--optim.lrr", "1"])
    assert stopped.value.code == 2 and "--optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options", "length"),
    [
        ("flm_demo", ["--steps", "7"], (7, None)),
        ("flm_demo", ["--steps", "7", "--budget-s", "None"], (7, None)),
        ("flm_demo", ["--budget-s", "7"], (None, 7.0)),
        ("flm_base", ["--budget_s=7"], (None, 7.0)),
        ("flm_base", ["--seed", "7"], (30_000, None)),
    ],
)
def test_a_length_given_alone_is_the_runs(monkeypatch, recipe, options, length):
    runs = []
    monkeypatch.setattr("fastvlp.training.loop.train", lambda run, *_, **__: runs.append(run))
    assert main(["pretrain", recipe, *options]) == 0
    assert [(run.steps, run.budget_s) for run in runs] == [length]


@pytest.mark.parametrize("option", ["--from", "--from=", "--init"])
def test_a_run_starts_from_another(monkeypatch, tmp_path, option):
    runs = []
    monkeypatch.setattr("fastvlp.training.loop.train", lambda run, *_, **__: runs.append(run))
    tokenizer, model = Tokenizer.train(["a red box"] * 2, vocab_size=60), recipe("flm_demo").model
    save_model(tmp_path, VLModel(with_tokenizer(model, tokenizer)), tokenizer, {})
    options = [option + str(tmp_path)] if option.endswith("=") else [option, str(tmp_path)]
    assert main(["pretrain", "flm_demo", *options]) == 0
    assert [(run.init, run.model) for run in runs] == [(str(tmp_path), model)]


@pytest.mark.parametrize(
    ("options", "has"), [(["--steps", "7", "--budget-s", "7"], "both"), (["--budget-s", "None"], "neither")]
)
def test_two_lengths_or_none_are_refused_at_once(options, has, capsys):
    assert main(["pretrain", "flm_demo", *options]) == 2
    printed = capsys.readouterr()
    assert has in printed.err and "--steps" in printed.err and "--budget-s" in printed.err and not printed.out


def test_a_file_of_ones_own_is_a_recipe(tmp_path):
    (tmp_path / "mine_of_recipes.py").write_text(
        "from fastvlp.recipes.flm_demo import flm_demo\nmine_of_recipes = flm_demo\n"
    )
    assert recipe(str(tmp_path / "mine_of_recipes.py")).name == "flm_demo"
    (tmp_path / "other_of_recipes.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"other_of_recipes\(\)"):
        recipe(str(tmp_path / "other_of_recipes.py"))
    with pytest.raises(UserError, match="no such Python file"):
        recipe(str(tmp_path / "none.py"))
