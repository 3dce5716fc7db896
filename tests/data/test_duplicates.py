import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastvlp.batch import Record
from fastvlp.cli import main
from fastvlp.data.caption_cut import CaptionCut
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.sources.importing import import_data
from fastvlp.data.sources.inspection import as_tables, inspect_data
from fastvlp.data.tokenize import Tokenizer


def photo(seed: int, side: int = 200) -> Image.Image:
    """Smooth areas of many colours, as in a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)


def scene(seed: int) -> Image.Image:
    """A few shapes on a plain area, as in rendered sets."""
    rng = np.random.default_rng(seed)
    image = np.full((64, 64, 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(3):
        x, y, w = rng.integers(0, 44), rng.integers(0, 44), rng.integers(8, 20)
        image[y : y + w, x : x + w] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write(folder: Path, split: str, images: Sequence[bytes]) -> None:
    with ShardWriter(folder / split) as writer:
        for n, data in enumerate(images):
            writer.write(Record(key=f"r{n}", images=(data,), info={"captions": ["x"]}))


def test_copies_in_another_split_are_found(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    pytest.importorskip("scipy")
    pictures = [photo(n) for n in range(6)]
    train = [encoded(picture) for picture in pictures]
    copies = [
        train[0],
        encoded(pictures[1], "JPEG", quality=70),
        encoded(pictures[2].resize((120, 90)), "WEBP", quality=80),
        encoded(photo(77)),
        encoded(Image.fromarray(255 - np.asarray(pictures[3]))),
    ]
    write(tmp_path, "train", [*train, train[5]])
    write(tmp_path, "test", copies)
    report = inspect_data(tmp_path)
    found = {one.second: (one.first, one.exact) for one in report.duplicates}
    assert report.perceptual and found == {
        ("train", "r0"): (("test", "r0"), True),
        ("train", "r1"): (("test", "r1"), False),
        ("train", "r2"): (("test", "r2"), False),
    }
    file = io.StringIO()
    Console(file=file, width=100).print(as_tables(report.splits, report.duplicates))
    assert "1 of the same bytes, 2 that look the same" in file.getvalue() and "test/r0" in file.getvalue()


def test_other_scenes_on_plain_areas_are_no_copies(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    write(tmp_path, "train", [encoded(scene(n)) for n in range(300)])
    write(tmp_path, "val", [encoded(scene(n)) for n in (*range(1000, 1100), 7)])
    found = inspect_data(tmp_path).duplicates
    assert [(one.first, one.second, one.exact) for one in found if one.exact] == [
        (("train", "r7"), ("val", "r100"), True)
    ]
    assert len(found) <= 3


def test_the_same_image_twice_in_one_split_is_no_leak(tmp_path: Path) -> None:
    write(tmp_path, "train", [encoded(photo(0))] * 3)
    write(tmp_path, "val", [encoded(photo(1))])
    assert inspect_data(tmp_path).duplicates == []


def test_what_is_cut_of_captions() -> None:
    cut = CaptionCut(max_length=5)
    cut.add_lengths([3, 5, 6, 12])
    # Of 1 + 3 + 4 + 10 words the last 1 and 7 are cut.
    assert (cut.captions, cut.cut, cut.tokens, cut.lost) == (4, 2, 18, 8)
    assert "2 of 4 captions (50.0%) and 44.4% of their tokens" in str(cut)


def test_import_and_inspect_say_what_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["one", "one two", "one two three four five"]
    Tokenizer.train(words * 20, "wordpiece", 60).save(tmp_path / "tokenizer.json")
    rows = []
    for n, caption in enumerate(words):
        (tmp_path / f"{n}.png").write_bytes(encoded(photo(n)))
        rows.append({"image": f"{n}.png", "caption": caption})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"tokenizer": tmp_path / "tokenizer.json", "max_length": 5}
    done = import_data(tmp_path / "t.jsonl", tmp_path / "out", **options)
    (report,) = inspect_data(tmp_path / "out", **options).splits
    for cut in (done.cut, report.cut):
        assert cut is not None and (cut.captions, cut.cut, cut.tokens, cut.lost) == (3, 1, 8, 2)
    flags = ["--tokenizer", str(options["tokenizer"]), "--max-length", "5"]
    assert main(["data", "import", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "o"), *flags]) == 0
    assert main(["data", "inspect", str(tmp_path / "o"), *flags]) == 0
    assert capsys.readouterr().out.count("1 of 3 captions") == 2
    assert import_data(tmp_path / "t.jsonl", tmp_path / "plain").cut is None
