"""Zero-shot classification: a class is the mean of its names' embeddings in several templates (CLIP, arXiv 2103.00020,
section 3.1.4; the seven of FLIP, arXiv 2212.00794, appendix A.2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.embedding import embed_images, embed_texts, open_split, open_towers, read_labels
from fastvlp.eval.options import ZeroShot
from fastvlp.eval.ranks import ROUNDING
from fastvlp.model.joint_space import unit

# flip7 and openai80: Copyright (c) 2021 OpenAI, MIT licence (prompts/LICENSE-openai-clip). zh7 is ours.
PROMPTS = Path(__file__).with_name("prompts")


def class_ranks(score_IC: Tensor, label_I: Tensor, *, tie: float = 0.0) -> Tensor:
    """Rank from 1 of each image's class -> [I]. A class that scores as high as the right one, to `tie`, is ahead of it, and
    so is all that is compared with NaN."""
    own_I1 = score_IC.gather(1, label_I[:, None])
    return score_IC.shape[1] - (score_IC < own_I1 - tie).sum(1)


def accuracy_by_class(rank_I: Tensor, label_I: Tensor, classes: int) -> Tensor:
    """Share of each class's images with rank 1 -> [C], NaN for a class without images."""
    hit_C = torch.zeros(classes, dtype=torch.float64, device=rank_I.device).index_add(
        0, label_I, (rank_I <= 1).double()
    )
    return hit_C / label_I.bincount(minlength=classes)


def class_scores(rank_I: Tensor, label_I: Tensor, classes: int) -> dict[str, float]:
    """`top1`; `top5` where there are more than five classes; `mean_per_class`, of top1 over the classes that occur."""
    shares = {f"top{k}": float((rank_I <= k).double().mean()) for k in (1, 5) if k < max(classes, 2)}
    return shares | {"mean_per_class": float(accuracy_by_class(rank_I, label_I, classes).nanmean())}


def class_vectors(text_TE: Tensor, class_of_text_T: Tensor, classes: int) -> Tensor:
    """The mean of each class's unit vectors, made a unit vector again -> [C E]."""
    count_C = class_of_text_T.bincount(minlength=classes)
    total_CE = torch.zeros(classes, text_TE.shape[1], device=text_TE.device).index_add(0, class_of_text_T, text_TE)
    return unit(total_CE / count_C[:, None])


def read_classes(path: Path) -> dict[str, list[str]]:
    """{label: names}, from a text file with one a line, where the name is the label, or JSON. Raises UserError for a class
    that is there twice or has no name."""
    text = _read(path)
    if path.suffix == ".json":
        return _json_classes(path, text)
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name = " ".join(line.split())
        if name in lines:
            raise UserError(f"{path}:{number}: class {name!r} is in line {lines[name]} already; remove one")
        if name:
            lines[name] = number
    if not lines:
        raise UserError(f"{path}: no class in it; write one a line")
    return {name: [name] for name in lines}


def _json_classes(path: Path, text: str) -> dict[str, list[str]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            line = text[: text.rfind(json.dumps(twice, ensure_ascii=False))].count("\n") + 1
            raise UserError(f"{path}:{line}: class {twice!r} is there twice; remove one")
        return dict(pairs)

    try:
        told = json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); write {{label: name}} or {{label: [names]}}") from error
    if not isinstance(told, dict) or not told:
        raise UserError(f"{path}: no class in it; write {{label: name}} or {{label: [names]}}")
    classes = {label: names if isinstance(names, list) else [names] for label, names in told.items()}
    for label, names in classes.items():
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{path}: class {label!r} has {told[label]!r}; give it a name or a list of names")
    return classes


def read_templates(told: str) -> list[str]:
    """The templates of a name that comes with fastvlp, or of a file. Raises UserError for a line without one `{}`."""
    own = sorted(path.stem for path in PROMPTS.glob("*.txt"))
    path = PROMPTS / f"{told}.txt" if told in own else Path(told)
    if told not in own and not path.is_file():
        raise UserError(f"--templates {told}: no such file; choose one, or {', '.join(own)}")
    templates = [(number, line.strip()) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    for number, template in templates:
        if template.count("{}") != 1:
            raise UserError(f"{path}:{number}: {template!r} needs one {{}}, where the name of the class goes")
    if not templates:
        raise UserError(f"{path}: no template in it; write one a line, with {{}} where the name of the class goes")
    return [template for _, template in templates]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({error}); give a text file in UTF-8") from error


def find_labels(shards: Shards, labels: Sequence[str], classes: Mapping[str, Any], source: str) -> Tensor:
    """The place of each record's label among the classes -> int64 [I]."""
    place = {label: c for c, label in enumerate(classes)}
    for i, label in enumerate(labels):
        if label not in place:
            near = get_close_matches(label, place, 3) or list(place)[:3]
            raise UserError(
                f"{source}: no class {label!r}, which {shards.key(i)} of {shards.url} has (near it: {', '.join(near)}); "
                f"add it, or name another field of the records with --label"
            )
    return torch.tensor([place[label] for label in labels])


def evaluate(told: ZeroShot) -> dict[str, Any]:
    """`scores` on a split, and top1 of each class. Raises UserError for a record that cannot be used."""
    templates = read_templates(told.templates)
    shards = open_split(told)
    labels = read_labels(shards, told.label)
    classes = read_classes(Path(told.classes)) if told.classes else {label: [label] for label in sorted({*labels})}
    label_I = find_labels(shards, labels, classes, told.classes or shards.url)
    reader, saved, _ = open_towers(told)
    image_IE = embed_images(reader, shards)
    texts = [[t.replace("{}", name) for name in names for t in templates] for names in classes.values()]
    class_of_text = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(its) for its in texts]))
    text_TE = embed_texts(reader, [text for its in texts for text in its])
    score_IC = image_IE @ class_vectors(text_TE, class_of_text.to(reader.device), len(classes)).T
    # Names that the tokenizer does not know may all be alike to it; their classes are then never told apart.
    spelt_CL, _ = reader.tokenizer.encode([", ".join(names) for names in classes.values()], reader.max_length)
    _, spelling_C, count = spelt_CL.unique(dim=0, return_inverse=True, return_counts=True)
    label_I = label_I.to(reader.device)
    rank_I = class_ranks(score_IC, label_I, tie=ROUNDING)
    by_class = accuracy_by_class(rank_I, label_I, len(classes)).tolist()
    return {
        "scores": {"zero-shot": class_scores(rank_I, label_I, len(classes))},
        "by_class": {label: share for label, share in zip(classes, by_class) if not math.isnan(share)},
        "counts": {
            "images": len(shards),
            "classes": len(classes),
            "classes_like_another": int((count[spelling_C] > 1).sum()),
            "templates": len(templates),
        },
        "data": shards.url,
        "weights": saved.weights.name,
        "step": saved.info.get("step"),
    }
