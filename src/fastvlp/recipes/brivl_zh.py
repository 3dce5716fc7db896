"""BriVL on Chinese captions, for which it was made: brivl_photos with a tokenizer trained on them.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192      # a column caption_zh, or a field captions_zh
    vlp pretrain brivl_zh

With a smaller model and in three minutes: 1.2 % retrieval recall, where clip_photos on the same captions had 2.9 %
(docs/log.md, entry 13).
"""

from dataclasses import replace

from fastvlp.data.pairs import PairData
from fastvlp.recipes.brivl_photos import brivl_photos
from fastvlp.training.train_config import TrainConfig


def brivl_zh() -> TrainConfig:
    run = brivl_photos()
    data = PairData(train="photos/train", val="photos/val", batch_size=32, fit="squash", captions="captions_zh")
    return replace(run, name="brivl_zh", data=data)
