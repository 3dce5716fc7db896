"""Pictures for the report, with the captions and answers of each arm."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastvlp.comparison.results import AnsweredQuestion, Sample
from fastvlp.comparison.scored_data import reference_captions, split_folder, validation_pairs
from fastvlp.comparison.short_finetuning import ShortFinetuning
from fastvlp.data.records.schema import answers_fault
from fastvlp.data.records.shards import Shards
from fastvlp.training.state import TrainState

# Largest side in pixels of a picture that is shown without loss: JPEG would smear a drawing of few pixels.
DRAWING = 64
# Questions about one picture.
QUESTIONS = 3


def make_samples(states: Mapping[str, TrainState], finetuning: ShortFinetuning) -> list[Sample]:
    """The first pictures of the scored split, with captions and answers.

    Pictures and texts are those of the first arm that can write. Arms with other data are left out, and so are arms of two
    towers, which cannot write.
    """
    options = finetuning.options
    writing = {arm: state for arm, state in states.items() if state.model.config.fusion is not None}
    if not writing or not options.pictures:
        return []
    first = next(iter(writing.values()))
    same_data = {arm: state for arm, state in writing.items() if state.run.data == first.run.data}
    images = torch.cat([batch.image for batch in validation_pairs(first, options, options.pictures)])
    captions = {arm: finetuning.sample_captions(state, options.pictures) for arm, state in same_data.items()}
    references = reference_captions(first.run, options.split)
    shards = Shards(split_folder(first.run.data, options.split))
    return [
        Sample(
            key=shards.key(i),
            picture=data_url(images[i]),
            references=references[i],
            captions={arm: texts[i] for arm, texts in captions.items() if texts},
            questions=answer_questions(same_data, finetuning, shards.info(i), images[i]),
        )
        for i in range(len(images))
    ]


def merged(earlier: Sequence[Sample], later: Sequence[Sample]) -> list[Sample]:
    """Samples with the captions and answers of further arms, as far as these are of the same pictures."""
    if not earlier:
        return list(later)
    more = {sample.key: sample for sample in later}
    return [with_answers(sample, more[sample.key]) if sample.key in more else sample for sample in earlier]


def with_answers(sample: Sample, more: Sample) -> Sample:
    """A sample with the captions and answers that another one of the same picture has."""
    answers = {question.question: question.answers for question in more.questions}
    questions = [
        replace(question, answers=question.answers | answers.get(question.question, {}))
        for question in sample.questions
    ]
    return replace(sample, captions=sample.captions | more.captions, questions=questions)


def answer_questions(
    states: Mapping[str, TrainState], finetuning: ShortFinetuning, info: Mapping[str, Any], image: Tensor
) -> list[AnsweredQuestion]:
    """Up to three questions of a picture, of different kinds, with the answer of each arm."""
    questions = finetuning.questions(next(iter(states.values())))
    if questions is None:
        return []
    by_kind: dict[str, dict[str, Any]] = {}
    for entry in info.get(questions.data.questions) or ():
        if entry.get("question") and entry.get("answers") and not answers_fault(entry["answers"]):
            by_kind.setdefault(str(entry.get("kind", len(by_kind))), entry)
    entries = list(by_kind.values())[:QUESTIONS]
    texts = [entry["question"] for entry in entries]
    answers = {arm: finetuning.answers(state, texts, image) for arm, state in states.items()}
    return [
        AnsweredQuestion(
            question=entry["question"],
            right=max(entry["answers"], key=entry["answers"].get),
            answers={arm: own[i] for arm, own in answers.items()},
        )
        for i, entry in enumerate(entries)
    ]


def data_url(image: Tensor) -> str:
    """An image, uint8 [3 H W], as a data URL: PNG if it is a drawing of few pixels, else JPEG."""
    drawing = image.shape[-1] <= DRAWING
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG" if drawing else "JPEG", quality=90)
    return f"data:image/{'png' if drawing else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
