"""One function for all evaluations of a run, for notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlp.eval.evaluation import Evaluation, evaluate_embeddings
from fastvlp.tasks.task_evaluation import evaluate_task
from fastvlp.tasks.task_scores import TaskScores


def evaluate(method: str, run: str | Path, /, **options: Any) -> Evaluation | TaskScores:
    """Score a run. The scores are also written into the run's folder.

    Args:
        method: The evaluation. `task` scores a fine-tuned run on its task. `retrieval` retrieves images by captions and
            captions by images, with the embeddings. `zeroshot` classifies images by the names of the classes. `probe` fits a
            logistic regression to frozen image features. `sugarcrepe`, `winoground` and `vsr` test whether the model
            understands how words combine, by scores of pairs. `mteb` scores an export with mteb's own runner.
        run: Folder of the run.
        **options: Options of the method, as `vlp evaluate METHOD --help` lists them, such as `data`, `split` and `device`.

    Returns:
        `scores` by name, and the `path` of the file that they were written to.

    Raises:
        UserError: There is no such method, the run lacks an ability that the method needs, or a record cannot be used.
    """
    if method == "task":
        return evaluate_task(str(run), **options)
    return evaluate_embeddings(method, run, **options)
