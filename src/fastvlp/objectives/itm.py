"""Image-text matching with hard negatives from the batch (ALBEF, arXiv 2107.07651, section 3.2).

ALBEF finds its hard negatives with a contrastive loss. Here none is needed: the matching head itself scores a few other texts
of the batch, without gradients, and one is drawn with a probability in proportion to how well it matches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.layers import initialise
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.equal_pairs import EqualPairs, contents
from fastvlp.objectives.objective import MORE_ROWS, Loss, Objective, ObjectiveConfig, PairScorer, constant
from fastvlp.random import uniform

NEGATIVE_SALT, OFFSET_SALT = 501, 502


@dataclass(frozen=True, kw_only=True)
class ITMConfig(ObjectiveConfig):
    """Decide whether a text belongs to an image. Each image is read with its own text and with the text of another pair."""

    candidates: int = 4
    """Number of other texts of the batch that are scored for each image, to draw a hard negative; 1 takes a random negative at
    no extra cost."""
    equal_pairs: EqualPairs = "ignored"
    """Pairs with the same text or the same image: negatives uses them as negatives of each other, ignored does not."""

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"`candidates` must be at least 1, not {self.candidates}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> ITM:
        return ITM(self, model)


class ITM(Objective):
    abilities = frozenset({"match"})
    contrasts = True

    def __init__(self, config: ITMConfig, model: ModelConfig):
        super().__init__()
        width = model.text.width
        self.config = config
        self.pool = nn.Linear(width, width)
        self.match = nn.Linear(width, 2)
        initialise(self, width)

    @property
    def pair_scorer(self) -> PairScorer:
        return lambda *pairs: self.scores(*pairs).float().diff(dim=1)[:, 0]

    @property
    def matching_head(self) -> tuple[nn.Linear, nn.Linear]:
        return self.pool, self.match

    def scores(self, model: VLModel, image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor) -> Tensor:
        """Logits (no match, match) of each row: [B 2]."""
        state = model.read(image_BKD, ids_BL, mask=masks.full(length_B, ids_BL.shape[1]))
        return self.match(torch.tanh(self.pool(state[:, 0])))

    def candidates(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The rows of the other texts that each image may get [B C], and which of them do belong to it too: bool [B C]."""
        B = len(batch)
        row = torch.arange(B, device=batch.ids.device)
        order = uniform(batch.seed, (B - 1,), OFFSET_SALT).argsort(1)[:, : min(self.config.candidates, B - 1)]
        other = (row[:, None] + 1 + order) % B
        if self.config.equal_pairs == "negatives":
            return other, torch.zeros_like(other, dtype=torch.bool)
        content = contents(batch)
        return other, (content[other] == content[:, None]).any(-1)

    @torch.no_grad()
    def negatives(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        """The row of another pair's text for each image: [B]. It is one that does not belong to the image, unless all
        candidates do."""
        other, equal = self.candidates(batch)
        B, candidates = other.shape
        score = torch.zeros(B, candidates, device=other.device)
        if candidates > 1:
            for k in range(candidates):
                logits = self.scores(model, image_BKD, batch.ids[other[:, k]], batch.length[other[:, k]]).float()
                score[:, k] = F.log_softmax(logits, -1)[:, 1]
        noise = uniform(batch.seed, (candidates,), NEGATIVE_SALT).clamp(1e-7, 1 - 1e-7)
        gumbel = -torch.log(-torch.log(noise))
        choice = (score + gumbel - 1e4 * equal).argmax(1)
        return other.gather(1, choice[:, None])[:, 0]

    def has_negative(self, batch: Batch) -> Tensor:
        """Whether any of a row's candidates does not belong to its image: bool [B]."""
        return ~self.candidates(batch)[1].all(1)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        right = constant(len(batch), batch.length)
        return {"match": right + self.has_negative(batch).sum() if len(batch) > 1 else 2 * right}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """The loss of each image with its own text and with a hard negative, where the batch has one.

        A batch of one row has no negative: that is an error in training; in validation, whose last batch may be that short, it
        counts as no row.
        """
        B = len(batch)
        if B < 2 and not self.training:
            return {"match": Loss(image_BKD.new_zeros(()), batch.length.new_zeros(()))}
        if B < 2:
            raise UserError(
                f"image-text matching takes its negatives from the batch, and this one has a single readable pair; "
                f"{MORE_ROWS}"
            )
        other = self.negatives(model, image_BKD, batch)
        ids = torch.stack([batch.ids, batch.ids[other]], 1).flatten(0, 1)
        length = torch.stack([batch.length, batch.length[other]], 1).flatten()
        logits = self.scores(model, image_BKD, ids, length).float()
        ignored = -100
        target = torch.stack([torch.ones_like(other), torch.where(self.has_negative(batch), 0, ignored)], 1).flatten()
        total = F.cross_entropy(logits, target, ignore_index=ignored, reduction="sum")
        return {"match": Loss(total, self.counts(batch)["match"])}
