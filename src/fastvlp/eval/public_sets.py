"""Public sets for zero-shot classification, by name: how their folders are called, and which classes they have.

ImageNet and the sets that measure how robust an ImageNet classifier is. The names are CLIP's for ImageNet's 1000 classes;
ObjectNet's are its own, as it was scored by CLIP (arXiv 2103.00020, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastvlp.data.sources.source_files import read_json
from fastvlp.errors import UserError
from fastvlp.eval.class_files import PROMPTS

Names = Mapping[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A public set of images in a folder for each class.

    Attributes:
        names_of: names of the classes, by the name of their folder; called with the folder of the data.
        border: pixels that are cut off at each edge.
        has_others: whether it has images of further classes, which are left out.
    """

    names_of: Callable[[Path], Names]
    border: int = 0
    has_others: bool = False


@lru_cache
def imagenet_classes() -> tuple[tuple[str, str, str], ...]:
    """The 1000 classes of ImageNet's challenge in their order: WordNet id, letters of the sets of 200 classes that have it
    (a: ImageNet-A, r: ImageNet-R), and CLIP's name."""
    lines = (PROMPTS / "imagenet.tsv").read_text(encoding="utf-8").splitlines()
    return tuple((wnid, sets, name) for wnid, sets, name in (line.split("\t") for line in lines))


def by_wordnet_id(data: Path, subset: str = "") -> Names:
    """Folders such as n01440764; those classes of `subset` alone."""
    return {wnid: [name] for wnid, sets, name in imagenet_classes() if subset in sets}


def by_number(data: Path) -> Names:
    """Folders 0 to 999: numbers of the classes in the order of their WordNet ids, not in the order of the folders' names, in
    which 10 comes before 2."""
    return {str(number): [name] for number, (_, _, name) in enumerate(imagenet_classes())}


def of_objectnet(data: Path) -> Names:
    """ObjectNet's classes that ImageNet has too, by the files in its own folder `mappings`.

    Raises UserError if these are neither in the folder of the data nor beside it.
    """
    for place in (data / "mappings", data.parent / "mappings"):
        files = [place / name for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")]
        if all(file.is_file() for file in files):
            break
    else:
        raise UserError(
            f"{data}: ObjectNet's folder mappings, which lists the classes that ImageNet has too, is neither here nor beside "
            f"it; copy mappings/ of objectnet-1.0 here"
        )
    label_of, shared = (read_json(file) for file in files)
    texts = (
        isinstance(label_of, dict) and isinstance(shared, dict) and all(isinstance(x, str) for x in label_of.values())
    )
    names = {folder: [label.lower()] for folder, label in label_of.items() if label in shared} if texts else {}
    if not names:
        raise UserError(
            f"{place}: not ObjectNet's {{folder: label}} and {{label: ImageNet's classes}}; copy them again"
        )
    return names


PUBLIC_SETS: Mapping[str, PublicSet] = {
    "imagenet": PublicSet(names_of=by_wordnet_id),
    # Recht et al. 2019, arXiv 1902.10811.
    "imagenet-v2": PublicSet(names_of=by_number),
    # Hendrycks et al. 2021, arXiv 1907.07174.
    "imagenet-a": PublicSet(names_of=lambda data: by_wordnet_id(data, "a")),
    # Hendrycks et al. 2021, arXiv 2006.16241.
    "imagenet-r": PublicSet(names_of=lambda data: by_wordnet_id(data, "r")),
    # Wang et al. 2019, arXiv 1905.13549.
    "imagenet-sketch": PublicSet(names_of=by_wordnet_id),
    # Barbu et al. 2019. A red border of two pixels marks each image as one that must not be trained on.
    "objectnet": PublicSet(names_of=of_objectnet, border=2, has_others=True),
}
