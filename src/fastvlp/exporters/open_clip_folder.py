"""A folder that open_clip loads by `local-dir:FOLDER` or, uploaded, by `hf-hub:OWNER/NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastvlp.convert.checkpoints import convert
from fastvlp.convert.open_clip import PROJECTIONS, clip_map
from fastvlp.convert.weight_map import undo_map
from fastvlp.exporters.interface import ExportSource, ExportTarget
from fastvlp.exporters.processor import RESIZE, longest_text, read_texts, write_json, write_tokenizer
from fastvlp.exporters.public_pair import SCALE, find_layout, learned_scale
from fastvlp.exporters.sample_inputs import sample_inputs, vector_difference
from fastvlp.files import write_whole
from fastvlp.model.model import ModelConfig
from fastvlp.model.saving import Saved, load_model
from fastvlp.tensor_files import write_safetensors

ACTIVATIONS: Mapping[str, dict[str, Any]] = {"gelu": {}, "gelu_tanh": {"act_kwargs": {"approximate": "tanh"}}}
CARD = """---
library_name: open_clip
license: {license}
pipeline_tag: zero-shot-image-classification
tags: [clip, image-text, fastvlp]
---

# {name}

```python
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{place}")
tokenizer = open_clip.get_tokenizer("local-dir:{place}")
```

Trained with fastvlp.
"""


class OpenCLIPExport(ExportTarget):
    """A model of CLIP's shape, with open_clip's names of weights."""

    name = "open_clip"
    summary = "for open_clip, which loads it by local-dir: or hf-hub:"
    files = (
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    )
    tolerance = 1e-5

    def misfit(self, source: ExportSource) -> str | None:
        config, fit = source.saved.model.config, source.config.data.fit
        layout = find_layout(config)
        if layout is None or layout.model_type != "clip":
            return "its encoders or its joint space are not those of CLIP (sizes such as clip_small are)"
        image, text = _encoders(config)
        if image.layer.activation != text.layer.activation:
            return "its encoders have different activations, and those of open_clip have one"
        return None if fit in RESIZE else f"images are made square by {fit}, which open_clip does not do"

    def write(self, source: ExportSource, folder: Path) -> None:
        saved, data = source.saved, source.config.data
        config = saved.model.config
        length = longest_text(config, source.max_length)
        write_json(folder / "open_clip_config.json", _settings(saved, data.fit, length))
        write_safetensors(folder / "open_clip_model.safetensors", _tensors(saved, length), {"format": "pt"})
        write_tokenizer(folder, saved.tokenizer, config, length)
        card = CARD.format(license=source.license, name=source.card["name"], place=source.place)
        write_whole(folder / "README.md", card.encode())

    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        """Compares with our own reader of the layout: open_clip needs torchvision (bench/open_clip_export.py compares with
        it)."""
        inputs = sample_inputs(source)
        with TemporaryDirectory(dir=folder.parent) as place:
            convert(str(folder), Path(place) / "back")
            back = load_model(Path(place) / "back")
        with torch.inference_mode():
            ids, length = source.saved.tokenizer.encode(list(inputs.cleaned), source.max_length)
            model = back.model.eval()
            image, text = model.embed_image(model.encode_image(inputs.seen)), model.embed_text(ids, length)
        return {
            "token ids": inputs.token_difference(read_texts(folder, inputs)["input_ids"]),
            "image vectors": vector_difference(image, inputs.image_vectors),
            "text vectors": vector_difference(text, inputs.text_vectors),
        }


def _encoders(config: ModelConfig) -> tuple[Any, Any]:
    return config.image, config.text


def _settings(saved: Saved, fit: str, length: int) -> dict[str, Any]:
    config = saved.model.config
    image, text = _encoders(config)
    embed = config.embed
    assert embed is not None
    quick = image.layer.activation == "quick_gelu"
    activation = {} if quick else ACTIVATIONS[image.layer.activation]
    return {
        "model_cfg": {
            "embed_dim": embed.width,
            "quick_gelu": quick,
            "vision_cfg": {
                "image_size": image.size,
                "layers": image.depth,
                "width": image.width,
                "head_width": image.width // image.layer.heads,
                "mlp_ratio": image.layer.hidden / image.width,
                "patch_size": image.patch,
                "norm_kwargs": {"eps": image.norm_eps},
                **activation,
            },
            "text_cfg": {
                "context_length": length,
                "vocab_size": text.vocab,
                "width": text.width,
                "heads": text.layer.heads,
                "layers": text.depth,
                "mlp_ratio": text.layer.hidden / text.width,
                "hf_tokenizer_name": ".",
                # `argmax`, the default, takes the largest id instead of </s>.
                "pool_type": "eos",
                "eos_id": text.eos,
                "norm_kwargs": {"eps": text.norm_eps},
                **activation,
            },
        },
        "preprocess_cfg": {
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": "bicubic",
            "resize_mode": RESIZE[fit],
        },
    }


def _tensors(saved: Saved, length: int) -> dict[str, Tensor]:
    """The weights by open_clip's names. There texts are cut and padded to as many tokens as there are positions."""
    config = saved.model.config
    image, text = _encoders(config)
    state = {name: x.detach().float() for name, x in saved.model.state_dict().items()}
    # The norm after the text's layers is the head's in our `sizes.clip`.
    state = {name.replace("text.last_norm.", "embed.text.norm."): x for name, x in state.items()}
    tensors = undo_map(state, clip_map(image.depth, text.depth))
    side = image.patch
    tensors["visual.conv1.weight"] = tensors["visual.conv1.weight"].reshape(-1, 3, side, side)
    tensors["positional_embedding"] = tensors["positional_embedding"][:length]
    learned = learned_scale(saved)
    tensors["logit_scale"] = learned.get("log_scale", torch.tensor(SCALE)).reshape(())
    if "bias" in learned:
        tensors["logit_bias"] = learned["bias"].reshape(())
    return {name: (x.T if name in PROJECTIONS else x).contiguous() for name, x in tensors.items()}
