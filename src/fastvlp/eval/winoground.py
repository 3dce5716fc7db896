"""Winoground (Thrush et al. 2022, arXiv 2204.03162): two pictures and two captions of the same words."""

from __future__ import annotations

from pathlib import Path

from fastvlp.eval.benchmark_items import make_pairs, open_pictures, read_items
from fastvlp.eval.composition import WINOGROUND_CHANCE, winoground_hits
from fastvlp.eval.encoding import AS_IN_TRAINING, Encoding, RunFolder, open_run
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.pair_methods import PairMethod, score_by_all
from fastvlp.eval.ranks import ROUNDING
from fastvlp.eval.uncertainty import numbers_only, standard_error


@evaluation
def evaluate_winoground(
    run: RunFolder,
    /,
    *,
    data: str | Path,
    images: str | Path | None = None,
    by: PairMethod | None = None,
    encoding: Encoding = AS_IN_TRAINING,
) -> Evaluation:
    """Match two pictures with two captions that have the same words in another order (Winoground).

    There are three scores. `text`: for both pictures, the right caption scores higher. `image`: for both captions, the right
    picture scores higher. `group`: both. Equal scores count as wrong. Each way in which the run can score pairs is a column.
    The result is also added to a file in the folder of the run.

    Args:
        run: Folder of the run.
        data: The published examples.jsonl, with image_0, image_1, caption_0 and caption_1.
        images: Folder or .zip with the pictures; by default `images` or `images.zip` beside the items.
        by: Score pairs only by cosine, match or likelihood.
        encoding: Options of encoding images and texts.

    Raises:
        UserError: An item or picture cannot be used; an evaluation leaves none out.
    """
    place = Path(data)
    items = read_items(place / "examples.jsonl" if place.is_dir() else place)
    # In the order of the last two dimensions of the scores: picture, then caption.
    names = [name for field in ("image_0", "image_0", "image_1", "image_1") for name in items.names(field)]
    texts = [text for field in ("caption_0", "caption_1") * 2 for text in items.texts(field)]
    pairs = make_pairs(open_pictures(images, items.path), names, texts)
    opened = open_run(run, encoding)
    scores_of = {
        name: score_P.view(2, 2, -1).permute(2, 0, 1) for name, score_P in score_by_all(opened, pairs, by).items()
    }
    hits_of = {name: winoground_hits(score_I22, tie=ROUNDING) for name, score_I22 in scores_of.items()}
    values = {
        name: {metric: hit_I.double().tolist() for metric, hit_I in hits.items()} for name, hits in hits_of.items()
    }
    return Evaluation(
        scores={name: {metric: sum(its) / len(its) for metric, its in own.items()} for name, own in values.items()},
        chance=WINOGROUND_CHANCE,
        errors={
            name: numbers_only({metric: standard_error(its) for metric, its in own.items()})
            for name, own in values.items()
        },
        counts={"items": len(items.rows), "images": len(pairs.pictures), "texts": len(pairs.texts)},
        data=str(place),
        weights=opened.saved.weights.name,
        step=opened.saved.info.get("step"),
    )
