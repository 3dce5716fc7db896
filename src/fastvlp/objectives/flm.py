"""Free language modeling: each token is predicted from all tokens outside its corrupted span (FLM, arXiv 2303.14038).

The text is encoded once left to right and once right to left. The query of a token then reads the forward states left of its
span and the reverse states right of it. The next-token losses of the two streams are added (the paper's L_inter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.config import NotNegative
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model import masks
from fastvlp.model.directions import Streams
from fastvlp.model.model import Bos, ModelConfig, VLModel
from fastvlp.objectives.cloze_methods import likeliest, predict_causal
from fastvlp.objectives.losses import SAME_SHAPE, head_loss, places, rows_at
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig, constant
from fastvlp.random import uniform

SpanMode = Literal["token", "centred", "uniform"]
EXTRA_SALT, SIDE_SALT = 201, 202
# Queries of padding are left out if the other queries are at most this share of all. Above it, gathering costs more than it
# saves.
MOST_REAL = 7 / 8


@dataclass(frozen=True, kw_only=True)
class FLMConfig(ObjectiveConfig):
    """Predict each token from the image and all tokens outside its span. The defaults follow the paper; `official_flm` follows
    the released code where it differs."""

    span_mode: SpanMode = "token"
    """The tokens that are hidden when a token is predicted (its span): token hides only the token (the released recipe),
    centred also hides Binomial(M-1, p) neighbours around it (the released code), and uniform hides a span of the same length
    that is placed uniformly over the token, inside the text."""
    span_rate: float = 0.0
    """Average length of a span, as a share of the M predictable tokens; for centred and uniform."""
    forward_weight: NotNegative = 1.0
    """Weight of the forward stream's next-token loss; 0 leaves it out."""
    reverse_weight: NotNegative = 1.0
    """Weight of the reverse stream's loss; 0 leaves it out."""
    bos: Bos = "blind"
    """The tokens that <s> attends to. blind: no text, so that the first word is learned and every query has something to attend
    to. official: the whole text, while no other token attends to <s>."""
    end_query: Literal["mask", "official"] = "mask"
    """The query at the position of </s>. mask: the mask token, as for other tokens. official: </s> itself, which gives the
    answer away."""
    empty_rows: Literal["drop", "official"] = "drop"
    """Queries whose span covers all tokens that they could see: drop leaves them out of the loss; with official they see every
    token, including the one to predict."""
    pad_target: bool = False
    """Also predict </s> at the first padding position of the reverse stream, as the released code does."""

    def __post_init__(self) -> None:
        if not 0 <= self.span_rate <= 1:
            raise ValueError(f"`span_rate` is a share of the text, 0 to 1, not {self.span_rate}")
        if self.span_mode == "token" and self.span_rate:
            raise ValueError(
                "`span_mode` token hides one token, so `span_rate` must be 0; or choose centred or uniform"
            )

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> FLM:
        return FLM(self)


def official_flm(span_mode: SpanMode = "token", span_rate: float = 0.0) -> FLMConfig:
    """Returns the config of free language modeling as the released code computes it (TencentARC/FLM bd8b19d)."""
    return FLMConfig(
        span_mode=span_mode,
        span_rate=span_rate,
        bos="official",
        end_query="official",
        empty_rows="official",
        pad_target=True,
    )


def draw_spans(mode: SpanMode, rate: float, seed_B: Tensor, length_B: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Draws a half-open span [start, end) around each position -> two [B L] tensors. Position 0 (<s>) is not corrupted.

    A span has m ~ Binomial(M-1, p) further tokens with p = (M rate - 1)/(M - 1 + 1e-5), as in the released code. With
    `centred`, m//2 of them are on the left; if m is odd, the last one is on either side with equal chance. At the left edge of
    the text the span is shifted, and at the right edge it is cut.
    """
    position = torch.arange(L, device=seed_B.device).expand(len(seed_B), L)
    if mode == "token":
        return position, position + 1
    M = (length_B - 1)[:, None].float()
    p = ((M * rate - 1) / (M - 1 + 1e-5)).clamp(min=0)
    draw = uniform(seed_B, (L, L), EXTRA_SALT) < p[..., None]
    extra = (draw & (torch.arange(L, device=seed_B.device) < (M - 1)[..., None])).sum(-1)
    side = uniform(seed_B, (L,), SIDE_SALT)
    if mode == "centred":
        left = extra // 2 + ((extra % 2 == 1) & (side < 0.5))
        start = (position - left).clamp(min=0)
        return start, (start + extra + 1).clamp(max=L)
    lowest = (position - extra).clamp(min=1)
    highest = torch.minimum(position, (length_B[:, None] - 1 - extra).clamp(min=1))
    start = lowest + ((highest - lowest + 1) * side).long().clamp(max=(highest - lowest).clamp(min=0))
    return start, start + extra + 1


class FLM(Objective):
    reading = "flm"
    reads_mask = True
    abilities = frozenset({"write"})

    def __init__(self, config: FLMConfig):
        super().__init__()
        self.config = config
        self.bos = config.bos

    @property
    def cloze_method(self) -> ClozeMethod:
        return partial(predict_flm, bos=self.config.bos)

    @property
    def next_word_method(self) -> ClozeMethod:
        """Returns a method that uses the left-to-right stream and its head."""
        return partial(predict_causal, bos=self.config.bos)

    def reaches_all(self, model: ModelConfig) -> bool:
        return bool(model.reconstructor and (self.config.forward_weight or self.config.reverse_weight))

    def _first(self) -> int:
        return 0 if self.config.bos == "blind" else 1

    def _spans(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return draw_spans(self.config.span_mode, self.config.span_rate, batch.seed, batch.length, batch.ids.shape[1])

    def _targets(self, batch: Batch, spans: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the positions that predict a token: of the queries, and of the forward and the reverse stream; three bool
        [B L]."""
        c, L = self.config, batch.ids.shape[1]
        position, n = torch.arange(L, device=batch.ids.device), batch.length[:, None]
        reconstruct = (position >= 1) & (position < n)
        if c.empty_rows == "drop":
            start, end = spans
            left = (self._first() == 0) | (start > 1)
            reconstruct = reconstruct & (left | (end < n))
        forward = (position >= self._first()) & (position < n - 1)
        last = torch.clamp(n + 1, max=L) if c.pad_target else n
        reverse = (position >= 2) & (position < last)
        return reconstruct, forward, reverse

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        named = zip(("reconstruct", "forward", "reverse"), self._targets(batch, self._spans(batch)))
        return {name: mask.sum() for name, mask in named if self._weight(name)}

    def _weight(self, name: str) -> float:
        c = self.config
        weight = {"reconstruct": 1.0, "forward": c.forward_weight, "reverse": c.reverse_weight}[name]
        return weight / (1 + c.forward_weight + c.reverse_weight)

    def queries(
        self,
        batch: Batch,
        spans: tuple[Tensor, Tensor],
        streams: Streams,
        model: VLModel,
        place_T: Tensor | None = None,
    ) -> Tensor:
        """Returns the reconstructed states of positions 1 to L-1, [B L-1 D]; or only those at the given places, [T D]."""
        text, c = model.config.text, self.config
        position = torch.arange(1, batch.ids.shape[1], device=batch.ids.device).expand(len(batch), -1)
        ids = torch.full_like(position, text.mask)
        if c.end_query == "official":
            ids = torch.where(position == batch.length[:, None] - 1, text.eos, ids)
        start, end = (edge[:, 1:] for edge in spans)
        mask, empty = masks.bridge(start, end, batch.length, streams.forward_L, streams.reverse_BL, first=streams.first)
        if c.empty_rows == "official":
            mask = mask | empty[:, None, :, None]
        return model.reconstruct(streams, ids, position, mask, place_T)

    def _reconstructed(
        self, batch: Batch, spans: tuple[Tensor, Tensor], streams: Streams, model: VLModel, mask_BL: Tensor, T: int
    ) -> Tensor:
        """Returns the states [T D] of the queries that the mask marks. If many texts are short, the other queries are not
        computed."""
        # <s> has no query.
        mask_N = mask_BL[:, 1:].flatten()
        rounded = T + -T % SAME_SHAPE
        # The marked queries come first, in their order, and then others up to a multiple of SAME_SHAPE.
        place_N = (~mask_N).to(torch.uint8).argsort(stable=True)
        if rounded > MOST_REAL * len(mask_N):
            return rows_at(self.queries(batch, spans, streams, model), place_N[:T])
        return self.queries(batch, spans, streams, model, place_N[:rounded])[:T]

    def forward(
        self, model: VLModel, image_BKD: Tensor, batch: Batch, spans: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Loss]:
        """Returns the losses. `spans`: start and end, two [B L]; tests give them, otherwise they are drawn."""
        spans = spans or self._spans(batch)
        streams = model.streams(image_BKD, batch.ids, batch.length, bos=self.config.bos, whole=False)
        names = ("reconstruct", "forward", "reverse")
        masks_BL = {name: mask for name, mask in zip(names, self._targets(batch, spans)) if self._weight(name)}
        at = dict(zip(masks_BL, places(*masks_BL.values())))
        marked, T = masks_BL["reconstruct"], len(at["reconstruct"])
        states = {"reconstruct": self._reconstructed(batch, spans, streams, model, marked, T)}
        states |= self._next_tokens(model, streams, batch, at)
        moved = {"reconstruct": batch.ids, "forward": batch.ids.roll(-1, 1), "reverse": batch.ids.roll(1, 1)}
        return self._losses(model, states, {name: rows_at(moved[name], place_T) for name, place_T in at.items()})

    def _next_tokens(
        self, model: VLModel, streams: Streams, batch: Batch, at: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the states [T D] that predict a token, for each of the two streams that has a loss."""
        L, position = len(streams.forward_L), torch.arange(batch.ids.shape[1], device=batch.ids.device)
        # A reversed text begins with its last token.
        column = batch.length[:, None] - 1 - position if self.config.bos == "blind" else position
        first_B1 = 2 * L * torch.arange(len(batch), device=batch.ids.device)[:, None]
        place = {"forward": first_B1 + position, "reverse": first_B1 + L + column}
        columns = {name: rows_at(place[name], at[name]) for name in place if name in at}
        if not columns:
            return {}
        state = rows_at(streams.top[-1], torch.cat(list(columns.values())))
        return dict(zip(columns, model.fusion.norm(state).split([*map(len, columns.values())])))

    def _losses(self, model: VLModel, states: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Returns the losses of states [T D] that predict ids [T], by name. States that share a head pass through it in one
        call."""
        if model.forward_head is None:
            nll = head_loss(model.head, torch.cat(list(states.values())), torch.cat(list(targets.values())))
            parts = dict(zip(states, nll.split([*map(len, targets.values())])))
        else:
            parts = {name: head_loss(model.stream_head(name), states[name], targets[name]) for name in states}
        return {
            name: Loss(part.sum(), constant(len(part), targets[name]), self._weight(name))
            for name, part in parts.items()
        }


def predict_flm(model: VLModel, image_BKD: Tensor, batch: Batch, bos: Bos = "blind") -> Tensor:
    """Predicts each token from all other tokens in one pass, with the reconstructor -> ids [B L]; column 0 has no
    prediction."""
    spans = draw_spans("token", 0.0, batch.seed, batch.length, batch.ids.shape[1])
    streams = model.streams(image_BKD, batch.ids, batch.length, bos=bos, whole=False)
    state = FLM(FLMConfig(bos=bos)).queries(batch, spans, streams, model)
    return torch.cat([batch.ids[:, :1], likeliest(model.head.hidden(state), model.head.vocabulary)], 1)
