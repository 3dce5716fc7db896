"""Short fine-tunings before a score: the same number of steps for every arm, on a copy, so that its training goes on
unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.comparison.scored_data import caption_data, question_data, spread_evenly, validation_pairs
from fastvlp.comparison.scoring_options import ScoringOptions
from fastvlp.data.blind import AnsweredQuestion, BlindScore, answered_questions, blind_score
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import Data, Rows
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import VLModel
from fastvlp.objectives.objective import Objective, ObjectiveConfig
from fastvlp.objectives.saved_objectives import common_bos
from fastvlp.random import hash64
from fastvlp.tasks import caption
from fastvlp.tasks.caption import CaptionConfig
from fastvlp.tasks.items import Item, ItemMaker
from fastvlp.tasks.vqa import VQAConfig, VQAData
from fastvlp.training.division import Division
from fastvlp.training.loop import steps
from fastvlp.training.optim import OptimConfig, build_optimiser
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.state import TrainState, autocast


class Questions(NamedTuple):
    """Questions of one data set in the tokens of an arm: those to train on, those that are scored, and how many of these their
    text alone answers."""

    data: VQAData
    train: ItemMaker
    held_out: ItemMaker
    blind: BlindScore | None = None


class Tuned(NamedTuple):
    """A fine-tuned copy of an arm, and the head that it was tuned with."""

    model: VLModel
    objective: Any


def questions_of_items(items: Iterable[Item]) -> list[AnsweredQuestion]:
    """The texts of the items that can be used, with their answers."""
    return list(answered_questions([item.entry for item in items if item.text]))


@dataclass(kw_only=True)
class ShortFinetuning:
    """Fine-tunes copies of the arms.

    Attributes:
        answering: the last copy of each arm that was tuned for questions, for the report.
        captioning: the same, tuned for captions.
    """

    options: ScoringOptions
    answering: dict[str, Tuned] = field(default_factory=dict)
    captioning: dict[str, Tuned] = field(default_factory=dict)
    _questions: dict[Any, Questions | None] = field(default_factory=dict)

    def questions(self, state: TrainState) -> Questions | None:
        """The questions for an arm; None if there are none. Arms with the same data, tokenizer and images share them."""
        key = (state.run.data, state.run.tokenizer, state.run.text, state.model.config.image)
        if key not in self._questions:
            self._questions[key] = self._read_questions(state)
        return self._questions[key]

    def _read_questions(self, state: TrainState) -> Questions | None:
        data = question_data(state.run.data, self.options)
        if data is None:
            return None
        size = state.model.config.image.size
        train = data.items("train", state.tokenizer, size, strict=False)
        held_out = data.evaluation_items(self.options.split, state.tokenizer, size)
        assert train is not None
        held_out.items = spread_evenly(held_out.items, self.options.probe_items)
        blind = blind_score(questions_of_items(train.items), questions_of_items(held_out.items))
        return Questions(data, train, held_out, blind)

    def tune_for_questions(self, state: TrainState, questions: Questions) -> Tuned:
        """A copy of the arm that was tuned to answer questions, reading as in its pretraining."""
        trained = list(cast(Mapping[str, Objective], state.pretraining.objectives).values())
        config = VQAConfig(reading=trained[0].reading, bos=common_bos(trained), answers=len(questions.data.answers))
        rows = Rows(len(questions.train.items), questions.train)
        self.answering[state.run.name] = tuned = self.tune(state, config, questions.data, rows)
        return tuned

    def captions(self, state: TrainState, count: int) -> list[str]:
        """Greedy captions of the first `count` validation pictures by a copy of the arm that was tuned to caption; tuned,
        because a model pretrained by MLM cannot write."""
        self.captioning.pop(state.run.name, None)
        return self._written(state, self._captioning(state).model, count)

    def _captioning(self, state: TrainState) -> Tuned:
        """The copy that was tuned to caption; it is tuned now where another process measured the last score."""
        if state.run.name not in self.captioning:
            data = caption_data(state.run)
            rows = data.rows("train", state.tokenizer, state.model.config.image.size, strict=False)
            assert rows is not None
            self.captioning[state.run.name] = self.tune(state, CaptionConfig(), data, rows)
        return self.captioning[state.run.name]

    def sample_captions(self, state: TrainState, count: int) -> list[str]:
        """Greedy captions: by the copy that was tuned for CIDEr, where that is measured, else by the arm as it is; none of an
        arm that cannot write."""
        if self.options.caption_items > 0 and self.options.measures("cider"):
            return self._written(state, self._captioning(state).model, count)
        trained = cast(Mapping[str, Objective], state.pretraining.objectives).values()
        # At an <s> that saw the whole text in training there is no text yet.
        writes = any("write" in part.abilities and part.bos == "blind" for part in trained)
        return self._written(state, state.evaluated.model, count) if writes else []

    def _written(self, state: TrainState, model: VLModel, count: int) -> list[str]:
        captions: list[str] = []
        for batch in validation_pairs(state, self.options, count):
            with evaluating(model), autocast(state):
                captions += caption.caption(model, state.tokenizer, batch.image.to(state.device))
        return captions

    def answers(self, state: TrainState, questions: list[str], image: Tensor) -> list[str]:
        """The arm's answers to questions about one image, uint8 [3 H W], by the copy that was tuned to answer; it is tuned now
        where another process measured the last score. Empty where none is tuned."""
        own = self.questions(state)
        if own is None or not questions or not self.options.measures("vqa"):
            return [""] * len(questions)
        tuned = self.answering.get(state.run.name) or self.tune_for_questions(state, own)
        ids, length = state.tokenizer.encode(questions, own.data.max_length)
        images = image.expand(len(questions), -1, -1, -1)
        batch = Batch(image=images, ids=ids, length=length, seed=torch.zeros_like(length)).to(state.device)
        with evaluating(tuned.model, tuned.objective), autocast(state):
            logits = tuned.objective.logits(tuned.model, tuned.model.encode_image(batch.image), batch)
        return [own.data.answers[i] for i in logits.argmax(1).tolist()]

    def tune(self, state: TrainState, config: ObjectiveConfig, data: Data, rows: Rows) -> Tuned:
        """A copy of the arm's weights after `probe_steps` steps on a task. All parts but the new head have one learning
        rate, whatever the pretraining had. The state is not changed."""
        model = deepcopy(state.evaluated.model)
        torch.manual_seed(hash64(state.run.seed, 1))
        pretraining = Pretraining(model, {"task": config.build(model.config, state.tokenizer)}).to(state.device)
        run = replace(
            state.run,
            name=f"{state.run.name} probe",
            data=data,
            objectives={"task": config},
            optim=OptimConfig(lr=self.options.probe_lr, cross_multiplier=1, head_multiplier=5, warmup=0.1),
            steps=self.options.probe_steps,
            budget_s=None,
            accumulate=1,
            keep=1.0,
            ema=None,
            compile=False,
        )
        tuning = TrainState(
            run=run,
            device=state.device,
            tokenizer=state.tokenizer,
            model=model,
            pretraining=pretraining,
            wrapped=pretraining,
            optimiser=build_optimiser(pretraining, run.optim),
            ema=None,
            train=Loader(rows.count, rows.make, batch_size=self.options.probe_batch, seed=state.run.seed),
            val=None,
            division=Division(1, 1),
        )
        for _ in steps(tuning):
            pass
        return Tuned(model, pretraining.objectives["task"])
