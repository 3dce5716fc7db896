"""What the arms of a comparison are measured with: the same for all, on copies, so that training goes on undisturbed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.comparison.options import Settings
from fastvlp.comparison.results import Answered, Sample
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import Data, PairData, Split, readable_infos
from fastvlp.data.records.schema import answers_fault
from fastvlp.data.records.shards import Shards
from fastvlp.data.splits import find_splits
from fastvlp.errors import UserError
from fastvlp.eval.cloze import cloze
from fastvlp.eval.embedding import embed_split
from fastvlp.eval.encoding import LoadedModel
from fastvlp.eval.mode import evaluating
from fastvlp.eval.ranks import retrieval_scores
from fastvlp.eval.split_reading import read_captions
from fastvlp.objectives.objective import ClozeMethod, Objective, ObjectiveConfig
from fastvlp.objectives.saved_objectives import common_bos
from fastvlp.random import hash64
from fastvlp.tasks import caption, vqa
from fastvlp.tasks.caption import CaptionConfig, CaptionData
from fastvlp.tasks.items import Item, ItemMaker
from fastvlp.tasks.vqa import VQA, VQAConfig, VQAData, frequent_answers
from fastvlp.training.loop import TrainConfig, TrainState, autocast, steps
from fastvlp.training.optim import OptimConfig, adamw
from fastvlp.training.pretraining import Pretraining

# The side in pixels up to which a picture goes into the report as it is: JPEG would smear it.
DRAWING = 64


def objectives_of(state: TrainState) -> list[Objective]:
    return [cast(Objective, objective) for objective in state.pretraining.objectives.values()]


def own_cloze_method(state: TrainState) -> ClozeMethod | None:
    """How the arm predicts single words: as its first objective that learns to. None where none does."""
    return next((method for objective in objectives_of(state) if (method := objective.cloze_method) is not None), None)


def fine_tuned(
    state: TrainState, told: ObjectiveConfig, data: Data, rows: int, make: Any, settings: Settings
) -> Pretraining:
    """A copy of the arm's weights after `probe_steps` on a task; one rate for all parts but the fresh head's, whatever
    the pretraining was. The state itself is not changed."""
    model = deepcopy(state.evaluated.model)
    torch.manual_seed(hash64(state.run.seed, 1))
    made = Pretraining(model, {"task": told.build(model.config, state.tokenizer)}).to(state.device)
    run = replace(
        state.run,
        name=f"{state.run.name} probe",
        data=data,
        objectives={"task": told},
        optim=OptimConfig(lr=settings.probe_lr, cross_multiplier=1, head_multiplier=5, warmup=0.1),
        steps=settings.probe_steps,
        budget_s=None,
        accumulate=1,
        keep=1.0,
        ema=None,
        compile=False,
    )
    probe = TrainState(
        run=run,
        device=state.device,
        tokenizer=state.tokenizer,
        model=model,
        pretraining=made,
        wrapped=made,
        optimiser=adamw(made, run.optim),
        ema=None,
        train=Loader(rows, make, batch_size=settings.probe_batch, seed=state.run.seed),
        val=None,
    )
    for _ in steps(probe):
        pass
    return made


@dataclass(kw_only=True)
class Questions:
    """Questions of one data set in one tokenizer: what is trained on, and what is scored."""

    data: VQAData
    train: ItemMaker
    held_out: ItemMaker


@dataclass(kw_only=True)
class Yardsticks:
    """Scores arms. `answering`: each arm's last model that was fine-tuned on questions, kept for the report."""

    settings: Settings
    answering: dict[str, Pretraining] = field(default_factory=dict)
    questions: dict[Any, Questions | None] = field(default_factory=dict)

    def score(self, state: TrainState) -> dict[str, float]:
        scores: dict[str, float] = {}
        method = own_cloze_method(state)
        if method is not None:
            with autocast(state):
                pairs = self.pairs(state, self.settings.cloze_items)
                scores["cloze"] = cloze(state.evaluated.model, method, pairs).accuracy
        if state.model.config.embed is not None:
            scores |= self.retrieval(state)
        if state.model.config.fusion is None:
            return scores
        if (asked := self.asked(state)) is not None:
            scores["vqa"] = self.vqa(state, asked)
        if self.settings.caption_items:
            said = self.captions(state, self.settings.caption_items)
            references = self.references(state)[: self.settings.caption_items]
            scores["cider"] = caption.scores(said, references)["cider"]
        return scores

    def pairs(self, state: TrainState, count: int) -> Iterator[Batch]:
        """The first `count` validation pairs."""
        rows = state.run.data.rows(self.settings.split, state.tokenizer, state.model.config.image.size, strict=True)
        if rows is None:
            raise UserError(f"{state.run.name}: the data has no {self.settings.split!r} split to score the arms on")
        size = self.settings.probe_batch
        for batch, _ in Loader(min(rows.count, count), rows.make, batch_size=size, seed=0).once():
            yield batch

    def retrieval(self, state: TrainState) -> dict[str, float]:
        """Recall of the towers among all pictures of the split and all captions of each."""
        data = state.run.data
        shards = Shards(split_folder(data, self.settings.split))
        loaded = LoadedModel(
            model=state.evaluated.model,
            tokenizer=state.tokenizer,
            batch_size=self.settings.probe_batch,
            max_length=data.max_length,
            fit=data.fit,
            regions=data.regions if isinstance(data, PairData) else None,
            precision=state.run.precision,
        )
        field = data.captions if isinstance(data, PairData) else "captions"
        scores = retrieval_scores(*embed_split(loaded, shards, read_captions(shards, field)))
        return {name: scores[name] for name in ("recall", "image_to_text/r1", "text_to_image/r1")}

    def vqa(self, state: TrainState, asked: Questions) -> float:
        trained = objectives_of(state)
        told = VQAConfig(reading=trained[0].reading, bos=common_bos(trained), answers=len(asked.data.answers))
        made = fine_tuned(state, told, asked.data, len(asked.train.items), asked.train, self.settings)
        self.answering[state.run.name] = made
        objective = made.objectives["task"]
        assert isinstance(objective, VQA)
        with autocast(state):
            batch = 4 * self.settings.probe_batch
            return vqa.measure(made.model, objective, asked.data.answers, asked.held_out, batch)["accuracy"]

    def asked(self, state: TrainState) -> Questions | None:
        """None where there are no questions. Arms with the same data, tokenizer and image size share them."""
        key = (state.run.data, state.run.tokenizer, state.model.config.image)
        if key not in self.questions:
            self.questions[key] = self._questions(state)
        return self.questions[key]

    def _questions(self, state: TrainState) -> Questions | None:
        told = question_data(state.run.data, self.settings)
        if told is None:
            return None
        size = state.model.config.image.size
        train = told.items("train", state.tokenizer, size, strict=False)
        held_out = told.evaluation_items(self.settings.split, state.tokenizer, size)
        assert train is not None
        # Neighbouring questions are about one picture.
        held_out.items = spread_evenly(held_out.items, self.settings.probe_items)
        return Questions(data=told, train=train, held_out=held_out)

    def captions(self, state: TrainState, count: int) -> list[str]:
        """Greedy captions of the first validation pictures, every arm after the same fine-tuning: MLM has no decoder."""
        data = caption_data(state.run)
        rows = data.rows("train", state.tokenizer, state.model.config.image.size, strict=False)
        assert rows is not None
        made = fine_tuned(state, CaptionConfig(), data, rows.count, rows.make, self.settings)
        said: list[str] = []
        for batch in self.pairs(state, count):
            with autocast(state):
                said += caption.caption(made.model, state.tokenizer, batch.image.to(state.device))
        return said

    def references(self, state: TrainState) -> list[list[str]]:
        return caption_data(state.run).references(self.settings.split)

    def samples(self, states: Mapping[str, TrainState]) -> list[Sample]:
        """The first validation pictures with captions and answers. Pictures and texts are those of the first arm's data;
        arms with other data are left out, and two towers alone, which say nothing."""
        speaking = {arm: state for arm, state in states.items() if state.model.config.fusion is not None}
        if not speaking or not self.settings.pictures:
            return []
        first = next(iter(speaking.values()))
        alike = {arm: state for arm, state in speaking.items() if state.run.data == first.run.data}
        count = self.settings.pictures
        images = torch.cat([batch.image for batch in self.pairs(first, count)])
        said = {arm: self.captions(state, count) for arm, state in alike.items()}
        known = self.references(first)
        shards = Shards(split_folder(first.run.data, self.settings.split))
        return [
            Sample(
                key=shards.key(i),
                picture=data_url(images[i]),
                references=known[i],
                captions={arm: texts[i] for arm, texts in said.items()},
                questions=self.answers(alike, shards.info(i), images[i]),
            )
            for i in range(len(images))
        ]

    def answers(self, states: Mapping[str, TrainState], info: Mapping[str, Any], image: Tensor) -> list[Answered]:
        """Up to three questions of a picture, of different kinds, with every arm's answer."""
        asked = self.asked(next(iter(states.values())))
        if asked is None:
            return []
        kinds: dict[str, dict[str, Any]] = {}
        for told in info.get(asked.data.questions) or ():
            if not told.get("question") or not told.get("answers") or answers_fault(told["answers"]):
                continue
            kinds.setdefault(str(told.get("kind", len(kinds))), told)
        chosen = list(kinds.values())[:3]
        replies = {arm: self.answer(state, [t["question"] for t in chosen], image) for arm, state in states.items()}
        return [
            Answered(
                question=told["question"],
                right=max(told["answers"], key=told["answers"].get),
                answers={arm: texts[i] for arm, texts in replies.items()},
            )
            for i, told in enumerate(chosen)
        ]

    def answer(self, state: TrainState, texts: list[str], image: Tensor) -> list[str]:
        asked = self.asked(state)
        made = self.answering.get(state.run.name)
        if asked is None or made is None or not texts:
            return [""] * len(texts)
        ids, length = state.tokenizer.encode(texts, asked.data.max_length)
        images = image.expand(len(texts), -1, -1, -1)
        batch = Batch(image=images, ids=ids, length=length, seed=torch.zeros_like(length)).to(state.device)
        objective = made.objectives["task"]
        assert isinstance(objective, VQA)
        with evaluating(made), autocast(state):
            logits = objective.logits(made.model, made.model.encode_image(batch.image), batch)
        return [asked.data.answers[i] for i in logits.argmax(1).tolist()]


def spread_evenly(items: list[Item], count: int) -> list[Item]:
    """`count` items from the whole list, or all where there are no more."""
    n, k = len(items), min(len(items), count)
    return [items[i * n // k] for i in range(k)]


def split_folder(data: Data, split: Split) -> str:
    folder = getattr(data, split, None)
    if not isinstance(folder, str):
        raise UserError(f"the data has no {split!r} split; name its folder with --set data.{split}=FOLDER")
    return folder


def question_data(data: Data, settings: Settings) -> VQAData | None:
    """From --vqa, or from the recipe's own records where they hold questions; in the language of its captions."""
    name = "questions" + (data.captions.removeprefix("captions") if isinstance(data, PairData) else "")
    if settings.vqa is not None:
        folders = find_splits(settings.vqa)
        name = name if _holds(folders["train"], name) else "questions"
    elif isinstance(data, PairData) and getattr(data, settings.split) is not None:
        folders = {"train": data.train, settings.split: split_folder(data, settings.split)}
        if not _holds(data.train, name):
            return None
    else:
        return None
    shared = {"batch_size": settings.probe_batch} | {n: getattr(data, n) for n in ("max_length", "fit", "cache")}
    answers = frequent_answers(folders["train"], name)
    return VQAData(**shared, **cast(dict[str, Any], folders), questions=name, answers=answers)


def _holds(folder: str, field: str) -> bool:
    return any(info.get(field) for info in islice(readable_infos(Shards(folder)), 50))


def caption_data(run: TrainConfig) -> CaptionData:
    data = run.data
    if not isinstance(data, PairData):
        raise UserError(f"{run.name}: captions are compared on image-text pairs; set --caption-items 0 --pictures 0")
    names = ("batch_size", "workers", "cache", "max_length", "fit", "train", "val", "test", "captions")
    return CaptionData(**{name: getattr(data, name) for name in names})


def data_url(image: Tensor) -> str:
    """uint8 [3 H W] as a PNG, or as a JPEG where it is large."""
    drawing = image.shape[-1] <= DRAWING
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG" if drawing else "JPEG", quality=90)
    return f"data:image/{'png' if drawing else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
