"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837) as published: `v2_OpenEnded_mscoco_NAME_questions.json`, for training and
validation `v2_mscoco_NAME_annotations.json` beside it, and COCO's images in `NAME/`. VQA v1's files have similar names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped
from fastvlp.data.answers import normalise_answer, soft_scores
from fastvlp.data.sources.coco import split_of
from fastvlp.data.sources.interface import AnnotationSource, Item
from fastvlp.data.sources.source_files import each_row, expect_form, image_record, read_json

FORM = "VQA's questions and annotations"


@dataclass(frozen=True, kw_only=True)
class VQASource(AnnotationSource):
    """Questions about COCO's images, with people's answers."""

    name = "vqa"
    summary = "a folder with VQA's *_OpenEnded_*_questions.json, and *_annotations.json beside them"

    @classmethod
    def files(cls, path: Path) -> Sequence[Path]:
        return list(question_files(path).values())

    def records(self, path: Path) -> Iterator[Item]:
        """Yields one record an image, with all its questions; those of a test set have no answers. An answer's score is its
        accuracy by the official rule, which is 0.3 for each of ten people who gave it, 1 at most."""
        for name, file in question_files(path).items():
            content = read_json(file)
            answers, dropped = scored_answers(file)
            yield from dropped
            by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)

            def add(item: dict[str, Any], answers: Any = answers, by_image: Any = by_image) -> None:
                number = item["question_id"]
                question = {
                    "question": item["question"],
                    "answers": {},
                    **answers.get(number, {}),
                    "question_id": number,
                }
                image = item["image_id"]
                if isinstance(image, float) and image != int(image):
                    raise ValueError(f"image_id {image} is no whole number")
                by_image[int(image)].append(question)

            with expect_form(file, FORM):
                questions = content["questions"]
            yield from each_row(questions, f"{file.name}: question", add)
            folder = re.sub("-dev", "", name)  # the images of test-dev2015 are some of test2015's
            for image, questions in by_image.items():
                stem = f"COCO_{folder}_{image:012d}"
                info = {"questions": questions, "split": split_of(name), "coco_id": image}
                yield image_record(f"{name}/{stem}", info, self.image_folder(path), f"{folder}/{stem}.jpg")


def question_files(path: Path) -> dict[str, Path]:
    """{NAME, as `train2014`: file of its questions}; v2's where v1's are there too."""
    files = {}
    for file in sorted(path.glob("*OpenEnded_*_questions.json")):
        files[file.stem.removesuffix("_questions").rpartition("_")[2]] = file
    return files


def scored_answers(questions: Path) -> tuple[dict[int, dict[str, Any]], list[Dropped]]:
    """{question_id: its scored answers and kind}, from the annotations beside a file of questions, and those of another
    form."""
    file = questions.with_name(questions.name.replace("OpenEnded_", "").replace("_questions.", "_annotations."))
    if not file.is_file():
        return {}, []
    content = read_json(file)
    with expect_form(file, FORM):
        annotations = content["annotations"]
    scored: dict[int, dict[str, Any]] = {}

    def add(item: dict[str, Any]) -> None:
        answers = soft_scores([normalise_answer(answer["answer"]) for answer in item["answers"]])
        scored[item["question_id"]] = {"answers": answers, "kind": item["answer_type"]}

    return scored, list(each_row(annotations, f"{file.name}: annotation", add))
