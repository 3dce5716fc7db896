"""The folder of a model in Immich's machine-learning service: two ONNX graphs and how texts and images are prepared.

Immich runs models of its own list only. One that is placed in its cache, in the folder of a listed model with vectors of the
same width, is run instead: `clip/NAME/` there has `textual/` and `visual/`. This follows its code; it was not tried in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastvlp.exporters.graphs import ImageGraph, PaddedTextGraph, run_graph, write_graph
from fastvlp.exporters.interface import ExportSource, ExportTarget
from fastvlp.exporters.onnx_folder import joint_space_misfit
from fastvlp.exporters.processor import RESIZE, longest_text, read_texts, write_json, write_tokenizer
from fastvlp.exporters.sample_inputs import sample_inputs, vector_difference


class ImmichExport(ExportTarget):
    """Graphs by the names, and files by the places, that Immich reads."""

    name = "immich"
    summary = "graphs and settings for Immich's search"
    files = (
        "config.json",
        "textual/model.onnx",
        "textual/tokenizer.json",
        "textual/tokenizer_config.json",
        "visual/model.onnx",
        "visual/preprocess_cfg.json",
    )
    tolerance = 1e-5

    def misfit(self, source: ExportSource) -> str | None:
        fit = source.config.data.fit
        if fit not in RESIZE:
            return f"images are made square by {fit}, which Immich does not do; it knows {', '.join(RESIZE)}"
        return joint_space_misfit(source)

    def write(self, source: ExportSource, folder: Path) -> None:
        saved, data, inputs = source.saved, source.config.data, sample_inputs(source)
        model = saved.model
        config, embed, image = model.config, model.config.embed, model.config.image
        assert embed is not None
        length = longest_text(config, source.max_length)
        (folder / "textual").mkdir()
        (folder / "visual").mkdir()
        write_json(
            folder / "config.json",
            {
                "embed_dim": embed.width,
                "vision_cfg": {"image_size": image.size, "width": image.width},
                "text_cfg": {"context_length": length, "vocab_size": config.text.vocab, "width": config.text.width},
            },
        )
        write_json(
            folder / "visual" / "preprocess_cfg.json",
            {
                "size": [image.size, image.size],
                "mode": "RGB",
                "mean": list(image.mean),
                "std": list(image.std),
                "interpolation": "bicubic",
                "resize_mode": RESIZE[data.fit],
                "fill_color": 0,
            },
        )
        write_tokenizer(folder / "textual", saved.tokenizer, config, length)
        pixels = model.image.normalised(inputs.seen[:2])
        write_graph(
            ImageGraph(model), folder / "visual" / "model.onnx", {"image": pixels}, "image_embeds", {"image": ["batch"]}
        )
        ids = read_texts(folder / "textual", inputs)["input_ids"][:4].int()
        axes = {"text": ["batch", "length"]}
        write_graph(PaddedTextGraph(model), folder / "textual" / "model.onnx", {"text": ids}, "text_embeds", axes)

    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        inputs, model = sample_inputs(source), source.saved.model
        # Immich asks for one picture or text at a time, padded to the whole length.
        ids = read_texts(folder / "textual", inputs, whole=True)["input_ids"].int()
        pixels = model.image.normalised(inputs.seen).detach()
        image = run_graph(folder / "visual" / "model.onnx", *({"image": x[None]} for x in pixels))
        text = run_graph(folder / "textual" / "model.onnx", *({"text": row[None]} for row in ids))
        return {
            "image vectors": vector_difference(image, inputs.image_vectors),
            "text vectors": vector_difference(text, inputs.text_vectors),
        }
