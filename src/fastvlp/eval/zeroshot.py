"""Zero-shot classification: a class is the mean of the embeddings of its names in several templates (CLIP, arXiv
2103.00020, section 3.1.4; the seven templates of FLIP, arXiv 2212.00794, appendix A.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvlp.eval.class_files import read_templates
from fastvlp.eval.classification import accuracy_by_class, class_chance, class_errors, class_ranks, class_scores
from fastvlp.eval.embedding import embed_images, embed_texts
from fastvlp.eval.encoding import WHOLE_IMAGES, LoadedModel, MaskedEncoding, RunFolder, open_towers
from fastvlp.eval.evaluation import Evaluation, evaluation
from fastvlp.eval.labelled_images import open_labelled_images
from fastvlp.eval.ranks import ROUNDING
from fastvlp.model.joint_space import unit


@evaluation
def evaluate_zeroshot(
    run: RunFolder,
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

    Each class name is put into the templates and embedded. An image gets the class with the nearest embedding. The result is
    also added to a file in the folder of the run.

    Args:
        run: Folder of the run.
        data: Folder of shards, or folder with a sub-folder of pictures for each class, or folder with one of these for each
            split.
        split: Sub-folder of `data` to use, if there is one of this name.
        classes: A .txt file with a class in each line, a .json file {label: name or list of names}, or a public data set:
            imagenet, imagenet-v2, imagenet-a, imagenet-r, imagenet-sketch, objectnet. By default the labels are the names.
        templates: Sentences around a class name: simple (only the name), flip7, openai80, zh7, or a file with a template in
            each line and {} in the place of the name.
        label: Field of the records with the class. For folders of pictures the class is the name of the folder.
        encoding: Options of encoding images and texts.

    Raises:
        UserError: A record cannot be used; an evaluation leaves none out.
    """
    sentences = read_templates(templates)
    records, names_of, label_I, left_out = open_labelled_images(str(data), split, classes, label)
    loaded, saved, _ = open_towers(run, encoding)
    image_IE = embed_images(loaded, records)
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
            "images": len(records),
            "classes": len(names_of),
            "classes_like_another": count_equal_names(loaded, names_of),
            "templates": len(sentences),
            **({"images_of_other_classes": left_out} if left_out else {}),
        },
        data=records.url,
        weights=saved.weights.name,
        step=saved.info.get("step"),
        details={"by_class": {name: share for name, share in zip(names_of, by_class) if not math.isnan(share)}},
    )


def count_equal_names(loaded: LoadedModel, names_of: Mapping[str, Sequence[str]]) -> int:
    """Counts the classes with the same tokens as another class, which happens with words that the tokenizer does not know.
    The model cannot distinguish such classes."""
    ids_CL, _ = loaded.tokenizer.encode([", ".join(names) for names in names_of.values()], loaded.max_length)
    _, tokens_C, count = ids_CL.unique(dim=0, return_inverse=True, return_counts=True)
    return int((count[tokens_C] > 1).sum())


def class_vectors(text_TE: Tensor, class_of_text_T: Tensor, classes: int) -> Tensor:
    """The normalised mean of the unit vectors of each class's texts -> [C E]."""
    count_C = class_of_text_T.bincount(minlength=classes)
    total_CE = torch.zeros(classes, text_TE.shape[1], device=text_TE.device).index_add(0, class_of_text_T, text_TE)
    return unit(total_CE / count_C[:, None])
