"""What a step must cost, counted before it is timed: multiplications, bytes, memory.

FLOPs are those of the matrix products, a multiplication and an addition being two, attention counted over all pairs of
positions although a causal kernel skips half. A training step is three forward passes (Kaplan et al., arXiv 2001.08361,
section 2.1); what a chunked loss computes again is not counted, so that MFU means what it does in PaLM (arXiv
2204.02311, appendix B).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvlp.batch import Batch
from fastvlp.dist import Precision
from fastvlp.model.encoders.interface import ImageEncoderConfig, TextEncoderConfig
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import HeadConfig
from fastvlp.model.keep import keep_count
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig
from fastvlp.model.single_stream import SingleConfig
from fastvlp.objectives.ar import AR
from fastvlp.objectives.clip import CLIP
from fastvlp.objectives.flm import FLM
from fastvlp.objectives.itm import ITM
from fastvlp.objectives.mlm import MLM
from fastvlp.objectives.moco import MoCo
from fastvlp.objectives.objective import Objective, PairObjective
from fastvlp.objectives.prefixlm import PrefixLM
from fastvlp.objectives.reconstruct import Reconstruct, ReconstructConfig
from fastvlp.objectives.siglip import SigLIP
from fastvlp.objectives.simclr import SimCLR
from fastvlp.training.pretraining import Pretraining


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one forward pass, by part. `text`: text tower and fusion, the image's keys and values included."""

    image: float = 0
    text: float = 0
    reconstructor: float = 0
    head: float = 0

    @property
    def forward(self) -> float:
        return self.image + self.text + self.reconstructor + self.head

    @property
    def training(self) -> float:
        return 3 * self.forward

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            image=self.image + other.image,
            text=self.text + other.text,
            reconstructor=self.reconstructor + other.reconstructor,
            head=self.head + other.head,
        )


def linear_flops(rows: float, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def _self_attention(layer: LayerConfig, rows: int, length: int) -> float:
    return linear_flops(rows * length, layer.width, 4 * layer.width) + 4.0 * rows * length**2 * layer.width


def _cross_attention(layer: LayerConfig, queries: float, keys: float, pairs: float) -> float:
    """`queries` and `keys` in tokens, `pairs` how often one meets another."""
    return linear_flops(queries + keys, layer.width, 2 * layer.width) + 4.0 * pairs * layer.width


def _mlp(layer: LayerConfig, tokens: float) -> float:
    return 2 * linear_flops(tokens, layer.width, layer.hidden)


def image_flops(config: ImageEncoderConfig, images: int, keep: float = 1.0) -> Flops:
    """The image encoder; `keep`: share of the patches that are embedded at all."""
    if not isinstance(config, ViTConfig):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            config.build()(torch.empty(images, 3, config.size, config.size, dtype=torch.uint8))
        return Flops(image=counter.get_total_flops())
    patches = keep_count(config.grid**2, keep)
    length = patches + config.prefix
    embed = linear_flops(images * patches, 3 * config.patch**2, config.layer.width)
    block = _self_attention(config.layer, images, length) + _mlp(config.layer, images * length)
    return Flops(image=embed + config.depth * block)


def text_flops(config: ModelConfig, images: int, seen: int, texts: int, length: int) -> Flops:
    """Text tower and fusion over `texts` rows of `length` tokens beside `images` of `seen` tokens each, every row with
    the same image counted against one set of keys. One stream: texts = images; FLM's two: texts = 2 images."""
    fusion, tokens, tower = config.fusion, texts * length, tower_flops(config.text, texts, length)
    if fusion is None:
        return tower
    cross = _cross_attention(fusion.layer, tokens, images * seen, tokens * seen)
    block = _self_attention(fusion.layer, texts, length) + cross + _mlp(fusion.layer, tokens)
    width = fusion.layer.width
    enter = linear_flops(tokens, width, width) + linear_flops(images * seen, config.image.width, width)
    return tower + Flops(text=enter + fusion.depth * block)


def tower_flops(config: TextEncoderConfig, texts: int, length: int) -> Flops:
    """The text encoder alone."""
    if not isinstance(config, TextTransformerConfig):
        ids = torch.zeros(texts, length, dtype=torch.int64, device="meta")
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            config.build()(ids, torch.arange(length), causal=True)
        return Flops(text=counter.get_total_flops())
    block = _self_attention(config.layer, texts, length) + _mlp(config.layer, texts * length)
    return Flops(text=config.depth * block)


def single_flops(config: SingleConfig, rows: int, length: int) -> Flops:
    """`rows` of words and regions, `length` of both together; the projection of the features, less than a quarter of one
    layer, is left out."""
    block = _self_attention(config.layer, rows, length) + _mlp(config.layer, rows * length)
    return Flops(text=config.depth * block)


def row_width(config: ModelConfig, batch: Batch) -> int:
    """Tokens that a batch's rows are padded to: of text, and of regions too where one stream reads both."""
    if config.single is None or batch.regions is None:
        return batch.ids.shape[1]
    return int((batch.length + batch.regions.mask.sum(1)).max())


def decoder_flops(told: ReconstructConfig, config: ImageEncoderConfig, images: int, seen: int) -> Flops:
    """MAE's decoder over all patches, of which the dropped ones are asked for."""
    width = told.width
    enter = linear_flops(images * seen, config.width, width)
    asked = images * (config.tokens - seen)
    layer = LayerConfig(width=width, heads=told.heads, hidden=4 * width)
    block = _self_attention(layer, images, config.tokens) + _mlp(layer, images * config.tokens)
    return Flops(image=enter + told.depth * block + linear_flops(asked, width, 3 * (config.size // config.grid) ** 2))


def reconstructor_flops(config: ModelConfig, rows: int, queries: int, length: int) -> Flops:
    """`queries` a row read both streams of `length` tokens each."""
    part = config.reconstructor
    if part is None:
        return Flops()
    asked, keys = rows * queries, rows * 2 * length
    block = _cross_attention(part.layer, asked, keys, asked * 2 * length) + _mlp(part.layer, asked)
    enter = linear_flops(asked, part.layer.width, part.layer.width)
    return Flops(reconstructor=enter + (part.bottom + part.top) * block)


def head_flops(config: ModelConfig, targets: float) -> Flops:
    """The vocabulary head on `targets` tokens."""
    width = config.text.width
    return Flops(head=linear_flops(targets, width, width + config.text.vocab))


def attended_flops(head: HeadConfig, rows: int, length: int) -> float:
    """The blocks of a tower's head over `length` states or regions; what joins them to the tower is left out."""
    if head.layer is None:
        return 0.0
    return head.depth * (_self_attention(head.layer, rows, length) + _mlp(head.layer, rows * length))


def pair_flops(objective: PairObjective, config: ModelConfig, rows: int, length: int, seen: int, regions: int) -> Flops:
    """Texts and heads of two towers. The joint space and the logits are thousands of times smaller at any batch that
    fits."""
    embed = config.embed
    if embed is None:
        return tower_flops(config.text, rows, length)
    positions, pool = embed.positions(length), embed.image.regions
    if isinstance(objective, CLIP | SigLIP | MoCo):
        positions = keep_count(positions, objective.config.text_keep)
    if pool is not None:
        seen = regions if pool.grid is None else pool.grid**2 + 1
    made = tower_flops(config.text, rows, positions) + Flops(
        image=attended_flops(embed.image, rows, seen), text=attended_flops(embed.text, rows, positions)
    )
    if isinstance(objective, MoCo):
        # Keys are made without gradients: a third of what `training` counts for a pass.
        keys = made + image_flops(config.image, rows, objective.config.key_keep)
        made += Flops(image=keys.image / 3, text=keys.text / 3)
    return made


def objective_flops(
    objective: Objective, config: ModelConfig, rows: int, length: int, keep: float = 1.0, regions: int = 0
) -> Flops:
    """One forward pass of an objective beside encoded images, up to the vocabulary. regions: boxes that travel with each.

    An objective that is none of the pretraining ones counts as one summary by its `reading`: its own head is small.
    """
    seen = keep_count(config.image.grid**2, keep) + config.image.prefix
    if config.single is not None:
        return single_flops(config.single, rows, length)
    if isinstance(objective, SimCLR):
        return image_flops(config.image, 2 * rows, objective.config.keep)
    if isinstance(objective, PairObjective):
        return pair_flops(objective, config, rows, length, seen, regions)
    if isinstance(objective, Reconstruct):
        return decoder_flops(objective.config, config.image, rows, seen)
    if objective.reading == "flm":
        queries = length - 1 if isinstance(objective, FLM) else 1
        return text_flops(config, rows, seen, 2 * rows, length) + reconstructor_flops(config, rows, queries, length)
    one = text_flops(config, rows, seen, rows, length)
    if isinstance(objective, ITM):
        both = text_flops(config, rows, seen, 2 * rows, length)
        candidates = min(objective.config.candidates, rows - 1)
        # Scored without gradients: a third of what `training` counts for a pass.
        scored = one.text * candidates / 3 if candidates > 1 else 0.0
        return both + Flops(text=scored)
    return one


def step_flops(
    pretraining: Pretraining, shapes: Iterable[tuple[int, int]], targets: Mapping[str, float], regions: int = 0
) -> Flops:
    """Micro-batches of `shapes` (rows, tokens that they are padded to); `targets`: of all together, as
    `Pretraining.counts` names them; `regions`: boxes that travel with each image."""
    config, keep, total = pretraining.model.config, pretraining.keep, Flops()
    for rows, length in shapes:
        towers = config.single is None or config.single.regions.pool is not None
        total += image_flops(config.image, rows, keep) if towers else Flops()
        for _, objective in pretraining.named():
            total += objective_flops(objective, config, rows, length, keep, regions)
    for term, count in targets.items():
        if isinstance(pretraining.objectives[term.split("/")[0]], FLM | AR | MLM | PrefixLM):
            total += head_flops(config, count)
    return total


def adamw_bytes(parameters: int) -> int:
    """Bytes that a fused fp32 AdamW step must move: weight, gradient, two moments in; all but the gradient out."""
    return parameters * 4 * (4 + 3)


# Dense peaks, FLOP/s: (bf16 tensor cores, plain fp32). NVIDIA's data sheets of H100 (2023), H200 (2024), A100 (2021),
# which print the bf16 figures of Hopper with 2:4 sparsity, twice these. First match of the device's name wins.
_PEAKS = (
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
)


def peak_flops(device: torch.device | str, precision: Precision = "bf16") -> float | None:
    """The device's peak in FLOP/s, None where it is not known: then FLOP/s are reported instead of MFU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((bf16 if precision == "bf16" else fp32 for key, bf16, fp32 in _PEAKS if key in name), None)


def peak_memory(device: torch.device | str) -> int:
    """Most bytes held so far: of the device's tensors, or of this process where the device is the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux lets a new process begin with the peak of the one that started it.
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
