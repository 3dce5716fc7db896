"""SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610): the caption of a picture beside a hard negative, in seven kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvlp.errors import UserError
from fastvlp.eval.benchmark_items import make_pairs, open_pictures, read_items
from fastvlp.eval.classification import mean_by
from fastvlp.eval.composition import is_above, macro_error
from fastvlp.eval.encoding import AS_IN_TRAINING, Encoding, RunFolder, open_run
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.pair_methods import PairMethod, score_by_all
from fastvlp.eval.ranks import ROUNDING
from fastvlp.eval.uncertainty import numbers_only, standard_error

KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


@evaluation
def evaluate_sugarcrepe(
    run: RunFolder,
    /,
    *,
    data: str | Path,
    images: str | Path | None = None,
    by: PairMethod | None = None,
    encoding: Encoding = AS_IN_TRAINING,
) -> Evaluation:
    """Distinguish a picture's caption from a caption with a word added, replaced or swapped (SugarCrepe).

    The score is the share of the items whose caption scores higher than its hard negative: for each kind of negative, for all
    items (`overall`), and as the mean of the kinds (`macro`). Equal scores count as wrong. Each way in which the run can score
    pairs is a column: the cosine of its embeddings, its matching head, and the mean log-likelihood of the caption's tokens. The
    result is also added to a file in the folder of the run.

    Args:
        run: Folder of the run.
        data: Folder with the published files, one .json for each kind, such as add_att.json; or one such file; or a .jsonl with
            filename, caption, negative_caption and kind.
        images: Folder or .zip with the pictures (COCO's val2017); by default `images` or `images.zip` beside the items.
        by: Score pairs only by cosine, match or likelihood.
        encoding: Options of encoding images and texts.

    Raises:
        UserError: An item or picture cannot be used; an evaluation leaves none out.
    """
    place = Path(data)
    names, captions, negatives, kinds = read_sugarcrepe(place)
    pairs = make_pairs(open_pictures(images, place), [*names, *names], [*captions, *negatives])
    opened = open_run(run, encoding)
    scores_of = {name: score_P.view(2, -1) for name, score_P in score_by_all(opened, pairs, by).items()}
    hits_of = {name: is_above(*score_2I, tie=ROUNDING) for name, score_2I in scores_of.items()}
    image_I = pairs.image_P[: len(names)].tolist()
    results = {name: sugarcrepe_scores(hit_I, kinds, image_I) for name, hit_I in hits_of.items()}
    return Evaluation(
        scores={name: scores for name, (scores, _) in results.items()},
        chance=dict.fromkeys(next(iter(results.values()))[0], 0.5),
        errors={name: errors for name, (_, errors) in results.items()},
        counts={
            "items": len(names),
            "images": len(pairs.pictures),
            "kinds": len({*kinds}),
            **{f"ties_{name}": int((a - b).abs().le(ROUNDING).sum()) for name, (a, b) in scores_of.items()},
        },
        data=str(place),
        weights=opened.saved.weights.name,
        step=opened.saved.info.get("step"),
        details={"items_by_kind": {kind: kinds.count(kind) for kind in sorted({*kinds})}},
    )


def read_sugarcrepe(data: Path) -> tuple[list[str | int], list[str], list[str], list[str]]:
    """Name of the picture, caption, negative caption and kind of each item, of one file or of those of a folder.

    Raises UserError if there is no file of this form.
    """
    files = [data]
    if data.is_dir():
        files = [path for kind in KINDS if (path := data / f"{kind}.json").is_file()]
        if not files:
            raise UserError(f"{data}: none of {', '.join(f'{kind}.json' for kind in KINDS)} here; give their folder")
    names: list[str | int] = []
    captions, negatives, kinds = list[str](), list[str](), list[str]()
    for path in files:
        items = read_items(path)
        names += items.names("filename")
        captions += items.texts("caption")
        negatives += items.texts("negative_caption")
        in_rows = any("kind" in row for row in items.rows)
        kinds += items.texts("kind") if in_rows else [path.stem] * len(items.rows)
    return names, captions, negatives, kinds


def sugarcrepe_scores(
    hit_I: Tensor, kinds: Sequence[str], images: Sequence[int]
) -> tuple[dict[str, float], Mapping[str, float]]:
    """Share of hits of each kind, of all items (`overall`) and as the mean of the kinds (`macro`), and their standard errors.

    Args:
        hit_I: whether each item was answered right.
        kinds: kind of each item.
        images: image of each item; items on one image depend on each other.
    """
    hits = hit_I.double().tolist()
    scores: dict[str, float] = {str(kind): mean for kind, mean in mean_by(hits, kinds).items()}
    errors = {}
    for kind in scores:
        own = [i for i, its in enumerate(kinds) if its == kind]
        errors[kind] = standard_error([hits[i] for i in own], [images[i] for i in own])
    errors |= {"overall": standard_error(hits, images), "macro": macro_error(hits, kinds, images)}
    macro = sum(scores.values()) / len(scores)
    return scores | {"overall": float(torch.tensor(hits).mean()), "macro": macro}, numbers_only(errors)
