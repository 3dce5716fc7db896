"""The part of the captions that `max_length` cuts off, which is never read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from fastvlp.data.records.interface import Records
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import RecordError
from fastvlp.data.tokenize import Tokenizer

# Tokens of `<s>` and `</s>`, for which a text has no room.
MARKS = 2


@dataclass(kw_only=True)
class CaptionCut:
    """Captions and tokens, and how many of them are cut.

    Attributes:
        max_length: tokens of a text, `<s>` and `</s>` included.
        captions, cut: how many captions there are, and how many are longer.
        tokens, lost: their tokens without `<s>` and `</s>`, and those that are cut off.
    """

    max_length: int
    captions: int = 0
    cut: int = 0
    tokens: int = 0
    lost: int = 0

    def add_lengths(self, lengths: Sequence[int]) -> None:
        """Adds captions by their numbers of tokens, `<s>` and `</s>` included."""
        self.captions += len(lengths)
        self.cut += sum(length > self.max_length for length in lengths)
        self.tokens += sum(length - MARKS for length in lengths)
        self.lost += sum(max(0, length - self.max_length) for length in lengths)

    def add(self, texts: list[str], tokenizer: Tokenizer) -> None:
        if texts:
            self.add_lengths(tokenizer.encode(texts, max_length=1 << 16)[1].tolist())

    def __str__(self) -> str:
        return (
            f"`max_length` {self.max_length} cuts {self.cut:,} of {self.captions:,} captions "
            f"({self.cut / max(1, self.captions):.1%}) and {self.lost / max(1, self.tokens):.1%} of their tokens"
        )


def sample_cut(shards: Records, field: str, tokenizer: Tokenizer, max_length: int, most: int) -> CaptionCut:
    """Counts the tokens that are cut off from the captions of up to `most` records, which are spread evenly over a split."""
    cut = CaptionCut(max_length=max_length)
    step = max(1, len(shards) // most)
    for i in islice(range(0, len(shards), step), most):
        try:
            texts = usable_captions(shards.info(i), field)
        except RecordError:
            continue
        cut.add(texts, tokenizer)
    return cut
