"""One function for all evaluations of a run, for notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastvlp.errors import UserError
from fastvlp.eval.embedding_retrieval import evaluate_retrieval
from fastvlp.eval.evaluation import Evaluation
from fastvlp.eval.probe import evaluate_probe
from fastvlp.eval.zeroshot import evaluate_zeroshot
from fastvlp.tasks.task_evaluation import evaluate_task
from fastvlp.tasks.task_scores import TaskScores

METHODS: Mapping[str, Callable[..., Evaluation | TaskScores]] = {
    "task": evaluate_task,
    "retrieval": evaluate_retrieval,
    "zeroshot": evaluate_zeroshot,
    "probe": evaluate_probe,
}


def evaluate(method: str, run: str | Path, /, **options: Any) -> Evaluation | TaskScores:
    """Score a run. The scores are also written into the run's folder.

    Args:
        method: `task`: a fine-tuned run on its task. `retrieval`: find images by captions and captions by images, with the
            embeddings. `zeroshot`: classify images by the names of the classes. `probe`: logistic regression on frozen
            image features.
        run: Folder of the run.
        **options: Options of the method, as `vlp evaluate METHOD --help` lists them: `evaluate_task`, `evaluate_retrieval`,
            `evaluate_zeroshot` and `evaluate_probe` have them as keyword parameters.

    Returns:
        `scores` by name, and the `path` of the file that they were written to.

    Raises:
        UserError: There is no such method, the run did not learn what the method needs, or a record cannot be used.
    """
    if method not in METHODS:
        near = get_close_matches(method, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
        raise UserError(f"{method}: no such evaluation; {hint}")
    return METHODS[method](run, **options)
