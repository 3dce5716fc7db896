"""Runs as models of transformers: the same vectors, token ids and pixels there, and the same run after a way back."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.cli import main
from fastvlp.errors import UserError
from fastvlp.exporters.export import export
from fastvlp.model.saving import load_model
from fastvlp.model.sizes import flip_tiny_published
from fastvlp.search.embedder import Embedder
from tests.convert.public_models import write_model
from tests.exporters.made_runs import CAPTIONS, clip_shaped, made_run

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("fit", ["crop", "centre", "squash"])
def test_a_clip_shaped_run(fit: str, tmp_path: Path):
    run = made_run(tmp_path / "run", clip_shaped(), fit=fit)
    differences = export(run, tmp_path / "out", to="transformers").differences
    assert max(differences.values()) <= 1e-5 and len(differences) == 4
    back = tmp_path / "back"
    assert main(["convert", str(tmp_path / "out"), str(back)]) == 0
    one, two = load_model(run), load_model(back)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids, length = one.tokenizer.encode(CAPTIONS, 24)
    assert torch.equal(two.tokenizer.encode(CAPTIONS, 24)[0], ids)
    assert torch.equal(
        two.model.embed_image(two.model.encode_image(image)), one.model.embed_image(one.model.encode_image(image))
    )
    assert torch.equal(two.model.embed_text(ids, length), one.model.embed_text(ids, length))
    assert two.objectives["clip.log_scale"] == 1.5


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese_clip"])
def test_public_models_come_back_as_they_were(name: str, tmp_path: Path):
    public = write_model(name, tmp_path / name)
    assert main(["convert", str(public.folder), str(tmp_path / "run")]) == 0
    differences = export(tmp_path / "run", tmp_path / "out", to="transformers").differences
    assert max(differences.values()) <= 1e-5
    back = transformers.AutoModel.from_pretrained(tmp_path / "out")
    wanted, found = public.model.state_dict(), back.state_dict()
    assert type(back) is type(public.model) and wanted.keys() == found.keys()
    for key, x in wanted.items():
        # Tokens that the vocabulary lacked are at its end, and BERT's first token type is in its positions.
        rows = range(1, len(x)) if "word_embeddings" in key else range(len(x) if x.ndim else 0)
        if "token_type" not in key and "position_embeddings" not in key:
            assert torch.equal(found[key][rows] if x.ndim else found[key], x[rows] if x.ndim else x), key


def test_what_does_not_fit_is_named(tmp_path: Path):
    run = made_run(tmp_path / "flip", flip_tiny_published(size=48))
    with pytest.raises(UserError, match="none of CLIP, SigLIP"):
        export(run, tmp_path / "out", to="transformers")
    run = made_run(tmp_path / "bars", clip_shaped(), fit="letterbox")
    with pytest.raises(UserError, match="letterbox"):
        export(run, tmp_path / "out", to="transformers")
    run = made_run(tmp_path / "bpe", clip_shaped(), kind="bpe")
    with pytest.raises(UserError, match="id 2"):
        export(run, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


def odd_texts() -> list[str]:
    """500 texts in two languages, with marks, odd spaces, other scripts and symbols."""
    alphabet = [*"abc XYZ 09 .,!?-'\"()/#@&", "\u00a0", "\t", "\n", "\u200b", "\ufeff", "é", "ß", "ﬁ", "½", "–", "…"]
    alphabet += [*"狗海滩红色的杯子，。！“”《》", "🐕", "한", "ج", "\u0301", "\x07", "[SEP]", "[MASK]", "##a"]
    generator = random.Random(0)
    return ["".join(generator.choices(alphabet, k=generator.randrange(40))) for _ in range(500)]


def test_the_exported_tokenizer_gives_our_ids_of_odd_texts(tmp_path: Path):
    run = made_run(tmp_path / "run", clip_shaped())
    export(run, tmp_path / "out", to=("transformers", "fastvlp"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "transformers")
    embedder = Embedder.load(tmp_path / "out" / "fastvlp")
    texts = odd_texts()
    ids = theirs(texts, padding=True, truncation=True).input_ids
    assert embedder._ids(texts)[0].tolist() == ids


def test_the_exported_processor_gives_our_pixels(tmp_path: Path):
    run = made_run(tmp_path / "run", clip_shaped())
    export(run, tmp_path / "out", to=("transformers", "fastvlp"))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out" / "transformers")
    embedder = Embedder.load(tmp_path / "out" / "fastvlp")
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate([(32, 32), (33, 50), (101, 64), (64, 64), (40, 90), (200, 51), (7, 9)]):
        small = generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        data = io.BytesIO()
        image.save(data, "PNG" if i % 2 else "JPEG")
        ours = embedder.model.image.normalised(embedder.pixels([data.getvalue()]))
        known = processor(Image.open(data), return_tensors="pt").pixel_values
        # In levels of 255: resampling differs by one or two, and a JPEG is decoded at a smaller scale by us.
        levels = (ours - known).abs() * 255 * 0.27
        assert levels.max() <= 2.5 if i % 2 else levels.mean() <= 4
