"""mteb's own runner on an export: tasks of local data have the scores of our own evaluations."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlp.batch import Record
from fastvlp.cli import main
from fastvlp.data.records.shards import ShardWriter
from fastvlp.errors import UserError
from fastvlp.eval.embedding_retrieval import evaluate_retrieval
from fastvlp.eval.mteb_scores import evaluate_mteb
from fastvlp.eval.mteb_tasks import zeroshot_task
from fastvlp.eval.split_reading import open_split
from fastvlp.eval.zeroshot import evaluate_zeroshot
from fastvlp.exporters.export import export
from tests.documents import DOCS
from tests.exporters.made_runs import CAPTIONS, clip_shaped, made_run
from tests.installed import skip_without

skip_without("mteb", "sentence_transformers", install="-e '.[mteb]'")

LABELS = ["red circle", "dog", "blue squares", "beach", "桌子"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, its export, and shards whose pictures have the model's size, so that nothing is resized."""
    folder = tmp_path_factory.mktemp("mteb")
    export(made_run(folder / "run", clip_shaped()), folder / "exported", to="sentence-transformers")
    words = CAPTIONS[0].split() + CAPTIONS[1].split()
    pixels = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with ShardWriter(folder / "data" / "test") as writer:
        for i, image in enumerate(pixels.numpy()):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            captions = [" ".join(words[(i * k) % 11 : (i * k) % 11 + 3] + words[i % 12 :]) for k in (1, 3)]
            info = {"captions": captions, "label": LABELS[i % len(LABELS)]}
            writer.write(Record(key=str(i), images=(file.getvalue(),), info=info))
    return folder


@pytest.mark.slow
def test_the_scores_are_those_of_our_own_evaluations(made: Path, capsys: pytest.CaptureFixture[str]):
    data = made / "data"
    assert main(["evaluate", "mteb", str(made / "exported"), "--data", str(data), "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "text_to_image/r1" in printed and "top1" in printed and "chance" in printed
    by_mteb = evaluate_mteb(made / "exported", data=data)
    retrieval = evaluate_retrieval(made / "run", data=data)
    zeroshot = evaluate_zeroshot(made / "run", data=data, templates="simple")
    scores = by_mteb.scores["retrieval"]
    assert scores.keys() == {
        f"{a}_to_{b}/r{k}" for a, b in (("image", "text"), ("text", "image")) for k in (1, 5, 10)
    } | {"recall"}
    assert scores == pytest.approx({name: retrieval.scores["towers"][name] for name in scores}, abs=1e-5)
    assert by_mteb.scores["zeroshot"]["top1"] == pytest.approx(zeroshot.scores["zero-shot"]["top1"])
    assert by_mteb.errors["zeroshot"]["top1"] == pytest.approx(zeroshot.errors["zero-shot"]["top1"])
    assert by_mteb.chance["recall"] == retrieval.chance["recall"] and by_mteb.chance["top1"] == 0.2
    assert by_mteb.counts == {
        "retrieval_images": 20, "retrieval_texts": 40, "zeroshot_images": 20, "zeroshot_classes": 5,
    }  # fmt: skip
    assert 0 < scores["recall"] < 1, "an order that is neither all right nor all wrong"


def test_what_mteb_cannot_run_is_named(made: Path):
    with pytest.raises(UserError, match=r"retrieval.*`data`"):
        evaluate_mteb(made / "exported")
    with pytest.raises(UserError, match=str(made / "run")):
        evaluate_mteb(made / "run", data=made / "data")
    with pytest.raises(UserError, match="one text for each class"):
        evaluate_mteb(made / "exported", data=made / "data", tasks=("zeroshot",), templates="flip7")
    with pytest.raises(UserError, match="nor a task of mteb"):
        evaluate_mteb(made / "exported", tasks=("NoSuchTask",))


@pytest.mark.slow
def test_the_example_of_the_guide(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """docs/guide/evaluate.md: mteb's own calls, here with a task made of local data in place of the hub's."""
    import mteb

    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "guide/evaluate.md").read_text(encoding="utf-8"), re.DOTALL)
    records = open_split(str(made / "data"), "test")
    labels = [i % len(LABELS) for i in range(len(records))]
    task = zeroshot_task(records, labels, [f"a photo of a {label}" for label in LABELS])
    monkeypatch.chdir(tmp_path)
    Path("clip_st").symlink_to(made / "exported")
    done: list = []
    run = mteb.evaluate
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [task])
    monkeypatch.setattr(mteb, "evaluate", lambda *args: done.append(run(*args, cache=None)))
    exec(code, {})
    assert 0 <= done[0].task_results[0].scores["test"][0]["accuracy"] <= 1
