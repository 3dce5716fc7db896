"""Fine-tuning a pretrained run on a task, and scoring a fine-tuned one: `train()` with a task's data and objective."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import cattrs
import torch
from cattrs.errors import BaseValidationError

from fastvlp import dist
from fastvlp.data import splits
from fastvlp.data.files import write_whole
from fastvlp.data.regions import RegionSource
from fastvlp.data.rows import Data, Split
from fastvlp.errors import UserError
from fastvlp.model.model import Bos, ModelConfig, Reading
from fastvlp.model.saved import Saved, load_exactly, load_model
from fastvlp.objectives.objective import Objective, ObjectiveConfig
from fastvlp.tasks import caption, entailment, grounding, nlvr, retrieval, vcr, vqa
from fastvlp.tasks.caption import CaptionConfig, CaptionData
from fastvlp.tasks.entailment import EntailmentConfig, EntailmentData
from fastvlp.tasks.grounding import GroundingConfig, GroundingData
from fastvlp.tasks.nlvr import NLVRConfig, NLVRData
from fastvlp.tasks.nlvr2 import NLVR2Config, NLVR2Data
from fastvlp.tasks.options import Evaluate, Finetune, Task
from fastvlp.tasks.retrieval import RetrievalConfig, RetrievalData
from fastvlp.tasks.vcr import VCRConfig, VCRData
from fastvlp.tasks.vqa import VQAConfig, VQAData, frequent_answers
from fastvlp.train.optim import OptimConfig
from fastvlp.train.run import train
from fastvlp.train.state import TrainConfig

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
    """A task: what it reads, what it trains, and how a split is scored (captions are decoded first). types: rows of a
    single stream's type table, where it reads more than words and one image."""

    data: type[Data]
    config: type[ObjectiveConfig]
    score: Callable[..., dict[str, float]] | None
    rates: Rates = USUAL
    types: int = 2


# Heads that pretraining has trained already learn no faster than the towers.
TASKS: dict[Task, Kind] = {
    "vqa": Kind(VQAData, VQAConfig, vqa.evaluate),
    "nlvr": Kind(NLVRData, NLVRConfig, nlvr.evaluate),
    "nlvr2": Kind(NLVR2Data, NLVR2Config, nlvr.evaluate, types=3),
    "caption": Kind(CaptionData, CaptionConfig, None, replace(USUAL, head=1)),
    "grounding": Kind(GroundingData, GroundingConfig, grounding.evaluate),
    "retrieval": Kind(RetrievalData, RetrievalConfig, retrieval.evaluate, replace(USUAL, head=1)),
    "entailment": Kind(EntailmentData, EntailmentConfig, entailment.evaluate),
    "vcr": Kind(VCRData, VCRConfig, vcr.evaluate, types=4),
}


def find_splits(folder: str, task: Task, needed: Split = "train") -> dict[str, str]:
    """The splits in `folder`; those of pairs are looked for first where a task is about two images."""
    return splits.find_splits(folder, ("pairs-", "") if task == "nlvr2" else ("",), needed)


def task_data(told: Finetune, model: ModelConfig) -> Data:
    places = find_splits(told.data, told.task)
    shared: dict[str, Any] = {
        **places,
        "batch_size": told.batch_size,
        "workers": told.workers,
        "max_length": min(50, model.text.positions),
        "regions": source_regions(told.source) if model.single is not None or told.task == "grounding" else None,
    } | ({} if told.fit is None else {"fit": told.fit})
    match told.task:
        case "vqa":
            field = told.field or "questions"
            return VQAData(**shared, questions=field, answers=frequent_answers(places["train"], field, told.answers))
        case "nlvr":
            return NLVRData(**shared, statements=told.field or "statements")
        case "nlvr2":
            return NLVR2Data(**shared, statements=told.field or "statements")
        case "caption":
            return CaptionData(**shared, captions=told.field or "captions")
        case "grounding":
            return GroundingData(**shared, expressions=told.field or "expressions")
        case "retrieval":
            return RetrievalData(**shared, captions=told.field or "captions")
        case "entailment":
            return EntailmentData(**shared, entailments=told.field or "entailments")
        case "vcr":
            return VCRData(**shared, choices=told.field or "choices")
        case _:
            assert_never(told.task)


def source_data(folder: str) -> dict[str, Any]:
    """What a run's config says of its data; nothing where a model was saved without one."""
    path = Path(folder) / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["data"]) if path.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); copy the folder again") from error


def source_regions(folder: str) -> RegionSource:
    """The regions that the pretrained run reads, but for their classes; the records' objects where it reads none."""
    found = source_data(folder).get("regions")
    try:
        return RegionSource() if found is None else replace(cattrs.structure(found, RegionSource), classes=None)
    except (TypeError, BaseValidationError) as error:
        raise UserError(f"{folder}: no regions that this version knows ({error!r}); copy the folder again") from error


def task_objective(told: Finetune, data: Data, info: Mapping[str, Any], model: ModelConfig) -> ObjectiveConfig:
    """`info` of the pretrained model says how it was read, and what its `<s>` saw."""
    reading: Reading = told.reading or info.get("reading", "full")
    bos: Bos = "official" if "official" in _values(info.get("objectives"), "bos") else "blind"
    head: dict[str, Any] = {"reading": reading, "bos": bos}
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
            matched = told.reading is None and "ITMConfig" in _values(info.get("objectives"), "type")
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


def _values(objectives: Any, field: str) -> list[Any]:
    configs = objectives.values() if isinstance(objectives, Mapping) else ()
    return [config.get(field) for config in configs if isinstance(config, Mapping)]


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
    return TrainConfig(
        name=told.name or f"{Path(told.source).name}-{told.task}",
        out=told.out,
        data=data,
        model=config,
        objectives={told.task: task_objective(told, data, source.info, config)},
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


def finetune(told: Finetune) -> tuple[dict[Split, Any], Path] | None:
    """Trains, then scores the best weights on val and test where they exist. Returns the scores and their file (None on
    all ranks but the main one)."""
    run = plan(told)
    with dist.process_group():
        train(run, told.resume)
        if not dist.is_main():
            return None
        held_out = [split for split in HELD_OUT if getattr(run.data, split) is not None]
        scores = {split: evaluate(Evaluate(run=str(run.folder), split=split, device=told.device)) for split in held_out}
    return scores, write_results(run.folder, scores)


def load_task(folder: str | Path) -> tuple[Saved, Objective, Data]:
    """A fine-tuned run by itself: model, head, and the data it was trained on. Raises UserError where the folder is no
    run of a task, or is damaged."""
    saved = load_model(folder)
    name, told = saved.info.get("task"), saved.info.get("objectives")
    if name not in TASKS or not isinstance(told, Mapping):
        raise UserError(f"{folder}: no fine-tuned run (its task is {name!r}); make one with `vlp finetune`")
    path = Path(folder) / "config.json"
    try:
        data = cattrs.structure(json.loads(path.read_text(encoding="utf-8"))["data"], TASKS[name].data)
        config = cattrs.structure(told[name], TASKS[name].config)
    except (OSError, ValueError, KeyError, TypeError, BaseValidationError) as error:
        raise UserError(f"{path}: not the config of this run ({error!r}); copy the folder again") from error
    objective = config.build(saved.model.config, saved.tokenizer)
    load_exactly(objective, saved.learned(name), saved.weights)
    return saved, objective, data


def load_zero_shot(told: Evaluate) -> tuple[Saved, Objective, Data]:
    """A pretrained run that matches images and texts, with the captions and regions that it was trained on."""
    if told.data is None:
        raise UserError("--zero-shot needs --data: the folder whose splits are searched")
    saved, source = load_model(told.run), source_data(told.run)
    known = {name: source[name] for name in ("captions", "max_length", "fit") if name in source}
    regions = source_regions(told.run) if saved.model.config.single is not None else None
    data = RetrievalData(train="", batch_size=64, regions=regions, **known)
    return saved, retrieval.zero_shot(saved, told.run), data


def evaluate(told: Evaluate) -> dict[str, Any]:
    """Scores of a fine-tuned run's best weights on a split of its own data, or of `told.data`. Raises UserError for a
    record that cannot be read: an evaluation leaves none out."""
    if told.threads:
        torch.set_num_threads(told.threads)
    saved, objective, data = load_zero_shot(told) if told.zero_shot else load_task(told.run)
    task: Task = "retrieval" if told.zero_shot else saved.info["task"]
    if told.data is not None:
        places: dict[str, Any] = {**find_splits(told.data, task, needed=told.split)}
        data = replace(data, **places)
    if told.beams < 1 or told.most < 1:
        raise UserError(f"--beams {told.beams} and --most {told.most} must be at least 1")
    device = dist.pick_device(told.device)
    model, tokenizer = saved.model.to(device), saved.tokenizer
    objective.to(device)
    about: dict[str, Any] = {
        "weights": saved.weights.name,
        "step": saved.info.get("step"),
        "data": getattr(data, told.split),
    }
    if (score := TASKS[task].score) is not None:
        return about | score(model, objective, data, told.split, tokenizer)
    assert isinstance(data, CaptionData)
    decoding: dict[str, Any] = {"beams": told.beams, "most": told.most, "length_penalty": told.length_penalty}
    scores, said = caption.evaluate(model, data, told.split, tokenizer, **decoding)
    return about | scores | {"decoding": decoding, "captions": said}


def write_results(folder: Path, scores: Mapping[Split, Any]) -> Path:
    """results.json, or results-2.json and so on: no result is ever overwritten."""
    n = 1
    while (path := folder / ("results.json" if n == 1 else f"results-{n}.json")).exists():
        n += 1
    write_whole(path, json.dumps(scores, indent=2, ensure_ascii=False).encode())
    return path


def told_in_words(scores: Mapping[Split, Mapping[str, Any]]) -> str:
    """A line for each score, to print."""
    return "\n".join(
        f"{split:>5} {name:24} {value:{'.0f' if name == 'count' else '.4f'}}"
        for split, found in scores.items()
        for name, value in found.items()
        if isinstance(value, float)
    )
