"""Linear probe: logistic regression on frozen image features, as in CLIP (arXiv 2103.00020, appendix A.3), with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.data.records.shards import Shards
from fastvlp.data.splits import find_splits
from fastvlp.eval.embedding import Features, Reader, image_batches, image_features, open_run, read_labels
from fastvlp.eval.options import Probe
from fastvlp.eval.zeroshot import class_ranks, class_scores
from fastvlp.random import hash64_rows

# Strongest first: each fit starts from the one before, which is near it.
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(2, -13, -1))
HELD_OUT = 0.1


class Chosen(NamedTuple):
    """validation: accuracy of each strength."""

    strength: float
    validation: dict[float, float]


def fit_logistic(
    x_ND: Tensor, class_N: Tensor, classes: int, strength: float, start_CD: Tensor | None = None
) -> Tensor:
    """The minimum of mean cross-entropy + strength / 2 * |W|**2 over weights and biases -> [C D+1], the bias last and not
    penalised. It is unique but for what is added to all biases alike, so that `start_CD` only shortens the way (L-BFGS)."""
    x = F.pad(x_ND, (0, 1), value=1.0)
    start = x.new_zeros(classes, x.shape[1]) if start_CD is None else start_CD
    weight = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [weight],
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=torch.finfo(x.dtype).eps / 100,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        total = F.cross_entropy(x @ weight.T, class_N) + strength / 2 * weight[:, :-1].square().sum()
        total.backward()
        return total

    search.step(loss)
    return weight.detach()


def predict(x_ND: Tensor, weight_CD: Tensor) -> Tensor:
    """Logits [N C]."""
    return F.linear(x_ND, weight_CD[:, :-1], weight_CD[:, -1])


def choose_strength(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int, strengths: Sequence[float] = STRENGTHS
) -> Chosen:
    """The strength with the most accurate fit on features and classes that it was not fitted to; of equal ones the
    strongest."""
    weight, validation = None, {}
    for strength in sorted(strengths, reverse=True):
        weight = fit_logistic(*train, classes, strength, weight)
        validation[strength] = float((class_ranks(predict(val[0], weight), val[1]) == 1).double().mean())
    return Chosen(max(validation, key=lambda strength: validation[strength]), validation)


def held_out(count: int, share: float = HELD_OUT) -> Tensor:
    """bool [count]: which rows of a split are validated on, by a hash of their place. At least one is."""
    order = hash64_rows(0, torch.arange(count)).argsort()
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: max(1, round(count * share))]] = True
    return chosen


def read_features(reader: Reader, shards: Shards, kind: Features) -> Tensor:
    """Of every record's first image, fp32 [I D]."""
    with reader.reading():
        batches = image_batches(shards, reader)
        return torch.cat([image_features(reader.model, images.to(reader.device), kind) for _, images in batches])


def probe(x: Mapping[str, Tensor], label: Mapping[str, Tensor], classes: int) -> tuple[dict[str, float], Chosen]:
    """Scores on `test` of the fit to all of `train` and `val`, with the strength that `val` chose, or a tenth of `train`
    where there is none. Classes that only `test` has come last; none of their images is ever right.

    Features are scaled to mean 0 and deviation 1 over what is fitted to, so that one range of strengths serves models of
    any width (ours: CLIP takes them as they are).
    """
    if "val" not in x:
        out = held_out(len(x["train"])).to(label["train"].device)
        x = {**x, "train": x["train"][~out], "val": x["train"][out]}
        label = {**label, "train": label["train"][~out], "val": label["train"][out]}
    both = torch.cat([x["train"], x["val"]])
    mean_D, deviation_D = both.mean(0), both.std(0).clamp(min=1e-6)
    scaled = {name: (part - mean_D) / deviation_D for name, part in x.items()}
    fitted = torch.cat([scaled["train"], scaled["val"]]), torch.cat([label["train"], label["val"]])
    seen = int(fitted[1].max()) + 1
    chosen = choose_strength((scaled["train"], label["train"]), (scaled["val"], label["val"]), seen)
    logits = predict(scaled["test"], fit_logistic(*fitted, seen, chosen.strength))
    rank_I = class_ranks(F.pad(logits, (0, classes - seen), value=-torch.inf), label["test"])
    return class_scores(rank_I, label["test"], classes), chosen


def open_splits(told: Probe) -> dict[str, Shards]:
    """train, val where it is neither missing nor what is scored, and `test`, which is scored."""
    places = {**find_splits(told.data, (told.prefix,)), **find_splits(told.data, (told.prefix,), told.split)}
    kept = {"train": places["train"], "test": places[told.split]}
    if told.split == "test" and "val" in places:
        kept["val"] = places["val"]
    return {name: Shards(place) for name, place in kept.items()}


def evaluate(told: Probe) -> dict[str, Any]:
    """`scores` on the split that is told, which is not fitted to. Raises UserError for a record that cannot be used."""
    shards = open_splits(told)
    labels = {name: read_labels(part, told.label) for name, part in shards.items()}
    seen = sorted({*labels["train"], *labels.get("val", ())})
    unseen = sorted({*labels["test"]} - {*seen})
    classes = {name: place for place, name in enumerate([*seen, *unseen])}
    reader, saved, _ = open_run(told)
    label = {name: torch.tensor([classes[one] for one in its]).to(reader.device) for name, its in labels.items()}
    x = {name: read_features(reader, part, told.features) for name, part in shards.items()}
    scores, chosen = probe(x, label, len(classes))
    counts = {name: len(part) for name, part in shards.items()}
    return {
        "scores": {"probe": scores},
        "strength": chosen.strength,
        "validation": {f"{strength:.3g}": accuracy for strength, accuracy in chosen.validation.items()},
        "counts": counts | {"classes": len(classes), "classes_only_in_test": len(unseen)},
        "data": shards["test"].url,
        "weights": saved.weights.name,
        "step": saved.info.get("step"),
    }
