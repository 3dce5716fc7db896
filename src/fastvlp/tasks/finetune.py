"""Fine-tuning a pretrained run on a task, and scoring a fine-tuned one: `train()` with a task's data and objective."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import cattrs
from cattrs.errors import BaseValidationError

from fastvlp import dist
from fastvlp.data.files import write_whole
from fastvlp.data.rows import Data, Fit, Split
from fastvlp.errors import UserError
from fastvlp.model.model import Bos, Reading
from fastvlp.model.saved import Saved, load_exactly, load_model
from fastvlp.objectives.objective import Objective, ObjectiveConfig
from fastvlp.tasks import caption, nlvr, vqa
from fastvlp.tasks.caption import Caption, CaptionConfig, CaptionData
from fastvlp.tasks.nlvr import NLVR, NLVRConfig, NLVRData
from fastvlp.tasks.nlvr2 import NLVR2, NLVR2Config, NLVR2Data
from fastvlp.tasks.vqa import VQA, VQAConfig, VQAData, frequent_answers
from fastvlp.train.optim import OptimConfig
from fastvlp.train.run import train
from fastvlp.train.state import TrainConfig, pick_device

Task = Literal["vqa", "nlvr", "nlvr2", "caption"]
TASKS: tuple[Task, ...] = ("vqa", "nlvr", "nlvr2", "caption")
# Other names under which a development split is imported.
SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("val", "dev", "validation"), "test": ("test",)}

HELD_OUT: tuple[Split, ...] = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Optimiser of a task: `lr` of the towers, `cross` and `head` times it (spec flm.md section 5, where the towers come
    from trained weights and a batch is 256 or 512)."""

    lr: float
    cross: float
    head: float
    batch_size: int


# The paper's multipliers, at rates for models of the sizes that are trained here from scratch.
RATES: dict[Task, Rates] = {
    "vqa": Rates(lr=3e-4, cross=1, head=5, batch_size=64),
    "nlvr": Rates(lr=3e-4, cross=1, head=5, batch_size=64),
    "nlvr2": Rates(lr=3e-4, cross=1, head=5, batch_size=64),
    "caption": Rates(lr=3e-4, cross=1, head=1, batch_size=64),
}


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """One fine-tuning. None: the task's default, or what the pretrained run had.

    source: folder of the pretrained run. data: folder whose folders are the splits (`train`, `val` or `dev`, `test`;
    for pairs of images also `pairs-train` and so on). field: of a record's info, that holds the questions, statements or
    captions (`questions_zh`). reading: how the head reads the text (not for captions, which are always causal).
    answers: most that VQA chooses from.
    """

    task: Task
    source: str
    data: str
    steps: int = 1000
    batch_size: int | None = None
    lr: float | None = None
    reading: Reading | None = None
    field: str | None = None
    fit: Fit | None = None
    answers: int = 3129
    name: str | None = None
    out: str | None = None
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: int | None = None


def find_splits(folder: str, task: Task) -> dict[str, str]:
    """Folder of each split that is there. Raises UserError where there is nothing to train on."""
    prefixes = ("pairs-", "") if task == "nlvr2" else ("",)
    found: dict[str, str] = {}
    for split, names in SPLITS.items():
        places = [Path(folder) / f"{prefix}{name}" for prefix in prefixes for name in names]
        place = next((place for place in places if place.is_dir()), None)
        if place is not None:
            found[split] = str(place)
    if "train" not in found:
        raise UserError(f"{folder}: no split called train here; give the folder that `vlp data import --out` wrote")
    return found


def task_data(told: Finetune, max_length: int) -> Data:
    splits = find_splits(told.data, told.task)
    shared: dict[str, Any] = {
        **splits,
        "batch_size": told.batch_size or RATES[told.task].batch_size,
        "workers": told.workers,
        "max_length": max_length,
    } | ({} if told.fit is None else {"fit": told.fit})
    match told.task:
        case "vqa":
            field = told.field or "questions"
            return VQAData(**shared, questions=field, answers=frequent_answers(splits["train"], field, told.answers))
        case "nlvr":
            return NLVRData(**shared, statements=told.field or "statements")
        case "nlvr2":
            return NLVR2Data(**shared, statements=told.field or "statements")
        case "caption":
            return CaptionData(**shared, captions=told.field or "captions")
        case _:
            assert_never(told.task)


def task_objective(told: Finetune, data: Data, info: Mapping[str, Any]) -> ObjectiveConfig:
    """`info` of the pretrained model says how it was read, and what its `<s>` saw."""
    reading: Reading = told.reading or info.get("reading", "full")
    bos: Bos = "official" if "official" in _values(info.get("objectives"), "bos") else "blind"
    if isinstance(data, VQAData):
        return VQAConfig(reading=reading, bos=bos, answers=len(data.answers))
    if isinstance(data, NLVR2Data):
        return NLVR2Config(reading=reading, bos=bos)
    if isinstance(data, NLVRData):
        return NLVRConfig(reading=reading, bos=bos)
    return CaptionConfig()


def _values(objectives: Any, field: str) -> list[Any]:
    configs = objectives.values() if isinstance(objectives, Mapping) else ()
    return [config.get(field) for config in configs if isinstance(config, Mapping)]


def plan(told: Finetune) -> TrainConfig:
    """The run that `finetune` trains."""
    source = load_model(told.source)
    config = source.model.config
    data = task_data(told, min(50, config.text.positions))
    rates = RATES[told.task]
    optim = OptimConfig(
        lr=told.lr or rates.lr, cross_multiplier=rates.cross, head_multiplier=rates.head, warmup=0.1, decay="linear"
    )
    return TrainConfig(
        name=told.name or f"{Path(told.source).name}-{told.task}",
        out=told.out,
        data=data,
        model=config,
        objectives={told.task: task_objective(told, data, source.info)},
        optim=optim,
        steps=told.steps,
        init=told.source,
        seed=told.seed,
        validate_every=max(1, told.steps // 5),
        device=told.device,
        precision=told.precision,
        threads=told.threads,
    )


def finetune(told: Finetune, resume: bool = False) -> Path | None:
    """Trains, then scores the best weights on val and test where they exist. Returns the results' file (None on all
    ranks but the main one)."""
    run = plan(told)
    with dist.process_group():
        train(run, resume)
        if not dist.is_main():
            return None
        splits: list[Split] = [split for split in HELD_OUT if getattr(run.data, split) is not None]
        scores = {split: score(run.folder, split, device=told.device) for split in splits}
    return write_results(run.folder, scores)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How captions are made: `beams` 1 is greedy; see `tasks.decode`."""

    beams: int = 1
    most: int = 30
    length_penalty: float = 0.0


GREEDY = Decoding()


def load_task(folder: str | Path) -> tuple[Saved, Objective, Data]:
    """A fine-tuned run by itself: model, head, and the data it was trained on. Raises UserError where the folder is no
    run of a task, or is damaged."""
    saved = load_model(folder)
    name, told = saved.info.get("task"), saved.info.get("objectives")
    if name not in TASKS or not isinstance(told, Mapping):
        raise UserError(f"{folder}: no fine-tuned run (its task is {name!r}); make one with `vlp finetune`")
    configs: dict[str, tuple[type[Data], type[ObjectiveConfig]]] = {
        "vqa": (VQAData, VQAConfig),
        "nlvr": (NLVRData, NLVRConfig),
        "nlvr2": (NLVR2Data, NLVR2Config),
        "caption": (CaptionData, CaptionConfig),
    }
    data_type, objective_type = configs[name]
    path = Path(folder) / "config.json"
    try:
        data = cattrs.structure(json.loads(path.read_text(encoding="utf-8"))["data"], data_type)
        config = cattrs.structure(told[name], objective_type)
    except (OSError, ValueError, KeyError, TypeError, BaseValidationError) as error:
        raise UserError(f"{path}: not the config of this run ({error!r}); copy the folder again") from error
    objective = config.build(saved.model.config, saved.tokenizer)
    own = {key.removeprefix(f"{name}."): value for key, value in saved.objectives.items()}
    load_exactly(objective, own, saved.weights)
    return saved, objective, data


def score(
    folder: str | Path, split: Split, *, decoding: Decoding = GREEDY, device: str = "auto", data: Data | None = None
) -> dict[str, Any]:
    """Scores of a fine-tuned run's best weights on a split of its own data, or of `data`. Raises UserError for a record
    that cannot be read: an evaluation leaves none out."""
    saved, objective, own = load_task(folder)
    used = data or own
    place = pick_device(device)
    model, tokenizer = saved.model.to(place), saved.tokenizer
    objective.to(place)
    told: dict[str, Any] = {"weights": saved.weights.name, "step": saved.info.get("step")}
    if isinstance(objective, VQA) and isinstance(used, VQAData):
        return told | vqa.evaluate(model, objective, used, split, tokenizer)
    if isinstance(objective, NLVR | NLVR2) and isinstance(used, NLVRData):
        return told | nlvr.evaluate(model, objective, used, split, tokenizer)
    assert isinstance(objective, Caption) and isinstance(used, CaptionData)
    found, said = caption.evaluate(
        model,
        used,
        split,
        tokenizer,
        beams=decoding.beams,
        most=decoding.most,
        length_penalty=decoding.length_penalty,
    )
    return told | {"beams": decoding.beams, "length_penalty": decoding.length_penalty} | found | {"captions": said}


def evaluate(
    folder: str | Path, split: Split = "test", *, decoding: Decoding = GREEDY, device: str = "auto"
) -> tuple[dict[str, Any], Path]:
    """`score`, written beside the run's other results. Returns the scores and the file."""
    scores = score(folder, split, decoding=decoding, device=device)
    return scores, write_results(Path(folder), {split: scores})


def write_results(folder: Path, scores: Mapping[Split, Any]) -> Path:
    """results.json, or results-2.json and so on: no result is ever overwritten."""
    n = 1
    while (path := folder / ("results.json" if n == 1 else f"results-{n}.json")).exists():
        n += 1
    write_whole(path, json.dumps(scores, indent=2, ensure_ascii=False).encode())
    return path
