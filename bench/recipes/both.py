"""The model of two languages that docs/log.md searches with: flip50.py on English and Chinese captions, 8,000 tokens.

vlp pretrain both.py --budget-s 420
"""

from dataclasses import replace

from flip50 import flip50

from fastvlp.training.train_config import TrainConfig


def both() -> TrainConfig:
    run = flip50()
    data = replace(run.data, captions="captions+captions_zh")
    return replace(run, name="both", data=data, vocab=8000, budget_s=420)
