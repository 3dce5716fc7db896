"""A public checkpoint becomes a folder like a run's: weights, tokenizer, and the config that its training would have saved.

Sizes are read off the tensors. What these do not tell, such as the number of heads, is the published models'.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastvlp.convert.interface import Layout, Release
from fastvlp.convert.weight_files import read_weights
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.extensions import variants
from fastvlp.files import whole_folder, write_whole
from fastvlp.model.layers import Activation
from fastvlp.model.model import VLModel
from fastvlp.model.saving import load_exactly, save_model
from fastvlp.model.sizes import with_tokenizer
from fastvlp.objectives.saved_objectives import describe


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    folder: Path
    parameters: int
    """How many numbers the model has."""
    untrained: tuple[str, ...]
    """Prefixes of the parameters that the checkpoint lacks; they are drawn from seed 0."""


def convert(
    layout: str,
    checkpoint: Path,
    out: Path,
    /,
    *,
    tokenizer: Path | None = None,
    activation: Literal["gelu", "quick_gelu"] | None = None,
) -> Converted:
    """Make a folder like a run's of a public checkpoint. `vlp pretrain --from`, `vlp finetune --from`, `vlp evaluate` and
    `vlp export` read it, each as far as the model allows.

    Args:
        layout: Whose files are laid out like the checkpoint. uniter: as pretrained, base or large. bert: a start for UNITER,
            whose regions are untrained. open_clip: both encoders; OpenAI's too. flip: its parameters, names joined by "/", as
            .safetensors. brivl: text encoder and heads; the image encoder is untrained. flm: as pretrained.
        checkpoint: A .safetensors file or a PyTorch file; nothing in it is executed.
        out: Folder to write.
        tokenizer: The checkpoint's own tokenizer.json; by default the one beside it.
        activation: Of open_clip, whose files do not tell: quick_gelu for weights of OpenAI, which is the default where the
            file is OpenAI's own; otherwise gelu.

    Raises:
        UserError: A file is missing or damaged, laid out otherwise, or of another tokenizer, or `out` exists.
    """
    kind = find_layout(layout)
    if activation is not None and activation not in kind.activations:
        allowed = f"one of {', '.join(kind.activations)}" if kind.activations else "known already; leave it out"
        raise UserError(f"`activation` of {layout} is {allowed}")
    with whole_folder(out) as part:
        release = read_release(kind, checkpoint, activation)
        path = tokenizer or checkpoint.with_name("tokenizer.json")
        words = Tokenizer.load(path, complete=kind.completes_vocabulary)
        torch.manual_seed(0)
        model = VLModel(with_tokenizer(release.config, words))
        load_exactly(model, completed(release, model, kind.completes_vocabulary), checkpoint)
        objectives = {name: config.build(model.config, words) for name, config in release.objectives.items()}
        info = {"name": out.name, "step": 0, **describe(release.objectives, objectives)}
        save_model(part, model, words, info, objectives=release.objective_weights)
        config = {"name": out.name, "data": release.data, "objectives": info["objectives"]}
        write_whole(part / "config.json", json.dumps(config, indent=2).encode())
    return Converted(out, sum(p.numel() for p in model.parameters()), release.untrained)


def find_layout(name: str) -> Layout:
    """The layout of that name, also one of a user's own file. Raises UserError with the nearest names."""
    known = {kind.name: kind for kind in variants(Layout, __package__)}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
        raise UserError(f"{name}: no such layout of checkpoints; {hint}")
    return known[name]()


def completed(release: Release, model: VLModel, new_words: bool) -> dict[str, Tensor]:
    """The weights of a release with those of `model` where it has none; with `new_words` for tokens too that the tokenizer
    has besides the checkpoint's, padding and mask."""
    own = model.state_dict()
    state = {name: x for name, x in own.items() if name.startswith(release.untrained or ("\0",))} | release.weights
    name = "text.word.weight"
    table, rows = state[name], own[name]
    if new_words and 0 < len(rows) - len(table) <= 2:
        state[name] = torch.cat([table, rows[len(table) :]])
    return state


def read_release(layout: Layout, path: Path, activation: Activation | None) -> Release:
    """The checkpoint in a file. Raises UserError where it is not laid out so."""
    weights, wrong = read_weights(path), f"{path}: not laid out as {layout.name}"
    remedy = "name the layout that it has, and the file as it was released"
    try:
        return layout.read(weights, activation)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(f"{wrong}: it has no {error.args[0]}; {remedy}") from error
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{wrong}: {error}; {remedy}") from error
