"""Models of transformers through `vlp convert`: the same tokens, the same pixels and the same vectors as there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvlp.cli import main
from fastvlp.model import masks
from fastvlp.model.saving import Saved, load_model
from fastvlp.search.embedder import Embedder
from tests.convert.public_models import KINDS, PAIRS, TEXTS, Public, write_model

TOLERANCE = 1e-5


def converted(public: Public, *options: str) -> Saved:
    out = public.folder.parent / f"{public.folder.name}-converted"
    assert main(["convert", str(public.folder), str(out), *options]) == 0
    return load_model(out)


def close(mine: Tensor, known: Tensor) -> bool:
    return mine.shape == known.shape and bool((mine - known).abs().max() <= TOLERANCE)


def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(x) for x in pixels]


def their_pixels(folder: Path, images: list[Image.Image]) -> Tensor:
    """As the image processor in the folder prepares them."""
    stated = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(stated[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return (pixels - mean) / std


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_a_model_of_two_encoders(name: str, tmp_path: Path):
    public = write_model(name, tmp_path / name)
    saved, theirs = converted(public), public.model
    padding = {"padding": "max_length", "max_length": 12} if name == "siglip" else {"padding": True}
    tokens = public.tokenizer(TEXTS, return_tensors="pt", truncation=True, **padding)
    ids, length = saved.tokenizer.encode(TEXTS, 13 if name == "siglip" else 12)
    start = int(name == "siglip")
    for row, theirs_, n in zip(ids, tokens.input_ids, length):
        assert row[start:n].tolist() == theirs_[: n - start].tolist()
    pixels = their_pixels(public.folder, pictures())
    given = {"input_ids": tokens.input_ids} if name == "siglip" else {**tokens}
    given.pop("token_type_ids", None)
    with torch.no_grad():
        known = theirs(pixel_values=pixels, **given)
        mine = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures()])
        image = saved.model.embed_image(saved.model.encode_image(mine))
        text = saved.model.embed_text(ids, length)
    assert close(image, unit(known.image_embeds)) and close(text, unit(known.text_embeds))
    learned = {key.partition(".")[2]: x for key, x in saved.objectives.items()}
    logits = learned["log_scale"].exp() * image @ text.T + learned.get("bias", 0)
    assert torch.allclose(logits, known.logits_per_image, atol=1e-4)
    export = str(tmp_path / "export")
    assert main(["export", str(tmp_path / f"{name}-converted"), export]) == 0
    embedder = Embedder.load(export)
    assert close(torch.from_numpy(embedder.images(pictures())), unit(known.image_embeds))
    assert close(torch.from_numpy(embedder.texts(TEXTS)), unit(known.text_embeds))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind is None])
def test_an_image_encoder(name: str, tmp_path: Path):
    public = write_model(name, tmp_path / name)
    saved = converted(public)
    image = torch.randn(2, 3, *[saved.model.config.image.size] * 2)
    with torch.no_grad():
        known = public.model(pixel_values=image).last_hidden_state
        known = known.flatten(2).mT if known.ndim == 4 else known
        assert close(saved.model.encode_image(image), known)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind is not None and name not in PAIRS])
def test_a_text_encoder(name: str, tmp_path: Path):
    public = write_model(name, tmp_path / name)
    saved, theirs = converted(public), getattr(public.model, public.model.base_model_prefix, public.model)
    tokens = public.tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True)
    ids, length = saved.tokenizer.encode(TEXTS, 12)
    real = tokens.attention_mask.bool()
    assert torch.equal(ids[real], tokens.input_ids[real]) and torch.equal(real.sum(1), length)
    with torch.no_grad():
        known = theirs(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mine = saved.model.text(ids, torch.arange(ids.shape[1]), mask=masks.full(length, ids.shape[1]))
    assert close(mine[real], known[real])


@pytest.mark.parametrize("options", [{"shards": "20KB"}, {"safe": False}])
def test_weights_in_several_files_or_of_pytorch(options: dict, tmp_path: Path):
    whole, parts = write_model("clip", tmp_path / "whole"), write_model("clip", tmp_path / "parts", **options)
    files = [*(tmp_path / "parts").glob("*.safetensors")]
    assert len(files) > 1 if "shards" in options else not files
    wanted, found = (converted(public).model.state_dict() for public in (whole, parts))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], x) for name, x in wanted.items())


def test_a_file_of_weights_with_its_config(tmp_path: Path):
    public = write_model("clip", tmp_path / "clip")
    (public.folder / "config.json").rename(tmp_path / "clip.json")
    weights = str(public.folder / "model.safetensors")
    assert main(["convert", weights, str(tmp_path / "out"), "--config", str(tmp_path / "clip.json")]) == 0
    assert load_model(tmp_path / "out").model.config.text.present
