"""VLModel: an image encoder, a text encoder, the parts that join them, and the ways to encode a text together with an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from fastvlp.batch import Regions
from fastvlp.errors import UserError
from fastvlp.model import like_lengths, masks
from fastvlp.model.absent import Absent
from fastvlp.model.directions import Streams, reverse_text
from fastvlp.model.encoders.interface import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from fastvlp.model.freezing import Freezable
from fastvlp.model.fusion import Fusion, FusionConfig, LMHead, Reconstructor, ReconstructorConfig
from fastvlp.model.joint_space import Embed, EmbedConfig
from fastvlp.model.layers import KeyValue, initialise_as_mae, select_rows
from fastvlp.model.region_embedding import region_features, require_regions
from fastvlp.model.region_pooling import RegionPool, box_weights, pool_regions
from fastvlp.model.single_stream import SingleConfig, SingleStates, SingleStream

# How `summarise` encodes a text: in both directions at once, left to right, or with FLM's two streams and reconstructor.
Reading = Literal["full", "causal", "flm"]
# What <s> attends to. `blind`: only itself, as usual in left-to-right texts. `official`, as in FLM's released code: the whole
# text, while no other token attends to <s>.
Bos = Literal["blind", "official"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Config of a model with an image encoder, a text encoder, and parts that join them. There are three kinds:

    - two encoders with a joint space (`embed`),
    - two encoders with fusion layers, in which the text attends to the image (`fusion`), with or without a joint space,
    - a single stream over words and regions (`single`).
    """

    image: ImageEncoderConfig
    """The image encoder. A single stream over a detector's regions uses only its image size."""
    text: TextEncoderConfig
    """The text encoder. A single stream uses only its word embedding."""
    fusion: FusionConfig | None = None
    """Layers in which the text attends to the image, with a vocabulary head."""
    reconstructor: ReconstructorConfig | None = None
    """FLM's reconstructor. It needs fusion layers."""
    embed: EmbedConfig | None = None
    """Heads that map images and texts into one joint space."""
    single: SingleConfig | None = None
    """One transformer over words and regions. It cannot be combined with fusion, reconstructor or joint space."""
    separate_heads: bool = False
    """Whether FLM's forward and reverse streams have their own vocabulary heads."""
    initial: Literal["bert", "mae"] = "bert"
    """Distribution of new weights: as in BERT, or as in MAE and FLIP."""

    @property
    def longest_text(self) -> int:
        """The largest number of tokens that a text may have, including <s> and </s>."""
        embed = self.embed if self.fusion is None else None
        if embed is None or embed.text_length is None:
            return self.text.positions
        return self.text.positions + (2 if not embed.text_special else int(not embed.text_start))

    def check(self) -> None:
        """Raises UserError if parts do not fit together. They are not checked on creation, because the command line changes
        the fields one by one."""
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
                    "`model.single` cannot be combined with fusion, reconstructor, embed or separate heads, and needs "
                    "`model.text.depth` 0"
                )
            self.single.regions.check(self.image)
        if self.embed:
            self.embed.check(self.image, self.text)

    def _check_reconstructor(self, part: ReconstructorConfig) -> None:
        depth = self.fusion.depth if self.fusion else 0
        if part.bottom > self.text.depth or part.top > depth:
            raise UserError(
                f"`model.reconstructor`: bottom {part.bottom} and top {part.top} are too many. Each bottom layer reads one "
                f"layer of the text encoder, which has {self.text.depth}, and each top layer one of fusion, which has {depth}"
            )


class Cache(NamedTuple):
    """Decoding state: what the text encoder keeps of the text so far, and the keys and values of the text and of the image
    for each fusion layer."""

    text: Any
    past: list[KeyValue]
    image: list[KeyValue]

    def select(self, rows: Tensor) -> Cache:
        """Returns the state of the given rows of text, in the given order. The keys of the images stay as they are."""
        return Cache(select_rows(self.text, rows), select_rows(self.past, rows), self.image)


class VLModel(Freezable):
    """A vision-language model. Raises UserError for a config whose parts do not fit together.

    Parts that the config leaves out are `Absent`. Using such a part raises a UserError that names the field to set.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.check()
        width = config.text.width
        # group_texts: encode texts of the joint space in groups of like length on a GPU too.
        self.config, self.group_texts = config, False
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
        self.embed = Embed(config.embed, config.image, width) if config.embed else cast(Embed, Absent("embed"))
        if config.initial == "mae":
            initialise_as_mae(self)
            if "image" in self.encoders():
                self.image.start_positions()

    def resized(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights `state` of a similar model, resized to fit this one if only the number of positions or of token
        types differs."""
        for name, part in (("image", self.image), ("text", self.text), ("single", self.single)):
            if isinstance(part, Absent):
                continue
            own = {key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}
            state = {**state, **{f"{name}.{key}": x for key, x in part.resized(own).items()}}
        return dict(state)

    def encoders(self) -> dict[str, ImageEncoder | TextEncoder]:
        """Returns the encoders that the model has, by name: `image` and `text`."""
        named: dict[str, ImageEncoder | TextEncoder] = {"image": self.image, "text": self.text}
        return {name: encoder for name, encoder in named.items() if not isinstance(encoder, Absent)}

    @property
    def causal_head(self) -> LMHead:
        """The head that predicts the next token from the forward stream."""
        return self.forward_head or self.head

    def stream_head(self, stream: str) -> LMHead:
        """Returns the vocabulary head of FLM's `reconstruct`, `forward` or `reverse` predictions."""
        own = {"reconstruct": self.head, "forward": self.forward_head, "reverse": self.reverse_head}[stream]
        return own or self.head

    def encode_image(self, image: Tensor, keep_BK: Tensor | None = None, regions: Regions | None = None) -> Tensor:
        """Encodes images, uint8 [B 3 H W] -> states [B K D] or, for a single stream, features of regions [B R F].

        Args:
            image: the images, or their stored states [B K D], which are not encoded again.
            keep_BK: indices of the patches to encode; None means all.
            regions: the batch's regions, for a single stream.

        Raises UserError if `keep_BK` is given and the model needs all patches.
        """
        if keep_BK is not None:
            self.config.image.check_can_drop()
        if self.config.single is None:
            return self._encoded(image, keep_BK)
        if keep_BK is not None:
            raise UserError("a single stream over regions needs all patches; set `keep` to 1")
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
        """Encodes words and regions together, in a single stream.

        Args:
            feature_BRF: the features that `encode_image` returned.
            hidden_BR: True for regions whose features are masked.
            slot_B: as in `SingleStream.forward`.
            kind_BL: the row of the table of token types for each word; None means row 0.
        """
        position_L, kinds = torch.arange(ids_BL.shape[1], device=ids_BL.device), self.single.kinds
        words = self.text.embed(ids_BL, position_L, kinds[0] if kind_BL is None else kinds[kind_BL])
        return self.single(words, length_B, feature_BRF, require_regions(regions), hidden_BR=hidden_BR, slot_B=slot_B)

    def embed_image(self, image_BKD: Tensor, regions: Regions | None = None) -> Tensor:
        """Returns unit vectors of images in the joint space, fp32 [B E], from the states that `encode_image` returned.
        `regions`: the batch's regions, for heads that pool regions."""
        return self.embed.image(image_BKD, regions=regions)

    def embed_text(
        self, ids_BL: Tensor, length_B: Tensor, keep_BK: Tensor | None = None, stored_BSD: Tensor | None = None
    ) -> Tensor:
        """Returns unit vectors of texts in the joint space, fp32 [B E].

        Args:
            keep_BK: sorted positions of the tokens to encode (FLIP's text masking); the others are not computed.
            stored_BSD: stored states of the texts (from `text_states`), which are not computed again.
        """
        if stored_BSD is None:
            return self.embed.text(*self.text_states(ids_BL, length_B, keep_BK))
        _, length = self.embed.words(ids_BL, length_B, self.config.text)
        return self.embed.text(stored_BSD.to(self.text.word_table.dtype), length.clamp(max=stored_BSD.shape[1]))

    def text_states(self, ids_BL: Tensor, length_B: Tensor, keep_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the states of texts [B L D] that the joint space pools, and the number of states without padding [B]."""
        config = self.embed.config
        ids, length = self.embed.words(ids_BL, length_B, self.config.text)
        if keep_BK is not None:
            ids, length = ids.gather(1, keep_BK), (keep_BK < length[:, None]).sum(1)
        elif not config.sees_padding and like_lengths.worthwhile(ids, self.group_texts):
            return like_lengths.in_groups(self._text_states, ids, length), length
        return self._text_states(ids, length, keep_BK), length

    def _text_states(self, ids_BL: Tensor, length_B: Tensor, position_BL: Tensor | None = None) -> Tensor:
        mask, L = self.embed.config.text_mask, ids_BL.shape[1]
        position = torch.arange(L, device=ids_BL.device).expand_as(ids_BL) if position_BL is None else position_BL
        seen = masks.full(length_B, L) if mask == "full" else None
        return self.text(ids_BL, position, mask=seen, causal=mask == "causal")

    def read(
        self,
        image_BKD: Tensor,
        ids_BL: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        slot_B: Tensor | None = None,
    ) -> Tensor:
        """Encodes texts with cross-attention to images -> [B L D].

        Each image may have s texts. Rows b*s ... b*s+s-1 then attend to image b.

        Args:
            mask: True where a row attends to a column. Cannot be combined with `causal`.
            causal: whether each token attends only to itself and the tokens before it.
            slot_B: the number of the image within its item, for items with several images; None means the first image.
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
        """Encodes texts left to right with cross-attention to images -> [B L D]. `bos` must be as in pretraining."""
        mask = None if bos == "blind" else masks.causal_official(length_B, ids_BL.shape[1])
        return self.read(image_BKD, ids_BL, mask=mask, causal=mask is None, slot_B=slot_B)

    def streams(
        self,
        image_BKD: Tensor,
        ids_BL: Tensor,
        length_B: Tensor,
        *,
        bos: Bos = "blind",
        slot_B: Tensor | None = None,
        whole: bool = True,
    ) -> Streams:
        """Encodes texts in FLM's two directions, in one pass of 2B rows through shared weights (arXiv 2303.14038, section 3.1).

        If `bos` is `blind`, the reverse rows hold reversed texts. Both directions are then causal and use the fast causal
        attention kernel. With `whole` False they leave out their last column: </s> of the longest texts in the forward rows,
        and <s> in the reverse rows. No other token attends to these tokens, and no prediction reads them.
        """
        B, L = ids_BL.shape
        forward_L = torch.arange(L, device=ids_BL.device)
        mask, causal = None, bos == "blind"
        position_BL = forward_L.expand(B, L)
        real_BL = position_BL < length_B[:, None]
        if causal:
            L = L if whole else L - 1
            reverse_BL = reverse_text(position_BL, length_B)[:, :L]
            ids = torch.stack([ids_BL[:, :L], reverse_text(ids_BL, length_B)[:, :L]], 1).flatten(0, 1)
            forward_L, position_BL, real_BL = forward_L[:L], position_BL[:, :L], real_BL[:, :L]
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
            raise UserError("the model has no reconstructor, but FLM needs one; set `model.reconstructor`")
        return self.reconstructor

    def reconstruct(
        self, streams: Streams, ids_BQ: Tensor, position_BQ: Tensor, mask: Tensor, place_T: Tensor | None = None
    ) -> Tensor:
        """Runs the reconstructor -> [B Q D]. A query is a token id at a position. In each layer it attends to the two streams.

        `mask`: [B 1 Q 2L] from `masks.bridge`. It is the same in every layer: with different masks, a query could see the
        words that it has to predict through the states of another layer. `place_T`: compute these of the B * Q -> [T D].
        """
        part, B, x = self._reconstructor, ids_BQ.shape[0], self.text.embed(ids_BQ, position_BQ)
        x = x if place_T is None else x.flatten(0, 1).index_select(0, place_T)
        for states, blocks, norms in (
            (streams.bottom, part.bottom, part.bottom_key_norm),
            (streams.top, part.top, part.top_key_norm),
        ):
            aligned = states[len(states) - len(blocks) :]
            for state, block, norm in zip(aligned, blocks, norms):
                keys = block.keys(norm(state).reshape(B, -1, state.shape[-1]))
                x = block(x, memory=keys, memory_mask=mask, place_T=place_T)
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
        """Returns one vector for each text with its image -> [B D], the input of a task's head.

        Args:
            reading: how the vector is computed. `full`: the state of `<s>` after attention in both directions. `causal`: the
                state of `</s>`, the only position that has seen the whole text. `flm`: the state of a query at position 0 that
                attends to all states of both streams.
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
        """Returns the decoding state of an empty text for each image, which `step` continues."""
        memory = self.fusion.image_memory(image_BKD, None)
        layer = cast(FusionConfig, self.config.fusion).layer
        past = [KeyValue.empty(layer, memory) for _ in self.fusion.blocks]
        return Cache(self.text.empty_past(memory), past, [block.keys(memory) for block in self.fusion.blocks])

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends one token to each row of `cache`, in place. Returns the state of the token [B D]. It equals the last state
        that a causal `read` of all tokens so far would return."""
        position = torch.full_like(ids_B[:, None], cache.past[0].length)
        x = self.text.step(ids_B[:, None], position, cache.text)
        x = self.fusion.text_in(x) + self.fusion.text_type
        for block, past, memory in zip(self.fusion.blocks, cache.past, cache.image, strict=True):
            x = block(x, past=past, memory=memory)
        return self.fusion.norm(x)[:, 0]
