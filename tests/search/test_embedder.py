"""An embedder computes what the run's model computes, for any batch; bad input is named."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.embedding import embed_images, embed_texts
from fastvlp.eval.encoding import open_run
from fastvlp.eval.pair_scores import pair_score
from fastvlp.search.embedder import Embedder, Unreadable
from fastvlp.tasks.caption import caption
from fastvlp.tasks.task_evaluation import load_task
from fastvlp.tensor_files import read_safetensors, write_safetensors

TEXTS = ["a red circle", "红色的圆形", "", "a blue square left of a small green triangle", "x" * 500, "a red circle"]


def test_vectors_equal_those_of_evaluation(embedder, runs, world, pictures):
    loaded = open_run(runs["towers"]).loaded
    images = embed_images(loaded, Shards(world / "test"))
    assert np.allclose(embedder.images(pictures), images.numpy(), atol=1e-6)
    assert np.allclose(embedder.texts(TEXTS), embed_texts(loaded, TEXTS).numpy(), atol=1e-6)
    assert np.allclose(np.linalg.norm(embedder.texts(TEXTS), axis=1), 1, atol=1e-6)


def test_languages_are_those_of_the_captions(embedder, monkeypatch):
    assert embedder.languages == ["en"]
    for field, languages in (("captions_zh", ["zh"]), ("captions_zh+captions", ["en", "zh"]), ("alt_text", [])):
        monkeypatch.setattr(embedder, "captions", field)
        assert embedder.languages == languages


def test_vectors_do_not_depend_on_the_batch(embedder, pictures):
    assert np.allclose(embedder.images(pictures)[3:4], embedder.images(pictures[3:4]), atol=1e-6)
    assert np.allclose(embedder.texts(TEXTS)[3:4], embedder.texts(TEXTS[3:4]), atol=1e-6)
    assert embedder.images([]).shape == embedder.texts([]).shape == (0, embedder.width)


def test_texts_of_one_length_share_a_pass_and_keep_their_places(embedder, monkeypatch):
    texts = [f"{'a red circle ' * (i % 7)}{'blue ' * (i % 3)}" for i in range(40)]
    alone = np.concatenate([embedder.texts(text) for text in texts])
    monkeypatch.setattr("fastvlp.search.embedder.ROWS", 8)
    passes, own = [], embedder._ids
    monkeypatch.setattr(embedder, "_ids", lambda part: passes.append(embedder.lengths(part)) or own(part))
    assert np.allclose(embedder.texts(texts), alone, atol=1e-6)
    assert [len(part) for part in passes] == [8] * 5
    assert [n for part in passes for n in part] == sorted(embedder.lengths(texts))


def test_an_opened_picture_equals_its_bytes(embedder, pictures):
    opened = [Image.open(io.BytesIO(data)) for data in pictures]
    assert np.allclose(embedder.images(opened), embedder.images(pictures), atol=1e-6)


def test_texts_are_cleaned_as_captions_are(embedder):
    vectors = embedder.texts(["a red\x00 circle\ud800", "  a red circle\n"])
    assert np.array_equal(vectors[0], vectors[1])
    assert embedder.lengths(["", "a " * 5000]) == [2, 40]


def test_an_unreadable_picture_is_named_by_its_index(embedder, pictures):
    with pytest.raises(Unreadable, match=r"picture 2: .*damaged or truncated") as caught:
        embedder.images([*pictures[:2], pictures[0][:200], b"junk"])
    assert caught.value.index == 2
    with pytest.raises(Unreadable, match="not an image of a known format"):
        embedder.images([b""])


@pytest.mark.parametrize("opened", [False, True])
def test_a_picture_with_too_many_pixels_is_not_decoded(exports, opened):
    embedder = Embedder.load(exports["towers"])
    embedder.max_pixels = 30 * 30
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    with pytest.raises(Unreadable, match="40x40 pixels are more than the 900 allowed"):
        embedder.images([Image.open(file) if opened else file.getvalue()])


def test_abilities_are_known_and_others_refused(exports, embedder, pictures):
    assert {name: sorted(Embedder.load(folder).can) for name, folder in exports.items()} == {
        "all": ["caption", "embed", "match"],
        "towers": ["embed"],
        "vqa": ["answer"],
    }
    with pytest.raises(UserError, match="towers cannot caption; it can embed"):
        embedder.caption(pictures[:1])


def test_match_scores_and_captions_equal_the_runs(exports, runs, world, pictures):
    embedder = Embedder.load(exports["all"])
    loaded, saved, _ = open_run(runs["all"])
    image = embedder.pixels(pictures[:3])
    ids, length = loaded.tokenizer.encode(TEXTS[:3], loaded.max_length)
    with torch.no_grad():
        wanted = pair_score(saved)[1](saved.model.encode_image(image), ids, length)
    assert np.allclose(embedder.match(pictures[:3], TEXTS[:3]), wanted, atol=1e-5)
    assert embedder.caption(pictures[:3]) == caption(saved.model, saved.tokenizer, image)
    assert embedder.match([], []).shape == (0,) and embedder.caption([]) == []


def test_answers_equal_the_fine_tuned_runs(exports, runs, pictures):
    embedder = Embedder.load(exports["vqa"])
    tuned = load_task(runs["vqa"])
    objective, data = tuned.objective, tuned.data
    questions = ["what colour is the circle?", "how many squares are there?"]
    answers = embedder.answer(pictures[:2], questions)
    assert set(answers) <= {*data.answers} and len(answers) == 2
    ids, length = embedder.tokenizer.encode(questions, 50)
    states = embedder.model.encode_image(embedder.pixels(pictures[:2]))
    summary = embedder.model.summarise(states, ids, length, reading="full")
    scores = objective.head(torch.tanh(objective.pool(summary)))
    assert answers == [data.answers[i] for i in scores.argmax(1)]


@pytest.mark.slow
def test_loading_imports_no_training_code(exports, tmp_path):
    folder = shutil.copytree(exports["all"], tmp_path / "alone")
    code = f"""
import sys
from fastvlp.search.embedder import Embedder
embedder = Embedder.load({str(folder)!r})
embedder.texts(["a red circle"])
unwanted = [m for m in sys.modules if m.startswith(("fastvlp.training", "fastvlp.data.loader", "fastvlp.recipes"))]
sys.exit(str(unwanted) if unwanted else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_damaged_exports_are_refused(exports, runs, tmp_path):
    with pytest.raises(UserError, match="not an export"):
        Embedder.load(runs["towers"])
    folder = shutil.copytree(exports["towers"], tmp_path / "damaged")
    (folder / "config.json").write_text(json.dumps({"data": {}}))
    with pytest.raises(UserError, match="damaged export"):
        Embedder.load(folder)


def test_the_fingerprint_depends_on_weights_config_and_tokenizer(exports, tmp_path, embedder):
    assert Embedder.load(exports["towers"]).fingerprint == embedder.fingerprint
    folder = shutil.copytree(exports["towers"], tmp_path / "changed")
    (folder / "card.json").write_text("{}")
    assert Embedder.load(folder).fingerprint == embedder.fingerprint
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    assert Embedder.load(folder).fingerprint != embedder.fingerprint

    # As of earlier versions, whose model.json has no checksum of the tokenizer.
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({name: described[name] for name in ("format", "config", "info")}))
    before = Embedder.load(folder).fingerprint
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert Embedder.load(folder).fingerprint != before


def test_one_text_is_one_vector_and_a_picture_may_be_a_path(exports, world, tmp_path):
    embedder = Embedder.load(exports["towers"])
    data = Shards(world / "test").read(0).images[0]
    (tmp_path / "picture").write_bytes(data)
    assert embedder.texts("a cat").shape == (1, embedder.width)
    np.testing.assert_array_equal(embedder.texts("a cat"), embedder.texts(["a cat"]))
    for picture in (tmp_path / "picture", str(tmp_path / "picture"), data):
        np.testing.assert_array_equal(embedder.images(picture), embedder.images([data]))
    with pytest.raises(Unreadable):
        embedder.images([tmp_path / "none"])


def test_a_picture_may_be_a_path_bytes_an_open_file_or_an_image(exports, pictures, tmp_path):
    embedder = Embedder.load(exports["all"])
    path, data = tmp_path / "p", pictures[0]
    path.write_bytes(data)
    wanted, caption = embedder.images([data]), embedder.caption([data])
    with path.open("rb") as file, path.open("rb") as begun, path.open("rb", buffering=0) as raw:
        begun.read(10)
        image = Image.open(io.BytesIO(data))
        for given in (
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            file,
            begun,
            raw,
            io.BytesIO(data),
            image,
        ):
            np.testing.assert_array_equal(embedder.images(given), wanted)
            np.testing.assert_allclose(embedder.images([given, given]), np.repeat(wanted, 2, 0), atol=1e-6)
            assert embedder.caption(given) == caption
            assert embedder.match(given, "a red circle").shape == (1,)


@pytest.mark.parametrize("wrong", [io.StringIO("text"), 7, None, ["a", "b"]])
def test_what_is_no_picture_is_named(embedder, pictures, wrong):
    with pytest.raises(Unreadable, match=r"picture 1: a \w+ is no picture"):
        embedder.images([pictures[0], wrong])


def test_cut_texts_and_unknown_words_are_told(embedder):
    short, long, odd, empty = embedder.readings(["a red circle", "a red circle " * 30, "a 🦓 rqzvx 红色 circle", ""])
    assert short == (5, "", []) and empty == (2, "", [])
    assert long.tokens == 92 and long.unknown == []
    assert long.cut == ("a red circle " * 30)[len("a red circle " * 12 + "a red ") :].strip()
    assert odd.cut == "" and odd.unknown[:2] == ["🦓", "rqzvx"] and "circle" not in odd.unknown
    assert embedder.readings("a red circle") == [short]
    assert embedder.lengths(["a red circle " * 30]) == [embedder.max_length]
