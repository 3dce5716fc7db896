"""An export has what serving reads and no more, and is there whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from fastvlp.errors import UserError
from fastvlp.eval.embedding_retrieval import evaluate_retrieval
from fastvlp.eval.evaluation import add_result
from fastvlp.exporters import native
from fastvlp.exporters.export import export
from fastvlp.search.embedder import Embedder


def tensors(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {*file.keys()}


def test_exports_have_the_heads_of_abilities_and_no_other_parameters(exports):
    kept = {name: {key for key in tensors(folder) if key.startswith("objectives.")} for name, folder in exports.items()}
    assert kept["towers"] == set()
    assert {key.split(".")[1] for key in kept["all"]} == {"itm"}
    assert {key.split(".")[1] for key in kept["vqa"]} == {"vqa"}
    assert {path.name for path in exports["all"].iterdir()} == {
        "model.json",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "card.json",
        "README.md",
    }


def test_exports_do_not_name_the_place_of_the_run(exports, runs, world):
    for folder in exports.values():
        for path in folder.iterdir():
            data = path.read_bytes()
            assert str(world).encode() not in data and str(runs["all"].parent).encode() not in data, path


def test_the_card_is_filled_from_the_run(runs, tmp_path):
    run = shutil.copytree(runs["towers"], tmp_path / "run")
    result = {"scores": {"towers": {"text_to_image/recall@1": 0.25}}}
    add_result(run, "retrieval", "somewhere/photos/test", {"scores": {"towers": {"text_to_image/recall@1": 0.125}}})
    add_result(run, "retrieval", "somewhere/photos/test", result)
    card = export(run, tmp_path / "out", license="cc-by-4.0").card
    assert card["scores"] == {"retrieval, photos/test": {"text_to_image/recall@1": 0.25}}
    assert card["objectives"] == {"clip": "CLIPConfig"} and card["data"]["train"].endswith("/train")
    assert card["training"]["step"] == 1 and card["training"]["pairs"] == 8 and card["training"]["device"]
    assert card == json.loads((tmp_path / "out" / "card.json").read_text()) == Embedder.load(tmp_path / "out").card
    text = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "license: cc-by-4.0",
        "| text_to_image/recall@1 | 0.25 |",
        card["training"]["device"],
        "clip (CLIPConfig)",
    ):
        assert words in text


def test_the_card_describes_the_exported_checkpoint(runs, tmp_path):
    run = shutil.copytree(runs["towers"], tmp_path / "run")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (best,) = (line for line in lines if line["kind"] == "validation")
    with (run / "log.jsonl").open("a") as log:
        for kind in ("train", "validation"):
            log.write(
                json.dumps(best | {"kind": kind, "step": 297, "elapsed": 9999.0, "loss": best["loss"] + 1}) + "\n"
            )
    card = export(run, tmp_path / "out").card
    assert card["validation"]["loss"] == best["loss"]
    training = {name: card["training"][name] for name in ("step", "steps", "pairs", "weights")}
    assert training == {"step": 1, "steps": 297, "pairs": 8, "weights": "best.safetensors"}
    assert card["training"]["seconds"] == pytest.approx(best["elapsed"], abs=1e-3)
    assert f"| loss | {best['loss']:.4g} |" in (tmp_path / "out" / "README.md").read_text()


def test_the_cards_code_runs_where_it_was_exported(runs, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(pictures[0])
    for out, named in ((Path("exports/small"), "exports/small"), (tmp_path / "own", "own")):
        export(runs["towers"], out)
        code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        assert f'Embedder.load("{named}")' in code
        ran: dict[str, object] = {}
        exec(code, ran)
        assert ran["scores"].shape == (1, 1)


def test_a_missing_licence_has_a_placeholder(exports):
    text = (exports["towers"] / "README.md").read_text()
    assert "license: other" in text and "Not chosen yet" in text


def test_an_export_that_fails_leaves_nothing(runs, tmp_path, monkeypatch):
    def fails(card, place):
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "card_text", fails)
    with pytest.raises(KeyboardInterrupt):
        export(runs["towers"], tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_existing_files_are_not_overwritten(exports, runs, tmp_path):
    with pytest.raises(UserError, match=str(exports["towers"])):
        export(runs["towers"], exports["towers"])
    (tmp_path / "empty").mkdir()
    export(runs["towers"], tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").exists()


def test_an_export_is_evaluated_as_the_run_is(exports, runs, world, tmp_path):
    # The results are written into the folders: other tests read the originals.
    exported = evaluate_retrieval(shutil.copytree(exports["towers"], tmp_path / "export"), data=world)
    original = evaluate_retrieval(shutil.copytree(runs["towers"], tmp_path / "run"), data=world)
    assert exported.scores == original.scores
