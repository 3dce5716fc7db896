"""Zero-shot classification: a class is the mean of the embeddings of its names in several templates (CLIP, arXiv
2103.00020, section 3.1.4; the seven templates of FLIP, arXiv 2212.00794, appendix A.2)."""

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
from fastvlp.eval.classification import accuracy_by_class, class_chance, class_errors, class_ranks, class_scores
from fastvlp.eval.embedding import embed_images, embed_texts
from fastvlp.eval.encoding import WHOLE_IMAGES, LoadedModel, MaskedEncoding, open_towers
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.ranks import ROUNDING
from fastvlp.eval.split_reading import open_split, read_labels
from fastvlp.model.joint_space import unit

# flip7 and openai80: Copyright (c) 2021 OpenAI, MIT licence (prompts/LICENSE-openai-clip). zh7 is ours.
PROMPTS = Path(__file__).with_name("prompts")


@evaluation
def evaluate_zeroshot(
    run: str | Path,
    /,
    *,
    data: str | Path,
    split: str = "test",
    classes: str | Path | None = None,
    templates: str = "flip7",
    label: str = "label",
    encoding: MaskedEncoding = WHOLE_IMAGES,
) -> Evaluation:
    """Classify images by the names of the classes, without training on any labels.

    An image gets the class whose name, in the templates, has the nearest embedding. The result is also added to a file in
    the folder of the run.

    Args:
        run: Folder of the run.
        data: Folder of shards, or folder with a folder for each split.
        split: Folder in `data`, if there is one of this name.
        classes: A .txt file with a class in each line, or a .json file {label: name or list of names}; by default the
            labels of the records are the names.
        templates: Sentences around a class's name: simple (the bare name), flip7, openai80, zh7, or a file with a template
            in each line and {} in the place of the name.
        label: Field of the records with the class.
        encoding: How images and texts are encoded.

    Raises:
        UserError: a record cannot be used; an evaluation leaves none out.
    """
    sentences = read_templates(templates)
    shards = open_split(str(data), split)
    labels = read_labels(shards, label)
    names_of = read_classes(Path(classes)) if classes else {name: [name] for name in sorted({*labels})}
    label_I = find_labels(shards, labels, names_of, str(classes or shards.url))
    loaded, saved, _ = open_towers(run, encoding)
    image_IE = embed_images(loaded, shards)
    texts_of = [[t.replace("{}", name) for name in names for t in sentences] for names in names_of.values()]
    class_of_text = torch.arange(len(texts_of)).repeat_interleave(torch.tensor([len(texts) for texts in texts_of]))
    text_TE = embed_texts(loaded, [text for texts in texts_of for text in texts])
    score_IC = image_IE @ class_vectors(text_TE, class_of_text.to(loaded.device), len(names_of)).T
    label_I = label_I.to(loaded.device)
    rank_I = class_ranks(score_IC, label_I, tie=ROUNDING)
    by_class = accuracy_by_class(rank_I, label_I, len(names_of)).tolist()
    return Evaluation(
        scores={"zero-shot": class_scores(rank_I, label_I, len(names_of))},
        chance=class_chance(len(names_of)),
        errors={"zero-shot": class_errors(rank_I, label_I, len(names_of))},
        counts={
            "images": len(shards),
            "classes": len(names_of),
            "classes_like_another": count_equal_names(loaded, names_of),
            "templates": len(sentences),
        },
        data=shards.url,
        weights=saved.weights.name,
        step=saved.info.get("step"),
        details={"by_class": {name: share for name, share in zip(names_of, by_class) if not math.isnan(share)}},
    )


def count_equal_names(loaded: LoadedModel, names_of: Mapping[str, Sequence[str]]) -> int:
    """How many classes have the same tokens as another class, as happens to words that the tokenizer does not know. The
    model cannot tell such classes apart."""
    ids_CL, _ = loaded.tokenizer.encode([", ".join(names) for names in names_of.values()], loaded.max_length)
    _, tokens_C, count = ids_CL.unique(dim=0, return_inverse=True, return_counts=True)
    return int((count[tokens_C] > 1).sum())


def class_vectors(text_TE: Tensor, class_of_text_T: Tensor, classes: int) -> Tensor:
    """The normalised mean of the unit vectors of each class's texts -> [C E]."""
    count_C = class_of_text_T.bincount(minlength=classes)
    total_CE = torch.zeros(classes, text_TE.shape[1], device=text_TE.device).index_add(0, class_of_text_T, text_TE)
    return unit(total_CE / count_C[:, None])


def read_classes(path: Path) -> dict[str, list[str]]:
    """Reads {label: names} from JSON, or from a text file with a class in each line, whose name is the label.

    Raises UserError for a class that occurs twice or has no name.
    """
    text = _read(path)
    if path.suffix == ".json":
        return _json_classes(path, text)
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name = " ".join(line.split())
        if name in lines:
            raise UserError(f"{path}:{number}: class {name!r} is also in line {lines[name]}; remove one")
        if name:
            lines[name] = number
    if not lines:
        raise UserError(f"{path}: no class in it; write one in each line")
    return {name: [name] for name in lines}


def _json_classes(path: Path, text: str) -> dict[str, list[str]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            line = text[: text.rfind(json.dumps(twice, ensure_ascii=False))].count("\n") + 1
            raise UserError(f"{path}:{line}: class {twice!r} occurs twice; remove one")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write {{label: name}} or {{label: [names]}}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: no class in it; write {{label: name}} or {{label: [names]}}")
    classes = {label: names if isinstance(names, list) else [names] for label, names in content.items()}
    for label, names in classes.items():
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{path}: class {label!r} has {content[label]!r}; give it a name or a list of names")
    return classes


def read_templates(name: str) -> list[str]:
    """The templates of this name that come with fastvlp, or those in this file. Raises UserError for a line that does not
    have `{}` once."""
    own = sorted(path.stem for path in PROMPTS.glob("*.txt"))
    path = PROMPTS / f"{name}.txt" if name in own else Path(name)
    if name not in own and not path.is_file():
        raise UserError(f"`templates` {name}: no such file; give a file, or one of {', '.join(own)}")
    templates = [(number, line.strip()) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    for number, template in templates:
        if template.count("{}") != 1:
            raise UserError(f"{path}:{number}: {template!r} must have {{}} once, in the place of the class's name")
    if not templates:
        raise UserError(
            f"{path}: no template in it; write one in each line, with {{}} in the place of the class's name"
        )
    return [template for _, template in templates]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({error}); give a text file in UTF-8") from error


def find_labels(shards: Shards, labels: Sequence[str], classes: Mapping[str, Any], source: str) -> Tensor:
    """The index of each record's label among the classes -> int64 [I]. Raises UserError for a label that is no class."""
    place = {label: c for c, label in enumerate(classes)}
    for i, label in enumerate(labels):
        if label not in place:
            near = get_close_matches(label, place, 3) or list(place)[:3]
            raise UserError(
                f"{source}: no class {label!r}, which {shards.key(i)} of {shards.url} has (near it: {', '.join(near)}); "
                f"add it, give a .json {{label: name}} as `classes`, or name another field of the records with `label`"
            )
    return torch.tensor([place[label] for label in labels])
