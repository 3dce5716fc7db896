"""Free language modeling: every token is reconstructed from all but its own corrupted span (arXiv 2303.14038).

Text is encoded once left to right and once right to left; each token's query then reads the forward states left of its
span and the reverse states right of it. Two next-token losses on the streams themselves are added (the paper's L_inter).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model import masks
from fastvlp.model.model import Bos, ModelConfig, Streams, VLModel
from fastvlp.objectives.cloze_methods import likeliest
from fastvlp.objectives.losses import head_loss
from fastvlp.objectives.objective import ClozeMethod, Loss, Objective, ObjectiveConfig
from fastvlp.random import uniform

SpanMode = Literal["token", "centred", "uniform"]
EXTRA_SALT, SIDE_SALT = 201, 202


@dataclass(frozen=True, kw_only=True)
class FLMConfig(ObjectiveConfig):
    """Defaults are the paper's, but for three traps of the released code, each kept by option (`official_flm`).

    span_mode: `token` hides the token alone (the released recipe); `centred` adds Binomial(M-1, p) neighbours around it
        (released code); `uniform` places as long a span uniformly over it, inside the text.
    span_rate: share of the M predictable tokens that a span hides on average; read only by the last two modes.
    forward_weight, reverse_weight: of the streams' own losses; 0 leaves a loss out.
    bos: `blind` makes <s> a start that sees no text, so that x_1 is learned and no row is ever empty; `official` lets it
        see all and hides it from the other tokens.
    end_query: `mask` asks for </s> as for any token; `official` puts </s> itself there, a free target.
    empty_rows: rows whose span covers all that they might see: `drop` them from the loss, or `official`: they see every
        key, their own token included.
    pad_target: the released reverse loss also asks the first padding position for </s>.
    """

    span_mode: SpanMode = "token"
    span_rate: float = 0.0
    forward_weight: float = 1.0
    reverse_weight: float = 1.0
    bos: Bos = "blind"
    end_query: Literal["mask", "official"] = "mask"
    empty_rows: Literal["drop", "official"] = "drop"
    pad_target: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.span_rate <= 1:
            raise ValueError(f"span_rate is a share of the text, 0 to 1, not {self.span_rate}")
        if self.span_mode == "token" and self.span_rate:
            raise ValueError("span_mode 'token' hides one token; for a span_rate choose 'centred' or 'uniform'")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> FLM:
        return FLM(self)


def official_flm(span_mode: SpanMode = "token", span_rate: float = 0.0) -> FLMConfig:
    """Free language modeling as the released code computes it (TencentARC/FLM bd8b19d)."""
    return FLMConfig(
        span_mode=span_mode,
        span_rate=span_rate,
        bos="official",
        end_query="official",
        empty_rows="official",
        pad_target=True,
    )


def draw_spans(mode: SpanMode, rate: float, seed_B: Tensor, length_B: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """A half-open span [start, end) around each position -> two [B L] tensors; row 0 (<s>) is not corrupted.

    Spec 1.3: m ~ Binomial(M-1, p) more tokens with p = (M rate - 1)/(M - 1 + 1e-5). `centred` puts m//2 of them to the
    left, one more by a coin where m is odd; it slides at the left edge and is cut at the right one, as released.
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

    def reaches_all(self, model: ModelConfig) -> bool:
        return bool(model.reconstructor and (self.config.forward_weight or self.config.reverse_weight))

    def _first(self) -> int:
        return 0 if self.config.bos == "blind" else 1

    def _spans(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return draw_spans(self.config.span_mode, self.config.span_rate, batch.seed, batch.length, batch.ids.shape[1])

    def _targets(self, batch: Batch, spans: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows of each stream are asked for a token: three bool [B L]."""
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

    def queries(self, batch: Batch, spans: tuple[Tensor, Tensor], streams: Streams, model: VLModel) -> Tensor:
        """Reconstructed states of rows 1..L-1 -> [B L-1 D]."""
        text, c = model.config.text, self.config
        position = torch.arange(1, batch.ids.shape[1], device=batch.ids.device).expand(len(batch), -1)
        ids = torch.full_like(position, text.mask)
        if c.end_query == "official":
            ids = torch.where(position == batch.length[:, None] - 1, text.eos, ids)
        start, end = (edge[:, 1:] for edge in spans)
        mask, empty = masks.bridge(start, end, batch.length, streams.forward_L, streams.reverse_BL, first=streams.first)
        if c.empty_rows == "official":
            mask = mask | empty[:, None, :, None]
        return model.reconstruct(streams, ids, position, mask)

    def forward(
        self, model: VLModel, image_BKD: Tensor, batch: Batch, spans: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Loss]:
        """`spans` (start, end: [B L]) replaces the draw, for tests against given spans."""
        spans = spans or self._spans(batch)
        streams = model.streams(image_BKD, batch.ids, batch.length, bos=self.config.bos)
        ask_reconstruct, ask_forward, ask_reverse = self._targets(batch, spans)
        top = model.fusion.norm(streams.top[-1]).unflatten(0, (len(batch), 2))
        # The row of the reverse stream that holds each text position: its own inverse where the stream is flipped.
        held = torch.where(streams.reverse_BL < 0, streams.forward_L, streams.reverse_BL)
        reverse = top[:, 1].gather(1, held[..., None].expand(-1, -1, top.shape[-1]))
        asked = {
            "reconstruct": (self.queries(batch, spans, streams, model), batch.ids[:, 1:], ask_reconstruct[:, 1:]),
            "forward": (top[:, 0], batch.ids.roll(-1, 1), ask_forward),
            "reverse": (reverse, batch.ids.roll(1, 1), ask_reverse),
        }
        asked = {name: parts for name, parts in asked.items() if self._weight(name)}
        return self._losses(model, asked)

    def _losses(self, model: VLModel, asked: dict[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, Loss]:
        """Only the asked rows meet the vocabulary, all streams that share a head in one call."""
        states = {name: state[ask] for name, (state, _, ask) in asked.items()}
        targets = {name: target[ask] for name, (_, target, ask) in asked.items()}
        sizes = [len(target) for target in targets.values()]
        if model.forward_head is None:
            nll = head_loss(model.head, torch.cat(list(states.values())), torch.cat(list(targets.values())))
            parts = dict(zip(states, nll.split(sizes)))
        else:
            parts = {name: head_loss(model.stream_head(name), states[name], targets[name]) for name in states}
        return {
            name: Loss(part.sum(), part.new_tensor(len(part)).long(), self._weight(name))
            for name, part in parts.items()
        }


def predict_flm(model: VLModel, image_BKD: Tensor, batch: Batch, bos: Bos = "blind") -> Tensor:
    """Each token from all others in one pass, through the reconstructor -> ids [B L]; column 0 holds no prediction."""
    spans = draw_spans("token", 0.0, batch.seed, batch.length, batch.ids.shape[1])
    streams = model.streams(image_BKD, batch.ids, batch.length, bos=bos)
    state = FLM(FLMConfig(bos=bos)).queries(batch, spans, streams, model)
    return torch.cat([batch.ids[:, :1], likeliest(model.head.hidden(state), model.head.vocabulary)], 1)
