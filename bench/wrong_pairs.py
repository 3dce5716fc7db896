"""Measure whether UNITER's wrong pairs can be recognised by their numbers of words and regions alone.

    python bench/wrong_pairs.py                          # texts and regions of the sizes of UNITER's data
    python bench/wrong_pairs.py --data demo/world/train  # the embedded corpus

Pairs are cut into batches of a budget of tokens, and wrong pairs are made in each, as the objective makes them now and by
the rule it had before: any other image that does not make the row longer than the longest of the batch. The area under the
curve (AUC) is the chance that a right pair has more regions than a wrong one; 0.5 says nothing. `words and regions`: the AUC
of the share of right pairs among others with the same numbers, where half of the batches tell it for the other half. Takes
under a minute on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from fastvlp.batch import Batch, Regions
from fastvlp.data.batching import avoid_single_row, budget_sizes
from fastvlp.data.records.shards import Shards
from fastvlp.data.regions import RegionSource, region_count
from fastvlp.objectives.wra import COIN_SALT, OTHER_SALT, WRA, WRAConfig
from fastvlp.random import mix64, uniform

# Text lengths and numbers of regions of UNITER's data: mean, standard deviation, limits.
WORDS, REGIONS = (13.5, 3.5, 3, 62), (36.0, 16.0, 10, 100)


@dataclass(frozen=True, kw_only=True)
class Options:
    data: str | None = None
    """A split whose captions and regions are counted; by default the sizes are drawn at random."""
    pairs: int = 60_000
    """Pairs that are drawn."""
    max_tokens: int = 10_240
    """Budget of a batch."""
    group: int = 8192
    """Pairs among which batches are made."""


def sizes(o: Options) -> tuple[Tensor, Tensor]:
    """Tokens of the text and number of regions of each pair."""
    if o.data is not None:
        infos = [shards.info(i) for shards in [Shards(o.data)] for i in range(len(shards))]
        words = [len(info["captions"][0].split()) + 2 for info in infos]
        return torch.tensor(words), torch.tensor([region_count(RegionSource(stored=True), info) for info in infos])
    draw = torch.Generator().manual_seed(0)
    words, regions = (
        (mean + std * torch.randn(o.pairs, generator=draw)).round().clamp(low, high).long()
        for mean, std, low, high in (WORDS, REGIONS)
    )
    return words, regions


def batches(o: Options) -> Iterator[Batch]:
    """Batches of numbers alone; each pair has a text and an image of its own."""
    words, regions = sizes(o)
    for bucket in torch.arange(len(words)).split(o.group):
        total = (words + regions)[bucket]
        longest_first = bucket[total.argsort(descending=True, stable=True)]
        for row in longest_first.split(avoid_single_row(budget_sizes((words + regions)[longest_first], o.max_tokens))):
            content = torch.stack([row, row], 1)
            counted = Regions(box=torch.zeros(len(row), 1, 4), count=regions[row])
            yield Batch(
                image=row[:, None],
                ids=row[:, None],
                length=words[row],
                seed=mix64(row),
                regions=counted,
                content=content,
            )


def before(batch: Batch) -> tuple[Tensor, Tensor]:
    """The number of regions of each row, and which are right, by the earlier rule."""
    own = torch.arange(len(batch))
    length, count = batch.length, batch.regions.count
    fits = (own[:, None] != own) & (length[:, None] + count <= (length + count).max())
    other = uniform(batch.seed, (len(batch),), OTHER_SALT).masked_fill(~fits, 2.0).argmin(1)
    wrong = (uniform(batch.seed, (), COIN_SALT) < 0.5) & fits.any(1)
    return count[torch.where(wrong, other, own)], ~wrong


def now(batch: Batch) -> tuple[Tensor, Tensor]:
    objective = WRA(WRAConfig())
    text, image, right = objective.pairs(batch)
    return objective.regions(batch, text, image).count, right


def auc(score: Tensor, right: Tensor) -> float:
    """The chance that a right pair scores higher than a wrong one; equal scores count a half."""
    values, place = score.unique(return_inverse=True)
    rights, wrongs = (torch.bincount(place[chosen], minlength=len(values)).double() for chosen in (right, ~right))
    below = wrongs.cumsum(0) - wrongs / 2
    return float((rights * below).sum() / (rights.sum() * wrongs.sum()))


def known_share(key: Tensor, right: Tensor, part: Tensor) -> Tensor:
    """For each pair, the share of right pairs among those of the other half with the same key; a half where there are few."""
    _, place = key.unique(return_inverse=True)
    share = torch.empty(len(key), dtype=torch.float64)
    for half in (0, 1):
        other = part != half
        count, rights = (
            torch.bincount(place[chosen], minlength=int(place.max()) + 1) for chosen in (other, other & right)
        )
        share[part == half] = ((rights + 1).double() / (count + 2))[place[part == half]]
    return share


def main(o: Options) -> None:
    made = [*batches(o)]
    part = torch.cat([torch.full((len(batch),), k % 2) for k, batch in enumerate(made)])
    for name, rule in {"before": before, "now": now}.items():
        drawn = [rule(batch) for batch in made]
        right = torch.cat([right for _, right in drawn])
        regions = torch.cat([count for count, _ in drawn])
        words = torch.cat([batch.length for batch in made])
        longest = torch.cat([(batch.length + batch.regions.count).max().expand(len(batch)) for batch in made])
        found = {
            "regions": auc(regions, right),
            "regions and words": auc(known_share(words * 1000 + regions, right, part), right),
            "regions and words, given the longest row": auc(
                known_share((words + regions - longest) * 1000 + longest, right, part), right
            ),
        }
        print(f"{name}: {len(right)} pairs in {len(made)} batches, {(~right).double().mean():.1%} wrong; AUC by")
        for feature, value in found.items():
            print(f"  {feature}: {value:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
