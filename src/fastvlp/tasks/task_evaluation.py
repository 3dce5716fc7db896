"""Scores a fine-tuned run on a split of its task, or a pretrained run on a task that it can do without fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastvlp import dist
from fastvlp.data import splits
from fastvlp.data.pairs import Data
from fastvlp.data.records.shards import Shards
from fastvlp.data.vocabulary_texts import readable_infos
from fastvlp.errors import UserError
from fastvlp.model.freezing import evaluating
from fastvlp.model.frozen_states import stored_of_run
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import load_model
from fastvlp.objectives.saved_objectives import load_objective
from fastvlp.tasks.interface import FineTuned, Task, task_named, tasks, with_options
from fastvlp.tasks.pretrained import load_pretrained
from fastvlp.tasks.task_scores import TaskScores, new_scores_path, save_scores


def evaluate_task(
    run: Annotated[str | Path, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    split: str = "test",
    data: str | Path | None = None,
    zero_shot: bool = False,
    task: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    **scoring: Any,
) -> TaskScores:
    """Score the best weights of a fine-tuned run on a split. The scores are written to a new file in the folder of the run.

    Args:
        run: Folder of the fine-tuned run; with `zero_shot`, of a pretrained run.
        split: Name of the split's folder, such as val, test or testA. A folder test1 is found as test, and dev as val.
        data: Folder of another data set with the same splits and fields; by default the data that the run was fine-tuned on.
        zero_shot: Score a pretrained run on `data` without fine-tuning. For retrieval this uses its image-text matching.
        task: With `zero_shot`, the name of the task; needed if several tasks can be scored without fine-tuning.
        device: Device such as cpu or cuda:1; auto takes a GPU if there is one.
        threads: CPU threads that PyTorch uses; by default PyTorch chooses.
        **scoring: Options of the task's evaluation, such as `beams` of caption.

    Returns: The scores and their file.

    Raises:
        UserError: A record cannot be read, since an evaluation leaves none out; or the split has no answers or labels.
    """
    if threads:
        torch.set_num_threads(threads)
    run, data = str(run), None if data is None else str(data)
    tuned = load_zero_shot(run, data, task) if zero_shot else load_task(run)
    options: Any = with_options(tuned.task.scoring, scoring, f"the evaluation of {tuned.task.name}")
    scores = {split: score_split(tuned, split_folder(tuned, split, data), device=device, options=options, split=split)}
    save_scores(path := new_scores_path(Path(run)), scores)
    return TaskScores(scores, path)


def score_split(tuned: FineTuned, place: str, *, device: str, options: Any, split: str) -> dict[str, Any]:
    """Returns the scores on the split in the folder `place`, and the file and step of the scored weights. `split`: name of the
    split, for errors."""
    if reason := why_not_scored(tuned.task, place, tuned.data):
        raise UserError(f"split {split!r} cannot be scored, {reason}; choose another `split`, or `data` with answers")
    target = dist.pick_device(device)
    tuned.saved.model.to(target)
    tuned.objective.to(target)
    # A split may have any name, but the data has only the fields train, val and test. `test` is used, because it decides
    # nothing in training.
    tuned = tuned._replace(data=replace(tuned.data, test=place))
    about = {"weights": tuned.saved.weights.name, "step": tuned.saved.info.get("step"), "data": place}
    with evaluating(tuned.saved.model, tuned.objective):
        return about | tuned.task.score(tuned, "test", options)


def why_not_scored(task: type[Task], place: str, data: Data) -> str | None:
    """Returns the reason why a split cannot be scored: no record has an answer, as in published test sets. Returns None if a
    record has one."""
    field, count = getattr(data, task.field), 0
    for info in readable_infos(Shards(place)):
        if task.has_answer(info, field):
            return None
        count += 1
    # If no record can be read, scoring raises an error with the reason.
    return f"{place}: no record has {field!r}" + (f" with {task.answer!r}" if task.answer else "") if count else None


def split_folder(tuned: FineTuned, split: str, data: str | None) -> str:
    """Returns the folder of a split in `data`; without `data`, the folder in the run's own data, or beside its splits."""
    if data is None and not tuned.data.train:
        raise UserError("a converted model has no data of its own; name the `data` to score it on")
    own = getattr(tuned.data, split) if data is None and split in splits.SPLITS else None
    return own or splits.find_split(data or splits.parent(tuned.data.train), split, tuned.task.split_prefixes)


def load_task(folder: str | Path) -> FineTuned:
    """Loads a fine-tuned run. Raises UserError if the folder is not a run of a task, or is damaged."""
    saved = load_model(folder)
    name, named = saved.info.get("task"), {task.name: task for task in tasks()}
    if name not in named:
        raise UserError(
            f"{folder}: no fine-tuned run of a task that is known here: it was trained on {name!r}, the tasks are "
            f"{', '.join(named)}. Make one with `vlp finetune`, or import the file that defines your own task first, with "
            f"`vlp --import FILE.py ...` or `fastvlp.import_file`"
        )
    task = named[name]
    run, objective = read_saved_run(folder), load_objective(saved, name)
    return FineTuned(task, saved, objective, run.data_as(task.data), stored_of_run(saved, run, objective.image_use))


def load_zero_shot(folder: str, data: str | None, name: str | None = None) -> FineTuned:
    """Loads a pretrained run, to be scored on a task without fine-tuning. `data`: folder of the splits; required."""
    if data is None:
        raise UserError("`zero_shot` needs `data`: the folder with the splits to score")
    pretrained = load_pretrained(folder)
    ready = [
        FineTuned(task, pretrained.saved, *scored)
        for task in (tasks() if name is None else [task_named(name)])
        if (scored := task.zero_shot(pretrained)) is not None
    ]
    if not ready:
        raise UserError(f"{name} cannot be scored without fine-tuning; make a run with `vlp finetune {name}`")
    if len(ready) > 1:
        names = ", ".join(tuned.task.name for tuned in ready)
        raise UserError(f"several tasks can be scored without fine-tuning; choose `task`: {names}")
    return ready[0]
