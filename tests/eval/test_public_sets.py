"""Folders of classes and public sets by name: their labels, what ObjectNet leaves out, and its border."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastvlp.cli import main
from fastvlp.data.records.decode import read_pixels
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.errors import UserError
from fastvlp.eval.labelled_images import class_folders, open_labelled_images, without_border
from fastvlp.eval.public_sets import PUBLIC_SETS, imagenet_classes
from fastvlp.eval.zeroshot import evaluate_zeroshot


def write_picture(path: Path, shade: int = 0, size: int = 12, border: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (size, size), (255, 0, 0))
    image.paste((shade, shade, 9), (border, border, size - border, size - border))
    image.save(path)


def labels(data: Path, classes: str, split: str = "test") -> list[str]:
    found = open_labelled_images(str(data), split, classes, "label")
    names = [*found.names_of.values()]
    return [names[c][0] for c in found.label_I.tolist()]


def test_imagenet_has_its_classes_in_order():
    wnids = [wnid for wnid, _, _ in imagenet_classes()]
    assert len({*wnids}) == 1000 and wnids == sorted(wnids)
    names = {name: PUBLIC_SETS[name].names_of(Path()) for name in PUBLIC_SETS if name != "objectnet"}
    assert {name: len(its) for name, its in names.items()} == {
        "imagenet": 1000,
        "imagenet-v2": 1000,
        "imagenet-a": 200,
        "imagenet-r": 200,
        "imagenet-sketch": 1000,
    }
    assert names["imagenet"]["n02012849"] == ["crane bird"] and names["imagenet"]["n03126707"] == ["construction crane"]
    # Stingrays are in both sets of 200, the white shark in ImageNet-R alone, the electric ray in none.
    for wnid, own in (("n01498041", (True, True)), ("n01484850", (False, True)), ("n01496331", (False, False))):
        assert tuple(wnid in names[f"imagenet-{letter}"] for letter in "ar") == own
    assert len(names["imagenet-a"].keys() & names["imagenet-r"].keys()) == 86


def test_folders_are_called_by_wordnet_id_or_by_number(tmp_path: Path):
    for folder in ("n01440764", "n01443537"):
        write_picture(tmp_path / "sketch" / folder / "a.jpg")
    assert labels(tmp_path, "imagenet-sketch") == ["tench", "goldfish"], "a folder above the classes is no class"
    for folder in ("2", "10", "999"):
        write_picture(tmp_path / "v2" / folder / "a.jpg")
    # Sorted as strings, 10 would be the second folder.
    assert {*labels(tmp_path / "v2", "imagenet-v2")} == {"great white shark", "brambling", "toilet paper"}
    with pytest.raises(UserError, match=r"imagenet-a: no class 'n01440764'"):
        labels(tmp_path / "sketch", "imagenet-a")


def test_folders_of_splits_are_no_classes(tmp_path: Path):
    for split in ("train", "val"):
        write_picture(tmp_path / split / "n01440764" / "a.jpg")
    with pytest.raises(UserError, match=r"train, val.*`split`"):
        labels(tmp_path, "imagenet")
    assert labels(tmp_path, "imagenet", "val") == ["tench"]


def test_shards_and_empty_folders_are_no_class_folders(world: Path, tmp_path: Path):
    assert class_folders(str(world / "test")) is None and class_folders(str(tmp_path)) is None
    assert class_folders("s3://bucket/imagenet") is None


@pytest.fixture
def objectnet(tmp_path: Path) -> Path:
    for folder, shade in (("alarm_clock", 40), ("air_freshener", 80), ("ruler", 120)):
        write_picture(tmp_path / "images" / folder / "a.png", shade, border=2)
    (tmp_path / "mappings").mkdir()
    folders = {"alarm_clock": "Alarm clock", "air_freshener": "Air freshener", "ruler": "Ruler"}
    shared = {"Alarm clock": "analog clock; digital clock", "Ruler": "rule, ruler"}
    (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    return tmp_path


def test_objectnet_has_the_classes_of_imagenet_without_its_border(objectnet: Path):
    for data in (objectnet, objectnet / "images"):
        found = open_labelled_images(str(data), "test", "objectnet", "label")
        assert found.names_of == {"alarm_clock": ["alarm clock"], "ruler": ["ruler"]}
        assert found.left_out == 1 and found.label_I.tolist() == [0, 1]
        for i, shade in enumerate((40, 120)):
            pixels = read_pixels(found.records.images(i)[0])
            assert pixels.shape == (8, 8, 3)
            assert pixels.unique(dim=0).shape[0] == 1 and pixels[0, 0].tolist() == [shade, shade, 9]
    assert found.records.fingerprint != class_folders(str(objectnet / "images")).fingerprint


def test_objectnet_needs_its_own_mappings(objectnet: Path):
    (objectnet / "mappings" / "objectnet_to_imagenet_1k.json").write_text("[]")
    with pytest.raises(UserError, match="copy them again"):
        labels(objectnet, "objectnet")
    (objectnet / "mappings" / "objectnet_to_imagenet_1k.json").unlink()
    with pytest.raises(UserError, match=r"mappings/ of objectnet-1\.0"):
        labels(objectnet, "objectnet")


def test_a_border_is_cut_without_loss():
    pixels = torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    assert torch.equal(read_pixels(without_border(file.getvalue(), 2, "a")), pixels[2:-2, 2:-2])
    with pytest.raises(RecordError, match="nothing is left"):
        without_border(file.getvalue(), 4, "a")
    with pytest.raises(RecordError, match="cannot be decoded"):
        without_border(b"no image", 2, "a")


def test_class_folders_score_as_the_imported_images(runs, world: Path, tmp_path: Path, capsys):
    shards = Shards(world / "singles-test")
    for i in range(len(shards)):
        place = tmp_path / "folders" / str(shards.info(i)["label"]) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(shards.images(i)[0])
    run = shutil.copytree(runs["both"], tmp_path / "run")
    wanted = evaluate_zeroshot(run, data=world / "singles-test", templates="simple")
    assert main(["evaluate", "zeroshot", str(run), "--data", str(tmp_path / "folders"), "--templates", "simple"]) == 0
    assert f"images {len(shards)}" in capsys.readouterr().out
    found = evaluate_zeroshot(run, data=tmp_path / "folders", templates="simple")
    assert found.scores == wanted.scores and found.details == wanted.details
