"""A folder that `SentenceTransformer` loads: texts and pictures become vectors of one space by `encode`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastvlp.errors import UserError, install
from fastvlp.exporters.encoder_folders import PublicEncoder, image_encoder, text_encoder
from fastvlp.exporters.interface import ExportSource, ExportTarget
from fastvlp.exporters.processor import image_misfit, write_processor
from fastvlp.exporters.public_pair import find_layout, last_norm_state, part, with_last_norm
from fastvlp.exporters.sample_inputs import sample_inputs, vector_difference
from fastvlp.exporters.transformers_folder import TransformersExport
from fastvlp.model.encoders.transformers_models import quiet_transformers
from fastvlp.model.joint_space import HeadConfig

POOLS = {"first": "cls", "mean": "mean", "last": "lasttoken"}


class SentenceTransformersExport(ExportTarget):
    """CLIP, SigLIP and Chinese CLIP as one module; other encoders of transformers each with a pooling and its projection."""

    name = "sentence-transformers"
    summary = "for SentenceTransformer and mteb"
    files = ("modules.json", "config_sentence_transformers.json", "README.md")
    tolerance = 1e-5

    def misfit(self, source: ExportSource) -> str | None:
        config = source.saved.model.config
        if config.embed is None:
            return "it has no joint space of images and texts (model.embed)"
        if find_layout(config) is not None:
            return TransformersExport().misfit(source)
        if (reason := image_misfit(source)) is not None:
            return reason
        if _parts(source) is None:
            return (
                "an encoder is none of transformers, or a head of the joint space is more than a pooling and linear maps; "
                "`to` onnx takes every model with a joint space"
            )
        return None

    def write(self, source: ExportSource, folder: Path) -> None:
        library = _library()
        with TemporaryDirectory(dir=folder.parent) as place, quiet_transformers():
            modules = (_joined if find_layout(source.saved.model.config) else _routed)(library, source, Path(place))
            model = library.SentenceTransformer(modules=[*modules, library.sentence_transformer.modules.Normalize()])
            model.save_pretrained(str(folder), model_name=str(source.card["name"]), create_model_card=True)

    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        inputs = sample_inputs(source)
        with quiet_transformers():
            model = _library().SentenceTransformer(str(folder), device="cpu", local_files_only=True)
            pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in inputs.pictures]
            image = torch.from_numpy(model.encode(pictures, show_progress_bar=False))
            text = torch.from_numpy(model.encode(list(inputs.texts), show_progress_bar=False))
        return {
            "image vectors": vector_difference(image, inputs.image_vectors),
            "text vectors": vector_difference(text, inputs.text_vectors),
        }


def _library() -> ModuleType:
    try:
        import sentence_transformers
    except ImportError as error:
        raise UserError(f"`to` sentence-transformers needs that package: {install('sentence-transformers')}") from error
    return sentence_transformers


def _joined(library: ModuleType, source: ExportSource, place: Path) -> list[nn.Module]:
    """The model as one module of transformers."""
    target = TransformersExport()
    target.write(source, place)
    embed = source.saved.model.config.embed
    # Where padding is seen, every text is padded to the length that was trained.
    padded = embed is not None and embed.text_length is not None
    options = {"processing_kwargs": {"text": {"padding": "max_length"}}} if padded else {}
    return [library.sentence_transformer.modules.Transformer(str(place), **options)]


def _parts(source: ExportSource) -> tuple[PublicEncoder, PublicEncoder] | None:
    """Both encoders, where transformers has them and the heads are poolings and linear maps."""
    model, config = source.saved.model, with_last_norm(source.saved.model.config)
    state, embed = last_norm_state(source.saved), config.embed
    if embed is None or embed.text_mask == "none" or not (embed.text_special and embed.text_start):
        return None
    image = image_encoder(model.image, config.image, part(state, "image."))
    text = text_encoder(model.text, config.text, part(state, "text."))
    causal = text is not None and text.settings.get("model_type") == "clip_text_model"
    if image is None or text is None or causal != (embed.text_mask == "causal"):
        return None
    # CLIP's image encoder gives its last norm of the first state alone.
    first_only = image.output == "pooler_output" and embed.image.pool != "first"
    plain = all(_is_plain(head) for head in (embed.image, embed.text))
    return (image, text) if plain and not first_only else None


def _is_plain(head: HeadConfig) -> bool:
    return head.pool in POOLS and not (head.norm or head.regions or head.depth or head.skip)


def _routed(library: ModuleType, source: ExportSource, place: Path) -> list[nn.Module]:
    """Returns both encoders with their heads. The type of the input decides which of them computes."""
    kinds = library.sentence_transformer.modules
    parts, embed = _parts(source), source.saved.model.config.embed
    assert parts is not None and embed is not None
    state = last_norm_state(source.saved)
    write_processor(source, place)
    routes = {}
    files = {"image": ("preprocessor_config.json",), "text": ("tokenizer.json", "tokenizer_config.json")}
    for name, encoder, head in (("image", parts[0], embed.image), ("text", parts[1], embed.text)):
        folder = place / name
        encoder.write(folder)
        for file in files[name]:
            (folder / file).write_bytes((place / file).read_bytes())
        pooled = encoder.output == "pooler_output"
        how = {name: {"method": "forward", "method_output_name": encoder.output}}
        output = "sentence_embedding" if pooled else "token_embeddings"
        module = kinds.Transformer(str(folder), modality_config=how, module_output_name=output)
        width = source.saved.model.config.image.width if name == "image" else source.saved.model.config.text.width
        pooling = [] if pooled else [kinds.Pooling(width, POOLS[head.pool])]
        routes[name] = [module, *pooling, *_projections(kinds, head, part(state, f"embed.{name}."))]
    return [kinds.Router(routes, default_route="text")]


def _projections(kinds: Any, head: HeadConfig, state: Mapping[str, Tensor]) -> list[nn.Module]:
    activation = nn.Tanh() if head.hidden_activation == "tanh" else nn.ReLU()
    layers: list[tuple[str, nn.Module]] = [("hidden", activation)] if head.hidden else []
    layers += [("out", nn.Identity())] if head.project else []
    return [_dense(kinds, state, name, after) for name, after in layers]


def _dense(kinds: Any, state: Mapping[str, Tensor], name: str, activation: nn.Module) -> nn.Module:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    module: nn.Module = kinds.Dense(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        activation_function=activation,
        init_weight=weight,
        init_bias=bias,
    )
    return module
