"""Benchmarks in the forms in which they are published: how items and pictures are read, and each from the command line."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlp.cli import main
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.benchmark_items import make_pairs, open_pictures, read_items
from fastvlp.eval.encoding import open_run
from fastvlp.eval.evaluation import evaluate_embeddings
from fastvlp.eval.pair_methods import score_by_all
from fastvlp.eval.picture_files import PictureFolder
from fastvlp.eval.split_reading import read_captions
from fastvlp.eval.sugarcrepe import KINDS, evaluate_sugarcrepe, read_sugarcrepe
from fastvlp.eval.vsr import evaluate_vsr
from fastvlp.eval.winoground import evaluate_winoground
from fastvlp.model.model import VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import with_tokenizer
from tests.made import VOCAB
from tests.made_single import single_config


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip with the test images, called as those of COCO in a folder val2017, and their captions beside it."""
    folder = tmp_path_factory.mktemp("benchmark")
    shards = Shards(world / "test")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(len(shards)):
            archive.writestr(f"val2017/{i:012d}.png", shards.images(i)[0])
    captions = [its[0] for its in read_captions(shards, "captions_zh")]
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def captions_of(folder: Path) -> list[str]:
    return json.loads((folder / "captions.json").read_text())


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def results(run: Path, name: str) -> list[dict]:
    (path,) = (run / "evaluations").glob(f"{name}-*.json")
    return json.loads(path.read_text())["results"]


@pytest.mark.parametrize("zipped", [True, False])
def test_pictures_are_found_by_what_items_call_them(zipped: bool, tmp_path: Path):
    names = ["val2017/000000000139.png", "ex_0_img_0.png", "a/same.png", "b/same.png"]
    place = tmp_path / "images.zip" if zipped else tmp_path
    if zipped:
        with zipfile.ZipFile(place, "w") as archive:
            for shade, name in enumerate([*names, "__MACOSX/ex_0_img_0.png", "notes.txt"]):
                archive.writestr(name, png(shade))
    else:
        for shade, name in enumerate(names):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(png(shade))
    source = PictureFolder(place)
    assert sorted(source.names) == sorted(names)
    for called in ("val2017/000000000139.png", "000000000139.png", "000000000139", "139", 139, "coco/000000000139.png"):
        assert source.find(called) == names[0]
    assert source.find("ex_0_img_0") == names[1] and source.find("a/same.png") == names[2]
    assert source.find("../secret.png") is None and source.find(140) is None
    with pytest.raises(UserError, match=r"2 .*same"):
        source.find("same.png")
    pairs = make_pairs(source, [139, "ex_0_img_0", "000000000139.png"], ["a", "b", "a"])
    assert pairs.image_P.tolist() == [0, 1, 0] and pairs.text_P.tolist() == [0, 1, 0] and pairs.texts == ["a", "b"]
    assert pairs.pictures.images(1) == (png(1),) and len(pairs.pictures.fingerprint) == 64
    with pytest.raises(UserError, match=r"1 of 2 pictures .*nowhere.*`images`"):
        make_pairs(source, [139, "nowhere"], ["a", "b"])


def test_a_damaged_or_huge_member_of_a_zip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(1) * 50)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[50] ^= 0xFF
    (tmp_path / "broken.zip").write_bytes(content)
    with pytest.raises(RecordError, match=r"a\.png"):
        PictureFolder(tmp_path / "broken.zip").read("a.png")
    monkeypatch.setattr("fastvlp.eval.picture_files.MOST_BYTES", 100)
    with pytest.raises(RecordError, match="more than the 100"):
        PictureFolder(tmp_path / "images.zip").read("a.png")
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"no\.zip: neither a folder nor a readable \.zip"):
        PictureFolder(tmp_path / "no.zip")


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.json", "[]", "no item"),
        ("a.json", "[3]", "item 1 is no object"),
        ("a.json", "{", "not JSON"),
        ("a.jsonl", '{"caption": "x"}\nnot json\n', "a.jsonl:2"),
        ("a.jsonl", '{"caption": ""}', "item 1 has '' in the field 'caption'"),
        ("a.jsonl", '{"caption": "a"}\n{"text": "b"}', r"item 2 lacks the field 'caption' \(its fields: text\)"),
    ],
)
def test_items_of_another_form_are_named(name: str, text: str, part: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=part):
        read_items(tmp_path / name).texts("caption")


def test_truth_is_0_or_1(tmp_path: Path):
    assert read_items(jsonl(tmp_path / "a.jsonl", [{"label": 1}, {"label": 0}])).truths("label") == [True, False]
    with pytest.raises(UserError, match="item 1 has 2 in"):
        read_items(jsonl(tmp_path / "a.jsonl", [{"label": 2}])).truths("label")


def test_sugarcrepe_as_published_is_one_file_for_each_kind(tmp_path: Path):
    row = {"filename": "000000000001.jpg", "caption": "a", "negative_caption": "b"}
    for kind in ("swap_att", "add_obj"):
        (tmp_path / f"{kind}.json").write_text(json.dumps({"0": row, "7": row | {"caption": kind}}))
    _, captions, negatives, kinds = read_sugarcrepe(tmp_path)
    assert kinds == ["add_obj"] * 2 + ["swap_att"] * 2 and captions == ["a", "add_obj", "a", "swap_att"]
    assert negatives == ["b"] * 4
    assert read_sugarcrepe(tmp_path / "swap_att.json")[3] == ["swap_att"] * 2
    with pytest.raises(UserError, match=f"{KINDS[0]}.json"):
        read_sugarcrepe(tmp_path.parent)


def test_pictures_lie_beside_the_items(tmp_path: Path):
    items = jsonl(tmp_path / "a.jsonl", [{}])
    with pytest.raises(UserError, match="`images`"):
        open_pictures(None, items)
    (tmp_path / "own.png").write_bytes(png(1))
    assert open_pictures(None, items).place == tmp_path
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(png(1))
    assert open_pictures(None, items).place == tmp_path / "images"


@pytest.mark.slow
def test_each_method_scores_pairs_in_their_order(runs: dict[str, Path], pictures: Path):
    captions = captions_of(pictures)
    names = [3, 0, 3, 5, 0, 1]
    pairs = make_pairs(PictureFolder(pictures / "images.zip"), names, captions)
    opened = open_run(runs["both"])
    scores = score_by_all(opened, pairs)
    assert [*scores] == ["cosine", "match", "likelihood"]
    for p, (name, caption) in enumerate(zip(names, captions, strict=True)):
        alone = make_pairs(PictureFolder(pictures / "images.zip"), [name], [caption])
        for method, score in score_by_all(opened, alone).items():
            torch.testing.assert_close(score[0], scores[method][p], atol=1e-5, rtol=1e-4)
    assert [*score_by_all(open_run(runs["flm"]), pairs)] == ["likelihood"]
    with pytest.raises(UserError, match=r"`by` cosine.*likelihood"):
        score_by_all(open_run(runs["flm"]), pairs, "cosine")


def test_a_run_that_reads_regions_is_refused(pictures: Path, tmp_path: Path):
    tokenizer = Tokenizer.train(["a cat", "a dog"], vocab_size=VOCAB)
    save_model(tmp_path, VLModel(with_tokenizer(single_config(), tokenizer)), tokenizer, {"objectives": {}})
    with pytest.raises(UserError, match="reads regions"):
        score_by_all(open_run(tmp_path), make_pairs(PictureFolder(pictures / "images.zip"), [0], ["a cat"]))


def test_sugarcrepe_from_the_command_line(runs: dict[str, Path], pictures: Path, capsys: pytest.CaptureFixture[str]):
    captions = captions_of(pictures)
    rows = [
        {"filename": f"{i:012d}.png", "caption": own, "negative_caption": captions[i - 1], "kind": KINDS[i % 2]}
        for i, own in enumerate(captions)
    ]
    data = jsonl(pictures / "sugarcrepe.jsonl", rows)
    assert main(["evaluate", "sugarcrepe", str(runs["both"]), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("cosine", "match", "likelihood", "macro", "50.00 %", "items 6"))
    (saved,) = results(runs["both"], "sugarcrepe")
    by_function = evaluate_sugarcrepe(runs["both"], data=data)
    assert saved["scores"] == by_function.scores and saved["items_by_kind"] == {"add_att": 3, "add_obj": 3}
    # The other way round, what was right is wrong.
    turned = [row | {"caption": row["negative_caption"], "negative_caption": row["caption"]} for row in rows]
    jsonl(pictures / "turned.jsonl", turned)
    reverse = evaluate_embeddings("sugarcrepe", runs["both"], data=pictures / "turned.jsonl", by="match", batch_size=3)
    assert reverse.scores["match"]["overall"] == pytest.approx(1 - by_function.scores["match"]["overall"])
    assert main(["evaluate", "sugarcrepe", str(runs["flm"]), "--data", str(data), "--by", "match"]) == 2
    assert "--by match" in capsys.readouterr().err


def test_winoground_from_the_command_line(runs: dict[str, Path], pictures: Path, capsys: pytest.CaptureFixture[str]):
    captions = captions_of(pictures)
    rows = [
        {"id": k, "image_0": f"{i:012d}", "image_1": f"{j:012d}", "caption_0": captions[i], "caption_1": captions[j]}
        for k, (i, j) in enumerate([(0, 1), (2, 3), (4, 5), (0, 5)])
    ]
    data = jsonl(pictures / "examples.jsonl", rows)
    assert main(["evaluate", "winoground", str(runs["both"]), "--data", str(pictures)]) == 0
    assert "16.67 %" in capsys.readouterr().out
    scores = evaluate_winoground(runs["both"], data=data, by="match")
    # Against the scores of single pairs.
    text = image = group = 0
    for row in rows:
        names = [row["image_0"], row["image_0"], row["image_1"], row["image_1"]]
        pairs = make_pairs(PictureFolder(pictures / "images.zip"), names, [row["caption_0"], row["caption_1"]] * 2)
        a, b, c, d = score_by_all(open_run(runs["both"]), pairs, "match")["match"].tolist()
        text, image = text + (a > b and d > c), image + (a > c and d > b)
        group += a > b and d > c and a > c and d > b
    assert scores.scores["match"] == {"text": text / 4, "image": image / 4, "group": group / 4}


def test_vsr_from_the_command_line(runs: dict[str, Path], pictures: Path, capsys: pytest.CaptureFixture[str]):
    captions = captions_of(pictures)
    rows = [
        {"image": i, "caption": captions[i - (k % 2)], "label": 1 - k % 2, "relation": "on" if i < 3 else "under"}
        for k, i in enumerate([0, 0, 1, 1, 2, 3, 4, 5])
    ]
    data = jsonl(pictures / "test.jsonl", rows)
    assert main(["evaluate", "vsr", str(runs["both"]), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "auc" in printed and "true 4" in printed
    (saved,) = results(runs["both"], "vsr")
    assert saved["chance"] == {"accuracy": 0.5, "auc": 0.5} and saved["by_relation"]["match"].keys() == {"on", "under"}
    chosen = evaluate_vsr(runs["both"], data=data, validation=data)
    for method, scores in chosen.scores.items():
        assert (
            scores["accuracy"] >= saved["scores"][method]["accuracy"]
            and scores["auc"] == saved["scores"][method]["auc"]
        )
