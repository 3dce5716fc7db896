"""VLModel: the towers, fusion, reconstructor and vocabulary head, and the ways to read a text beside an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.absent import Absent
from fastvlp.model.encoders.interface import ImageEncoder, ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.fusion import Fusion, FusionConfig, LMHead, Reconstructor, ReconstructorConfig
from fastvlp.model.joint_space import Embed, EmbedConfig, check_head
from fastvlp.model.layers import KeyValue, initialise_as_mae
from fastvlp.model.region_embedding import given, region_features
from fastvlp.model.region_pooling import RegionPool, box_weights, pooled
from fastvlp.model.single_stream import Joint, SingleConfig, SingleStream

# How a model reads a text to summarise it: all at once, left to right, or through the reconstructor.
Reading = Literal["full", "causal", "flm"]
# `blind`: <s> is a left-to-right start that sees no text. `official`: it sees all and is hidden from every other token.
Bos = Literal["blind", "official"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """fusion: layers in which text reads the image, with a vocabulary head; None for two towers alone. embed: the towers'
    heads into a joint space. single: one stream over words and regions, with no towers but the image's where regions are
    pooled from it: else of `image` it reads the size, and of `text` the embedding. separate_heads: own vocabulary heads for
    the forward and the reverse stream (FLM's share_lm_scorer_weights). initial: how weights are drawn, `bert`
    (`layers.initialise`) or `mae`, FLIP's way."""

    image: ImageEncoderConfig
    text: TextEncoderConfig
    fusion: FusionConfig | None = None
    reconstructor: ReconstructorConfig | None = None
    embed: EmbedConfig | None = None
    single: SingleConfig | None = None
    separate_heads: bool = False
    initial: Literal["bert", "mae"] = "bert"

    @property
    def longest_text(self) -> int:
        """Most tokens, <s> and </s> included, that there are positions for."""
        embed = self.embed if self.fusion is None else None
        bare = embed is not None and embed.text_length is not None and not embed.text_special
        return self.text.positions + 2 * int(bare)


def check(config: ModelConfig) -> None:
    """Raises UserError for parts that do not fit together. Not in the config, whose fields are overridden one by one."""
    image, text, fusion, part = config.image, config.text, config.fusion, config.reconstructor
    image.check()
    text.check()
    for name, other in {"fusion": fusion, "reconstructor": part, "single": config.single}.items():
        if other is None:
            continue
        other.layer.check(f"model.{name}.layer")
        if other.layer.width != text.width:
            raise UserError(
                f"`model.{name}.layer.width` {other.layer.width} must equal the text encoder's width, {text.width}"
            )
    deep = fusion.depth if fusion else 0
    if part and (part.bottom > text.depth or part.top > deep):
        raise UserError(
            f"model.reconstructor: each layer reads one of text ({text.depth}) or fusion ({deep}); "
            f"bottom {part.bottom} and top {part.top} are more than there are"
        )
    if config.single and (fusion or part or config.embed or config.separate_heads or text.depth):
        raise UserError("model.single stands alone: no fusion, reconstructor, embed or heads, and model.text.depth 0")
    regions = config.single.regions if config.single else None
    if regions and regions.pool is not None:
        if regions.pool < 1 or regions.crop:
            raise UserError("model.single.regions.pool is a number of samples a side, 1 or more, and needs no crop")
        if regions.feature != image.width:
            raise UserError(
                f"model.single.regions.feature {regions.feature} must be what is pooled, the image tower's width "
                f"{image.width}"
            )
    embed = config.embed
    if embed:
        check_head("image", embed.image, image.width)
        check_head("text", embed.text, text.width)
    if embed and embed.image.pool == "patches" and not image.prefix:
        raise UserError("model.embed.image.pool patches leaves out the class token, and there is none; choose mean")
    if embed and embed.text_length is not None and not 1 <= embed.text_length <= text.positions:
        raise UserError(
            f"model.embed.text_length {embed.text_length} is not within the {text.positions} text positions"
        )


class Streams(NamedTuple):
    """States of both directions after each layer, rows b*2 (forward) and b*2+1 (reverse), so that [B*2 L D] viewed as
    [B 2L D] is the reconstructor's key list. `reverse_BL` says which text position a reverse column holds (-1: padding);
    `first` is the first forward position that other rows may see."""

    bottom: list[Tensor]
    top: list[Tensor]
    forward_L: Tensor
    reverse_BL: Tensor
    first: int


class Cache(NamedTuple):
    """Decoding state: keys and values of the text so far and of the image, layer by layer."""

    past: list[KeyValue]
    image: list[KeyValue]

    def select(self, rows: Tensor) -> Cache:
        return Cache([p.select(rows) for p in self.past], [i.select(rows) for i in self.image])


def flip(x_BL: Tensor, length_B: Tensor) -> Tensor:
    """Reverses the real tokens of each row and leaves padding where it is; its own inverse. [B L] or [B L D]."""
    position = torch.arange(x_BL.shape[1], device=x_BL.device)
    source = torch.where(position < length_B[:, None], length_B[:, None] - 1 - position, position)
    return x_BL.gather(1, source if x_BL.dim() == 2 else source[..., None].expand_as(x_BL))


class VLModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        check(config)
        width = config.text.width
        self.config = config
        fusion, image_width, single = config.fusion, config.image.width, config.single
        # Absent parts are declared as present: who reads one meets an error that names the field to set.
        blind = single is not None and single.regions.pool is None
        self.image = cast(ImageEncoder, Absent("image")) if blind else config.image.build()
        self.text = config.text.build()
        self.single = SingleStream(single, config.text.vocab) if single else cast(SingleStream, Absent("single"))
        self.fusion = Fusion(fusion, image_width) if fusion else cast(Fusion, Absent("fusion"))
        self.reconstructor = Reconstructor(config.reconstructor) if config.reconstructor else None
        head = lambda: LMHead(width, config.text.vocab, fusion.layer.eps if fusion else 1e-5)  # noqa: E731
        self.head = head() if fusion else cast(LMHead, Absent("fusion"))
        self.forward_head = head() if config.separate_heads else None
        self.reverse_head = head() if config.separate_heads else None
        embed = config.embed
        self.embed = Embed(embed, config.image, width) if embed else cast(Embed, Absent("embed"))
        if config.initial == "mae":
            initialise_as_mae(self)

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of another such model, each part made to fit this one where it differs in its number of positions or
        types alone."""
        for name, part in (("image", self.image), ("text", self.text), ("single", self.single)):
            if isinstance(part, Absent):
                continue
            start = f"{name}."
            own = part.resized({key.removeprefix(start): x for key, x in state.items() if key.startswith(start)})
            state = {**state, **{start + key: x for key, x in own.items()}}
        return dict(state)

    @property
    def causal_head(self) -> LMHead:
        """The head that predicts the next token from the forward stream."""
        return self.forward_head or self.head

    def stream_head(self, stream: str) -> LMHead:
        """The head of FLM's `reconstruct`, `forward` or `reverse` predictions."""
        own = {"reconstruct": self.head, "forward": self.forward_head, "reverse": self.reverse_head}[stream]
        return own or self.head

    def encode_image(self, image: Tensor, keep_BK: Tensor | None = None, regions: Regions | None = None) -> Tensor:
        """uint8 [B 3 H W] -> [B K D]. What a single stream reads are the regions' features: [B R F]."""
        if keep_BK is not None:
            self.config.image.check_can_drop()
        if self.config.single is None:
            return self.image(image, keep_BK)
        if keep_BK is not None:
            raise UserError("keep drops patches, and a single stream reads regions; leave keep at 1")
        source = self.config.single.regions
        if source.pool is None:
            return region_features(source, image, regions)
        how = RegionPool(samples=source.pool, place="exact")
        weight_BRN = box_weights(given(regions).box, self.config.image.grid, how)
        return pooled(self.image(image), weight_BRN, self.config.image)

    def read_regions(
        self,
        feature_BRF: Tensor,
        regions: Regions | None,
        ids_BL: Tensor,
        length_B: Tensor,
        *,
        hidden_BR: Tensor | None = None,
        slot_B: Tensor | None = None,
        kind_BL: Tensor | None = None,
    ) -> Joint:
        """Words and regions in one stream. `feature`: what `encode_image` gave; it is masked where `hidden`. `kind`: rows of
        the type table for each word, where it is not row 0."""
        position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        kinds = self.single.kinds
        words = self.text.embed(ids_BL, position_L, kinds[0] if kind_BL is None else kinds[kind_BL])
        return self.single(words, length_B, feature_BRF, given(regions), hidden_BR=hidden_BR, slot_B=slot_B)

    def embed_image(self, image_BKD: Tensor, regions: Regions | None = None) -> Tensor:
        """States of `encode_image` to unit vectors of the joint space, in fp32 -> [B E]. `regions`: of the batch, which
        some heads read."""
        return self.embed.image(image_BKD, regions=regions)

    def embed_text(self, ids_BL: Tensor, length_B: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """The text alone to unit vectors of the joint space, in fp32 -> [B E]. `keep_BK`: sorted positions that are
        encoded (FLIP's text masking); the others cost nothing."""
        config = self.embed.config
        ids, length = self.embed.words(ids_BL, length_B, self.config.text)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if keep_BK is not None:
            ids, position = ids.gather(1, keep_BK), keep_BK
            length = (keep_BK < length[:, None]).sum(1)
        full = masks.full(length, ids.shape[1]) if config.text_mask == "full" else None
        x = self.text(ids, position, mask=full, causal=config.text_mask == "causal")
        return self.embed.text(x, length)

    def read(
        self,
        image_BKD: Tensor,
        ids_BL: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        slot_B: Tensor | None = None,
    ) -> Tensor:
        """One stream over the text beside the image -> [B L D]. `mask` True = visible, or `causal`, not both.

        There may be s texts an image: rows b*s ... b*s+s-1 read image b.
        """
        position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        x = self.text(ids_BL, position_L, mask=mask, causal=causal)
        x = self.fusion.text_in(x) + self.fusion.text_type
        memory = self.fusion.image_memory(image_BKD, slot_B)
        for block in self.fusion.blocks:
            x = block(x, mask=mask, causal=causal, memory=block.keys(memory))
        return self.fusion.norm(x)

    def read_causally(
        self, image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor, *, bos: Bos, slot_B: Tensor | None = None
    ) -> Tensor:
        """`read` left to right, with the `<s>` that the model was pretrained with -> [B L D]."""
        mask = None if bos == "blind" else masks.causal_official(length_B, ids_BL.shape[1])
        return self.read(image_BKD, ids_BL, mask=mask, causal=mask is None, slot_B=slot_B)

    def streams(
        self, image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor, *, bos: Bos = "blind", slot_B: Tensor | None = None
    ) -> Streams:
        """Both directions as one pass of 2B rows through the shared weights (arXiv 2303.14038 section 3.1).

        With a text-blind `<s>` the reverse rows are flipped, so that both are plainly causal and the fast kernel serves.
        """
        B, L = ids_BL.shape
        forward_L = torch.arange(L, device=ids_BL.device)
        mask, causal = None, bos == "blind"
        position_BL = forward_L.expand(B, L)
        real_BL = position_BL < length_B[:, None]
        if causal:
            reverse_BL = flip(position_BL, length_B)
            ids = torch.stack([ids_BL, flip(ids_BL, length_B)], 1).flatten(0, 1)
        else:
            reverse_BL = position_BL
            ids = ids_BL.repeat_interleave(2, 0)
            both = [masks.causal_official(length_B, L), masks.anticausal_official(length_B, L)]
            mask = torch.stack(both, 1).flatten(0, 1)
        position = torch.stack([position_BL, reverse_BL], 1).flatten(0, 1)
        embedded, *bottom = self.text.states(ids, position, mask=mask, causal=causal)
        x = bottom[-1] if bottom else embedded
        types_2D = torch.stack([self.fusion.text_type, self._reconstructor.reverse_type])
        x = (self.fusion.text_in(x).unflatten(0, (B, 2)) + types_2D[:, None]).flatten(0, 1)
        memory = self.fusion.image_memory(image_BKD, slot_B)
        top = []
        for block in self.fusion.blocks:
            x = block(x, mask=mask, causal=causal, memory=block.keys(memory))
            top.append(x)
        reverse_BL = torch.where(real_BL, reverse_BL, -1)
        return Streams(bottom, top, forward_L, reverse_BL, 0 if causal else 1)

    @property
    def _reconstructor(self) -> Reconstructor:
        if self.reconstructor is None:
            raise ValueError("this model has no reconstructor; give ModelConfig one to read it with FLM")
        return self.reconstructor

    def reconstruct(self, streams: Streams, ids_BQ: Tensor, position_BQ: Tensor, mask: Tensor) -> Tensor:
        """Queries (an id at a position each) read the two streams, layer beside layer -> [B Q D].

        mask: [B 1 Q 2L] from `masks.bridge`, the same in every layer: redrawing it would leak (spec 1.6 item 6).
        """
        part, B = self._reconstructor, ids_BQ.shape[0]
        x = self.text.embed(ids_BQ, position_BQ)
        for states, blocks, norms in (
            (streams.bottom, part.bottom, part.bottom_key_norm),
            (streams.top, part.top, part.top_key_norm),
        ):
            aligned = states[len(states) - len(blocks) :]
            for state, block, norm in zip(aligned, blocks, norms):
                keys = block.keys(norm(state).reshape(B, -1, state.shape[-1]))
                x = block(x, memory=keys, memory_mask=mask)
            if blocks is part.bottom:
                x = self.fusion.text_in(x) + part.query_type
        return part.norm(x)

    def summarise(
        self,
        image_BKD: Tensor,
        ids_BL: Tensor,
        length_B: Tensor,
        *,
        reading: Reading,
        slot_B: Tensor | None = None,
        bos: Bos = "blind",
    ) -> Tensor:
        """One vector for the text beside the image -> [B D], what a task's head reads.

        full: `<s>` of the bidirectional reading. causal: `</s>`, the only position that has seen all. flm: the summary
        query, alone, over every state of both streams (spec section 5: same as computing every query).
        """
        if reading == "full":
            mask = masks.full(length_B, ids_BL.shape[1])
            return self.read(image_BKD, ids_BL, mask=mask, slot_B=slot_B)[:, 0]
        if reading == "causal":
            x = self.read_causally(image_BKD, ids_BL, length_B, bos=bos, slot_B=slot_B)
            return x[torch.arange(len(x), device=x.device), length_B - 1]
        streams = self.streams(image_BKD, ids_BL, length_B, bos=bos, slot_B=slot_B)
        mask = masks.bridge_all(length_B, streams.forward_L, streams.reverse_BL)
        zero_B1 = torch.zeros_like(ids_BL[:, :1])
        return self.reconstruct(streams, ids_BL[:, :1], zero_B1, mask)[:, 0]

    def begin(self, image_BKD: Tensor) -> Cache:
        """An empty text beside each image, to be decoded left to right with `step`."""
        memory = self.fusion.image_memory(image_BKD, None)
        layer = cast(FusionConfig, self.config.fusion).layer
        past = [*self.text.empty_past(memory), *(KeyValue.empty(layer, memory) for _ in self.fusion.blocks)]
        return Cache(past, [block.keys(memory) for block in self.fusion.blocks])

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends one token a row and returns its state [B D]; equals the last row of a causal `read` of all so far."""
        first = len(cache.past) - len(self.fusion.blocks)
        position = torch.full_like(ids_B[:, None], cache.past[first].length)
        x = self.text.step(ids_B[:, None], position, cache.past[:first])
        x = self.fusion.text_in(x) + self.fusion.text_type
        for block, past, memory in zip(self.fusion.blocks, cache.past[first:], cache.image, strict=True):
            x = block(x, past=past, memory=memory)
        return self.fusion.norm(x)[:, 0]
