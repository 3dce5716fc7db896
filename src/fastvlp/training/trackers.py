"""Trackers that show the numbers of a log: TensorBoard, Weights & Biases, MLflow or Trackio, each imported when it is used.

A resumed run goes on in the same run of the tracker, whose id is kept in the run's folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from fastvlp.errors import UserError, install
from fastvlp.files import write_whole

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
# The project, or experiment, that all runs are shown in.
PROJECT = "fastvlp"
# Ids that trackers gave to the run, by tracker.
IDS = "trackers.json"


class Tracker(Protocol):
    """Shows numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers, by name, at a step."""

    def close(self) -> None:
        """Sends what is left, and ends."""


def check_installed(names: Iterable[TrackerName]) -> None:
    """Raises UserError if a tracker is not installed, before a run has begun."""
    for name in names:
        missing = sys.modules[name] is None if name in sys.modules else importlib.util.find_spec(name) is None
        if missing:
            raise _not_installed(name)


def _not_installed(name: TrackerName) -> UserError:
    remedy = install("tensorboard") if name == "tensorboard" else f"pip install {name}"
    return UserError(f"`report_to` {name}: it is not installed: {remedy}, or leave it out")


def open_tracker(name: TrackerName, folder: Path, *, run: str, step: int, config: Mapping[str, Any]) -> Tracker:
    """Opens a tracker for a run.

    Args:
        name: Which one.
        folder: The run's folder.
        run: The run's name.
        step: The step that it starts or goes on from.
        config: What the tracker shows of the run.

    Raises:
        UserError: The tracker is not installed, or does not answer.
    """
    try:
        return TRACKERS[name](folder, run, step, config)
    except ImportError as error:
        raise _not_installed(name) from error
    except Exception as error:
        # Each tracker has errors of its own, which are not imported here.
        own = type(error).__module__.partition(".")[0] == name
        if not own and not isinstance(error, OSError | RuntimeError | ValueError):
            raise
        raise UserError(f"`report_to` {name}: cannot be started ({error}); log in, or leave it out") from error


class TensorBoard:
    """Files in the run's folder, for `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, run: str, step: int, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline writes it to the run's folder."""

    def __init__(self, folder: Path, run: str, step: int, config: Mapping[str, Any]):
        wandb = importlib.import_module("wandb")
        own = _run_id(folder, "wandb", step) or _keep_id(folder, "wandb", uuid.uuid4().hex[:12])
        self.run = wandb.init(project=PROJECT, name=run, id=own, resume="allow", dir=str(folder), config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, run: str, step: int, config: Mapping[str, Any]):
        self.mlflow = importlib.import_module("mlflow")
        self.mlflow.set_experiment(PROJECT)
        known = _run_id(folder, "mlflow", step)
        self.run_id = self.mlflow.start_run(run_id=known, run_name=None if known else run).info.run_id
        if known is None:
            _keep_id(folder, "mlflow", self.run_id)
            # It takes no values of more than 6,000 characters.
            self.mlflow.log_params({name: str(value)[:6000] for name, value in config.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics(dict(values), step=step, run_id=self.run_id)

    def close(self) -> None:
        self.mlflow.end_run()


class Trackio:
    """A run of Trackio, on this machine or a Space of the Hugging Face hub."""

    def __init__(self, folder: Path, run: str, step: int, config: Mapping[str, Any]):
        trackio = importlib.import_module("trackio")
        # It knows runs by name.
        own = _run_id(folder, "trackio", step) or _keep_id(folder, "trackio", f"{run}-{uuid.uuid4().hex[:6]}")
        self.run = trackio.init(project=PROJECT, name=own, resume="allow", config=dict(config))
        self.trackio = trackio

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()


TRACKERS: Mapping[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def _ids(folder: Path) -> dict[str, str]:
    try:
        ids = json.loads((folder / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: own for name, own in ids.items() if isinstance(own, str)} if isinstance(ids, dict) else {}


def _run_id(folder: Path, tracker: str, step: int) -> str | None:
    """The id of the run that is resumed; None for a new one."""
    return _ids(folder).get(tracker) if step else None


def _keep_id(folder: Path, tracker: str, own: str) -> str:
    write_whole(folder / IDS, json.dumps({**_ids(folder), tracker: own}).encode())
    return own
