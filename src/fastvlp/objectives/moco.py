"""Contrastive learning with a queue of keys from earlier steps (MoCo, arXiv 1911.05722; BriVL, arXiv 2103.06561).

The number of negatives of a step is the length of the queue, even if only few pairs fit into memory. The keys are embeddings by
a copy of the model that follows it slowly, so that keys of some hundred steps ago are still similar to new ones.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastvlp import dist
from fastvlp.batch import Batch
from fastvlp.config import PositiveShare, Share
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.absent import Absent
from fastvlp.model.joint_space import unit
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.contrastive import queue_nce
from fastvlp.objectives.objective import Loss, PairObjective, constant
from fastvlp.objectives.pair_embedding import PairsConfig, embed_pair, pair_contents

# Bounds of the temperature; a learned one is kept within them, as in ALBEF's released code.
COLDEST, WARMEST = 0.001, 0.5


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(PairsConfig):
    """Find each image's own text among the keys of earlier texts, and each text's own image. The defaults are those of the
    released BriVL 1.0; `albef` has ALBEF's."""

    mode: Literal["pos+queue", "batch+queue"] = "pos+queue"
    """Candidates of a row: its own key and the queue (pos+queue), or all keys of the step and the queue (batch+queue; ALBEF,
    BriVL 2)."""
    queue: int = 9600
    """Number of keys of each modality in the queue. A batch may be larger."""
    momentum: Share = 0.99
    """Momentum: share of its old weights that the copy keeps at each step."""
    temperature: float = 0.07
    """Temperature of the softmax; its initial value if it is learned."""
    temperature_learned: bool = False
    """Whether the temperature is learned."""
    alpha: Share = 0.0
    """With batch+queue: share of a row's target that is the copy's own prediction (ALBEF, arXiv 2107.07651, section 3.4)."""
    directions: Literal["sum", "mean"] = "sum"
    """How the losses of images and of texts are combined."""
    warm: bool = False
    """Use only the keys that were written so far, until the queue is full. Otherwise the queue starts with random vectors, as
    in the released code."""
    key_keep: PositiveShare = 1.0
    """Share of an image's patches that the copy encodes. If it equals the run's `keep`, they are the same patches."""
    buffers: Literal["copy", "own"] = "copy"
    """Buffers of the momentum copy, such as statistics of batch norms: copy takes those of the model, own updates its own, as
    in the released code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue < 1:
            raise ValueError(f"`queue` is a number of keys, at least 1, not {self.queue}; without a queue choose CLIP")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"`momentum` is a share, 0 to 1, such as 0.99, not {self.momentum}")
        if not COLDEST <= self.temperature <= WARMEST:
            raise ValueError(f"`temperature` is from {COLDEST} to {WARMEST}, not {self.temperature}")
        if not 0 <= self.alpha <= 1 or (self.alpha and self.mode == "pos+queue"):
            raise ValueError(f'`alpha` {self.alpha} is a share of the target, 0 to 1, and needs mode "batch+queue"')
        if not 0 < self.key_keep <= 1:
            raise ValueError(f"`key_keep` is a share of the patches, above 0 and up to 1, not {self.key_keep}")

    def for_tuning(self) -> PairsConfig:
        """Returns the config without the queue, which would be longer than an epoch if there are few pairs."""
        return CLIPConfig(temperature=max(self.temperature, 1 / CLIPConfig.max_scale))

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> MoCo:
        self.check(model)
        if model.embed is None:
            raise UserError("the queue needs embeddings, and the model has no joint space; set `model.embed`")
        return MoCo(self, model.embed.width)


def albef(queue: int = 65536) -> MoCoConfig:
    """ALBEF's contrastive loss (arXiv 2107.07651; salesforce/ALBEF b9727e4), without the slow start of alpha."""
    return MoCoConfig(
        mode="batch+queue",
        queue=queue,
        momentum=0.995,
        temperature_learned=True,
        alpha=0.4,
        directions="mean",
    )


def momentum_copy(model: VLModel) -> VLModel:
    """A copy of the encoders and their heads that gets no gradients. Frozen parameters are shared: they never differ."""
    left_out = (model.fusion, model.reconstructor, model.head, model.forward_head, model.reverse_head)
    # `deepcopy` takes the entries of this dict as copies that were already made.
    copies: dict[int, Any] = {id(part): Absent("fusion") for part in left_out if part is not None}
    copies |= {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return deepcopy(model, copies).requires_grad_(False)


class MoCo(PairObjective):
    """The state that a resumed run needs: the copy `slow`, both queues [K E], the `contents` [K 2] of the pairs of their keys,
    and the number of keys `written` so far, whose remainder by K is the place of the next key."""

    slow: VLModel
    image_queue: Tensor
    text_queue: Tensor
    queue_content: Tensor
    written: Tensor

    def __init__(self, config: MoCoConfig, width: int):
        super().__init__()
        self.config = config
        self.text_use = config.text_use
        self.temperature = nn.Parameter(torch.tensor(config.temperature), requires_grad=config.temperature_learned)
        for name in ("image_queue", "text_queue"):
            # Drawn from the run's seed, like weights, so that all ranks have the same queue.
            self.register_buffer(name, unit(nn.init.normal_(torch.empty(config.queue, width))))
        # No pair has these contents, because the first entries of a queue are not keys of pairs.
        self.register_buffer("queue_content", torch.full((config.queue, 2), -1))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.latest: tuple[Tensor, ...] | None = None
        # The micro-batches of the step so far; they are scored together.
        self.micro = 0
        self._is_full = False
        # There are no stored states for only some of the patches.
        self.image_use = "embedding" if config.key_keep == 1 else "pixels"

    def begin(self, model: VLModel) -> None:
        self.slow = momentum_copy(model)

    def kept(self) -> dict[str, Tensor]:
        return {"temperature": self.temperature}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(("image", "text"), constant(len(batch), batch.length))

    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return embed_pair(model, image_BKD, batch, self.config, drops_parts=self.drops_parts)

    @torch.no_grad()
    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        """Returns the keys of images and texts, two [B E]; the number of their micro-batch [B]; and the contents of the pairs,
        if equal pairs are left out."""
        share = self.config.key_keep if self.drops_parts else 1.0
        keep_BK = self.slow.config.image.random_patches(batch.seed, share, batch.image)
        image_BKD = self.slow.encode_image(batch.image, keep_BK)
        keys = embed_pair(self.slow, image_BKD, batch, self.config, drops_parts=self.drops_parts)
        micro_B = torch.full_like(batch.length, self.micro)
        self.micro += self.training
        return *keys, micro_B, *pair_contents(batch, self.config)

    def _filled(self) -> int:
        """Returns the number of keys in the queue. The number is on the device, so this waits for the device until the queue is
        full."""
        if not self._is_full:
            written = int(self.written)
            self._is_full = written >= self.config.queue
            return min(written, self.config.queue)
        return self.config.queue

    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """Returns the losses of finding each image's text among the keys of texts, and each text's image among the keys of
        images. The queue has the keys of earlier steps.

        In validation the candidates are the rows of the batch. With the queue the loss would stay constant or rise as the
        negatives become harder, and the first weights would seem to be the best.
        """
        image_BE, text_BE, image_key_BE, text_key_BE, micro_B, *contents = rows
        config, filled = self.config, 0
        mode, alpha = (config.mode, config.alpha) if self.training else ("batch+queue", 0.0)
        (images, first), (texts, _) = self.gather_rows(image_key_BE, least=1), self.gather_rows(text_key_BE, least=1)
        content = self.gather_contents(*contents)
        if self.training:
            self.micro = 0
            # Micro-batches are distributed over the ranks. This is the order that they would have on one rank; the oldest keys
            # are replaced first.
            order_M = self.gather_rows(micro_B, least=1)[0].argsort(stable=True)
            latest = (images, texts) if content[1] is None else (images, texts, content[1])
            self.latest = tuple(rows[order_M] for rows in latest)
            filled = self._filled() if config.warm else config.queue
        own = first + torch.arange(len(image_BE), device=image_BE.device)
        weight = config.weight / (2 if config.directions == "mean" else 1)

        def loss(query_BE: Tensor, key_ME: Tensor, queue_KE: Tensor, other_BE: Tensor) -> Loss:
            soft_BE = other_BE if alpha else None
            each = queue_nce(
                query_BE,
                key_ME,
                queue_KE[:filled],
                own,
                1 / self.temperature,
                mode,
                soft_BE,
                alpha,
                content=content,
                queue_content_K2=self.queue_content[:filled],
            )
            return Loss(each.sum(), constant(len(own), own), weight)

        return {
            "image": loss(image_BE, texts, self.text_queue, image_key_BE),
            "text": loss(text_BE, images, self.image_queue, text_key_BE),
        }

    @torch.no_grad()
    def after_step(self, model: VLModel) -> None:
        """Updates the copy and the queues. The released code updates the copy at the start of a step, before it makes the keys.
        An update at the end of the previous step is the same, since copy and model are equal at first."""
        self.follow(model)
        self.remember()
        if self.config.temperature_learned:
            self.temperature.clamp_(COLDEST, WARMEST)

    @torch.no_grad()
    def follow(self, model: VLModel) -> None:
        """Updates the copy in place: slow <- m slow + (1 - m) model."""
        fast = dict(model.named_parameters())
        moved = {name: p for name, p in self.slow.named_parameters() if p is not fast[name]}
        # If the weights are divided among ranks, both are divided in the same way.
        slow, current = dist.own_parts(moved.values()), dist.own_parts(fast[name] for name in moved)
        get_ema_multi_avg_fn(self.config.momentum)(slow, current, None)
        if self.config.buffers == "copy":
            buffers = dict(model.named_buffers())
            for name, buffer in self.slow.named_buffers():
                buffer.copy_(buffers[name])

    def remember(self) -> None:
        """Replaces the oldest keys by those of the step from all ranks."""
        if self.latest is None:
            return
        (count, _), K = self.latest[0].shape, self.config.queue
        newest = torch.arange(max(0, count - K), count, device=self.written.device)
        for queue, key in zip((self.image_queue, self.text_queue, self.queue_content), self.latest):
            queue[(self.written + newest) % K] = key[newest]
        self.written += count
        self.latest = None
