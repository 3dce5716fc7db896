"""Captions, word by word from the forward stream, as FLM's paper (arXiv 2303.14038) intends. The loss of its released code
reads the reconstructor, which has seen the words that it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData, Split
from fastvlp.data.reader import refusal
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.caption_metrics import WORDS_NOTE, bleu, caption_words, cider, rouge_l
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import ModelConfig, Reading, VLModel
from fastvlp.objectives.ar import next_token_loss
from fastvlp.objectives.objective import Loss, Objective, ObjectiveConfig
from fastvlp.tasks.decoder import CAPTION_DECODER
from fastvlp.tasks.generation import beam_search, greedy
from fastvlp.tasks.interface import USUAL_OPTIM, FineTuned, Task
from fastvlp.tasks.item_data import split_shards
from fastvlp.tasks.pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class CaptionData(PairData):
    """Image-text pairs as in pretraining; every caption of a record is a reference."""

    def references(self, split: Split) -> list[list[str]]:
        """The captions of each record. Raises UserError if there is no such split or a record has none."""
        shards = split_shards(self, split)
        references = []
        for i in range(len(shards)):
            try:
                references.append(usable_captions(shards.info(i), self.captions))
            except RecordError as error:
                raise refusal(shards, [error.dropped]) from error
            if not references[-1]:
                raise UserError(f"{shards.url}: {shards.key(i)} has no caption in {self.captions!r}; remove the record")
        return references


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(ObjectiveConfig):
    """Every token is predicted from the image and the tokens before it. There is nothing to choose."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Caption:
        return Caption()


class Caption(Objective):
    """The loss of the next token."""

    reading = "causal"
    bos = "blind"
    abilities = frozenset({"write"})

    def _predicted(self, batch: Batch) -> Tensor:
        """Positions whose next token is predicted: bool [B L]."""
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        return position < batch.length[:, None] - 1

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"next": self._predicted(batch).sum()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        state = model.read(image_BKD, batch.ids, causal=True)
        return {"next": next_token_loss(model, state, batch, self._predicted(batch))}


def caption(
    model: VLModel,
    tokenizer: Tokenizer,
    image: Tensor,
    *,
    beams: int = 1,
    most: int = 30,
    length_penalty: float = 0.0,
) -> list[str]:
    """Writes captions of images, uint8 [B 3 H W] on the model's device.

    Args:
        beams: Captions that are kept at a time; 1 is greedy search.
        most: Most tokens of a caption.
        length_penalty: A caption's score is its log-probability / tokens**length_penalty.
    """
    with evaluating(model):
        image_BKD = model.encode_image(image)
        if beams == 1:
            ids = greedy(model, image_BKD, most)
        else:
            ids, _ = beam_search(model, image_BKD, beams, most, length_penalty)
    return [tokenizer.decode(row) for row in ids.tolist()]


def scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to 4 and ROUGE-L in 0..1, CIDEr-D in 0..10."""
    words = [caption_words(text) for text in candidates]
    right = [[caption_words(text) for text in texts] for texts in references]
    bleus = {f"bleu{n}": score for n, score in enumerate(bleu(words, right), 1)}
    return {"cider": cider(words, right), **bleus, "rouge_l": rouge_l(words, right), "count": float(len(words))}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Options of decoding captions."""

    beams: int = 1
    """Captions kept at a time; 1 is greedy."""
    most: int = 30
    """Most tokens of a caption."""
    length_penalty: float = 0.0
    """A caption's score is its log-probability / tokens**length_penalty."""

    def __post_init__(self) -> None:
        if self.beams < 1 or self.most < 1:
            raise UserError(f"`beams` {self.beams} and `most` {self.most} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CaptionTask(Task):
    """Write a caption of an image.

    The text is always read left to right, whatever `reading` says.
    """

    name = "caption"
    data = CaptionData
    config = CaptionConfig
    field = "captions"
    # Pretraining has already trained the vocabulary head, so it learns at the rate of the encoders.
    optim = replace(USUAL_OPTIM, head_multiplier=1)
    scoring = Decoding
    decoder = CAPTION_DECODER

    def objective(self, data: CaptionData, pretrained: Pretrained, reading: Reading | None) -> CaptionConfig:
        if pretrained.config.fusion is None:
            raise UserError(
                f"{pretrained.folder}: a single stream over words and regions reads a text in both directions, and a caption "
                f"is written left to right; choose a run with fusion layers (flm, mlm, ar, prefixlm) or two encoders (clip)"
            )
        return CaptionConfig()

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Decoding) -> dict[str, Any]:
        """The scores, and the captions in the order of the records."""
        model, data, decoding = tuned.saved.model, tuned.data, asdict(options)
        references, rows = data.references(split), tuned.rows(split)
        device = next(model.parameters()).device
        captions: list[str] = []
        for batch, _ in Loader(rows.count, rows.make, batch_size=data.batch_size, seed=0).once():
            captions += caption(model, tuned.saved.tokenizer, batch.image.to(device), **decoding)
        return scores(captions, references) | {"note": WORDS_NOTE, "decoding": decoding, "captions": captions}
