"""Pictures and texts that every target is compared on, and what the run makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvlp.data.records.schema import clean_text
from fastvlp.data.records.transform import CENTRE, Transform
from fastvlp.exporters.interface import ExportSource

# Beside texts of the model's own words: short, long, empty, in two languages, with marks, and with odd characters.
TEXTS = (
    "a dog on a beach",
    "",
    "  Two   cups\ton a table\n",
    "A RED circle, left of 2 blue squares!",
    "沙滩上的狗",
    "桌子上有两个红色的杯子，旁边是a cat。",
    "naïve café – “quotes” … ½ ﬁ",
    "\u200bzero\u00a0width \ufeff bom",
    "🐕🏖️ dog",
    "a very long text about many things " * 30,
)


@dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """Inputs and what a run makes of them.

    Attributes:
        pictures: uint8 [n 3 H W], before they are made the model's square.
        seen: The squares, uint8 [n 3 size size].
        texts: Raw texts, n of them.
        cleaned: The texts as `Embedder` cleans them.
        ids: Token ids that an exported tokenizer gives [n L], padded with -1.
        image_vectors: Unit vectors [n E].
        text_vectors: Unit vectors [n E].
    """

    pictures: Tensor
    seen: Tensor
    texts: Sequence[str]
    cleaned: Sequence[str]
    ids: Tensor
    image_vectors: Tensor
    text_vectors: Tensor

    def token_difference(self, ids: Tensor) -> float:
        """Returns how many of the texts have other ids; padding does not count."""
        wrong = 0
        for own, other in zip(self.ids.tolist(), ids.tolist()):
            real = [i for i in own if i >= 0]
            wrong += other[: len(real)] != real or len(set(other[len(real) :])) > 1
        return float(wrong)


def sample_inputs(source: ExportSource) -> SampleInputs:
    """Makes inputs for a run with a joint space, and encodes them."""
    model, tokenizer = source.saved.model.eval(), source.saved.tokenizer
    config, embed = model.config, model.embed
    assert embed is not None
    generator = torch.Generator().manual_seed(0)
    fit = source.config.data.fit
    # Of the size that needs no resampling, of which libraries differ by a level or two.
    size = round(config.image.size / CENTRE) if fit == "centre" else config.image.size
    ramp = torch.arange(size) * 255 // max(1, size - 1)
    pictures = [ramp.expand(3, size, size), ramp[:, None].expand(3, size, size)]
    pictures += [*torch.randint(0, 256, (2, 3, size, size), generator=generator)]
    image = torch.stack(pictures).to(torch.uint8)
    transform = Transform(size=config.image.size, mode=fit)
    seen = torch.stack([transform(x.permute(1, 2, 0)) for x in image])
    words = torch.randint(0, tokenizer.vocab_size, (4, 6), generator=generator)
    texts = [*TEXTS, *(tokenizer.decode(row) for row in words)]
    cleaned = [clean_text(text) or "" for text in texts]
    ids, length = tokenizer.encode(cleaned, source.max_length)
    with torch.inference_mode():
        # The text graph drops <s> and </s> by itself where the encoder does not read them.
        special = embed.config.text_special
        read, real = embed.words(ids, length, config.text) if special else (ids, length)
        position = torch.arange(read.shape[1])
        return SampleInputs(
            pictures=image,
            seen=seen,
            texts=texts,
            cleaned=cleaned,
            ids=read.masked_fill(position >= real[:, None], -1),
            image_vectors=model.embed_image(model.encode_image(seen)),
            text_vectors=model.embed_text(ids, length),
        )


def vector_difference(vectors: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference of vectors, scaled to length one, from unit vectors; infinity where shapes differ."""
    if vectors.shape != wanted.shape:
        return float("inf")
    own = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    return float((own - wanted.double()).abs().max())
