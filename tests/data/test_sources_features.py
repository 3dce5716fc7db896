"""A detector's regions in UNITER's layouts, joined to the records of other sources."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlp.batch import Dropped, Record
from fastvlp.cli import main
from fastvlp.data.loader import Row
from fastvlp.data.pairs import PairData
from fastvlp.data.records.decode import StoredShape
from fastvlp.data.records.detections import check_arrays, pack, read_npz
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import RegionSource, read_regions
from fastvlp.data.sources import features
from fastvlp.data.sources.importing import import_data
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.model import VLModel
from fastvlp.model.region_embedding import RegionConfig
from fastvlp.model.sizes import tiny_single, with_tokenizer
from fastvlp.objectives.region import MRCConfig, MRFRConfig
from fastvlp.random import hash64
from fastvlp.training.pretraining import Pretraining

Arrays = dict[str, np.ndarray]
CONF = (0.3, 0.9, 0.1)


def arrays(seed: int = 0, conf: tuple[float, ...] = CONF) -> Arrays:
    """As the extractor writes them; the first number of a region's feature is its confidence."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.5, (len(conf), 2))
    size = rng.uniform(0.1, 0.5, (len(conf), 2))
    feature = rng.normal(size=(len(conf), 6))
    feature[:, 0] = conf
    shares = rng.dirichlet(np.ones(5), len(conf))
    made = {"norm_bb": np.concatenate([low, low + size, size], 1), "features": feature, "soft_labels": shares}
    return {name: x.astype(np.float16) for name, x in made.items()} | {"conf": np.array(conf, np.float16)}


def npz(content: Arrays, **options: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **content, **options)
    return file.getvalue()


def packed(x: np.ndarray) -> dict[bytes, Any]:
    """An array as msgpack-numpy writes it."""
    return {b"nd": True, b"type": x.dtype.str, b"kind": b"", b"shape": list(x.shape), b"data": x.tobytes()}


def msgpacked(content: Arrays) -> bytes:
    msgpack = pytest.importorskip("msgpack")
    return msgpack.packb({name: packed(x) for name, x in content.items()}, use_bin_type=True)


def write_lmdb(path: Path, entries: dict[str, bytes], *, keys: bool = True) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="reading an LMDB needs lmdb and msgpack")
    pytest.importorskip("msgpack", reason="reading an LMDB needs lmdb and msgpack")
    path.mkdir()
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for name, value in entries.items():
            transaction.put(name.encode(), value)
        if keys:
            transaction.put(b"__keys__", json.dumps(list(entries)).encode())
    return path


def write_npz(path: Path, entries: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in entries.items():
        (path / name).write_bytes(data)
    return path


ENTRIES = {"coco_val2014_000000000042.npz": 1, "coco_val2014_000000000007.npz": 2}
COCO = "COCO_val2014_000000000042"


def store(folder: Path, layout: str) -> Path:
    if layout == "npz":
        return write_npz(folder / "npz", {name: npz(arrays(seed)) for name, seed in ENTRIES.items()})
    if layout == "compressed":
        # The released converter meant `allow_pickle=True` for an option, and older numpy stores it as an array.
        zipped = {name: npz(arrays(seed) | {"allow_pickle": np.array(True)}) for name, seed in ENTRIES.items()}
        return write_lmdb(folder / "feat_th0.2_max100_min10_compressed", zipped)
    entries = {name: msgpacked(arrays(seed)) for name, seed in ENTRIES.items()}
    return write_lmdb(folder / "feat_th0.2_max100_min10", entries, keys=layout == "lmdb")


LAYOUTS = pytest.mark.parametrize("layout", ["npz", "lmdb", "keyless", "compressed"])


def record(key: str, images: int = 1, **info: Any) -> Record:
    return Record(key=key, images=(b"",) * images, info=info)


def reason(path: Path, item: Record) -> str:
    (dropped,) = features.add_regions(iter([item]), path)
    assert isinstance(dropped, Dropped) and dropped.key == item.key
    return dropped.reason


@LAYOUTS
def test_regions_go_from_uniters_layouts_to_what_training_reads(tmp_path: Path, layout: str) -> None:
    path = store(tmp_path, layout)
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": f"val2014/{COCO}.jpg", "caption": "a cat"}))
    done = import_data(tmp_path / "t.jsonl", tmp_path / "out", images="blank", features=path)
    assert not done.dropped
    (back,) = Shards(tmp_path / "out/train")
    assert back.info["confidences"] == [[0.8999, 0.3, 0.1]] and back.info["captions"] == ["a cat"]
    regions = RegionSource(stored=True, least=2)
    found = read_regions(regions, back.key, back.info, StoredShape(2, 2, 1), Transform(size=8), back.detected)
    own, order = arrays(1), [1, 0]
    assert torch.equal(found.feature_RF, torch.from_numpy(own["features"][order]))
    assert torch.equal(found.classes_RC, torch.from_numpy(own["soft_labels"][order]))
    assert torch.allclose(found.box_R4, torch.from_numpy(own["norm_bb"][order, :4]).float())


@LAYOUTS
def test_a_record_without_regions_is_dropped_by_name(tmp_path: Path, layout: str) -> None:
    path = store(tmp_path, layout)
    assert reason(path, record("val2014/COCO_val2014_000000000043")) == "its regions: no entry of its name"
    gone = Dropped(key="x", reason="image file is missing")
    assert list(features.add_regions(iter([gone]), path)) == [gone]


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("a.npz", "folder/A"),
        ("flickr30k_000001000092795.npz", "flickr30k-images/1000092795"),
        ("vg_000000107899.npz", "VG_100K/107899"),
        ("000000000009.npz", "val2017/000000000009"),
        ("nlvr2_dev-0-0-img0.npz", "dev-0-0-img0"),
    ],
)
def test_an_entry_has_its_images_name_maybe_with_the_sets(tmp_path: Path, entry: str, key: str) -> None:
    path = write_npz(tmp_path / "f", {entry: npz(arrays()), "other_x.npz": npz(arrays())})
    (found,) = features.add_regions(iter([record(key)]), path)
    assert isinstance(found, Record) and len(found.detected) == 1


def test_a_name_that_fits_two_sets_is_not_guessed_and_can_be_given(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "f", {f"{name}_01.npz": npz(arrays(k)) for k, name in enumerate(("coco", "vg"))})
    assert reason(path, record("1")) == "its regions: several entries of its name"
    (found,) = features.add_regions(iter([record("1", features="vg_01.npz")]), path)
    (same,) = features.add_regions(iter([record("vg_01")]), path)
    assert isinstance(found, Record) and isinstance(same, Record) and found.detected == same.detected


def test_a_pair_has_the_regions_of_each_image(tmp_path: Path) -> None:
    entries = {f"nlvr2_dev-3-0-img{k}.npz": npz(arrays(k, conf=(0.5,) * (k + 1))) for k in range(2)}
    (found,) = features.add_regions(iter([record("dev-3-0", images=2)]), write_npz(tmp_path / "f", entries))
    assert isinstance(found, Record)
    assert found.info["confidences"] == [[0.5], [0.5, 0.5]] and len(found.detected) == 2


def test_a_fixed_number_of_regions_is_fixed(tmp_path: Path) -> None:
    """The released converter ignores it where it is asked for, and keeps the rows of its confidence rule."""
    path = write_npz(tmp_path / "f", {"a.npz": npz(arrays(conf=(0.05, 0.9, 0.6, 0.1)))})
    (found,) = features.add_regions(iter([record("a")]), path)
    assert isinstance(found, Record)
    fixed = RegionSource(stored=True, least=3, most=3)
    regions = read_regions(fixed, "a", found.info, StoredShape(9, 9, 1), Transform(size=8), found.detected)
    assert [round(float(x), 1) for x in regions.feature_RF[:, 0]] == [0.9, 0.6, 0.1]


def test_without_confidences_the_order_stands(tmp_path: Path) -> None:
    content = arrays()
    del content["conf"], content["soft_labels"]
    (found,) = features.add_regions(iter([record("a")]), write_npz(tmp_path / "f", {"a.npz": npz(content)}))
    assert isinstance(found, Record) and found.info["confidences"] == [[1.0] * 3]
    regions = read_regions(
        RegionSource(stored=True), "a", found.info, StoredShape(9, 9, 1), Transform(size=8), found.detected
    )
    assert torch.equal(regions.feature_RF, torch.from_numpy(content["features"])) and regions.classes_RC is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conf": np.zeros(2, np.float16)}, "conf is one finite number a region, 3 in all"),
        ({"conf": np.full(3, np.nan)}, "conf is one finite number a region, 3 in all"),
        ({"features": np.zeros((2, 6), np.float16)}, "each array is a table of floats with 3 rows"),
    ],
)
def test_broken_regions_are_named(tmp_path: Path, changed: Arrays, message: str) -> None:
    path = write_npz(tmp_path / "f", {"a.npz": npz(arrays() | changed), "cut.npz": npz(arrays())[:-40]})
    assert message in reason(path, record("a"))
    assert "not readable as npz" in reason(path, record("cut"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["npz", "packed", "msgpack"])
def test_no_flipped_byte_escapes(layout: str) -> None:
    """The rest of a damaged entry is read, or it is named: one damaged file does not end an import."""
    content = arrays()
    read = features.read_msgpack if layout == "msgpack" else read_npz
    data = {"npz": npz, "packed": lambda content: pack(check_arrays(content)), "msgpack": msgpacked}[layout](content)
    named = 0
    for i, mask in itertools.product(range(len(data)), (0x01, 0xFF)):
        try:
            features.by_confidence(read(data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :]))
        except ValueError:
            named += 1
    assert named > len(data)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_nothing_that_is_stored_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    msgpack = pytest.importorskip("msgpack")
    pickled = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": pickle.dumps([Evil()])}
    rest = {name: packed(x) for name, x in arrays().items()}
    entries = {
        "a.npz": msgpack.packb({**rest, "features": pickled}),
        "b.npz": msgpack.packb({**rest, "more": pickled}),
        "c.npz": npz(arrays() | {"features": np.array([Evil()], dtype=object)}),
        "d.npz": b"\xc1",
        "e.npz": msgpack.packb([1]),
    }
    path = write_lmdb(tmp_path / "db", entries)
    assert "each array is a table of floats" in reason(path, record("a"))
    (fine,) = features.add_regions(iter([record("b")]), path)
    assert isinstance(fine, Record)
    assert "Object arrays cannot be loaded" in reason(path, record("c"))
    assert "not readable as msgpack" in reason(path, record("d"))
    assert "no dict of arrays" in reason(path, record("e"))
    assert not (tmp_path / "executed").exists()


def in_a_child(path: Path) -> int:
    return len(features.open_store(path).read("coco_val2014_000000000042.npz"))


def test_an_lmdb_is_opened_once_in_a_process_and_again_after_a_fork(tmp_path: Path) -> None:
    path = store(tmp_path, "lmdb")
    first = features.open_store(path)
    again = features.open_store(tmp_path / "." / path.name)
    assert again.names == first.names and again.read(first.names[0]).keys() == first.read(first.names[0]).keys()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(in_a_child, (path,)) == 4


def test_another_folder_or_file_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"data\.mdb.*npz"):
            features.open_store(path)
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(b"no LMDB" * 1000)
    with pytest.raises(UserError, match="LMDB"):
        features.open_store(tmp_path)
    bad = write_lmdb(tmp_path / "bad", {"__keys__": b"7"}, keys=False)
    with pytest.raises(UserError, match="its __keys__ are not a JSON list of names"):
        features.open_store(bad)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"lmdb.*msgpack.*pip install -e '.\[lmdb\]'"):
        features.open_store(write_npz(tmp_path / "without", {"data.mdb": b""}))


def test_the_command_joins_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path, "npz")
    rows = [{"image": f"{COCO}.jpg", "caption": "a cat"}, {"image": "none.jpg", "caption": "a dog"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    args = [str(tmp_path / "t.jsonl"), "--out", str(out), "--images", "blank", "--features", str(path)]
    assert main(["data", "import", *args]) == 0
    assert "1 its regions: no entry of its name" in capsys.readouterr().out
    assert main(["data", "inspect", str(out)]) == 0
    assert "confidences 1" in capsys.readouterr().out


def test_uniter_pretrains_on_what_was_imported(tmp_path: Path) -> None:
    """From an LMDB and captions, without images, to the losses of features and classes that are asked for."""
    rows = [{"image": f"{name.removesuffix('.npz')}.jpg", "caption": "a cat"} for name in ENTRIES]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import_data(tmp_path / "t.jsonl", tmp_path / "out", images="blank", features=store(tmp_path, "lmdb"))
    regions = RegionSource(stored=True, most=100)
    data = PairData(train=str(tmp_path / "out/train"), batch_size=2, regions=regions, max_tokens=64)
    tokenizer = Tokenizer.train(["a cat"] * 3, vocab_size=40)
    config = with_tokenizer(tiny_single(), tokenizer)
    config = replace(config, single=replace(config.single, regions=RegionConfig(feature=6)))
    rows_of = data.rows("train", tokenizer, config.image.size, strict=True)
    assert rows_of is not None and rows_of.lengths().tokens_T.tolist() == [4 + 3, 4 + 3]
    batch, _ = rows_of.make([Row(i, hash64(0, 0, i)) for i in range(2)])
    objectives = {"mrfr": MRFRConfig(rate=0.9), "mrc": MRCConfig(classes=5, rate=0.9)}
    built = {name: config_of.build(config, tokenizer) for name, config_of in objectives.items()}
    pretraining = Pretraining(VLModel(config), built)
    losses = pretraining(batch)
    assert losses.keys() == {"mrfr/masked", "mrc/masked"}
    torch.stack([loss.total for loss in losses.values()]).sum().backward()
    assert pretraining.model.single.regions.feature.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("factor", [np.array([640, 480, 640, 480]), 1.2, -0.3])
def test_boxes_outside_0_to_1_are_refused(factor: object) -> None:
    box = np.array([[0.1, 0.1, 0.9, 0.95], [0, 0, 1, 1]], np.float32)
    feature = np.ones((2, 4), np.float32)
    assert check_arrays({"norm_bb": box, "features": feature}).box_R4.max() == 1
    assert check_arrays({"norm_bb": box * 1.001, "features": feature}).box_R4.max() == 1
    with pytest.raises(ValueError, match="outside 0 to 1"):
        check_arrays({"norm_bb": box * factor, "features": feature})
