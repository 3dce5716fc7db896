"""Fine-tunes a pretrained run on a task: `train()` with the task's data and objective, and then scores."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastvlp import dist
from fastvlp.data.pairs import Split
from fastvlp.data.records.transform import Fit
from fastvlp.data.splits import find_splits
from fastvlp.errors import UserError
from fastvlp.model.model import ModelConfig, Reading
from fastvlp.model.saved_run import read_saved_run
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.tasks.decoder import USUAL_DECODER, DecoderConfig, needs_decoder, slower_encoders, with_decoder
from fastvlp.tasks.interface import USUAL_OPTIM, Task, make_task, with_options
from fastvlp.tasks.item_data import TaskData
from fastvlp.tasks.pretrained import Pretrained, load_pretrained
from fastvlp.tasks.task_evaluation import load_task, score_split, why_not_scored
from fastvlp.tasks.task_scores import TaskScores, new_scores_path, save_scores
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig, TrainOptions


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TrainOptions):
    """Training options of a fine-tuning, which are the same for all tasks."""

    image_size: int | None = None
    """Side of the square images in pixels; by default as in pretraining. Position embeddings are resized."""
    optim: OptimConfig = USUAL_OPTIM
    """The optimiser, and the learning rates of encoders, fusion layers (cross) and heads. By default those of the task; with a
    new decoder, the encoders learn at a tenth of its rate."""
    decoder: DecoderConfig = USUAL_DECODER
    """The decoder that is added to two encoders without fusion layers, such as a run of clip or flip."""


def finetune(
    task: Task | str,
    /,
    source: Annotated[str | Path, tyro.conf.arg(name="from")],
    data: str | Path,
    *,
    steps: int = 1000,
    batch_size: int = 64,
    max_tokens: int | None = None,
    lr: float | None = None,
    reading: Reading | None = None,
    field: str | None = None,
    fit: Fit | None = None,
    max_length: int | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    workers: int = 0,
    resume: bool = False,
    change: tuple[str, ...] = (),
    **options: Any,
) -> TaskScores | None:
    """Fine-tune a pretrained run on a task, and score its best weights on the splits val and test.

    Args:
        task: Name of the task, or the task with its options.
        source: Folder of the pretrained run.
        data: Folder with a sub-folder for each split: train, val or dev, test or test1.
        steps: Number of training steps.
        batch_size: Number of texts in a micro-batch, on each rank. A pair of images (NLVR2) counts once.
        max_tokens: Number of words and regions in a micro-batch, on each rank, instead of batch_size in training (UNITER).
        lr: Learning rate of the encoders, instead of `optim.lr`. Other parts learn at a multiple of it.
        reading: How the text is read: in both directions (full), left to right (causal) or by FLM; by default as in
            pretraining.
        field: Field of the records with the questions, statements or captions, such as questions_zh.
        fit: How an image becomes a square; by default as in pretraining, or squash instead of crop if a task needs all of it.
        max_length: Number of tokens after which a text is cut; by default as in pretraining, or more if the task needs it.
        name: Name of the new run; by default the name of the pretrained run and of the task.
        out: Folder of the new run; by default runs/NAME.
        workers: Number of processes that load data; 0 loads data in a thread.
        resume: Continue from the last checkpoint.
        change: Fields that a resumed run may change, such as data.batch_size or optim.lr.
        **options: The fields of `TuneOptions`, such as `image_size`, `augment` or `optim`, and the options of the task.

    Returns: The scores and their file; None on all ranks except the main rank.
    """
    names = {field.name for field in fields(TuneOptions)}
    chosen = make_task(task, {name: value for name, value in options.items() if name not in names})
    given = {"optim": chosen.optim, "decoder": chosen.decoder} | {k: x for k, x in options.items() if k in names}
    tuning, start = with_options(TuneOptions, given, "fine-tuning"), load_pretrained(str(source))
    out = str(out) if out else None
    run_name = name or f"{Path(source).name}-{chosen.name}"
    if resume:
        fit, max_length = earlier_input(Path(out or f"runs/{run_name}"), fit, max_length)
    start = adapted(chosen, start, tuning, max(max_length or 0, 64))
    batches = {"batch_size": batch_size, "max_tokens": max_tokens, "workers": workers}
    task_data = data_for(chosen, start, str(data), field, fit, max_length, **batches)
    tuning = replace(tuning, optim=rates(chosen, start, tuning, lr))
    objective = chosen.objective(task_data, start, reading)
    run = run_for(chosen, start, task_data, objective, tuning, steps=steps, name=run_name, out=out)
    return train_and_score(run, type(chosen), resume, change)


def adapted(task: Task, start: Pretrained, tuning: TuneOptions, longest: int) -> Pretrained:
    """Returns the pretrained model, prepared for fine-tuning: with fusion layers, with enough token types for the task, and for
    images of the chosen size. `longest`: number of text positions, if the decoder has a new table of words."""
    if needs_decoder(start.config):
        start = with_decoder(start, tuning.decoder, max(task.max_length, longest))
    elif tuning.decoder != task.decoder:
        raise UserError(
            f"{start.folder}: `decoder` is only for models of two separate encoders, and this model has fusion layers; leave "
            f"it out"
        )
    config = with_token_types(start.config, task.token_types)
    return start._replace(config=with_image_size(config, tuning.image_size))


def rates(task: Task, start: Pretrained, tuning: TuneOptions, lr: float | None) -> OptimConfig:
    """Returns the chosen optimiser. If its rates are those of the task, encoders below a new decoder learn more slowly."""
    if lr is not None and lr <= 0:
        raise UserError(f"`lr` must be above 0, not {lr}")
    optim, names = tuning.optim, ("lr", "cross_multiplier", "head_multiplier", "parts")
    usual = all(getattr(optim, name) == getattr(task.optim, name) for name in names)
    if usual and needs_decoder(start.saved.model.config):
        optim = slower_encoders(optim, tuning.decoder)
    return optim if lr is None else replace(optim, lr=lr)


def data_for(
    task: Task,
    start: Pretrained,
    folder: str,
    field: str | None = None,
    fit: Fit | None = None,
    max_length: int | None = None,
    **batches: Any,
) -> TaskData:
    """Returns the task's data in `folder`, prepared as in pretraining except for the given arguments. `batches`: fields that
    set the batch size. Raises UserError if there is no training split."""
    if max_length is not None and max_length < 3:
        raise UserError(f"`max_length` {max_length} leaves no room between <s> and </s>; give 3 or more")
    places, seen, model = find_splits(folder, task.split_prefixes), start.preprocessing, start.config
    field = field or task.field
    fields: dict[str, Any] = {
        **places,
        task.field: field,
        "fit": fit or (task.data.fit if seen.fit in ("crop", "centre") else seen.fit),
        "max_length": max_length or min(max(seen.max_length, task.max_length), model.longest_text),
        "regions": seen.regions if model.single is not None or task.needs_regions else None,
    }
    return task.data(**{"batch_size": 64} | batches | fields, **task.data_fields(places["train"], field))


def earlier_input(run: Path, fit: Fit | None, max_length: int | None) -> tuple[Fit | None, int | None]:
    """Returns the input options of a resumed run as it was saved, unless others are given. Changed defaults have no effect."""
    earlier = read_saved_run(run).data
    if fit is None and "fit" in earlier.stated:
        fit = earlier.fit
    if max_length is None and "max_length" in earlier.stated:
        max_length = earlier.max_length
    return fit, max_length


def run_for(
    task: Task,
    start: Pretrained,
    data: TaskData,
    objective: ObjectiveConfig,
    tuning: TuneOptions,
    *,
    steps: int,
    name: str,
    out: str | None,
) -> TrainConfig:
    """Returns the config of the run."""
    often = max(1, steps // 5)
    options = {field.name: getattr(tuning, field.name) for field in fields(TrainOptions)}
    return TrainConfig(
        name=name,
        out=out,
        data=data,
        model=start.config,
        objectives={task.name: objective},
        optim=tuning.optim,
        steps=steps,
        init=start.folder,
        validate_every=often,
        checkpoint_every=often,
        **options,
    )


def with_image_size(config: ModelConfig, size: int | None) -> ModelConfig:
    """Returns the model for images of `size` x `size` pixels; its positions are resized when its weights are loaded. Raises
    UserError for a size that the image encoder does not allow."""
    if size is None:
        return config
    config = replace(config, image=replace(config.image, size=size))
    try:
        config.check()
    except UserError as error:
        raise UserError(f"`image_size` {size}: {error}") from error
    return config


def with_token_types(config: ModelConfig, count: int) -> ModelConfig:
    """Returns the model with as many token types in its single stream as the task needs. Fine-tuning trains the new ones."""
    if config.single is None or config.single.types >= count:
        return config
    return replace(config, single=replace(config.single, types=count))


def train_and_score(
    run: TrainConfig, task: type[Task], resume: bool, change: tuple[str, ...] = ()
) -> TaskScores | None:
    """Trains, and then scores the splits val and test. Raises UserError, before training, if val has no answers."""
    splits: tuple[Split, ...] = ("val", "test")
    places = {split: place for split in splits if (place := getattr(run.data, split)) is not None}
    reasons = {split: why_not_scored(task, place, run.data) for split, place in places.items()}
    if reasons.get("val"):
        raise UserError(f"{reasons['val']}, and val chooses the weights; remove the folder, or import answers with it")
    with dist.process_group():
        train(run, resume=resume, change=change, scored=[split for split in places if not reasons[split]])
        if not dist.is_main():
            return None
        scores: dict[str, dict[str, Any]] = {}
        path, tuned = new_scores_path(run.folder), load_task(run.folder)
        for split, place in places.items():
            if reason := reasons[split]:
                scores[split] = {"not scored": reason}
            else:
                scores[split] = score_split(tuned, place, device=run.device, options=task.scoring(), split=split)
            # Scores are saved after each split, because the next one may fail.
            save_scores(path, scores)
    return TaskScores(scores, path)
