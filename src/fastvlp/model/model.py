"""VLModel: image and text encoder, the parts that join them, and the ways to read a text beside an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.absent import Absent
from fastvlp.model.encoders.interface import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from fastvlp.model.freezing import Freezable
from fastvlp.model.fusion import Fusion, FusionConfig, LMHead, Reconstructor, ReconstructorConfig
from fastvlp.model.joint_space import Embed, EmbedConfig
from fastvlp.model.layers import KeyValue, initialise_as_mae
from fastvlp.model.region_embedding import region_features, require_regions
from fastvlp.model.region_pooling import RegionPool, box_weights, pool_regions
from fastvlp.model.single_stream import SingleConfig, SingleStates, SingleStream

# How a model reads a text to summarise it: all at once, left to right, or through the reconstructor.
Reading = Literal["full", "causal", "flm"]
# `blind`: <s> is a left-to-right start that sees no text. `official`: it sees all and is hidden from every other token.
Bos = Literal["blind", "official"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model: an image encoder, a text encoder, and what joins them. It is one of

    - two encoders with a joint space (`embed`),
    - two encoders with fusion layers, in which the text reads the image (`fusion`), maybe with a joint space too,
    - a single stream over words and regions (`single`).
    """

    image: ImageEncoderConfig
    """The image encoder. A single stream over a detector's regions reads its size alone."""
    text: TextEncoderConfig
    """The text encoder. A single stream reads its embedding alone."""
    fusion: FusionConfig | None = None
    """Layers in which the text reads the image, with a vocabulary head."""
    reconstructor: ReconstructorConfig | None = None
    """FLM's reconstructor, beside fusion layers."""
    embed: EmbedConfig | None = None
    """Heads that map images and texts into one joint space."""
    single: SingleConfig | None = None
    """One stream over words and regions. It stands alone: no fusion, reconstructor or joint space."""
    separate_heads: bool = False
    """Whether FLM's forward and reverse stream have vocabulary heads of their own."""
    initial: Literal["bert", "mae"] = "bert"
    """How new weights are drawn: as in BERT, or as in MAE and FLIP."""

    @property
    def longest_text(self) -> int:
        """Most tokens, <s> and </s> included, that there are positions for."""
        embed = self.embed if self.fusion is None else None
        if embed is None or embed.text_length is None:
            return self.text.positions
        return self.text.positions + (2 if not embed.text_special else int(not embed.text_start))

    def check(self) -> None:
        """Raises UserError where parts do not fit together. It is not done on creation, because the command line overrides
        fields one by one."""
        self.image.check()
        self.text.check()
        for name, part in {"fusion": self.fusion, "reconstructor": self.reconstructor, "single": self.single}.items():
            if part is None:
                continue
            part.layer.check(f"model.{name}.layer")
            if part.layer.width != self.text.width:
                raise UserError(
                    f"`model.{name}.layer.width` {part.layer.width} must equal the text encoder's width, {self.text.width}"
                )
        if self.reconstructor:
            self._check_reconstructor(self.reconstructor)
        if self.single:
            if self.fusion or self.reconstructor or self.embed or self.separate_heads or self.text.depth:
                raise UserError(
                    "`model.single` stands alone: no fusion, reconstructor, embed or separate heads, and `model.text.depth` 0"
                )
            self.single.regions.check(self.image)
        if self.embed:
            self.embed.check(self.image, self.text)

    def _check_reconstructor(self, part: ReconstructorConfig) -> None:
        depth = self.fusion.depth if self.fusion else 0
        if part.bottom > self.text.depth or part.top > depth:
            raise UserError(
                f"`model.reconstructor`: each layer reads one of the text encoder ({self.text.depth} layers) or of fusion "
                f"({depth} layers); bottom {part.bottom} and top {part.top} are more than there are"
            )


class Streams(NamedTuple):
    """States of FLM's two directions. Row 2b is the forward stream of text b, row 2b+1 the reverse one, so that [B*2 L D]
    viewed as [B 2L D] is the list of keys that the reconstructor reads."""

    bottom: list[Tensor]  # after each layer of the text encoder
    top: list[Tensor]  # after each fusion layer
    forward_L: Tensor  # the text position of each forward column
    reverse_BL: Tensor  # the text position of each reverse column, -1 for padding
    first: int  # the first forward position that other rows may see


class Cache(NamedTuple):
    """State of decoding: keys and values of the text so far and of the image, layer by layer."""

    past: list[KeyValue]  # of the text encoder's layers, then of the fusion layers
    image: list[KeyValue]

    def select(self, rows: Tensor) -> Cache:
        """The state of some rows, in the order of their indices."""
        return Cache([p.select(rows) for p in self.past], [i.select(rows) for i in self.image])


def reverse_text(x_BL: Tensor, length_B: Tensor) -> Tensor:
    """Reverses the real tokens of each row, [B L] or [B L D], and leaves padding where it is. It is its own inverse."""
    position = torch.arange(x_BL.shape[1], device=x_BL.device)
    source = torch.where(position < length_B[:, None], length_B[:, None] - 1 - position, position)
    return x_BL.gather(1, source if x_BL.dim() == 2 else source[..., None].expand_as(x_BL))


class VLModel(Freezable):
    """A vision-language model. Raises UserError for a config whose parts do not fit together.

    Parts that the config leaves out are `Absent`: reading one raises a UserError that names the field to set.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.check()
        width = config.text.width
        self.config = config
        fusion, image_width, single = config.fusion, config.image.width, config.single
        reads_image = single is None or single.regions.pool is not None
        self.image = config.image.build() if reads_image else cast(ImageEncoder, Absent("image"))
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
        """The weights of another such model. A part that differs from this one's in its number of positions or types alone is
        made to fit."""
        for name, part in (("image", self.image), ("text", self.text), ("single", self.single)):
            if isinstance(part, Absent):
                continue
            start = f"{name}."
            own = part.resized({key.removeprefix(start): x for key, x in state.items() if key.startswith(start)})
            state = {**state, **{start + key: x for key, x in own.items()}}
        return dict(state)

    def encoders(self) -> dict[str, ImageEncoder | TextEncoder]:
        """The encoders that the model has, by the name of their part."""
        named: dict[str, ImageEncoder | TextEncoder] = {"image": self.image, "text": self.text}
        return {name: encoder for name, encoder in named.items() if not isinstance(encoder, Absent)}

    @property
    def causal_head(self) -> LMHead:
        """The head that predicts the next token from the forward stream."""
        return self.forward_head or self.head

    def stream_head(self, stream: str) -> LMHead:
        """The head of FLM's `reconstruct`, `forward` or `reverse` predictions."""
        own = {"reconstruct": self.head, "forward": self.forward_head, "reverse": self.reverse_head}[stream]
        return own or self.head

    def encode_image(self, image: Tensor, keep_BK: Tensor | None = None, regions: Regions | None = None) -> Tensor:
        """States of images, uint8 [B 3 H W] -> [B K D]; a single stream reads features of regions instead: [B R F].

        Args:
            image: the images, or their stored states [B K D], which are not encoded again.
            keep_BK: the patches to encode; None means all.

        Raises UserError where patches cannot be left out.
        """
        if keep_BK is not None:
            self.config.image.check_can_drop()
        if self.config.single is None:
            return self._encoded(image, keep_BK)
        if keep_BK is not None:
            raise UserError("patches cannot be left out where a single stream reads regions; set `keep` to 1")
        source = self.config.single.regions
        if source.pool is None:
            return region_features(source, image, regions)
        pool = RegionPool(samples=source.pool, place="exact")
        weight_BRN = box_weights(require_regions(regions).box, self.config.image.grid, pool)
        return pool_regions(self._encoded(image), weight_BRN, self.config.image)

    def _encoded(self, image: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        return image.to(self.image.mean.dtype) if image.ndim == 3 else self.image(image, keep_BK)

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
    ) -> SingleStates:
        """Words and regions in one stream.

        Args:
            feature_BRF: what `encode_image` returned.
            hidden_BR: regions whose features are masked.
            slot_B: as in `SingleStream.forward`.
            kind_BL: the row of the type table for each word; None means row 0.
        """
        position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        kinds = self.single.kinds
        words = self.text.embed(ids_BL, position_L, kinds[0] if kind_BL is None else kinds[kind_BL])
        return self.single(words, length_B, feature_BRF, require_regions(regions), hidden_BR=hidden_BR, slot_B=slot_B)

    def embed_image(self, image_BKD: Tensor, regions: Regions | None = None) -> Tensor:
        """Unit vectors of images in the joint space, fp32 [B E], from the states of `encode_image`. `regions`: the batch's,
        which some heads read."""
        return self.embed.image(image_BKD, regions=regions)

    def embed_text(
        self, ids_BL: Tensor, length_B: Tensor, keep_BK: Tensor | None = None, stored_BSD: Tensor | None = None
    ) -> Tensor:
        """Unit vectors of texts in the joint space, fp32 [B E].

        Args:
            keep_BK: sorted positions that are encoded (FLIP's text masking); the others cost nothing.
            stored_BSD: stored states of the texts (`text_states`), which are not encoded again.
        """
        if stored_BSD is None:
            return self.embed.text(*self.text_states(ids_BL, length_B, keep_BK))
        _, length = self.embed.words(ids_BL, length_B, self.config.text)
        return self.embed.text(stored_BSD.to(self.text.word_table.dtype), length.clamp(max=stored_BSD.shape[1]))

    def text_states(self, ids_BL: Tensor, length_B: Tensor, keep_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The states of texts that the head of the joint space reads [B L D], and how many of each row are real [B]."""
        config = self.embed.config
        ids, length = self.embed.words(ids_BL, length_B, self.config.text)
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if keep_BK is not None:
            ids, position = ids.gather(1, keep_BK), keep_BK
            length = (keep_BK < length[:, None]).sum(1)
        full = masks.full(length, ids.shape[1]) if config.text_mask == "full" else None
        return self.text(ids, position, mask=full, causal=config.text_mask == "causal"), length

    def read(
        self,
        image_BKD: Tensor,
        ids_BL: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        slot_B: Tensor | None = None,
    ) -> Tensor:
        """States of a text that reads an image -> [B L D]. `mask` (True where a row sees a column) and `causal` are not given
        together.

        An image may have s texts: rows b*s ... b*s+s-1 read image b. `slot_B`: which image of its item it is.
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
        """States of a text that is read left to right beside an image -> [B L D], with the `<s>` of pretraining."""
        mask = None if bos == "blind" else masks.causal_official(length_B, ids_BL.shape[1])
        return self.read(image_BKD, ids_BL, mask=mask, causal=mask is None, slot_B=slot_B)

    def streams(
        self, image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor, *, bos: Bos = "blind", slot_B: Tensor | None = None
    ) -> Streams:
        """FLM's two directions, as one pass of 2B rows through shared weights (arXiv 2303.14038, section 3.1).

        Where `<s>` sees no text, the reverse rows are reversed texts: both directions are then causal, and the fast attention
        kernel applies.
        """
        B, L = ids_BL.shape
        forward_L = torch.arange(L, device=ids_BL.device)
        mask, causal = None, bos == "blind"
        position_BL = forward_L.expand(B, L)
        real_BL = position_BL < length_B[:, None]
        if causal:
            reverse_BL = reverse_text(position_BL, length_B)
            ids = torch.stack([ids_BL, reverse_text(ids_BL, length_B)], 1).flatten(0, 1)
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
            raise UserError("the model has no reconstructor, which FLM reads it with; set `model.reconstructor`")
        return self.reconstructor

    def reconstruct(self, streams: Streams, ids_BQ: Tensor, position_BQ: Tensor, mask: Tensor) -> Tensor:
        """States of queries, an id at a position each, that read the two streams layer by layer -> [B Q D].

        `mask`: [B 1 Q 2L] from `masks.bridge`. It is the same in every layer; another one in each would let a query see the
        words that it predicts, by way of the other layers.
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
        """One vector for a text beside an image -> [B D], which a task's head reads.

        full: the state of `<s>`, read in both directions. causal: that of `</s>`, the only position that has seen all. flm: a
        query at position 0 that reads every state of both streams.
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
        """The state of an empty text beside each image, to be continued with `step`."""
        memory = self.fusion.image_memory(image_BKD, None)
        layer = cast(FusionConfig, self.config.fusion).layer
        past = [*self.text.empty_past(memory), *(KeyValue.empty(layer, memory) for _ in self.fusion.blocks)]
        return Cache(past, [block.keys(memory) for block in self.fusion.blocks])

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends one token to each row, in place, and returns its state [B D]: what a causal `read` of all tokens so far gives
        for the last one."""
        first = len(cache.past) - len(self.fusion.blocks)
        position = torch.full_like(ids_B[:, None], cache.past[first].length)
        x = self.text.step(ids_B[:, None], position, cache.past[:first])
        x = self.fusion.text_in(x) + self.fusion.text_type
        for block, past, memory in zip(self.fusion.blocks, cache.past[first:], cache.image, strict=True):
            x = block(x, past=past, memory=memory)
        return self.fusion.norm(x)[:, 0]
