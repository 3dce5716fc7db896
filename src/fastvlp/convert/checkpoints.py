"""A public checkpoint becomes a folder like a run's: weights, tokenizer, and the config that its training would have saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
from torch import Tensor
from tyro.conf import arg

from fastvlp.convert.checkpoint_source import Checkpoint, open_checkpoint, read_answers
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.public_encoders import read_tokenizer
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.extensions import variants
from fastvlp.files import whole_folder, write_whole
from fastvlp.model.layers import Activation
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import load_exactly, save_model
from fastvlp.model.sizes import with_tokenizer
from fastvlp.objectives.saved_objectives import describe

# Where layouts are: those of fine-tuned models are beside their tasks.
PACKAGES = ("fastvlp.convert", "fastvlp.tasks")
WORDS = "text.word.weight"
# How names of tensors in transformers begin.
TRANSFORMERS = ("vision_model.", "text_model.", "embeddings.", "bert.", "roberta.", "vit.")


@dataclass(frozen=True)
class Converted:
    """The result of `convert`."""

    folder: Path
    """Folder that was written."""
    layout: str
    """Name of the source's layout."""
    parameters: int
    """Number of parameters of the model."""
    untrained: tuple[str, ...]
    """Prefixes of the parameters that the source lacks; they have random values, drawn with seed 0."""
    absent: tuple[str, ...] = ()
    """Encoders that the model lacks: image or text."""


def convert(
    source: Annotated[str, arg(metavar="SOURCE")],
    out: Annotated[Path, arg(metavar="OUT")],
    /,
    *,
    layout: str = "auto",
    tokenizer: Path | None = None,
    config: Path | None = None,
    activation: Activation | None = None,
    heads: tuple[int, ...] = (),
    answers: Path | None = None,
    task: str | None = None,
) -> Converted:
    """Convert a public model to a folder with the same files as a run. `vlp pretrain RECIPE --from`, `vlp finetune --from`,
    `vlp evaluate` and `vlp export` read it, if the model has the parts that they need.

    Args:
        source: Folder of a model, a file of weights, or a repository on the Hugging Face hub, such as
            openai/clip-vit-base-patch32. Nothing in a file is executed.
        out: Folder to write.
        layout: Name of the source's layout, such as open_clip or uniter. auto recognises it by config.json,
            open_clip_config.json, or the names of the tensors.
        tokenizer: The model's tokenizer.json; by default the file beside its weights.
        config: Config of the model, if there is no config.json beside the weights: a config.json of transformers, a file of
            open_clip's model_configs, UNITER's config, or BriVL's .yml.
        activation: Activation function of the layers, if no config states it.
        heads: Number of attention heads, if no config states it: two numbers for the image and the text encoder, or one for a
            single stack of layers.
        answers: Answers of a model that was fine-tuned to answer questions, in the order of its outputs: a JSON list, or a JSON
            object from answers to numbers.
        task: Task to evaluate, if a fine-tuned model has the heads of several tasks.

    Raises:
        UserError: The source is not a known model, is damaged or lacks tensors; its tokenizer lacks a token that the model
            needs; an option is missing; the hub does not answer; or `out` exists.
    """
    stated = Stated(activation=activation, heads=tuple(heads), answers=read_answers(answers), task=task)
    with whole_folder(out) as part:
        checkpoint = open_checkpoint(source, config)
        kind = find_layout(checkpoint, layout)
        if further := sorted(stated.given - {*kind.options}):
            raise UserError(
                f"{source}: layout {kind.name} has no {', '.join(f'`{name}`' for name in further)}; leave it out"
            )
        release = read_release(kind, checkpoint, stated)
        words = words_of(checkpoint, release, tokenizer)
        torch.manual_seed(0)
        model = VLModel(config_of(release, words))
        # A public model's preprocessing may be for another image size than its positions.
        load_exactly(model, model.resized(completed(release, model)), source)
        objectives = {name: made.build(model.config, words) for name, made in release.objectives.items()}
        info: dict[str, Any] = {"name": out.name, "step": 0, **never_trained(release, words)}
        if objectives:
            info |= {"task": next(iter(objectives)), **describe(release.objectives, objectives)}
        save_model(part, model, words, info, objectives=release.objective_weights)
        run = {"name": out.name, "data": release.data, "objectives": info.get("objectives", {})}
        write_whole(part / "config.json", json.dumps(run, indent=2).encode())
    present = {"image": model.config.image.present, "text": model.config.text.present}
    absent = tuple(name for name, there in present.items() if not there)
    return Converted(out, kind.name, sum(p.numel() for p in model.parameters()), release.untrained, absent)


def never_trained(release: Release, words: Tokenizer) -> dict[str, list[str]]:
    """Returns the random parts of a converted model, for its `info`: parameters, and the roles of tokens that were added."""
    return {"untrained": list(release.untrained), "untrained_tokens": list(words.added)}


def layouts() -> dict[str, type[Layout]]:
    """Returns all layouts by name, including those in a user's own files."""
    return {kind.name: kind for package in PACKAGES for kind in variants(Layout, package)}


def find_layout(source: Checkpoint, name: str) -> Layout:
    """Returns the layout of this name; for `auto`, the layout that recognises the source. Raises UserError if there is none, or
    if several layouts recognise it."""
    known = layouts()
    if name != "auto":
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise UserError(f"`layout` {name}: no such layout of checkpoints; {hint}")
        return known[name]()
    configs = [kind for kind in known.values() if kind.described(source)]
    # A file may lie beside the config of another model; tensors of the hub are not fetched in vain.
    fitting = configs if configs and source.named is None else []
    fitting = fitting or [kind for kind in known.values() if kind.recognises(source)] or configs
    if len(fitting) == 1:
        return fitting[0]()
    if fitting:
        names = ", ".join(kind.name for kind in fitting)
        raise UserError(f"{source.source}: several layouts fit ({names}); choose its `layout`")
    listed = "; ".join(f"{kind.name}: {kind.summary}" for kind in known.values())
    raise UserError(f"{source.source}: {unknown(source)}. Choose its `layout` where it is one of these. {listed}")


def unknown(source: Checkpoint) -> str:
    """Describes a source that no layout recognises."""
    if source.model_type is not None:
        return f"a {source.model_type} of transformers, of which no model is made here"
    if any(name.startswith(TRANSFORMERS) for name in source.names):
        return (
            "tensors as transformers calls them, without the config.json that says what they are: name it as `config`"
        )
    few = ", ".join(sorted(source.names)[:3])
    return f"no public model that is known here: no config.json or open_clip_config.json says what it is, nor do {few}"


def read_release(layout: Layout, source: Checkpoint, stated: Stated) -> Release:
    """The checkpoint as a model. Raises UserError if it is not laid out so."""
    wrong = f"{source.source}: not laid out as {layout.name}"
    remedy = "name the `layout` that it has, and the files as they were released"
    try:
        return layout.read(source, stated)
    except UserError as error:
        known = str(error).startswith(source.source)
        raise error if known else UserError(f"{source.source}: {error}") from error
    except KeyError as error:
        raise UserError(f"{wrong}: it has no {error.args[0]}; {remedy}") from error
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{wrong}: {error}; {remedy}") from error


def words_of(source: Checkpoint, release: Release, path: Path | None) -> Tokenizer:
    """The tokenizer of a checkpoint; one of special tokens alone where it has no text encoder.

    Raises UserError if there is none, where it is of another vocabulary, or where it lacks a token that the model needs.
    """
    if not release.config.text.present:
        return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]")), complete=True)
    words = read_tokenizer(source, None if path is None else str(path))
    words = words if release.renew_words is None else release.renew_words(words)
    place, rows = path or source.source, vocabulary_of(release)
    if lacking := sorted(release.needs & {*words.added}):
        raise UserError(
            f"{place}: the tokenizer has no {' or '.join(lacking)} token, which the model needs; name the tokenizer.json that "
            "it was trained with (`tokenizer`)"
        )
    own = words.vocab_size - len(words.added)
    # A model's own tokenizer may have fewer words than its table, which is often rounded up.
    if rows is not None and (own > rows or (path is not None and own != rows)):
        raise UserError(
            f"{place}: a tokenizer of {own} tokens, and the model knows {rows}; use the tokenizer it was trained with"
        )
    if release.ends_in_largest and words.eos != own - 1:
        raise UserError(
            f"{place}: the model summarises a text at its largest token, and </s> of this tokenizer ({words.eos} of {own}) is "
            "not the largest; use the tokenizer it was trained with, or name the `config` that says how it reads a text"
        )
    return words


def vocabulary_of(release: Release) -> int | None:
    """Rows of the checkpoint's table of words; None if its text encoder has its own names for it."""
    table = release.weights.get(WORDS)
    return None if table is None else len(table)


def config_of(release: Release, words: Tokenizer) -> ModelConfig:
    """The model with the special tokens of its tokenizer and room for the checkpoint's vocabulary."""
    config = with_tokenizer(release.config, words)
    rows = vocabulary_of(release) or release.config.text.vocab
    return replace(config, text=replace(config.text, vocab=max(words.vocab_size, rows)))


def completed(release: Release, model: VLModel) -> dict[str, Tensor]:
    """The weights of a release with those of `model` where it has none, and for tokens that its vocabulary lacks."""
    own = model.state_dict()
    state = {name: x for name, x in own.items() if name.startswith(release.untrained or ("\0",))} | dict(
        release.weights
    )
    for name in vocabulary_tables(own):
        if name in state and len(state[name]) < len(own[name]):
            state[name] = torch.cat([state[name], own[name][len(state[name]) :]])
    return state


def vocabulary_tables(names: Sequence[str] | dict[str, Tensor]) -> list[str]:
    """Parameters with a row for each word of the vocabulary."""
    return [name for name in names if name == WORDS or ".vocabulary." in name or name == "single.words.bias"]
