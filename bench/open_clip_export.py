"""Compares a model that was exported for open_clip with what open_clip makes of it: vectors, token ids and pixels.

    pip install open_clip_torch torchvision
    python bench/open_clip_export.py

A model of CLIP's shape with random weights is exported. open_clip needs torchvision, so that this is no test.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvlp import Embedder, export
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.model import VLModel
from fastvlp.model.saving import save_model
from fastvlp.model.sizes import clip_small, with_tokenizer

CAPTIONS = ["a dog runs on the beach", "two cups, one table", "小狗在沙滩上跑", "a red circle " * 20, ""]
SIZES = [(112, 112), (150, 113), (120, 301), (64, 40)]


def made_run(folder: Path) -> Path:
    """A run of clip_small with random weights."""
    tokenizer = Tokenizer.train(CAPTIONS * 3, vocab_size=400)
    config = clip_small()
    torch.manual_seed(0)
    model = VLModel(with_tokenizer(replace(config, text=replace(config.text, positions=24)), tokenizer))
    info = {"name": "made", "objectives": {"clip": {"type": "CLIPConfig"}}}
    save_model(folder, model, tokenizer, info, objectives={"clip.log_scale": torch.tensor(2.0)})
    data = {"fit": "crop", "max_length": 24, "captions": "captions"}
    (folder / "config.json").write_text(json.dumps({"name": "made", "data": data}))
    return folder


def main() -> None:
    import open_clip

    with tempfile.TemporaryDirectory() as place:
        run, out = made_run(Path(place) / "run"), Path(place) / "out"
        export(run, out, to=("fastvlp", "open_clip"))
        embedder = Embedder.load(out / "fastvlp")
        name = f"local-dir:{out / 'open_clip'}"
        model, preprocess = open_clip.create_model_from_pretrained(name)
        ids = open_clip.get_tokenizer(name)(CAPTIONS)
        own = embedder.tokenizer.encode([text.strip() for text in CAPTIONS], 24)[0]
        generator = np.random.default_rng(0)
        small = [Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in SIZES]
        images = [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, SIZES)]
        pixels = torch.stack([preprocess(image) for image in images])
        seen = embedder.model.image.normalised(embedder.pixels(images))
        with torch.inference_mode():
            text = model.eval().encode_text(ids, normalize=True).numpy()
            # Of our pixels, so that encoders are compared and not resampling.
            image = model.encode_image(seen, normalize=True).numpy()
        print(f"ids equal        {bool((ids[:, : own.shape[1]] == own).all())}")
        print(f"text vectors     {np.abs(text - embedder.texts(CAPTIONS)).max():.2e}")
        print(f"image vectors    {np.abs(image - embedder.images(images)).max():.2e}")
        print(f"scale            {model.logit_scale.item():.3f} (2.000)")
        print(f"pixels, levels   {((seen - pixels).abs().max() * 255 * 0.27).item():.1f}")


if __name__ == "__main__":
    main()
