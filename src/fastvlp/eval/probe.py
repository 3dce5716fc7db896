"""Linear probe: logistic regression on frozen image features, as in CLIP (arXiv 2103.00020, appendix A.3), in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.data.records.shards import Shards
from fastvlp.data.splits import find_splits
from fastvlp.eval.classification import class_chance, class_ranks, class_scores
from fastvlp.eval.embedding import Features, image_features
from fastvlp.eval.encoding import AS_IN_TRAINING, Encoding, LoadedModel, RunFolder, open_run
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.split_reading import image_batches, read_labels
from fastvlp.random import hash64_rows

# Strengths of the regularisation, the strongest first: each fit starts from the one before, which is near it.
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(2, -13, -1))
# Share of the training split that validates the strength where there is no validation split.
HELD_OUT = 0.1


@evaluation
def evaluate_probe(
    run: RunFolder,
    /,
    *,
    data: str | Path,
    split: Literal["val", "test"] = "test",
    features: Features = "pooled",
    label: str = "label",
    prefix: str = "",
    encoding: Encoding = AS_IN_TRAINING,
) -> Evaluation:
    """Classify images by logistic regression on frozen features of the run.

    The classifier is fitted to the splits train and val. The result is also added to a file in the folder of the run.

    Args:
        run: Folder of the run.
        data: Folder with a sub-folder for each split: train, the scored split, and val if there is one.
        split: Split that is scored. With `val`, the strength of the regularisation is chosen on a tenth of train.
        features: Features of an image before (`pooled`) or after (`embedding`) the projection into the joint space.
        label: Field of the records with the class.
        prefix: Beginning of the splits' names, such as singles- for singles-train and singles-test of the embedded corpus.
        encoding: Options of encoding images.

    Raises:
        UserError: A record cannot be used; an evaluation leaves none out.
    """
    shards = open_splits(str(data), split, prefix)
    labels = {name: read_labels(part, label) for name, part in shards.items()}
    fitted = sorted({*labels["train"], *labels.get("val", ())})
    unseen = sorted({*labels["test"]} - {*fitted})
    place = {name: c for c, name in enumerate([*fitted, *unseen])}
    loaded, saved, _ = open_run(run, encoding)
    class_of = {name: torch.tensor([place[one] for one in its]).to(loaded.device) for name, its in labels.items()}
    features_of = {name: read_features(loaded, part, features) for name, part in shards.items()}
    scores, choice = probe(features_of, class_of, len(place))
    counts = {name: len(part) for name, part in shards.items()}
    return Evaluation(
        scores={"probe": scores},
        chance=class_chance(len(place)),
        counts=counts | {"classes": len(place), "classes_only_in_test": len(unseen)},
        data=shards["test"].url,
        weights=saved.weights.name,
        step=saved.info.get("step"),
        details={
            "strength": choice.strength,
            "validation": {f"{strength:.3g}": accuracy for strength, accuracy in choice.validation.items()},
        },
    )


def open_splits(data: str, split: Literal["val", "test"], prefix: str) -> dict[str, Shards]:
    """The shards of `train`, of `test` (the split that is scored), and of `val` if there are any and they are not scored."""
    places = {**find_splits(data, (prefix,)), **find_splits(data, (prefix,), split)}
    chosen = {"train": places["train"], "test": places[split]}
    if split == "test" and "val" in places:
        chosen["val"] = places["val"]
    return {name: Shards(place) for name, place in chosen.items()}


def read_features(loaded: LoadedModel, shards: Shards, features: Features) -> Tensor:
    """Features of the first image of every record, fp32 [I D]."""
    with loaded.inference():
        batches = image_batches(shards, loaded)
        return torch.cat([image_features(loaded.model, images.to(loaded.device), features) for _, images in batches])


class Choice(NamedTuple):
    """A strength of the regularisation, and the validation accuracy of every strength that was tried."""

    strength: float
    validation: dict[float, float]


def fit_logistic(
    x_ND: Tensor, class_N: Tensor, classes: int, strength: float, start_CD: Tensor | None = None
) -> Tensor:
    """The weights and biases that minimise mean cross-entropy + strength / 2 * |W|**2 -> [C D+1], the bias last.

    The bias is not penalised. The minimum is unique up to a constant added to all biases, so the start only saves steps of
    L-BFGS.
    """
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
    """Logits [N C] of features [N D]."""
    return F.linear(x_ND, weight_CD[:, :-1], weight_CD[:, -1])


def choose_strength(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int, strengths: Sequence[float] = STRENGTHS
) -> Choice:
    """The strength whose fit to `train` is the most accurate on `val`; the strongest of equally good ones."""
    weight, validation = None, {}
    for strength in sorted(strengths, reverse=True):
        weight = fit_logistic(*train, classes, strength, weight)
        validation[strength] = float((class_ranks(predict(val[0], weight), val[1]) == 1).double().mean())
    return Choice(max(validation, key=lambda strength: validation[strength]), validation)


def held_out(count: int, share: float = HELD_OUT) -> Tensor:
    """Chooses the rows of a split that are used for validation, by a hash of their index -> bool [count]; at least one."""
    order = hash64_rows(0, torch.arange(count)).argsort()
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: max(1, round(count * share))]] = True
    return chosen


def probe(x: Mapping[str, Tensor], label: Mapping[str, Tensor], classes: int) -> tuple[dict[str, float], Choice]:
    """Scores on `test` of the fit to `train` and `val` together.

    `val` chooses the strength, or a tenth of `train` if there is no `val`. Classes that only `test` has come last; their
    images always count as wrong. Features are standardised over the images that are fitted to, so that one range of
    strengths serves models of any width (our choice: CLIP takes the features as they are).

    Args:
        x: features [I D] of each split.
        label: class of each image, int64 [I].
        classes: number of classes.
    """
    if "val" not in x:
        out = held_out(len(x["train"])).to(label["train"].device)
        x = {**x, "train": x["train"][~out], "val": x["train"][out]}
        label = {**label, "train": label["train"][~out], "val": label["train"][out]}
    both = torch.cat([x["train"], x["val"]])
    mean_D, deviation_D = both.mean(0), both.std(0).clamp(min=1e-6)
    scaled = {name: (part - mean_D) / deviation_D for name, part in x.items()}
    fitted = torch.cat([scaled["train"], scaled["val"]]), torch.cat([label["train"], label["val"]])
    fitted_classes = int(fitted[1].max()) + 1
    choice = choose_strength((scaled["train"], label["train"]), (scaled["val"], label["val"]), fitted_classes)
    logits = predict(scaled["test"], fit_logistic(*fitted, fitted_classes, choice.strength))
    rank_I = class_ranks(F.pad(logits, (0, classes - fitted_classes), value=-torch.inf), label["test"])
    return class_scores(rank_I, label["test"], classes), choice
