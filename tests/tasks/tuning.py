"""Fine-tuning as the tests do it: short, in small batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from fastvlp.tasks.finetune import finetune
from fastvlp.tasks.task_scores import TaskScores
from fastvlp.training.train_config import TrainConfig


def tune(task: Any, source: Path, data: Path, out: Path, **options: Any) -> TaskScores:
    options = {"steps": 2, "batch_size": 8, "precision": "fp32", **options}
    scores = finetune(task, source=str(source), data=str(data), out=str(out), **options)
    assert scores is not None
    return scores


def planned(task: Any, source: Path, data: Path, out: Path, **options: Any) -> TrainConfig:
    """The run that `tune` would train."""
    with patch("fastvlp.tasks.finetune.train_and_score") as stopped:
        tune(task, source, data, out, **options)
    run: TrainConfig = stopped.call_args.args[0]
    return run
