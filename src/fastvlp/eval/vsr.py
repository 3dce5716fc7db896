"""VSR, Visual Spatial Reasoning (Liu et al. 2023, arXiv 2205.00363): is what a caption says of two objects' places true?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastvlp.eval.benchmark_items import Pairs, make_pairs, open_pictures, read_items
from fastvlp.eval.classification import mean_by
from fastvlp.eval.composition import auc, best_threshold, median_threshold
from fastvlp.eval.encoding import AS_IN_TRAINING, Encoding, RunFolder, open_run
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.pair_methods import PairMethod, score_by_all
from fastvlp.eval.uncertainty import numbers_only, standard_error


@evaluation
def evaluate_vsr(
    run: RunFolder,
    /,
    *,
    data: str | Path,
    images: str | Path | None = None,
    validation: str | Path | None = None,
    by: PairMethod | None = None,
    encoding: Encoding = AS_IN_TRAINING,
) -> Evaluation:
    """Decide whether the spatial relation in a caption is true of a picture (VSR).

    A caption is called true if its score is above a threshold. By default the threshold is the median of all scores, which uses
    no label and calls half of the captions true. With `validation` it is the threshold with the highest accuracy on that file.
    `accuracy` depends on the threshold. `auc`, the share of true and false captions whose order is right, does not. Published
    models are trained on VSR's train split, so do not compare their accuracies with those of a run that was not. Each way in
    which the run can score pairs is a column. The result is also added to a file in the folder of the run.

    Args:
        run: Folder of the run.
        data: A published .jsonl, such as test.jsonl, with image, caption, label (0 or 1) and relation.
        images: Folder or .zip with the pictures; by default `images` or `images.zip` beside the items.
        validation: Another such file, such as dev.jsonl, on which the threshold is chosen. Its pictures are in `images` too.
        by: Score pairs only by cosine, match or likelihood.
        encoding: Options of encoding images and texts.

    Raises:
        UserError: An item or picture cannot be used; an evaluation leaves none out.
    """
    place = Path(data)
    pairs, label_P, relations = read_vsr(place, images)
    opened = open_run(run, encoding)
    scores_of = score_by_all(opened, pairs, by)
    if validation is None:
        threshold_of = {name: median_threshold(score_P) for name, score_P in scores_of.items()}
    else:
        others, other_label_P, _ = read_vsr(Path(validation), images)
        held_out = score_by_all(opened, others, by)
        threshold_of = {name: best_threshold(score_P, other_label_P) for name, score_P in held_out.items()}
    hits_of = {name: ((score_P.double() > threshold_of[name]) == label_P) for name, score_P in scores_of.items()}
    results = {name: vsr_scores(scores_of[name], label_P, hit_P, pairs.image_P) for name, hit_P in hits_of.items()}
    share = float(label_P.double().mean())
    return Evaluation(
        scores={name: scores for name, (scores, _) in results.items()},
        # Scores in random order: half are above their median. Where labels choose the threshold, to call all pairs the same.
        chance={"accuracy": 0.5 if validation is None else max(share, 1 - share), "auc": 0.5},
        errors={name: errors for name, (_, errors) in results.items()},
        counts={"items": len(label_P), "images": len(pairs.pictures), "true": int(label_P.sum())},
        data=str(place),
        weights=opened.saved.weights.name,
        step=opened.saved.info.get("step"),
        details={
            "threshold": threshold_of,
            "by_relation": {name: mean_by(hit_P.double().tolist(), relations) for name, hit_P in hits_of.items()},
        },
    )


def vsr_scores(
    score_P: Tensor, label_P: Tensor, hit_P: Tensor, image_P: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """`accuracy` and `auc`, and their standard errors; those that are numbers.

    Args:
        score_P: the score of each pair.
        label_P: whether each caption is true.
        hit_P: whether the threshold got it right.
        image_P: the picture of each pair; pairs on one picture depend on each other in the accuracy's error.
    """
    hits, (area, error) = hit_P.double().tolist(), auc(score_P, label_P)
    scores = {"accuracy": sum(hits) / len(hits), "auc": area}
    return numbers_only(scores), numbers_only({"accuracy": standard_error(hits, image_P.tolist()), "auc": error})


def read_vsr(data: Path, images: str | Path | None) -> tuple[Pairs, Tensor, list[str]]:
    """The pairs of a file, whether each caption is true, bool [P], and its relation. Raises UserError for another form."""
    items = read_items(data)
    labels = torch.tensor(items.truths("label"))
    pairs = make_pairs(open_pictures(images, data), items.names("image"), items.texts("caption"))
    return pairs, labels, items.texts("relation")
