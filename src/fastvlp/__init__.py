"""Pretrain vision-language models fast, on your own image-text pairs.

The functions and classes for a notebook, in the order of their use:

- `import_data` imports your files into shards.
- `recipe` returns the config of a named recipe, and `train` trains it, or a `TrainConfig` of your own.
- `finetune_contrast` fine-tunes a model such as CLIP, public or your own, on your pairs.
- `finetune` fine-tunes a run on a task, `evaluate` scores it, and `compare` compares recipes at equal time.
- `measure_speed` measures how fast recipes train on this device.
- `starting_from` and `named_size` are for recipes of your own: they take a saved model, or the name of a size.
- `export` writes a run in the format of other tools, and `Embedder` and `load_model` load models.
- `embed_shards`, `build_index`, `search_index` and `open_index` are for search.
- `import_file` imports parts of your own. Their interfaces are `Objective`, `PairObjective`, `ImageEncoder`, `TextEncoder`,
  `Task`, `Source`, `IndexEngine`, `ExportTarget` and `Metric`; `fastvlp.parts` has further building blocks for them.

Each name is imported when it is first used, so that `import fastvlp` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlp.batch import Batch as Batch
    from fastvlp.batch import Example as Example
    from fastvlp.batch import Record as Record
    from fastvlp.comparison.compare import compare as compare
    from fastvlp.comparison.metrics.interface import Metric as Metric
    from fastvlp.comparison.metrics.interface import Score as Score
    from fastvlp.data.augment import AugmentConfig as AugmentConfig
    from fastvlp.data.pairs import PairData as PairData
    from fastvlp.data.records.shards import Shards as Shards
    from fastvlp.data.records.shards import ShardWriter as ShardWriter
    from fastvlp.data.records.transform import Transform as Transform
    from fastvlp.data.regions import RegionSource as RegionSource
    from fastvlp.data.sources.importing import import_data as import_data
    from fastvlp.data.sources.interface import Source as Source
    from fastvlp.data.tokenize import Tokenizer as Tokenizer
    from fastvlp.errors import UserError as UserError
    from fastvlp.exporters.export import export as export
    from fastvlp.exporters.interface import ExportTarget as ExportTarget
    from fastvlp.extensions import import_file as import_file
    from fastvlp.model.encoders.interface import ImageEncoder as ImageEncoder
    from fastvlp.model.encoders.interface import ImageEncoderConfig as ImageEncoderConfig
    from fastvlp.model.encoders.interface import TextEncoder as TextEncoder
    from fastvlp.model.encoders.interface import TextEncoderConfig as TextEncoderConfig
    from fastvlp.model.model import ModelConfig as ModelConfig
    from fastvlp.model.model import VLModel as VLModel
    from fastvlp.model.named_sizes import named_size as named_size
    from fastvlp.model.saving import load_model as load_model
    from fastvlp.model.saving import save_model as save_model
    from fastvlp.objectives.ar import ARConfig as ARConfig
    from fastvlp.objectives.clip import CLIPConfig as CLIPConfig
    from fastvlp.objectives.flm import FLMConfig as FLMConfig
    from fastvlp.objectives.flm import official_flm as official_flm
    from fastvlp.objectives.itm import ITMConfig as ITMConfig
    from fastvlp.objectives.mlm import MLMConfig as MLMConfig
    from fastvlp.objectives.moco import MoCoConfig as MoCoConfig
    from fastvlp.objectives.objective import Loss as Loss
    from fastvlp.objectives.objective import Objective as Objective
    from fastvlp.objectives.objective import ObjectiveConfig as ObjectiveConfig
    from fastvlp.objectives.objective import PairObjective as PairObjective
    from fastvlp.objectives.prefixlm import PrefixLMConfig as PrefixLMConfig
    from fastvlp.objectives.reconstruct import ReconstructConfig as ReconstructConfig
    from fastvlp.objectives.region import MRCConfig as MRCConfig
    from fastvlp.objectives.region import MRFRConfig as MRFRConfig
    from fastvlp.objectives.siglip import SigLIPConfig as SigLIPConfig
    from fastvlp.objectives.simclr import SimCLRConfig as SimCLRConfig
    from fastvlp.objectives.wra import WRAConfig as WRAConfig
    from fastvlp.recipes import recipe as recipe
    from fastvlp.search.bulk import embed_shards as embed_shards
    from fastvlp.search.embedder import Embedder as Embedder
    from fastvlp.search.engines.interface import IndexEngine as IndexEngine
    from fastvlp.search.engines.interface import open_index as open_index
    from fastvlp.search.indexing import build_index as build_index
    from fastvlp.search.indexing import search_index as search_index
    from fastvlp.speed.measure import measure_speed as measure_speed
    from fastvlp.tasks.caption import caption as caption
    from fastvlp.tasks.contrast import finetune_contrast as finetune_contrast
    from fastvlp.tasks.evaluate import evaluate as evaluate
    from fastvlp.tasks.finetune import finetune as finetune
    from fastvlp.tasks.interface import Task as Task
    from fastvlp.training.loop import train as train
    from fastvlp.training.optim import OptimConfig as OptimConfig
    from fastvlp.training.starting_point import starting_from as starting_from
    from fastvlp.training.train_config import TrainConfig as TrainConfig

_HOME = {
    "ARConfig": "objectives.ar",
    "AugmentConfig": "data.augment",
    "Batch": "batch",
    "CLIPConfig": "objectives.clip",
    "Embedder": "search.embedder",
    "Example": "batch",
    "ExportTarget": "exporters.interface",
    "FLMConfig": "objectives.flm",
    "ITMConfig": "objectives.itm",
    "ImageEncoder": "model.encoders.interface",
    "ImageEncoderConfig": "model.encoders.interface",
    "IndexEngine": "search.engines.interface",
    "Loss": "objectives.objective",
    "MLMConfig": "objectives.mlm",
    "MRCConfig": "objectives.region",
    "MRFRConfig": "objectives.region",
    "Metric": "comparison.metrics.interface",
    "MoCoConfig": "objectives.moco",
    "ModelConfig": "model.model",
    "Objective": "objectives.objective",
    "ObjectiveConfig": "objectives.objective",
    "OptimConfig": "training.optim",
    "PairData": "data.pairs",
    "PairObjective": "objectives.objective",
    "PrefixLMConfig": "objectives.prefixlm",
    "ReconstructConfig": "objectives.reconstruct",
    "Record": "batch",
    "RegionSource": "data.regions",
    "Score": "comparison.metrics.interface",
    "ShardWriter": "data.records.shards",
    "Shards": "data.records.shards",
    "SigLIPConfig": "objectives.siglip",
    "SimCLRConfig": "objectives.simclr",
    "Source": "data.sources.interface",
    "Task": "tasks.interface",
    "TextEncoder": "model.encoders.interface",
    "TextEncoderConfig": "model.encoders.interface",
    "Tokenizer": "data.tokenize",
    "TrainConfig": "training.train_config",
    "Transform": "data.records.transform",
    "UserError": "errors",
    "VLModel": "model.model",
    "WRAConfig": "objectives.wra",
    "build_index": "search.indexing",
    "caption": "tasks.caption",
    "compare": "comparison.compare",
    "embed_shards": "search.bulk",
    "evaluate": "tasks.evaluate",
    "export": "exporters.export",
    "finetune": "tasks.finetune",
    "finetune_contrast": "tasks.contrast",
    "import_data": "data.sources.importing",
    "import_file": "extensions",
    "load_model": "model.saving",
    "measure_speed": "speed.measure",
    "named_size": "model.named_sizes",
    "official_flm": "objectives.flm",
    "open_index": "search.engines.interface",
    "recipe": "recipes",
    "save_model": "model.saving",
    "search_index": "search.indexing",
    "starting_from": "training.starting_point",
    "train": "training.loop",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("fastvlp")
    if name not in _HOME:
        raise AttributeError(f"fastvlp has no {name!r}; the public names are {', '.join(__all__)}")
    return getattr(import_module(f"fastvlp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
