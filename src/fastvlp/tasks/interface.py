"""The interface of a task: its options, its data and objective, and the scoring of a fine-tuned model."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, TypeVar, get_type_hints

import cattrs
from cattrs.errors import BaseValidationError, CattrsError

from fastvlp.batch import Batch
from fastvlp.data.pairs import PairData, Rows, Split
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.stores import Stored
from fastvlp.errors import UserError
from fastvlp.extensions import variants
from fastvlp.model.model import Reading
from fastvlp.model.saving import Saved
from fastvlp.objectives.objective import Objective, ObjectiveConfig
from fastvlp.tasks.decoder import USUAL_DECODER, DecoderConfig
from fastvlp.tasks.item_data import ItemData, TaskData, no_split
from fastvlp.tasks.items import ItemMaker, batches_in_order
from fastvlp.tasks.pretrained import Pretrained
from fastvlp.training.optim import OptimConfig

T = TypeVar("T")


# These settings are for models of the sizes that are pretrained here, whose fusion layers are trained as well as their towers.
# The settings of the papers are: lr 5e-6 to 1e-5, cross 5, head 50 (VQA) or 10 (NLVR2), batches of 256 to 512 (FLM, arXiv
# 2303.14038); lr 3e-5 to 1e-4, for VQA head 10, batches of 5,120 to 10,240 tokens and regions (UNITER, arXiv 1909.11740).
USUAL_OPTIM = OptimConfig(lr=5e-4, cross_multiplier=1, head_multiplier=5, warmup=0.1, decay="linear")


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """No options."""


class FineTuned(NamedTuple):
    """A model that can be scored on a task.

    Attributes:
        task: the task.
        saved: the model, its tokenizer, and what was saved with them.
        objective: the task's objective, with its trained parameters.
        data: the data that it was trained on, or another with the same fields.
        stored: the stored states of its frozen encoders, which are read instead of pixels; None if there are none.
    """

    task: type[Task]
    saved: Saved
    objective: Any
    data: Any
    stored: Stored | None = None

    def items(self, split: Split) -> ItemMaker:
        """Returns the items of a split, to be scored. Raises UserError if there is no such split; and when a batch is made, for
        a record that cannot be used."""
        data: ItemData = self.data
        return data.evaluation_items(split, self.saved.tokenizer, self.saved.model.config.image.size, self.stored)

    def batches(self, split: Split) -> Iterator[Batch]:
        """Yields the items of a split in batches, each once and in order, on the model's device. Raises UserError like
        `items`."""
        device = next(self.saved.model.parameters()).device
        return batches_in_order(self.items(split), self.data.batch_size, device)

    def rows(self, split: Split) -> Rows:
        """Returns the rows of a split, to be scored. Raises UserError like `items`."""
        size, given = self.saved.model.config.image.size, {} if self.stored is None else {"stored": self.stored}
        rows: Rows | None = self.data.rows(split, self.saved.tokenizer, size, strict=True, **given)
        if rows is None:
            raise no_split(split)
        return rows


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A downstream task. Each task is a frozen dataclass in its own file.

    The fields of the dataclass are the options of `vlp finetune NAME`. Each has a default and, in a string below it, its help
    text. The first line of the docstring describes the task in the list of tasks. An instance is one choice of options. Class
    methods work on any fine-tuned run, without the options.

    Attributes:
        name: name of the task in commands and saved models.
        data: type of the task's data.
        config: type of its objective's config.
        field: name of the data's attribute that holds the field of the records with the texts; also that field's usual name.
        answer: key of the right answer in an entry of the field; None if the texts themselves are the answers (captions). A
            split is not scored if none of its entries has this key.
        optim: the default optimiser and its learning rates.
        decoder: the layers that two encoders without fusion layers get, unless others are chosen.
        max_length: smallest length, in tokens, at which texts are cut; less only if the model has fewer positions.
        token_types: number of token types in a single stream: 2 for words and one image.
        needs_regions: whether every model reads regions for this task, not only a single stream.
        split_prefixes: prefixes of the splits' folders; the first one that exists is used.
        scoring: dataclass with the options of its evaluation.
    """

    name: ClassVar[str]
    data: ClassVar[type[ItemData] | type[PairData]]
    config: ClassVar[type[ObjectiveConfig]]
    field: ClassVar[str]
    answer: ClassVar[str | None] = None
    optim: ClassVar[OptimConfig] = USUAL_OPTIM
    decoder: ClassVar[DecoderConfig] = USUAL_DECODER
    max_length: ClassVar[int] = 50
    token_types: ClassVar[int] = 2
    needs_regions: ClassVar[bool] = False
    split_prefixes: ClassVar[tuple[str, ...]] = ("",)
    scoring: ClassVar[type] = NoOptions

    def data_fields(self, train: str, field: str) -> Mapping[str, Any]:
        """Returns fields of the data that only this task has. `train`: folder of the training split. `field`: the field of its
        records with the texts."""
        return {}

    def objective(self, data: Any, pretrained: Pretrained, reading: Reading | None) -> ObjectiveConfig:
        """Returns the objective to train: by default a `config` with the task's options, which reads texts as in pretraining.
        `reading`: how the user wants texts to be read; None leaves the choice to the task."""
        make: Any = self.config
        config: ObjectiveConfig = make(reading=reading or pretrained.reading, bos=pretrained.bos, **self.options())
        return config

    def options(self) -> dict[str, Any]:
        """Returns the chosen options, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    @abc.abstractmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        """Returns the scores of the weights on a split: floats by name. Of these higher is better, except for counts, chance
        levels and standard errors. Values of other types are saved beside them. The model and the objective are in evaluation
        mode, without gradients. `options`: a `scoring`."""

    @classmethod
    def zero_shot(cls, pretrained: Pretrained) -> tuple[Objective, TaskData] | None:
        """Returns an objective, and data without splits, with which a pretrained run is scored without fine-tuning; None for a
        task that always needs fine-tuning. Raises UserError if the run did not learn what the task needs."""
        return None

    @classmethod
    def has_answer(cls, info: Mapping[str, Any], field: str) -> bool:
        """Whether a record has the right answer for any of its texts."""
        if cls.answer is None:
            return bool(usable_captions(info, field))
        entries = info.get(field)
        dicts = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        return any(entry.get(cls.answer) not in (None, {}) for entry in dicts)

    @classmethod
    def summary(cls) -> str:
        """Returns the first line of the docstring."""
        return (cls.__doc__ or "").partition("\n")[0]


def tasks() -> list[type[Task]]:
    """Returns all tasks: those of the package, and those in files that the user imported. Raises UserError if two have the
    same name."""
    known = variants(Task, "fastvlp.tasks")
    names = [task.name for task in known]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"several tasks are called {', '.join(double)}; give your own another name")
    return known


def task_named(name: str) -> type[Task]:
    """Returns the task of this name. If there is none, raises UserError with the nearest name."""
    named = {task.name: task for task in tasks()}
    if name not in named:
        near = get_close_matches(name, named, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(named)}."
        raise UserError(
            f"{name}: no task of that name; {hint} One of your own is in a file that is imported first, with "
            f"`vlp --import FILE.py ...` or `fastvlp.import_file`"
        )
    return named[name]


def make_task(task: Task | str, options: Mapping[str, Any]) -> Task:
    """Returns a task with some of its options set. Raises UserError for an option that it lacks, or for a value of the wrong
    type."""
    if isinstance(task, str):
        return with_options(task_named(task), options, task)
    if options:
        raise UserError(f"{', '.join(options)}: give these options to the task itself, or name the task")
    return task


def with_options(cls: type[T], options: Mapping[str, Any], owner: str) -> T:
    """Returns a dataclass of options with some of them set. Raises UserError for an unknown option or a value of the wrong
    type, and names the `owner` of the options."""
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    hints, values = get_type_hints(cls), {}
    for name, value in options.items():
        if name not in names:
            has = f"it has {', '.join(f'`{own}`' for own in names)}" if names else "it has none"
            raise UserError(f"`{name}` is no option of {owner}; {has}")
        try:
            whole = is_dataclass(value) and isinstance(value, hints[name])
            values[name] = value if whole else cattrs.structure(value, hints[name])
        except (CattrsError, BaseValidationError, TypeError, ValueError) as error:
            wanted = str(hints[name]).replace("typing.", "")
            raise UserError(f"{owner}: `{name}` cannot be {value!r}; it is {wanted}") from error
    return cls(**values)
