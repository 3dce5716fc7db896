"""Made data for measuring a recipe before anything is imported: a few scenes of the embedded corpus, and new weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import tokenizers

from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.training.train_config import TrainConfig

# Scenes: drawing one takes ten milliseconds, and larger batches show some twice.
MOST_SCENES = 512


def with_made_data(runs: Mapping[str, TrainConfig], folder: Path, steps: int) -> dict[str, TrainConfig]:
    """The runs on scenes of the embedded corpus, in pictures as large as the model's images, with a tokenizer of as many tokens
    as the run's vocabulary, and with new weights in place of those that they would start from. A teacher stays the run's own.

    Args:
        folder: where the scenes are written.
        steps: steps of which each row should be another scene.
    """
    made: dict[str, TrainConfig] = {}
    # By texts and size: recipes of the same texts share one.
    tokenizers_of: dict[tuple[tuple[str, ...], int], str] = {}
    for name, run in runs.items():
        size = max(16, run.model.image.size)
        scenes = min(MOST_SCENES, steps * run.accumulate * run.data.batch_size)
        out = folder / f"scenes-{size}-{scenes}"
        none = {"val": 0, "test": 0, "pairs": 0, "singles": 0}
        write_world(out, WorldConfig(size=size), train=scenes, **none, progress=False)
        try:
            data = run.data.of_pairs(str(out / "train"))
        except UserError as error:
            raise UserError(f"{name}: {error}; leave out `made_data`") from error
        key = tuple(data.texts()), run.vocab
        if key not in tokenizers_of:
            tokenizers_of[key] = str(folder / f"tokenizer-{len(tokenizers_of)}.json")
            padded(Tokenizer.train(key[0], "wordpiece", vocab_size=run.vocab), run.vocab).save(tokenizers_of[key])
        made[name] = replace(
            run, data=data, tokenizer=tokenizers_of[key], init=None, image=None, text=None, text_prefix=None
        )
    return made


def padded(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """The tokenizer with as many tokens more, which no text has, as make `vocab` in all: a step's cost depends on the size of
    the vocabulary."""
    spec = json.loads(tokenizer.copy().to_str())
    tokens = spec["model"]["vocab"]
    tokens |= {f"[unused {number}]": number for number in range(tokenizer.vocab_size, vocab)}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))
