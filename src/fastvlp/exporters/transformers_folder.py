"""A folder that `transformers` loads: CLIPModel, SiglipModel or ChineseCLIPModel with image processor and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fastvlp.exporters.interface import ExportSource, ExportTarget
from fastvlp.exporters.processor import image_misfit, write_json, write_processor
from fastvlp.exporters.public_pair import find_layout, public_pair
from fastvlp.exporters.sample_inputs import sample_inputs, vector_difference
from fastvlp.files import write_whole
from fastvlp.model.encoders.transformers_models import quiet_transformers, transformers
from fastvlp.tensor_files import write_safetensors

CARD = """---
library_name: transformers
license: {license}
pipeline_tag: zero-shot-image-classification
tags: [image-text, fastvlp]
---

# {name}

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

folder = "{place}"
model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
texts = tokenizer(["a cat on a sofa"], padding={padding}, truncation=True, return_tensors="pt")
pixels = AutoImageProcessor.from_pretrained(folder)(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
text, image = model.get_text_features(**texts).pooler_output, model.get_image_features(**pixels).pooler_output
print(torch.cosine_similarity(image, text))
```

Trained with fastvlp.
"""


class TransformersExport(ExportTarget):
    """A model whose encoders and joint space are those of a model of transformers."""

    name = "transformers"
    summary = "for CLIPModel, SiglipModel or ChineseCLIPModel of transformers"
    files = (
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    )
    tolerance = 1e-5

    def misfit(self, source: ExportSource) -> str | None:
        config = source.saved.model.config
        if config.embed is None:
            return "it has no joint space of images and texts (model.embed), which these models are made of"
        layout = find_layout(config)
        if layout is None:
            return (
                "its encoders or its joint space are none of CLIP, SigLIP or Chinese CLIP in transformers; sizes such as "
                "clip_small fit, and `to` onnx takes every model with a joint space"
            )
        if (reason := image_misfit(source)) is not None:
            return reason
        if layout.model_type == "clip" and source.saved.tokenizer.eos == 2:
            return (
                "its </s> has the id 2, at which CLIPModel summarises a text at its largest token instead of at </s>; train "
                "with a tokenizer whose </s> has another id, such as a WordPiece"
            )
        return None

    def write(self, source: ExportSource, folder: Path) -> None:
        pair = public_pair(source.saved)
        assert pair is not None
        write_json(folder / "config.json", {**pair.config, "dtype": "float32"})
        write_safetensors(folder / "model.safetensors", pair.tensors, {"format": "pt"})
        write_processor(source, folder)
        padding = '"max_length"' if pair.layout.model_type == "siglip" else "True"
        card = CARD.format(license=source.license, name=source.card["name"], place=source.place, padding=padding)
        write_whole(folder / "README.md", card.encode())

    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        hf, inputs, embed = transformers(), sample_inputs(source), source.saved.model.config.embed
        assert embed is not None
        with quiet_transformers(), torch.inference_mode():
            model, info = hf.AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
            strange = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
            processor = hf.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            pixels = processor([x.numpy() for x in inputs.pictures], return_tensors="pt").pixel_values
            tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            padding = "max_length" if embed.text_length else True
            tokens = tokenizer(list(inputs.texts), padding=padding, truncation=True, return_tensors="pt")
            image = model.eval().get_image_features(pixel_values=pixels).pooler_output
            text = model.get_text_features(**{name: tokens[name] for name in tokenizer.model_input_names}).pooler_output
        return {
            "tensors that transformers misses": float(len(strange)),
            "token ids": inputs.token_difference(tokens["input_ids"]),
            "image vectors": vector_difference(image, inputs.image_vectors),
            "text vectors": vector_difference(text, inputs.text_vectors),
        }
