"""Contrast with momentum keys and a queue of earlier ones, across modalities (MoCo, arXiv 1911.05722; BriVL, 2103.06561).

The negatives of a step are as many as the queue is long, however few pairs fit into memory. Beside the towers goes a copy
that follows them slowly: its embeddings, the keys, are still alike when they are contrasted some hundred steps later.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastvlp.batch import Batch
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.absent import Absent
from fastvlp.model.joint_space import unit
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.objectives.contrastive import queue_nce
from fastvlp.objectives.mismatched_pairs import PairsConfig, embed_pair
from fastvlp.objectives.objective import Loss, PairObjective

# Of temperatures; a learned one is kept within (ALBEF, released code).
COLDEST, WARMEST = 0.001, 0.5


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(PairsConfig):
    """The values of the released BriVL 1.0; `albef` has ALBEF's.

    mode: a row's candidates are its own key and the queue, or all keys of the step and the queue (ALBEF, BriVL 2).
    queue: keys of each modality that are remembered; a batch may be of any size, also larger. momentum: share of itself
    that the copy keeps at each step. temperature: fixed, or learned from there. alpha: share of the target that is the
    copy's own opinion, with "batch+queue" (ALBEF, arXiv 2107.07651, section 3.4). directions: the sum of both, or the mean.
    warm: only what was written counts until the queue is full; otherwise it begins as random vectors, as released.
    key_keep: share of the patches that the copy encodes (FLIP's keep); at the same share the queries' very patches.
    buffers: of the copy, its towers' (`copy`), or what its own passes make of them (`own`, as released: batch norms).
    """

    mode: Literal["pos+queue", "batch+queue"] = "pos+queue"
    queue: int = 9600
    momentum: float = 0.99
    temperature: float = 0.07
    temperature_learned: bool = False
    alpha: float = 0.0
    directions: Literal["sum", "mean"] = "sum"
    warm: bool = False
    key_keep: float = 1.0
    buffers: Literal["copy", "own"] = "copy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue < 1:
            raise ValueError(f"queue is a number of keys, at least 1, not {self.queue}; without a queue choose CLIP")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum is a share, 0 to 1, such as 0.99, not {self.momentum}")
        if not COLDEST <= self.temperature <= WARMEST:
            raise ValueError(f"temperature is within {COLDEST} to {WARMEST}, not {self.temperature}")
        if not 0 <= self.alpha <= 1 or (self.alpha and self.mode == "pos+queue"):
            raise ValueError(f'alpha {self.alpha} is a share of the target, 0 to 1, and needs mode "batch+queue"')
        if not 0 < self.key_keep <= 1:
            raise ValueError(f"key_keep is a share of the patches, above 0 and up to 1, not {self.key_keep}")

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> MoCo:
        self.check(model)
        if model.embed is None:
            raise UserError("the queue holds embeddings, and the model has none; set model.embed")
        return MoCo(self, model.embed.width)


def albef(queue: int = 65536) -> MoCoConfig:
    """ALBEF's contrastive part (arXiv 2107.07651; salesforce/ALBEF b9727e4), without the slow start of alpha."""
    return MoCoConfig(
        mode="batch+queue",
        queue=queue,
        momentum=0.995,
        temperature_learned=True,
        alpha=0.4,
        directions="mean",
    )


def momentum_copy(model: VLModel) -> VLModel:
    """The towers and their heads, which learn nothing by gradients. What is frozen there is shared: it would never differ."""
    left_out = (model.fusion, model.reconstructor, model.head, model.forward_head, model.reverse_head)
    # What deepcopy finds here it takes for the copy.
    known: dict[int, Any] = {id(part): Absent("fusion") for part in left_out if part is not None}
    known |= {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return deepcopy(model, known).requires_grad_(False)


class MoCo(PairObjective):
    """State that a resumed run needs: the copy `slow`, both queues [K E], and how many keys were `written`, of which the
    remainder by K is the place of the next."""

    slow: VLModel
    image_queue: Tensor
    text_queue: Tensor
    written: Tensor

    def __init__(self, config: MoCoConfig, width: int):
        super().__init__()
        self.config = config
        self.text_use = config.text_use
        self.temperature = nn.Parameter(torch.tensor(config.temperature), requires_grad=config.temperature_learned)
        for name in ("image_queue", "text_queue"):
            # Drawn as weights are, from the run's seed: the same on every rank.
            self.register_buffer(name, unit(nn.init.normal_(torch.empty(config.queue, width))))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.latest: tuple[Tensor, Tensor] | None = None
        # Of some patches alone there are no stored states.
        self.image_use = "embedding" if config.key_keep == 1 else "pixels"

    def begin(self, model: VLModel) -> None:
        self.slow = momentum_copy(model)

    def kept(self) -> dict[str, Tensor]:
        return {"temperature": self.temperature}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return dict.fromkeys(("image", "text"), batch.length.new_tensor(len(batch)))

    def embed(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        return embed_pair(model, image_BKD, batch, self.config)

    @torch.no_grad()
    def constants(self, model: VLModel, batch: Batch) -> tuple[Tensor, ...]:
        """Keys of images and texts, two [B E]."""
        keep_BK = self.slow.config.image.random_patches(batch.seed, self.config.key_keep)
        return embed_pair(self.slow, self.slow.encode_image(batch.image, keep_BK), batch, self.config)

    def score(self, *rows: Tensor) -> dict[str, Loss]:
        """Each image among keys of texts and the reverse; the queue is as it was before the step.

        In validation a row is told apart from the others of its batch: the loss over a queue stays where it is, or rises,
        while negatives get harder, and would call the first weights the best."""
        image_BE, text_BE, image_key_BE, text_key_BE = rows
        told, filled = self.config, 0
        mode, alpha = (told.mode, told.alpha) if self.training else ("batch+queue", 0.0)
        (images, first), (texts, _) = self.everyone(image_key_BE, least=1), self.everyone(text_key_BE, least=1)
        if self.training:
            self.latest = images, texts
            filled = min(int(self.written), told.queue) if told.warm else told.queue
        own = first + torch.arange(len(image_BE), device=image_BE.device)
        weight = told.weight / (2 if told.directions == "mean" else 1)

        def loss(query_BE: Tensor, key_ME: Tensor, queue_KE: Tensor, other_BE: Tensor) -> Loss:
            soft_BE = other_BE if alpha else None
            each = queue_nce(query_BE, key_ME, queue_KE[:filled], own, 1 / self.temperature, mode, soft_BE, alpha)
            return Loss(each.sum(), own.new_tensor(len(own)), weight)

        return {
            "image": loss(image_BE, texts, self.text_queue, image_key_BE),
            "text": loss(text_BE, images, self.image_queue, text_key_BE),
        }

    @torch.no_grad()
    def after_step(self, model: VLModel) -> None:
        """The released code lets the copy follow at the start of a step, before it makes the keys. Done at the end of the
        step before, that is the same: the first time, copy and towers are equal."""
        self.follow(model)
        self.remember()
        if self.config.temperature_learned:
            self.temperature.clamp_(COLDEST, WARMEST)

    @torch.no_grad()
    def follow(self, model: VLModel) -> None:
        """In place: slow <- m slow + (1 - m) model."""
        fast = dict(model.named_parameters())
        moved = {name: p for name, p in self.slow.named_parameters() if p is not fast[name]}
        get_ema_multi_avg_fn(self.config.momentum)([*moved.values()], [fast[name] for name in moved], None)
        if self.config.buffers == "copy":
            current = dict(model.named_buffers())
            for name, buffer in self.slow.named_buffers():
                buffer.copy_(current[name])

    def remember(self) -> None:
        """Writes the step's keys, of all ranks in rank order, over the oldest ones."""
        if self.latest is None:
            return
        (count, _), K = self.latest[0].shape, self.config.queue
        newest = torch.arange(max(0, count - K), count, device=self.written.device)
        for queue, key in zip((self.image_queue, self.text_queue), self.latest):
            queue[(self.written + newest) % K] = key[newest]
        self.written += count
        self.latest = None
