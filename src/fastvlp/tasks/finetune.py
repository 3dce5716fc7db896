"""Fine-tuning a pretrained run on a task, and scoring a fine-tuned one: `train()` with a task's data and objective."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import torch

from fastvlp import dist
from fastvlp.data import splits
from fastvlp.data.pairs import Data, Fit, PairData, Split, readable_infos
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import Shards
from fastvlp.data.regions import RegionSource
from fastvlp.errors import UserError
from fastvlp.files import write_whole
from fastvlp.model.model import ModelConfig, Reading
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import Saved, load_model
from fastvlp.objectives.objective import Objective, ObjectiveConfig
from fastvlp.objectives.saved_objectives import load_objective, saved_bos
from fastvlp.tasks import caption, entailment, grounding, nlvr, retrieval, vcr, vqa
from fastvlp.tasks.caption import CaptionConfig, CaptionData
from fastvlp.tasks.entailment import EntailmentConfig, EntailmentData
from fastvlp.tasks.grounding import GroundingConfig, GroundingData
from fastvlp.tasks.nlvr import NLVRConfig, NLVRData
from fastvlp.tasks.nlvr2 import NLVR2Config, NLVR2Data
from fastvlp.tasks.options import Evaluate, Finetune, Task
from fastvlp.tasks.retrieval import RetrievalConfig, RetrievalData
from fastvlp.tasks.task import ItemData
from fastvlp.tasks.vcr import VCRConfig, VCRData
from fastvlp.tasks.vqa import VQAConfig, VQAData, frequent_answers
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.state import TrainConfig

TaskData = ItemData | PairData

HELD_OUT: tuple[Split, ...] = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of a task: `lr` of the towers, `cross` times it of fusion and reconstructor, `head` times it of the
    vocabulary and the task's head."""

    lr: float
    cross: float
    head: float


# For models of the sizes that are pretrained here, fusion as well trained as the towers. The papers': lr 5e-6 to 1e-5,
# cross 5, head 50 (VQA) or 10 (NLVR2), batches of 256 to 512 (FLM, spec flm.md section 5); lr 3e-5 to 1e-4, for VQA head
# 10, batches of 5,120 to 10,240 tokens and regions (UNITER, spec uniter-brivl.md section A4).
USUAL = Rates(lr=5e-4, cross=1, head=5)


class Kind(NamedTuple):
    """A task: what it reads, what it trains, and how a split is scored (captions are decoded first). field: of a record, with
    what is said or asked. target: what each entry of it tells, which is to be found; captions are themselves that. types: rows
    of a single stream's type table, where it reads more than words and one image. length: tokens of a text that are not cut."""

    data: type[ItemData] | type[PairData]
    config: type[ObjectiveConfig]
    score: Callable[..., dict[str, float]] | None
    field: str
    target: str | None
    rates: Rates = USUAL
    types: int = 2
    length: int = 50


# Heads that pretraining has trained already learn no faster than the towers. VCR's rows have 220 pieces (UNITER's released
# code, spec uniter-brivl.md A4), <s> and three </s>.
TASKS: dict[Task, Kind] = {
    "vqa": Kind(VQAData, VQAConfig, vqa.evaluate, "questions", "answers"),
    "nlvr": Kind(NLVRData, NLVRConfig, nlvr.evaluate, "statements", "label"),
    "nlvr2": Kind(NLVR2Data, NLVR2Config, nlvr.evaluate, "statements", "label", types=3),
    "caption": Kind(CaptionData, CaptionConfig, None, "captions", None, replace(USUAL, head=1)),
    "grounding": Kind(GroundingData, GroundingConfig, grounding.evaluate, "expressions", "object"),
    "retrieval": Kind(RetrievalData, RetrievalConfig, retrieval.evaluate, "captions", None, replace(USUAL, head=1)),
    "entailment": Kind(EntailmentData, EntailmentConfig, entailment.evaluate, "entailments", "label"),
    "vcr": Kind(VCRData, VCRConfig, vcr.evaluate, "choices", "right", types=4, length=224),
}


def prefixes(task: Task) -> tuple[str, ...]:
    """Of the splits' names: those of pairs are looked for first where a task is about two images."""
    return ("pairs-", "") if task == "nlvr2" else ("",)


def find_splits(folder: str, task: Task) -> dict[str, str]:
    return splits.find_splits(folder, prefixes(task))


def task_data(told: Finetune, model: ModelConfig) -> TaskData:
    places = find_splits(told.data, told.task)
    kind, seen = TASKS[told.task], seen_by(told.source)
    if told.max_length is not None and told.max_length < 3:
        raise UserError(f"--max-length {told.max_length} leaves no room between <s> and </s>; give 3 or more")
    asked = told.field or kind.field
    shared: dict[str, Any] = {
        **places,
        kind.field: asked,
        "batch_size": told.batch_size,
        "workers": told.workers,
        "fit": told.fit or (kind.data.fit if seen.fit == "crop" else seen.fit),
        "max_length": told.max_length or min(max(seen.max_length, kind.length), model.longest_text),
        "regions": seen.regions if model.single is not None or told.task == "grounding" else None,
    }
    if told.task == "vqa":
        shared["answers"] = frequent_answers(places["train"], asked, told.answers)
    return kind.data(**shared)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How a pretrained run saw images and texts; the records' objects where it says nothing of regions."""

    regions: RegionSource = field(default_factory=RegionSource)
    fit: Fit = "crop"
    max_length: int = 50
    captions: str = "captions"


def seen_by(folder: str) -> Seen:
    """All but the classes of its regions."""
    data = read_saved_run(folder).data
    regions = replace(data.regions or RegionSource(), classes=None)
    # A crop would leave out some of what a detector found.
    fit: Fit = "squash" if "fit" not in data.stated and regions.stored else data.fit
    return Seen(regions=regions, fit=fit, max_length=data.max_length, captions=data.captions)


def task_objective(told: Finetune, data: Data, source: Saved, model: ModelConfig) -> ObjectiveConfig:
    """The pretrained model says how it was read, and what its `<s>` saw."""
    reading: Reading = told.reading or source.info.get("reading", "full")
    head: dict[str, Any] = {"reading": reading, "bos": saved_bos(source)}
    match told.task:
        case "vqa":
            assert isinstance(data, VQAData)
            return VQAConfig(**head, answers=len(data.answers))
        case "nlvr":
            return NLVRConfig(**head)
        case "nlvr2":
            return NLVR2Config(**head, form=told.form or ("pair-biattn" if model.single is not None else "pair"))
        case "caption":
            return CaptionConfig()
        case "grounding":
            loss = _loss(told, "ce", "rank")
            return GroundingConfig(**head, loss=loss, reduction=told.reduction, layers=told.layers)
        case "retrieval":
            # The matching head, which it starts from, reads all at once.
            matched = told.reading is None and retrieval.matching_head(source) is not None
            head |= {"reading": "full"} if matched else {}
            hard: dict[str, Any] = {"negatives": told.negatives, "anchors": told.anchors, "keep": told.keep}
            return RetrievalConfig(**head, **hard, source=told.source if matched else None)
        case "entailment":
            return EntailmentConfig(**head, loss=_loss(told, "bce", "ce"))
        case "vcr":
            return VCRConfig(**head, kinds=told.kinds)
        case _:
            assert_never(told.task)


def _loss(told: Finetune, usual: str, other: str) -> Any:
    if told.loss not in (None, usual, other):
        raise UserError(f"--loss {told.loss}: {told.task} has {usual} and {other}")
    return told.loss or usual


def with_types(config: ModelConfig, types: int) -> ModelConfig:
    """Room in a single stream's type table, whose new rows the task fills."""
    if config.single is None or config.single.types >= types:
        return config
    return replace(config, single=replace(config.single, types=types))


def plan(told: Finetune) -> TrainConfig:
    """The run that `finetune` trains."""
    source = load_model(told.source)
    kind = TASKS[told.task]
    config = with_types(source.model.config, kind.types)
    data = task_data(told, config)
    rates = kind.rates
    if told.lr is not None and told.lr <= 0:
        raise UserError(f"--lr must be above 0, not {told.lr}")
    often = max(1, told.steps // 5)
    optim = OptimConfig(
        lr=told.lr or rates.lr, cross_multiplier=rates.cross, head_multiplier=rates.head, warmup=0.1, decay="linear"
    )
    run = TrainConfig(
        name=told.name or f"{Path(told.source).name}-{told.task}",
        out=told.out,
        data=data,
        model=config,
        objectives={told.task: task_objective(told, data, source, config)},
        optim=optim,
        steps=told.steps,
        init=told.source,
        seed=told.seed,
        validate_every=often,
        checkpoint_every=often,
        device=told.device,
        precision=told.precision,
        threads=told.threads,
    )
    return as_before(told, run) if told.resume else run


def as_before(told: Finetune, run: TrainConfig) -> TrainConfig:
    """A resumed run reads on as it did where nothing else is told, whatever the defaults have become."""
    before = read_saved_run(run.folder).data
    names = [name for name in ("fit", "max_length") if name in before.stated and getattr(told, name) is None]
    kept: dict[str, Any] = {name: getattr(before, name) for name in names}
    return replace(run, data=replace(run.data, **kept))


def finetune(told: Finetune) -> tuple[dict[str, Any], Path] | None:
    """Trains, then scores the best weights on val and test where they exist, each written as it comes. Returns the scores
    and their file (None on all ranks but the main one)."""
    run = plan(told)
    places = {split: place for split in HELD_OUT if (place := getattr(run.data, split)) is not None}
    lacks = {split: untold(place, told.task, run.data) for split, place in places.items()}
    if lacks.get("val"):
        raise UserError(f"{lacks['val']}, and val chooses the weights; remove the folder, or import answers with it")
    with dist.process_group():
        train(run, told.resume)
        if not dist.is_main():
            return None
        scores: dict[str, Any] = {}
        path = new_results(run.folder)
        for split, lack in lacks.items():
            asked = Evaluate(run=str(run.folder), split=split, device=told.device)
            scores[split] = {"not scored": lack} if lack else evaluate(asked)
            write_whole(path, as_json(scores))
    return scores, path


def untold(place: str, task: Task, data: Data) -> str | None:
    """What all records of a split lack to be scored, as those of published test sets do; None where one has it."""
    kind, count = TASKS[task], 0
    asked, target = getattr(data, kind.field), kind.target
    for info in readable_infos(Shards(place)):
        entries = info.get(asked)
        dicts = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
        told = [one.get(target) for one in dicts] if target else usable_captions(info, asked)
        if any(value not in (None, {}) for value in told):
            return None
        count += 1
    # Where none can be read, who scores them says why.
    return f"{place}: no record has {asked!r}" + (f" with {target!r}" if target else "") if count else None


def load_task(folder: str | Path) -> tuple[Saved, Objective, TaskData]:
    """A fine-tuned run by itself: model, head, and the data it was trained on. Raises UserError where the folder is no
    run of a task, or is damaged."""
    saved = load_model(folder)
    name = saved.info.get("task")
    if name not in TASKS:
        raise UserError(f"{folder}: no fine-tuned run (its task is {name!r}); make one with `vlp finetune`")
    return saved, load_objective(saved, name), read_saved_run(folder).data_as(TASKS[name].data)


def load_zero_shot(told: Evaluate) -> tuple[Saved, Objective, TaskData]:
    """A pretrained run that matches images and texts, with the captions and regions that it was trained on."""
    if told.data is None:
        raise UserError("--zero-shot needs --data: the folder whose splits are searched")
    saved, seen = load_model(told.run), seen_by(told.run)
    known: dict[str, Any] = {name: getattr(seen, name) for name in ("captions", "max_length", "fit")}
    regions = seen.regions if saved.model.config.single is not None else None
    data = RetrievalData(train="", batch_size=64, regions=regions, **known)
    return saved, retrieval.zero_shot(saved, told.run), data


def split_place(told: Evaluate, task: Task, data: TaskData) -> str:
    """Of the split that is told: a folder's name, beside those of the run's own data or in `told.data`."""
    own = getattr(data, told.split) if told.data is None and told.split in splits.SPLITS else None
    return own or splits.find_split(told.data or splits.parent(data.train), told.split, prefixes(task))


def evaluate(told: Evaluate) -> dict[str, Any]:
    """Scores of a fine-tuned run's best weights on a split of its own data, or of `told.data`. Raises UserError for a
    record that cannot be read, as an evaluation leaves none out, and for a split that tells nothing to score by."""
    if told.threads:
        torch.set_num_threads(told.threads)
    saved, objective, data = load_zero_shot(told) if told.zero_shot else load_task(told.run)
    task: Task = "retrieval" if told.zero_shot else saved.info["task"]
    place = split_place(told, task, data)
    if lack := untold(place, task, data):
        raise UserError(f"split {told.split!r} cannot be scored, {lack}; choose another --split, or --data FOLDER")
    # The split may have any name, and data knows three; test is the one that nothing is chosen by.
    split: Split = "test"
    data = replace(data, test=place)
    if told.beams < 1 or told.most < 1:
        raise UserError(f"--beams {told.beams} and --most {told.most} must be at least 1")
    device = dist.pick_device(told.device)
    model, tokenizer = saved.model.to(device), saved.tokenizer
    objective.to(device)
    about: dict[str, Any] = {"weights": saved.weights.name, "step": saved.info.get("step"), "data": place}
    if (score := TASKS[task].score) is not None:
        return about | score(model, objective, data, split, tokenizer)
    assert isinstance(data, CaptionData)
    decoding: dict[str, Any] = {"beams": told.beams, "most": told.most, "length_penalty": told.length_penalty}
    scores, said = caption.evaluate(model, data, split, tokenizer, **decoding)
    return about | scores | {"decoding": decoding, "captions": said}


def write_results(folder: Path, scores: Mapping[str, Any]) -> Path:
    write_whole(path := new_results(folder), as_json(scores))
    return path


def new_results(folder: Path) -> Path:
    """results.json, or results-2.json and so on: no result is ever overwritten."""
    n = 1
    while (path := folder / ("results.json" if n == 1 else f"results-{n}.json")).exists():
        n += 1
    return path


def as_json(scores: Mapping[str, Any]) -> bytes:
    return json.dumps(scores, indent=2, ensure_ascii=False).encode()


def told_in_words(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each score, to print, and for each split without one."""
    return "\n".join(
        f"{split:>5} {name:24} {value:{'.0f' if name == 'count' else '.4f'}}"
        if isinstance(value, float)
        else f"{split:>5} {name}: {value}"
        for split, found in scores.items()
        for name, value in found.items()
        if isinstance(value, float) or name == "not scored"
    )
