"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837) as published: `v2_OpenEnded_mscoco_NAME_questions.json`, for training and
validation `v2_mscoco_NAME_annotations.json` beside it, and COCO's images in `NAME/`. VQA v1 is named alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.batch import Dropped, Record
from fastvlp.data.answers import normalise_answer, soft_scores
from fastvlp.data.sources.coco import split_of
from fastvlp.data.sources.paths import Images, in_form, pictured, read_json

FORM = "VQA's questions and annotations"


def files(path: Path) -> dict[str, Path]:
    """{set, as `train2014`: file of its questions}; v2's where both are there."""
    found = {}
    for file in sorted(path.glob("*OpenEnded_*_questions.json")):
        found[file.stem.removesuffix("_questions").rpartition("_")[2]] = file
    return found


def read(path: Path, images: Images | None = None) -> Iterator[Record | Dropped]:
    """Yields one record an image, with all its questions; those of a test set have no answers. An answer's score is its
    accuracy by the official rule, which is 0.3 for each of ten people who gave it, 1 at most."""
    for name, file in files(path).items():
        asked, scored = read_json(file), _annotations(file)
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        with in_form(file, FORM):
            for item in asked["questions"]:
                number = item["question_id"]
                told = {"question": item["question"], "answers": {}, **scored.get(number, {}), "question_id": number}
                by_image[int(item["image_id"])].append(told)
        folder = re.sub("-dev", "", name)  # test-dev2015 asks of some images of test2015
        for image, questions in by_image.items():
            stem = f"COCO_{folder}_{image:012d}"
            info = {"questions": questions, "split": split_of(name), "coco_id": image}
            yield pictured(f"{name}/{stem}", info, images or path, f"{folder}/{stem}.jpg")


def _annotations(questions: Path) -> dict[int, dict[str, Any]]:
    """{question_id: its scored answers and kind}."""
    file = questions.with_name(questions.name.replace("OpenEnded_", "").replace("_questions.", "_annotations."))
    if not file.is_file():
        return {}
    told = read_json(file)
    with in_form(file, FORM):
        return {
            item["question_id"]: {
                "answers": soft_scores([normalise_answer(one["answer"]) for one in item["answers"]]),
                "kind": item["answer_type"],
            }
            for item in told["annotations"]
        }
