"""Tables of Parquet, as data sets on a hub are."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from fastvlp.data.sources.importing import import_data
from tests.data.read_source import picture, read


def parquet(path: Path, columns: dict, schema: object = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns, schema=schema), path)
    return path


def cell(colour: str, path: str | None = None) -> dict:
    return {"bytes": picture(colour), "path": path}


def test_a_second_column_of_images_is_left_out(tmp_path: Path) -> None:
    columns = {"image": [cell("red")], "text": ["hello"], "conditioning_image": [cell("blue")], "when": [1]}
    columns |= {"day": [datetime.date(2020, 1, 2)], "masks": [[b"1"]]}
    path = parquet(tmp_path / "t.parquet", columns)
    infos, dropped, notes = read(path)
    (info,) = infos.values()
    assert info == {"captions": ["hello"], "when": 1, "day": "2020-01-02"} and not dropped
    assert sorted(note.split()[1] for note in notes) == ["conditioning_image", "masks"]
    assert import_data(path, tmp_path / "out").written == {"train": 1}


def test_a_path_without_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs/1.jpg").write_bytes(picture("blue"))
    cells = [{"bytes": None, "path": "imgs/1.jpg"}, cell("red", "x.jpg"), {"bytes": None, "path": None}, None]
    path = parquet(tmp_path / "t.parquet", {"image": cells, "caption": list("abcd")})
    infos, dropped, _ = read(path)
    assert infos["imgs/1"]["captions"] == ["a"] and len(infos) == 2
    assert dropped.keys() == {"t.parquet:2", "t.parquet:3"}


def test_a_damaged_column_and_a_bad_text_are_left_out(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    bad = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])), pa.py_buffer(b"a\xffc")],
    )
    times = pa.array([1 << 62] * 3, pa.timestamp("ms"))
    path = parquet(tmp_path / "t.parquet", {"image": [cell("red")] * 3, "caption": bad, "time": times})
    infos, dropped, notes = read(path)
    assert [info["captions"] for info in infos.values()] == [["a"], ["c"]] and dropped.keys() == {"t.parquet:1"}
    assert any("time" in note for note in notes)
    columns = {"image": [cell("red")], "caption": ["x"], "other": ["MARK" * 50]}
    path = parquet(tmp_path / "u.parquet", columns)
    data = bytearray(path.read_bytes())
    metadata = pytest.importorskip("pyarrow.parquet").ParquetFile(path).metadata.row_group(0).column(3)
    for at in range(metadata.data_page_offset, metadata.data_page_offset + 12):
        data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    infos, dropped, notes = read(path)
    assert [info["captions"] for info in infos.values()] == [["x"]] and any("other" in note for note in notes)


def test_classes_have_the_names_of_the_schema(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": [cell("red"), cell("blue")], "label": [1, 0]}).replace_schema_metadata(metadata)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    assert [info["label"] for info in read(tmp_path / "t.parquet")[0].values()] == ["dog", "cat"]
    plain = parquet(tmp_path / "u.parquet", {"image": [cell("red"), cell("blue")], "label": [0, 1]})
    assert [info["label"] for info in read(plain)[0].values()] == [0, 1]
