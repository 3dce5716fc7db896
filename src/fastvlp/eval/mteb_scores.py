"""Scores by mteb's own runner (Massive Text Embedding Benchmark, with tasks of images) of a folder that sentence-transformers
loads: of tasks of mteb, or of local data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import torch
from tyro.conf import arg

from fastvlp.dist import pick_device
from fastvlp.errors import UserError, install
from fastvlp.eval.class_files import read_templates
from fastvlp.eval.classification import class_chance
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.labelled_images import open_labelled_images
from fastvlp.eval.mteb_tasks import retrieval_tasks, zeroshot_task
from fastvlp.eval.ranks import recall_chance
from fastvlp.eval.split_reading import open_split, read_captions
from fastvlp.eval.uncertainty import standard_error
from fastvlp.model.encoders.transformers_models import quiet_transformers

LOCAL = ("retrieval", "zeroshot")


@dataclass(frozen=True, kw_only=True)
class MtebEncoding:
    """Options of running the model in mteb. Images and texts are preprocessed as the folder states."""

    batch_size: int = 32
    """Images, or texts, that are encoded at a time."""
    device: str = "auto"
    """Device such as cpu or cuda:1; `auto` takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads that PyTorch uses; its own choice by default."""


@evaluation
def evaluate_mteb(
    run: Annotated[str | Path, arg(metavar="EXPORT")],
    /,
    *,
    tasks: tuple[str, ...] = LOCAL,
    data: str | Path | None = None,
    split: str = "test",
    captions: str = "captions",
    classes: str | Path | None = None,
    templates: str = "simple",
    label: str = "label",
    encoding: MtebEncoding = MtebEncoding(),
) -> Evaluation:
    """Score an export for sentence-transformers with mteb's own runner.

    The tasks `retrieval` and `zeroshot` use local data. Their scores have the same names as in `vlp evaluate retrieval` and
    `zeroshot`. All other names are mteb's own tasks, such as CIFAR10ZeroShot, whose data mteb downloads. The result is also
    added to a file in the folder.

    Args:
        run: Folder that `vlp export --to sentence-transformers` wrote, or another folder that sentence-transformers loads.
        tasks: retrieval, zeroshot, or names of mteb's tasks.
        data: Local data for retrieval and zeroshot: a folder of shards; for zeroshot also a folder with a sub-folder of
            pictures for each class.
        split: Sub-folder of `data` to use, if there is one of this name.
        captions: Field of the records with the captions.
        classes: For zeroshot: a file with the names of the classes or a public data set, as for `evaluate zeroshot`.
        templates: For zeroshot: simple, or a file with a single template, since mteb compares with one text for each class.
        label: Field of the records with the class.
        encoding: Options of encoding images and texts.

    Raises:
        UserError: mteb is not installed, there is no such task, or its data cannot be read.
    """
    if data is None and (local := [task for task in tasks if task in LOCAL]):
        raise UserError(
            f"the task {local[0]} needs local data; give its folder as `data`, or name mteb's own tasks in `tasks`"
        )
    runner = MtebRunner.open(run, encoding)
    measured: dict[str, MtebScores] = {}
    for task in tasks:
        if task == "retrieval":
            measured[task] = runner.retrieval(str(data), split, captions)
        elif task == "zeroshot":
            measured[task] = runner.zeroshot(str(data), split, classes, templates, label)
        else:
            measured[task] = runner.own_task(task)
    return Evaluation(
        scores={task: its.scores for task, its in measured.items()},
        # By metric: retrieval and zeroshot have none in common.
        chance={name: value for its in measured.values() for name, value in its.chance.items()},
        errors={task: its.errors for task, its in measured.items()},
        counts={f"{task}_{name}": value for task, its in measured.items() for name, value in its.counts.items()},
        data="mteb" if data is None else str(data),
        weights="model.safetensors",
        step=None,
        details={"mteb": runner.mteb.__version__},
    )


class MtebScores(NamedTuple):
    """The scores of one task, by metric."""

    scores: dict[str, float]
    chance: dict[str, float]
    errors: dict[str, float]
    counts: dict[str, int]


@dataclass(frozen=True)
class MtebRunner:
    """mteb, and a model that is wrapped for it."""

    mteb: ModuleType
    model: Any
    batch_size: int

    @classmethod
    def open(cls, folder: str | Path, encoding: MtebEncoding) -> MtebRunner:
        """Loads a folder. Raises UserError if mteb is not installed, or sentence-transformers cannot load it."""
        mteb, library = _libraries()
        if encoding.threads:
            torch.set_num_threads(encoding.threads)
        if not (Path(folder) / "modules.json").is_file():
            raise UserError(
                f"{folder}: not a folder of sentence-transformers; write one with `vlp export RUN OUT --to "
                f"sentence-transformers`"
            )
        with quiet_transformers():
            device = str(pick_device(encoding.device))
            model = library.SentenceTransformer(str(folder), device=device, local_files_only=True)
        with warnings.catch_warnings(action="ignore"):
            wrapped = mteb.models.SentenceTransformerEncoderWrapper(model)
        # What mteb finds out by itself of a model that is not on the hub is that it reads texts.
        about = {"name": f"local/{Path(folder).resolve().name}", "modalities": ["text", "image"]}
        wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=about)
        return cls(mteb, wrapped, encoding.batch_size)

    def run(self, task: Any) -> dict[str, float]:
        """The scores of mteb for one task, by mteb's names. Nothing is read from or written to its cache of results."""
        with warnings.catch_warnings(action="ignore"):
            options = {"batch_size": self.batch_size, "show_progress_bar": False}
            done = self.mteb.evaluate(self.model, task, cache=None, show_progress_bar=False, encode_kwargs=options)
        parts = [part for split in done.task_results[0].scores.values() for part in split]
        if len(parts) != 1:
            raise UserError(
                f"`tasks` {task.metadata.name}: has {len(parts)} splits or languages, each with scores of its own; run it by "
                f"mteb itself, on the same folder"
            )
        (scores,) = parts
        return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}

    def retrieval(self, data: str, split: str, captions: str) -> MtebScores:
        """Recall in both directions, by the names of `ranks.recall`."""
        shards = open_split(data, split)
        captions_of = read_captions(shards, captions)
        shares = dict[str, float]()
        for direction, task in reversed(retrieval_tasks(shards, captions_of).items()):
            result = self.run(task)
            shares |= {f"{direction}/r{k}": result[f"hit_rate_at_{k}"] for k in (1, 5, 10)}
        chance = recall_chance([len(its) for its in captions_of])
        scores = shares | {"recall": sum(shares.values()) / len(shares)}
        counts = {"images": len(shards), "texts": sum(map(len, captions_of))}
        return MtebScores(scores, {name: chance[name] for name in scores}, {}, counts)

    def zeroshot(self, data: str, split: str, classes: str | Path | None, templates: str, label: str) -> MtebScores:
        """Top-1 accuracy, by the name of `classification.class_scores`."""
        sentences = read_templates(templates)
        images = open_labelled_images(data, split, classes, label)
        if len(sentences) > 1 or any(len(names) > 1 for names in images.names_of.values()):
            raise UserError(
                f"mteb compares images with one text for each class, and `templates` {templates} or `classes` gives several; "
                f"choose simple or a file with one template, and one name for each class"
            )
        texts = [sentences[0].replace("{}", names[0]) for names in images.names_of.values()]
        share = self.run(zeroshot_task(images.records, images.label_I.tolist(), texts))["accuracy"]
        count = len(images.records)
        hits = [1.0] * round(share * count) + [0.0] * (count - round(share * count))
        errors = {"top1": standard_error(hits)} if count > 1 else {}
        chance = {"top1": class_chance(len(texts))["top1"]}
        return MtebScores({"top1": share}, chance, errors, {"images": count, "classes": len(texts)})

    def own_task(self, name: str) -> MtebScores:
        """The main score of one of mteb's tasks. Raises UserError if there is none of this name, or its data is away."""
        try:
            task = self.mteb.get_task(name)
        except (KeyError, ValueError) as error:
            raise UserError(f"`tasks` {name}: neither {', '.join(LOCAL)} nor a task of mteb ({error})") from error
        try:
            scores = self.run(task)
        except OSError as error:
            raise UserError(
                f"`tasks` {name}: its data cannot be fetched ({type(error).__name__}: {error}); connect to the Hugging Face "
                f"hub, or make a task of local data: {', '.join(LOCAL)}"
            ) from error
        main = task.metadata.main_score
        return MtebScores({main: scores[main]}, {}, {}, {})


def _libraries() -> Sequence[ModuleType]:
    try:
        import mteb
        import mteb.models
        import sentence_transformers
    except ImportError as error:
        raise UserError(f"this evaluation needs the package mteb: {install('mteb')}") from error
    return mteb, sentence_transformers
