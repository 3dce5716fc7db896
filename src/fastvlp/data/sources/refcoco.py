"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016, arXiv 1608.00272; Mao et al. 2016, arXiv 1511.02283) as published by
lichengunc/refer: `instances.json`, and `refs(NAME).json` with NAME the authors of a split; images are COCO's `train2014`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped
from fastvlp.data.sources.coco import instance
from fastvlp.data.sources.interface import AnnotationSource, Item, Match
from fastvlp.data.sources.source_files import each_row, expect_form, image_record, read_json
from fastvlp.errors import UserError

FORM = "the RefCOCO family"


@dataclass(frozen=True, kw_only=True)
class RefCOCOSource(AnnotationSource):
    """Expressions that each mean one object of an image."""

    name = "refcoco"
    summary = "a folder with instances.json and refs(*).json, or one refs(*).json beside instances.json"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        return [path] if path.is_file() else sorted((*path.glob("refs(*).json"), *path.glob("refs(*).p")))

    @classmethod
    def match(cls, path: Path) -> Match:
        return Match.NAMES if path.match("refs(*).*") and path.is_file() else super().match(path)

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record an image and split, keyed `{split}/{file}`: the objects that COCO marks in it, and the
        expressions."""
        file = self.expression_file(path)
        instances, refs = read_json(file.with_name("instances.json")), read_json(file)
        with expect_form(file.with_name("instances.json"), FORM):
            classes = {category["id"]: category["name"] for category in instances["categories"]}
            images = list(instances["images"])
            file_of: dict[Any, str] = {}
            objects: dict[Any, dict[Any, dict[str, Any]]] = defaultdict(dict)
            annotations = instances["annotations"]

        def add_image(image: dict[str, Any]) -> None:
            file_of[image["id"]] = str(image["file_name"])

        def add_object(item: dict[str, Any]) -> None:
            objects[item["image_id"]][item["id"]] = instance(item, classes)

        yield from each_row(images, "instances.json: image", add_image)
        yield from each_row(annotations, "instances.json: annotation", add_object)
        by_image: dict[tuple[str, Any], list[dict[str, Any]]] = defaultdict(list)

        def add_expressions(ref: dict[str, Any]) -> None:
            place = [*objects[ref["image_id"]]].index(ref["ann_id"])
            expressions = [
                {"text": sentence["sent"], "object": place, "ref_id": ref["ref_id"]} for sentence in ref["sentences"]
            ]
            by_image[ref["split"], ref["image_id"]] += expressions

        yield from each_row(refs, f"{file.name}: expression", add_expressions)
        for (split, image), expressions in by_image.items():
            if image not in file_of:
                yield Dropped(key=f"{split}/{image}", reason="image is not listed in instances.json")
                continue
            name = file_of[image]
            info = {"objects": [*objects[image].values()], "expressions": expressions, "split": split, "coco_id": image}
            yield image_record(f"{split}/{Path(name).stem}", info, self.image_folder(file.parent), name)

    def expression_file(self, path: Path) -> Path:
        """The file of expressions at `path`. Raises UserError if there are several, and where there is only a pickle, whose
        loading runs whatever is in it."""
        files = self.files(path)
        safe = [file for file in files if file.suffix == ".json"]
        if not safe:
            name = files[0].stem
            raise UserError(
                f"{files[0]}: this is a pickle, and loading it runs any code in it. If you trust its origin, convert it to "
                f'JSON: python -c "import pickle, json; '
                f"json.dump(pickle.load(open('{name}.p', 'rb')), open('{name}.json', 'w'))\""
            )
        if len(safe) > 1:
            names = ", ".join(file.name for file in safe)
            raise UserError(f"{path}: {names} split the same images in different ways; give the one to read")
        return safe[0]
