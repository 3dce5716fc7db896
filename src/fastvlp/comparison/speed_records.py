"""Speed records: how soon a recipe reaches a fixed score on fixed data, measured again by whoever wants to know."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from tyro.conf import arg

from fastvlp.comparison.compare import compare
from fastvlp.comparison.continued import results_path
from fastvlp.comparison.prepared_arms import named_arms
from fastvlp.comparison.results import ArmRun, Comparison
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.comparison.settings import budget_of
from fastvlp.comparison.summary import first_reached
from fastvlp.config import from_json, to_json
from fastvlp.data.pairs import Split
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.data.world.corpus_card import read_card
from fastvlp.errors import UserError
from fastvlp.eval.t_test import p_above
from fastvlp.files import read_plain, write_whole
from fastvlp.plain_json import parse_json
from fastvlp.provenance import code, other_code

# A target is met if the test that the mean of the seeds is above it gives a p-value below this.
MOST_P = 0.01
Track = Literal["cpu2", "gpu1", "steps"]
CONTENT_SPLITS: tuple[Split, ...] = ("train", "val")
DEVICES: Mapping[Track, str] = {"cpu2": "cpu", "gpu1": "cuda", "steps": "auto"}


@dataclass(frozen=True, kw_only=True)
class RecordRun:
    """One seed.

    Attributes:
        final: the score at the end.
        steps, time: what the whole training took; seconds of CPU time on a CPU, of wall time on a GPU.
        reached_steps, reached_time: when the curve of scores first was at the target; None if it never was.
        failure: why the run ended early; None if it did not.
    """

    seed: int
    final: float
    steps: int
    time: float
    reached_steps: float | None = None
    reached_time: float | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedRecord:
    """The content of a record's file.

    Attributes:
        recipe: a name, or a file beside the record.
        changed: what is new in it, for the table.
        data: a level of the embedded corpus, or flickr8k.
        track: what is counted: CPU seconds on at most two cores, wall seconds on one GPU, or steps.
        budget: length of each run, such as 80s or 900steps.
        score, target: what has to be reached on held-out data.
        settings: changes of the recipe's fields.
        marks: shares of the budget after which a run is scored.
        scoring: options of scoring, other than the defaults.
        threads: CPU threads of PyTorch.
        date, commit, device: when and where it was measured.
        contents: hashes of the records of the splits.
        p: of the one-sided t test that the mean final score is above the target.
        log: file beside the record with the whole measurement.
    """

    recipe: str
    changed: str
    data: Literal["easy", "standard", "hard", "flickr8k"]
    track: Track
    budget: str
    score: str
    target: float
    settings: tuple[str, ...] = ()
    marks: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    scoring: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    date: str = ""
    commit: str = ""
    device: str = ""
    contents: dict[str, str | None] = field(default_factory=dict)
    runs: tuple[RecordRun, ...] = ()
    p: float | None = None
    log: str | None = None

    def __post_init__(self) -> None:
        if budget_of(self.budget)[1] != (self.track == "steps"):
            raise UserError(f"a record of the track {self.track} has a budget such as 80s, or with steps 900steps")
        if self.track == "cpu2" and not 1 <= self.threads <= 2:
            raise UserError(f"`threads` {self.threads}: a record of the track cpu2 allows at most two")

    @property
    def value(self) -> float:
        """The mean cost of the runs, in the unit of the track."""
        taken = [run.steps if self.track == "steps" else run.time for run in self.runs]
        return statistics.fmean(taken) if taken else 0.0

    @property
    def met(self) -> bool:
        """Whether every seed was trained to its end, and their mean is above the target beyond chance."""
        return self.p is not None and self.p < MOST_P and not any(run.failure for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A record as its file has it, and as it was measured now."""

    file: Path
    record: SpeedRecord
    measured: SpeedRecord
    comparison: Comparison


def read_record(file: Path) -> SpeedRecord:
    """Raises UserError for a file that is none."""
    try:
        return from_json(SpeedRecord, parse_json(read_plain(file)), str(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a speed record ({error}); give a file of records/, or one like it") from error


def verify_record(
    file: Annotated[str | Path, arg(metavar="FILE")],
    /,
    *,
    data: str | None = None,
    seeds: int = 3,
    out: str | Path | None = None,
    write: bool = False,
) -> Verified:
    """Measure a speed record again: train its recipe, and test statistically whether the target is met (p < 0.01).

    Args:
        file: File of the record.
        data: Folder with the data, with sub-folders train and val. By default the folder is named by the record; a missing
            level of the embedded corpus is written first.
        seeds: Number of runs, with different seeds.
        out: Folder of the measurement, by default verified/RECORD. A measurement by the same code in this folder is
            continued.
        write: If the target is met, write the results into the record's file, and the whole measurement beside it.

    Raises:
        UserError: The file is not a record, the data differ from the record's, its recipe cannot be trained, `out` has a
            measurement by other code, or `write` is given and the target is not met.
    """
    file = Path(file)
    record = read_record(file)
    if seeds < 2:
        raise UserError(f"`seeds` {seeds}: the test needs the spread over seeds; give at least 2")
    folder = find_data(record, data)
    out = Path(out or f"verified/{file.stem}")
    check_code(out)
    recipe = str(file.parent / record.recipe) if record.recipe.endswith(".py") else record.recipe
    settings = [
        *record.settings,
        f"data.train={folder / 'train'}",
        f"data.val={folder / 'val'}",
        device_setting(record),
    ]
    if record.contents:
        check_contents(file, record, folder, contents_of(recipe, settings))
    comparison = compare(
        [recipe],
        budget=record.budget,
        seeds=seeds,
        out=out,
        marks=record.marks,
        scoring=from_json(ScoringOptions, {"pictures": 0, "scores": [record.score]} | record.scoring, str(file)),
        set=settings,
        threads=record.threads,
        resume=results_path(out).exists(),
    )
    measured = measure(record, comparison)
    if record.contents:
        # An earlier measurement, which was continued here, may have read other data.
        check_contents(file, record, folder, measured.contents)
    if write:
        check_met(file, measured, out)
        write_record(file, measured, comparison)
    return Verified(file=file, record=record, measured=measured, comparison=comparison)


def find_data(record: SpeedRecord, data: str | None) -> Path:
    """The folder with the record's data; without `data` a level of the embedded corpus is written where it is missing."""
    folder = Path(data or record.data)
    if data is None and record.data != "flickr8k":
        card = folder / "corpus.json"
        if not card.exists() or not read_card(card).get("complete", True):
            write_world(folder, WorldConfig(level=record.data), pairs=0, singles=0)
    elif not folder.is_dir():
        how = "import it with `vlp data import`" if record.data == "flickr8k" else "leave `data` out to have it written"
        raise UserError(f"{folder}: no such folder; give the folder of {record.data} as `data`, or {how}")
    return folder


def check_code(out: Path) -> None:
    """Raises UserError if the folder has measurements of another commit or version."""
    path = results_path(out)
    if not path.exists():
        return
    earlier = Comparison.load(path)
    now = code()
    for about in (earlier.about, *earlier.continued):
        if changed := other_code(about, now):
            words = ", ".join(f"{name} {then}, not {current}" for name, (then, current) in changed.items())
            raise UserError(
                f"{out}: its measurements were made with other code ({words}); delete it, or give another folder as `out`"
            )


def contents_of(recipe: str, settings: Sequence[str]) -> dict[str, str | None]:
    """Returns hashes of the records that a recipe would be trained and scored on, by split."""
    (run,) = named_arms([recipe], settings).values()
    return {split: run.data.content(split) for split in CONTENT_SPLITS}


def check_contents(file: Path, record: SpeedRecord, folder: Path, contents: Mapping[str, str | None]) -> None:
    """Raises UserError if the data are not those on which the speed record was measured."""
    if record.contents != contents:
        raise UserError(
            f"{folder}: these are not the data on which {file} was measured; give the right folder as `data`"
        )


def check_met(file: Path, measured: SpeedRecord, out: Path) -> None:
    """Raises UserError if the target was not met."""
    if not measured.met:
        finals = ", ".join(f"{run.final:.4f}" for run in measured.runs)
        raise UserError(
            f"{file}: not written, since the target {measured.target:g} is not met with p < {MOST_P} (final scores {finals}); "
            f"give the record a longer `budget` or a lower `target`. The measurement is in {out}"
        )


def device_setting(record: SpeedRecord) -> str:
    return f"device={DEVICES[record.track]}"


def measure(record: SpeedRecord, comparison: Comparison) -> SpeedRecord:
    """Returns the record with the results of a comparison that trained only its recipe."""
    runs = tuple(record_run(run, record) for run in comparison.runs)
    about = comparison.about
    return replace(
        record,
        date=str(about.get("date", ""))[:10],
        commit=str(about.get("commit", "")),
        device=str(about.get("device", "")),
        contents=comparison.runs[0].contents,
        runs=runs,
        p=p_above([run.final for run in runs], record.target),
    )


def record_run(run: ArmRun, record: SpeedRecord) -> RecordRun:
    """One seed. An arm without the score has 0."""
    scored = [mark for mark in run.marks if record.score in mark.scores]
    scores = [mark.scores[record.score] for mark in scored]
    spent = scored[-1].spent if scored else None
    return RecordRun(
        seed=run.seed,
        final=scores[-1] if scores else 0.0,
        steps=spent.steps if spent else 0,
        time=spent.time if spent else 0.0,
        reached_steps=reached([mark.spent.steps for mark in scored], scores, record.target),
        reached_time=reached([mark.spent.time for mark in scored], scores, record.target),
        failure=run.failure if scores else run.failure or f"it has no score {record.score}",
    )


def reached(lengths: Sequence[float], scores: Sequence[float], target: float) -> float | None:
    """Returns the point at which the curve of scores first reaches the target; None if it never does."""
    first = first_reached(lengths, scores, target)
    return None if first is None else round(first.time, 1)


def write_record(file: Path, measured: SpeedRecord, comparison: Comparison) -> None:
    """Writes the record, and its log beside it. Raises UserError if these cannot be written."""
    log = f"logs/{file.stem}.json"
    comparison.save(file.parent / log)
    content = cast(dict[str, Any], to_json(replace(measured, log=log)))
    del content["type"]
    content["runs"] = [asdict(run) for run in measured.runs]
    write_whole(file, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())
