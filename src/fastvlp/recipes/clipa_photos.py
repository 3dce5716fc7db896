"""CLIPA (arXiv 2305.07017): smaller images and shorter texts first, then a tenth of the run on full ones.

    vlp data import PAIRS --out photos --val 0.1 --max-side 192
    vlp pretrain clipa_photos
    vlp compare clip_photos clipa_photos reclip_photos flip_whole_photos reclip_flip_photos --budget 20m

At first an image has 16 patches instead of 49, and a text 14 words instead of 48. The paper trains its two stages one after the
other, each with a schedule of its own; here one schedule covers both. With smaller towers, four minutes of a CPU core and
6,000 photographs, a recall of 4.5 ± 0.2 % (clip_photos 2.9 ± 0.1 %; docs/log.md, entry 56).
"""

from dataclasses import replace

from fastvlp.recipes.clip_photos import clip_photos
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def clipa_photos() -> TrainConfig:
    run = clip_photos()
    reduced = ReducedStart(share=0.9, size=64, max_length=16)
    return replace(run, name="clipa_photos", data=replace(run.data, batch_size=128), reduced=reduced)
