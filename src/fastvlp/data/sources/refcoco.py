"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016, arXiv 1608.00272; Mao et al. 2016) as published by lichengunc/refer:
`instances.json` and, of the people who split it, `refs(unc).json`; images are COCO's `train2014`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.sources.coco import instance
from fastvlp.data.sources.paths import Images, in_form, pictured, read_json
from fastvlp.errors import UserError

FORM = "the RefCOCO family"


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted((*path.glob("refs(*).json"), *path.glob("refs(*).p")))


def refs(path: Path) -> Path:
    """The file of expressions, which may be named itself. UserError where there are several, and where there is but a
    pickle, whose loading runs whatever is in it."""
    safe = [file for file in files(path) if file.suffix == ".json"]
    if not safe:
        pickled = files(path)[0]
        name = pickled.stem
        raise UserError(
            f"{pickled}: a pickle, whose loading runs whatever is in it. If you trust where it is from, make JSON of it: "
            f"python -c \"import pickle, json; json.dump(pickle.load(open('{name}.p', 'rb')), open('{name}.json', 'w'))\""
        )
    if len(safe) > 1:
        names = ", ".join(file.name for file in safe)
        raise UserError(f"{path}: {names} split the same images in other ways; name the one to read")
    return safe[0]


def read(path: Path, images: Images | None = None) -> Iterator[Record | Dropped]:
    """Yields one record an image and split, keyed `{split}/{file}`: the objects that COCO marks in it, and expressions that
    each mean one of them."""
    file = refs(path)
    told, spoken = read_json(file.with_name("instances.json")), read_json(file)
    with in_form(file.with_name("instances.json"), FORM):
        classes = {category["id"]: category["name"] for category in told["categories"]}
        file_of = {image["id"]: image["file_name"] for image in told["images"]}
        objects: dict[Any, dict[Any, dict[str, Any]]] = defaultdict(dict)
        for item in told["annotations"]:
            objects[item["image_id"]][item["id"]] = instance(item, classes)
    meant: dict[tuple[str, Any], list[dict[str, Any]]] = defaultdict(list)
    with in_form(file, FORM):
        for ref in spoken:
            place = [*objects[ref["image_id"]]].index(ref["ann_id"])
            meant[ref["split"], ref["image_id"]] += [
                {"text": sentence["sent"], "object": place, "ref_id": ref["ref_id"]} for sentence in ref["sentences"]
            ]
    for (split, image), expressions in meant.items():
        name = file_of[image]
        info = {"objects": [*objects[image].values()], "expressions": expressions, "split": split, "coco_id": image}
        yield pictured(f"{split}/{Path(name).stem}", info, images or file.parent, name)
