"""Tasks of mteb made from local data, so that its own runner measures what `evaluate_retrieval` and `evaluate_zeroshot` do.

Every function here needs the package mteb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastvlp.data.records.interface import Records

# What mteb asks of every task, and is the same of ours.
COMMON: dict[str, Any] = {
    "dataset": {"path": "local", "revision": "local"},
    "modalities": ["text", "image"],
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
}


def image_rows(records: Records, further: Mapping[str, Sequence[Any]]) -> Any:
    """A table of the first image of each record, `image`, and further columns. Pictures are decoded when they are read."""
    from datasets import Dataset, Image

    images = [{"bytes": records.images(i)[0], "path": None} for i in range(len(records))]
    return Dataset.from_dict({**further, "image": images}).cast_column("image", Image())


def retrieval_tasks(records: Records, captions_of: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Two tasks on the images and all their captions, `text_to_image` and `image_to_text`.

    An image is found where it is the caption's own; a caption, where it is any of the image's own.
    """
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    image_of_text = [i for i, its in enumerate(captions_of) for _ in its]
    image_ids = [f"image-{i}" for i in range(len(records))]
    text_ids = [f"text-{t}" for t in range(len(image_of_text))]
    images = image_rows(records, {"id": image_ids})
    texts = Dataset.from_dict({"id": text_ids, "text": [text for its in captions_of for text in its]})
    own_image = {text: {image_ids[i]: 1} for text, i in zip(text_ids, image_of_text, strict=True)}
    own_texts: dict[str, dict[str, int]] = {image: {} for image in image_ids}
    for text, i in zip(text_ids, image_of_text, strict=True):
        own_texts[image_ids[i]][text] = 1

    def made(direction: str, category: Any, main: str, queries: Any, corpus: Any, relevant: Any) -> Any:
        class LocalRetrieval(AbsTaskRetrieval):
            metadata = TaskMetadata(
                name=f"Local{category.upper()}Retrieval",
                description=f"Retrieval of local data, {direction}.",
                type="Any2AnyRetrieval",
                category=category,
                main_score=main,
                **COMMON,
            )

            def load_data(self, *args: Any, **options: Any) -> None:
                part: Any = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
                self.dataset = {"default": {"test": part}}
                self.data_loaded = True

        return LocalRetrieval()

    return {
        "text_to_image": made("text_to_image", "t2i", "recall_at_1", texts, images, own_image),
        "image_to_text": made("image_to_text", "i2t", "hit_rate_at_1", images, texts, own_texts),
    }


def zeroshot_task(records: Records, labels: Sequence[int], class_texts: Sequence[str]) -> Any:
    """Zero-shot classification of the images.

    Args:
        records: the images.
        labels: index of each image's class.
        class_texts: the text of each class: mteb compares with a single one.
    """
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    table = image_rows(records, {"label": [*labels]})

    class LocalZeroShot(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            name="LocalZeroShot",
            description="Zero-shot classification of local data.",
            type="ZeroShotClassification",
            category="i2t",
            main_score="accuracy",
            **COMMON,
        )

        def load_data(self, *args: Any, **options: Any) -> None:
            self.dataset = {"test": table}
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return [*class_texts]

    return LocalZeroShot()
