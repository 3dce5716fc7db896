"""Arm `clip` of the towers compared in docs/log.md (bench/results/compare_towers_en.json): plain CLIP, which the others vary.

    vlp compare clip.py siglip.py flip50.py flip75.py brivl.py flip_clip_flm.py clip_simclr.py flip50_crop.py --budget 9m \
      --slice 5s --marks 0.5 1 --pictures 0 --threads 1

Reads flickr8k/, as `vlp data import` writes it. The batches of all arms fill about the same memory.
"""

from fastvlp.data.pairs import PairData
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.model.encoders.vit import ViTConfig
from fastvlp.model.joint_space import EmbedConfig, HeadConfig
from fastvlp.model.layers import LayerConfig
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig

LAYER = LayerConfig(width=128, heads=4, hidden=512)


def clip() -> TrainConfig:
    return TrainConfig(
        name="clip",
        data=PairData(
            train="flickr8k/train", val="flickr8k/val", test="flickr8k/test", batch_size=64, max_length=34, fit="crop"
        ),
        model=ModelConfig(
            image=ViTConfig(size=64, patch=8, depth=4, layer=LAYER),
            text=TextTransformerConfig(positions=64, depth=2, layer=LAYER),
            embed=EmbedConfig(width=128, image=HeadConfig(pool="mean"), text=HeadConfig(pool="last", norm=True)),
        ),
        objectives={"clip": CLIPConfig()},
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, cross_multiplier=1, head_multiplier=1, warmup=0.1, decay="cosine"),
        vocab=5000,
        budget_s=540,
        precision="bf16",
    )
