"""The data on which the arms of a comparison are scored: held-out pairs, questions and reference captions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

from fastvlp.batch import Batch
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import Data, PairData, Split
from fastvlp.data.records.shards import Shards
from fastvlp.data.regions import RegionSource
from fastvlp.data.splits import find_splits
from fastvlp.data.vocabulary_texts import readable_infos
from fastvlp.errors import UserError
from fastvlp.tasks.caption import CaptionData
from fastvlp.tasks.items import Item
from fastvlp.tasks.vqa import VQAData, frequent_answers
from fastvlp.training.state import TrainState
from fastvlp.training.train_config import TrainConfig


def validation_pairs(state: TrainState, options: ScoringOptions, count: int | None = None) -> Iterator[Batch]:
    """The first `count` pairs of the scored split, or all, as the arm reads them."""
    rows = state.run.data.rows(options.split, state.tokenizer, state.model.config.image.size, strict=True)
    if rows is None:
        raise UserError(
            f"{state.run.name}: the data has no {options.split!r} split to score on; name its folder with "
            f"`set` data.{options.split}=FOLDER"
        )
    count = rows.count if count is None else min(rows.count, count)
    for batch, _ in Loader(count, rows.make, batch_size=options.probe_batch, seed=0).once():
        yield batch


def split_folder(data: Data, split: Split) -> str:
    folder = getattr(data, split, None)
    if not isinstance(folder, str):
        raise UserError(f"the data has no {split!r} split; name its folder with `set` data.{split}=FOLDER")
    return folder


def caption_field(data: Data) -> str:
    """The field of the records with the captions."""
    return data.captions if isinstance(data, PairData) else "captions"


def region_source(data: Data) -> RegionSource | None:
    """Returns the source of the images' regions; None if the data have none."""
    return data.regions if isinstance(data, PairData) else None


def caption_data(run: TrainConfig) -> CaptionData:
    """The pairs of the arm as data for captioning."""
    data = run.data
    if not isinstance(data, PairData):
        raise UserError(
            f"{run.name}: captions are compared on image-text pairs only; set `caption_items` and `pictures` to 0"
        )
    names = ("batch_size", "workers", "cache", "max_length", "fit", "train", "val", "test", "captions")
    return CaptionData(**{name: getattr(data, name) for name in names})


def reference_captions(run: TrainConfig, split: Split) -> list[list[str]]:
    """Returns all captions of each record of a split."""
    return caption_data(run).references(split)


def question_data(data: Data, options: ScoringOptions) -> VQAData | None:
    """Questions from the folder `options.vqa`, or from the arm's own records, in the language of its captions; None if its
    records have no questions."""
    field = "questions" + caption_field(data).removeprefix("captions")
    if options.vqa is not None:
        folders = find_splits(options.vqa)
        field = field if _has_field(folders["train"], field) else "questions"
    elif isinstance(data, PairData) and getattr(data, options.split) is not None:
        folders = {"train": data.train, options.split: split_folder(data, options.split)}
        if not _has_field(data.train, field):
            return None
    else:
        return None
    shared = {"batch_size": options.probe_batch} | {n: getattr(data, n) for n in ("max_length", "fit", "cache")}
    answers = frequent_answers(folders["train"], field)
    return VQAData(**shared, **cast(dict[str, Any], folders), questions=field, answers=answers)


def _has_field(folder: str, field: str) -> bool:
    """Whether one of the first records has it."""
    return any(info.get(field) for info in islice(readable_infos(Shards(folder)), 50))


def spread_evenly(items: list[Item], count: int) -> list[Item]:
    """`count` items at equal distances in the list; all of them if there are no more. Neighbouring questions are about the
    same image."""
    n, k = len(items), min(len(items), count)
    return [items[i * n // k] for i in range(k)]
