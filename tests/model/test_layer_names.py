"""The layers of an encoder by name, whatever the encoder is made of."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fastvlp.model.encoders.layer_names import find_layers
from tests.made import made_model

hf = pytest.importorskip("transformers")
from tests.towers.public import image_models, text_models  # noqa: E402


def test_the_layers_of_our_encoders():
    model = made_model()
    image, text = model.image.layer_names(), model.text.layer_names()
    assert image.before == ("position", "class_token", "patch", "embed_norm")
    assert (image.layers, image.after) == (("blocks.0",), ("norm",))
    assert text.before == ("word", "position", "norm", "drop")
    assert (text.layers, text.after) == (("blocks.0", "blocks.1"), ("last_norm",))


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


STAGES = {"convnext": 4, "efficientnet": 4, "resnet": 4}


@pytest.mark.parametrize(("name", "model"), [*image_models().items(), *text_models().items()])
def test_the_layers_of_public_encoders(name, model):
    wrapped = Wrapped(model)
    names = find_layers(wrapped)
    assert len(names.layers) == STAGES.get(name, 3) or name == "efficientnet"
    parts = [*names.before, *names.layers, *names.after]
    own = [parameter for parameter, _ in wrapped.named_parameters()]
    covered = [sum(f"{parameter}.".startswith(f"{part}.") for part in parts) for parameter in own]
    assert covered == [1] * len(own)
    assert any("embed" in part or "stem" in part for part in names.before), names


def test_layers_compute_in_the_order_of_their_names():
    """Each layer of a vision transformer reads the one before it, so its gradients stop at a layer that is detached."""
    model = image_models()["vit"]
    layers = [model.get_submodule(name) for name in find_layers(model).layers]
    order: list[int] = []
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: order.append(i))
    model(torch.zeros(1, 3, 32, 32))
    assert order == [*range(len(layers))] and all(a < b for a, b in pairwise(order))


def test_stages_beside_each_other_are_layers_and_a_small_stem_is_not():
    stage = lambda: nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))  # noqa: E731
    cnn = nn.Module()
    cnn.conv, cnn.layer1, cnn.layer2, cnn.norm = nn.Conv2d(3, 16, 3), stage(), stage(), nn.BatchNorm2d(16)
    assert find_layers(cnn) == (("conv",), ("layer1", "layer2"), ("norm",))
    vit = nn.Module()
    vit.stem, vit.blocks = nn.Sequential(nn.Conv2d(3, 2, 1)), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert find_layers(vit) == (("stem",), ("blocks.0", "blocks.1"), ())


def test_without_lists_each_module_is_a_layer():
    plain = nn.Module()
    plain.first, plain.drop, plain.second = nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)
    assert find_layers(Wrapped(plain)).layers == ("model.first", "model.second")
    assert find_layers(Wrapped(nn.Linear(2, 2))).layers == ("model",)
