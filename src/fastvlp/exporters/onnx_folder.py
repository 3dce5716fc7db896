"""An image and a text graph in ONNX with tokenizer and image settings, for onnxruntime in any language."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastvlp.exporters.graphs import ImageGraph, TextGraph, run_graph, write_graph
from fastvlp.exporters.interface import ExportSource, ExportTarget
from fastvlp.exporters.processor import image_misfit, read_texts, write_processor
from fastvlp.exporters.sample_inputs import sample_inputs, vector_difference
from fastvlp.files import write_whole
from fastvlp.search.embedder import usable_abilities

CARD = """---
library_name: onnx
license: {license}
tags: [image-text, fastvlp]
---

# {name}

`image.onnx` takes `pixel_values`, float32 [batch 3 {size} {size}], prepared as preprocessor_config.json says.
`text.onnx` takes `input_ids` and `attention_mask`, int64 [batch length], as tokenizer.json makes them.
Both return unit vectors of {width} numbers.

```python
import numpy, onnxruntime, tokenizers

tokenizer = tokenizers.Tokenizer.from_file("{place}/tokenizer.json")
tokenizer.enable_truncation({length})
ids = numpy.array([tokenizer.encode("a cat on a sofa").ids])
session = onnxruntime.InferenceSession("{place}/text.onnx")
(vector,) = session.run(None, {{"input_ids": ids, "attention_mask": numpy.ones_like(ids)}})
```

Trained with fastvlp.
"""


class OnnxExport(ExportTarget):
    """Graphs with a dynamic batch and length."""

    name = "onnx"
    summary = "graphs for onnxruntime; for every model with a joint space"
    files = (
        "image.onnx",
        "text.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "README.md",
    )
    tolerance = 1e-5

    def misfit(self, source: ExportSource) -> str | None:
        return joint_space_misfit(source) or image_misfit(source)

    def write(self, source: ExportSource, folder: Path) -> None:
        model, inputs = source.saved.model, sample_inputs(source)
        assert model.config.embed is not None
        length = write_processor(source, folder)
        pixels = model.image.normalised(inputs.seen[:2])
        write_graph(
            ImageGraph(model),
            folder / "image.onnx",
            {"pixel_values": pixels},
            "image_embeds",
            {"pixel_values": ["batch"]},
        )
        texts = {name: x[:4] for name, x in read_texts(folder, inputs).items()}
        axes = {key: ["batch", "length"] for key in texts}
        write_graph(TextGraph(model), folder / "text.onnx", texts, "text_embeds", axes)
        card = CARD.format(
            license=source.license,
            name=source.card["name"],
            place=source.place,
            size=model.config.image.size,
            width=model.config.embed.width,
            length=length,
        )
        write_whole(folder / "README.md", card.encode())

    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        inputs, model = sample_inputs(source), source.saved.model
        texts = read_texts(folder, inputs)
        image = run_graph(folder / "image.onnx", {"pixel_values": model.image.normalised(inputs.seen).detach()})
        text = run_graph(folder / "text.onnx", texts)
        alone = run_graph(folder / "text.onnx", *(read_texts(folder, inputs, [i]) for i in (0, 1)))
        return {
            "token ids": inputs.token_difference(texts["input_ids"]),
            "image vectors": vector_difference(image, inputs.image_vectors),
            "text vectors": vector_difference(text, inputs.text_vectors),
            "vectors of one text": vector_difference(alone, inputs.text_vectors[:2]),
        }


def joint_space_misfit(source: ExportSource) -> str | None:
    """Says why images and texts alone have no vectors; None if they have."""
    if "embed" in usable_abilities(source.saved):
        return None
    return "it has no joint space (model.embed), or it reads a detector's boxes of each image; export a run of clip"
