"""Captioning from the forward stream: the paper's intent; the released loss reads the reconstructor, which sees the
answer (spec flm.md B4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData, Split
from fastvlp.data.reader import refusal
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError, Shards
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.caption_metrics import bleu, caption_words, cider, rouge_l
from fastvlp.eval.mode import evaluating
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.ar import next_token_loss
from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig
from fastvlp.tasks.generation import beam_search, greedy


@dataclass(frozen=True, kw_only=True)
class CaptionData(PairData):
    """The pairs of pretraining; every caption of a record is a reference."""

    def references(self, split: Split) -> list[list[str]]:
        """The captions of each record. Raises UserError where there is no such split or a record has none."""
        folder = {"train": self.train, "val": self.val, "test": self.test}[split]
        if folder is None:
            raise UserError(f"the data has no {split!r} split; choose another --split, or --data FOLDER that has it")
        shards = Shards(folder)
        found = []
        for i in range(len(shards)):
            try:
                found.append(usable_captions(shards.info(i), self.captions))
            except RecordError as error:
                raise refusal(shards, [error.dropped]) from error
            if not found[-1]:
                raise UserError(f"{folder}: {shards.key(i)} has no caption in {self.captions!r}; remove the record")
        return found


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(ObjectiveConfig):
    """Nothing to choose: every token from the image and those before it, the first from the image alone."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Caption:
        return Caption()


class Caption(Objective):
    reading = "causal"
    bos = "blind"
    abilities = frozenset({"write"})

    def _asked(self, batch: Batch) -> Tensor:
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        return position < batch.length[:, None] - 1

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"next": self._asked(batch).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        state = model.read(image_BKD, batch.ids, causal=True)
        return {"next": next_token_loss(model, state, batch, self._asked(batch))}


def caption(
    model: VLModel,
    tokenizer: Tokenizer,
    image: Tensor,
    *,
    beams: int = 1,
    most: int = 30,
    length_penalty: float = 0.0,
) -> list[str]:
    """Captions of uint8 images [B 3 H W] on the model's device, greedy for one beam."""
    with evaluating(model):
        image_BKD = model.encode_image(image)
        if beams == 1:
            ids = greedy(model, image_BKD, most)
        else:
            ids, _ = beam_search(model, image_BKD, beams, most, length_penalty)
    return [tokenizer.decode(row) for row in ids.tolist()]


def scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to 4 and ROUGE-L in 0..1, CIDEr-D in 0..10."""
    said = [caption_words(text) for text in candidates]
    known = [[caption_words(text) for text in texts] for texts in references]
    named = {f"bleu{n}": score for n, score in enumerate(bleu(said, known), 1)}
    return {"cider": cider(said, known), **named, "rouge_l": rouge_l(said, known), "count": float(len(said))}


def evaluate(
    model: VLModel,
    data: CaptionData,
    split: Split,
    tokenizer: Tokenizer,
    *,
    beams: int = 1,
    most: int = 30,
    length_penalty: float = 0.0,
) -> tuple[dict[str, float], list[str]]:
    """Scores of a split, and the captions in its order; refuses a split with an unreadable record."""
    references = data.references(split)
    rows = data.rows(split, tokenizer, model.config.image.size, strict=True)
    assert rows is not None
    device = next(model.parameters()).device
    said: list[str] = []
    for batch, _ in Loader(rows.count, rows.make, batch_size=data.batch_size, seed=0).once():
        images = batch.image.to(device)
        said += caption(model, tokenizer, images, beams=beams, most=most, length_penalty=length_penalty)
    return scores(said, references), said
