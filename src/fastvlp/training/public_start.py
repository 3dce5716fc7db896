"""Starts a run from public encoders: a recipe with these encoders, their preprocessing, tokenizer and weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.convert.public_encoders import PublicImages, PublicTexts, read_images, read_texts, read_tokenizer
from fastvlp.convert.public_folder import open_public
from fastvlp.convert.public_model import pair_scale, public_weights, with_encoders
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.inherited_config import same_weights
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import Inheritance, inherit_objectives
from fastvlp.objectives.objective import Objective
from fastvlp.training.train_config import TrainConfig


def with_public_encoders(
    run: TrainConfig,
    *,
    image: str | None = None,
    image_layers: int | None = None,
    text: str | None = None,
    text_layers: int | None = None,
) -> TrainConfig:
    """Returns a run with public encoders instead of its own. Their weights are loaded when the run starts.

    Image size and preprocessing are those of the image encoder, and the tokenizer is that of the text encoder. The parts that
    join the encoders are those of the run, at the encoders' widths; if both encoders are from one model with a joint space,
    they are those of that model.

    Args:
        run: A recipe's run.
        image: Folder of a model in the layout of transformers, or its name on the Hugging Face hub.
        image_layers: Number of its first layers to use; None for all.
        text: The same for the text encoder.
        text_layers: Number of its first layers to use; None for all.

    Raises:
        UserError: There is no such model, or the run's model cannot be built with it.
    """
    run = replace(run, image=image, image_layers=image_layers, text=text, text_layers=text_layers)
    return _adapted(run, *read_encoders(run))


def _adapted(run: TrainConfig, images: PublicImages | None, texts: PublicTexts | None) -> TrainConfig:
    model, data = with_encoders(run.model, images, texts), run.data
    fields: dict[str, Any] = {}
    # If regions are read, the model must see the whole image.
    reads_regions = model.single is not None or (model.embed is not None and model.embed.image.regions is not None)
    if images is not None and not reads_regions and getattr(data, "regions", None) is None:
        fields["fit"] = images.preprocessing.fit
    if _fixed_length(model):
        fields["max_length"] = min(data.max_length, model.longest_text)
    return replace(run, model=model, data=replace(data, **fields))


def _fixed_length(model: ModelConfig) -> bool:
    """Whether the joint space was trained on texts that are padded to a fixed length (SigLIP)."""
    return model.embed is not None and model.embed.text_length is not None


def read_encoders(run: TrainConfig) -> tuple[PublicImages | None, PublicTexts | None]:
    """Reads the public encoders that a run names; their weights are read later. Raises UserError like `read_images`, and if the
    run also starts from a saved model."""
    if run.init is not None and (run.image or run.text):
        raise UserError(
            f"{run.name}: it starts from the saved model `init` and from public encoders; give only one of the two"
        )
    if run.text_prefix is not None and not run.text:
        raise UserError(f"{run.name}: `text_prefix` is for a public text encoder; name it as `text`")
    folders = {source: open_public(source) for source in (run.image, run.text) if source}
    images = read_images(folders[run.image], layers=run.image_layers) if run.image else None
    texts = read_texts(folders[run.text], layers=run.text_layers) if run.text else None
    return images, texts


def completed(run: TrainConfig, images: PublicImages | None, texts: PublicTexts | None) -> TrainConfig:
    """Returns the run with the public encoders that it names, and with positions for its longest texts. If the run already has
    the encoders, maybe at another image size, nothing else is changed."""
    if images is None and texts is None:
        return run
    wanted = with_encoders(run.model, images, texts)
    if not (same_weights(wanted.image, run.model.image) and same_weights(wanted.text, run.model.text)):
        run = _adapted(run, images, texts)
    model = run.model
    more = run.data.max_length - model.longest_text
    if texts is not None and more > 0 and not _fixed_length(model):
        model = replace(model, text=replace(model.text, positions=model.text.positions + more))
    return replace(run, model=model)


def public_tokenizer(texts: PublicTexts, path: str | None) -> Tokenizer:
    """Returns the tokenizer of a public text encoder, or the one in the named file. Raises UserError if the encoder has none,
    or if the file has another vocabulary."""
    tokenizer = read_tokenizer(texts.folder, path)
    known = tokenizer.vocab_size - len(tokenizer.added)
    if known > texts.config.vocab:
        raise UserError(
            f"{path or texts.folder.source}: a tokenizer of {known} tokens, and the text encoder knows {texts.config.vocab}; "
            "name the tokenizer.json that the encoder was trained with (`tokenizer`)"
        )
    return tokenizer


def load_encoders(
    model: VLModel, objectives: Mapping[str, nn.Module], images: PublicImages | None, texts: PublicTexts | None
) -> Inheritance | None:
    """Loads the weights of public encoders into a model that is built for them, and into the parts of objectives that share
    them. Also loads the weights of an image encoder that names its own (`starting_weights`). Returns None if there are none of
    these.

    Positions are resized, and the vocabulary gets the model's size. Projections are loaded if they have the model's shape.
    Raises UserError if weights are missing or have another shape.
    """
    named = None if images is not None else model.config.image.starting_weights()
    if images is None and texts is None and named is None:
        return None
    source = (
        " and ".join(dict.fromkeys(part.folder.source for part in (images, texts) if part is not None))
        or "`model.image`"
    )
    state, own, result = public_weights(model.config, images, texts), model.state_dict(), Inheritance()
    state |= {f"image.{name}": x for name, x in (named or {}).items()}
    fitted = _with_vocabulary(model, model.resized(state)) if texts is not None else model.resized(state)
    heads = {name: f"embed.{name}." for name in ("image", "text")}
    for name, value in own.items():
        if name not in fitted or (name.startswith(tuple(heads.values())) and fitted[name].shape != value.shape):
            result.fresh.append(name)
            continue
        if fitted[name].shape != value.shape:
            raise UserError(
                f"{source}: {name} has shape {list(fitted[name].shape)}, the model wants {list(value.shape)}; leave the "
                "fields of `model.image` and `model.text` that give widths and layers as the public encoders have them"
            )
        (result.loaded if fitted[name] is state[name] else result.resized).append(name)
    result.dropped.extend(name for name in fitted if name not in own)
    expected = [f"{part}." for part, given in (("image", images or named), ("text", texts)) if given is not None]
    if missing := [name for name in result.fresh if name.startswith(tuple(expected) or ("\0",))]:
        raise UserError(f"{source}: has no weights for {', '.join(missing[:3])}")
    model.load_state_dict(own | {name: fitted[name] for name in (*result.loaded, *result.resized)})
    new_heads = [name for name in result.fresh if name.startswith(tuple(heads.values()))]
    scale = pair_scale(images, texts) if model.config.embed and not new_heads else {}
    inherit_objectives(objectives, {f"{name}.{key}": x for name in objectives for key, x in scale.items()}, result)
    return result


def check_tokens(model: VLModel, objectives: Mapping[str, Objective], new: Collection[str]) -> None:
    """Raises UserError if an objective reads a token that is never trained. `new`: the roles of the tokens that the public
    tokenizer lacked, whose vectors are random."""
    if not new or model.text.word_table.requires_grad:
        return
    for name, objective in objectives.items():
        reads = {"mask": objective.reads_mask, "bos": objective.bos is not None}
        if lacking := [role for role in new if reads.get(role)]:
            raise UserError(
                f"objective {name} reads {' and '.join(lacking)}, which the tokenizer of the public text encoder lacked: the "
                "vectors of new words are random, and `freeze` keeps them so; train the table of words too, or take another "
                "text encoder, such as a BERT"
            )


def _with_vocabulary(model: VLModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state with as many rows in the table of words as the model has. New rows are drawn around the mean of the
    others."""
    names = [name for name, parameter in model.named_parameters() if parameter is model.text.word_table]
    name, rows = names[0], len(model.text.word_table)
    table = state[name]
    if len(table) == rows:
        return state
    new = table.mean(0) + table.std(0) * torch.randn(max(0, rows - len(table)), table.shape[1])
    return {**state, name: torch.cat([table, new])[:rows]}
