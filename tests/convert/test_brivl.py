"""BriVL through `vlp convert`: the known answers of its code, by the config that the conversion saves, and its CNN."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Regions
from fastvlp.cli import main
from fastvlp.convert.efficientnet import efficientnet_config, efficientnet_weights
from fastvlp.errors import UserError
from fastvlp.model.encoders.efficientnet_shapes import STAGES
from fastvlp.model.saving import Saved, load_model
from fastvlp.tasks.pretrained import preprocessing_of
from tests.convert.test_checkpoints import BERT, made_tokenizer
from tests.golden import assert_close, load

NAME = "brivl_towers"


def converted(folder: Path, *options: str) -> Saved:
    """The model that `vlp convert` makes of the release's file and its config."""
    c, _, weights, _ = load(NAME)
    made_tokenizer(folder / "tokenizer.json", BERT, c["vocab"])
    torch.save({"learnable": {name.removeprefix("learnable."): x for name, x in weights.items()}}, folder / "brivl.pth")
    (folder / "cfg.json").write_text(json.dumps({"MODEL": c | {"CNN": "tf_efficientnet_b5_ns"}}))
    # BERT's heads are in its own config, of another release.
    heads = ("--heads", *(str(c[f"{part}_TRANSFORMER_HEAD"]) for part in ("IMG", "TEXT")), "4")
    made = [str(folder / "brivl.pth"), str(folder / "out"), "--config", str(folder / "cfg.json"), *heads]
    assert main(["convert", *made, *options]) == 0
    return load_model(folder / "out")


def test_embeddings_are_those_of_the_released_code(tmp_path: Path, capsys):
    saved = converted(tmp_path)
    assert "absent encoder: image" in capsys.readouterr().out
    c, tol, _, known = load(NAME)
    regions = Regions(box=known["in.image_boxs"] / c["IMG_SIZE"], count=known["in.maskImages"].sum(1).long())
    with torch.no_grad():
        image = saved.model.embed_image(known["in.feature_map"].flatten(2).mT, regions)
        text = saved.model.embed_text(known["in.texts"], known["in.maskTexts"].sum(1).long())
    for name, mine in {"img_emb": image, "text_emb": text, "similarity": image @ text.T}.items():
        assert_close(mine, known[f"out.{name}"], tol[f"out.{name}"], name)


def test_padding_counts_up_to_the_length_of_the_release(tmp_path: Path):
    """A text has the vector that it has when it is padded to MAX_TEXT_LEN, whatever the batch is padded to."""
    saved, (c, tol, _, known) = converted(tmp_path), load(NAME)
    row, length = 2, known["in.maskTexts"].sum(1).long()
    assert length[row] < c["MAX_TEXT_LEN"]
    with torch.no_grad():
        short = saved.model.embed_text(known["in.texts"][row : row + 1, : length[row]], length[row : row + 1])
    assert_close(short[0], known["out.text_emb"][row], tol["out.text_emb"], "text_emb")
    found = preprocessing_of(tmp_path / "out")
    assert (found.max_length, found.fit, found.captions) == (c["MAX_TEXT_LEN"], "squash", "captions_zh")
    assert found.regions.whole and found.regions.most == c["MAX_IMG_LEN"] - 1


def test_the_grid_of_brivl_2_needs_no_boxes(tmp_path: Path):
    saved = converted(tmp_path, "--layout", "brivl2")
    assert saved.model.config.embed.image.regions.grid == 6
    assert not preprocessing_of(tmp_path / "out").regions.whole
    with torch.no_grad():
        assert saved.model.embed_image(load(NAME)[3]["in.feature_map"].flatten(2).mT).shape[0] == 3


def test_other_sizes_than_the_released_need_its_config(tmp_path: Path, capsys):
    _, _, weights, _ = load(NAME)
    made_tokenizer(tmp_path / "tokenizer.json", BERT, 90)
    torch.save(weights, tmp_path / "brivl.pth")
    assert main(["convert", str(tmp_path / "brivl.pth"), str(tmp_path / "out")]) == 2
    assert "MAX_TEXT_LEN" in (error := capsys.readouterr().err) and "--config" in error
    config = tmp_path / "cfg.yml"
    config.write_text("MODEL:\n  IMG_SIZE: 380\n  MAX_TEXT_LEN: 12\n  MAX_IMG_LEN: 37\n  GRID_SIZE: 4\n"
                      "  IMG_TRANSFORMER_HEAD: 4\n  TEXT_TRANSFORMER_HEAD: 4\n")  # fmt: skip
    made = ["convert", str(tmp_path / "brivl.pth"), str(tmp_path / "out"), "--config", str(config)]
    assert main(made) == 2
    assert "--heads" in capsys.readouterr().err
    assert main([*made, "--heads", "4", "4", "4"]) == 0
    assert load_model(tmp_path / "out").model.config.embed.text_length == 12


def cnn_weights(prefix: str) -> dict[str, Tensor]:
    """Random weights of timm's tf_efficientnet_b0 by its names."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def conv(name: str, out: int, into: int, kernel: int = 1, bias: bool = False) -> None:
        scale = 1 / math.sqrt(into * kernel**2)
        weights[f"{name}.weight"] = torch.randn(out, into, kernel, kernel, generator=generator) * scale
        if bias:
            weights[f"{name}.bias"] = torch.randn(out, generator=generator)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)
        weights[f"{name}.running_mean"] = 0.1 * torch.randn(width, generator=generator)
        weights[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=generator)
        weights[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv_stem", 32, 3, 3)
    norm("bn1", 32)
    into = 32
    for s, ((blocks, _, kernel), out) in enumerate(zip(STAGES, (16, 24, 40, 80, 112, 192, 320))):
        for b in range(blocks):
            name, wide = f"blocks.{s}.{b}", into * (6 if s else 1)
            if s:
                conv(f"{name}.conv_pw", wide, into)
                norm(f"{name}.bn1", wide)
            conv(f"{name}.conv_dw", wide, 1, kernel)
            norm(f"{name}.bn2" if s else f"{name}.bn1", wide)
            conv(f"{name}.se.conv_reduce", into // 4, wide, bias=True)
            conv(f"{name}.se.conv_expand", wide, into // 4, bias=True)
            conv(f"{name}.conv_pwl" if s else f"{name}.conv_pw", out, wide)
            norm(f"{name}.bn3" if s else f"{name}.bn2", out)
            into = out
    conv("conv_head", 1280, 320)
    norm("bn2", 1280)
    weights["classifier.weight"] = torch.zeros(3, 1280)
    return {prefix + name: x for name, x in weights.items()}


def timm_forward(w: dict[str, Tensor], image: Tensor) -> Tensor:
    """`forward_features` of timm's tf_efficientnet: the padding of TensorFlow, eps 1e-3, SiLU."""
    w = {name: x.double() for name, x in w.items()}

    def conv(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = w[f"{name}.weight"].shape[-1]
        for side in (3, 2):
            more = max((-(-x.shape[side] // stride) - 1) * stride + kernel - x.shape[side], 0)
            x = F.pad(x, (more // 2, more - more // 2, 0, 0) if side == 3 else (0, 0, more // 2, more - more // 2))
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, *(w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")), eps=1e-3
        )

    x = F.silu(norm(conv(image.double(), "conv_stem", 2), "bn1"))
    for s, (blocks, stride, _) in enumerate(STAGES):
        for b in range(blocks):
            name, y = f"blocks.{s}.{b}", x
            norms = iter(("bn1", "bn2", "bn3"))
            if s:
                y = F.silu(norm(conv(y, f"{name}.conv_pw"), f"{name}.{next(norms)}"))
            y = conv(y, f"{name}.conv_dw", stride if b == 0 else 1, groups=y.shape[1])
            y = F.silu(norm(y, f"{name}.{next(norms)}"))
            squeezed = F.silu(conv(y.mean((2, 3), keepdim=True), f"{name}.se.conv_reduce"))
            y = y * conv(squeezed, f"{name}.se.conv_expand").sigmoid()
            y = norm(conv(y, f"{name}.conv_pwl" if s else f"{name}.conv_pw"), f"{name}.{next(norms)}")
            x = x + y if b > 0 else y
    return F.silu(norm(conv(x, "conv_head"), "bn2"))


@pytest.mark.slow
@pytest.mark.parametrize(("published", "size"), [(64, 64), (76, 76), (92, 92), (64, 76), (76, 64)])
def test_the_cnn_gives_the_map_of_timm(published: int, size: int):
    """At these sizes different stages halve maps of odd sides, also where the weights come with another image size."""
    config = replace(efficientnet_config("tf_efficientnet_b0", published), size=size)
    weights = cnn_weights("")
    encoder = config.build().eval()
    encoder.load_state_dict(efficientnet_weights(weights, ""))
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, known = encoder(image), timm_forward(weights, image).flatten(2).mT
    assert mine.shape == known.shape == (2, config.grid**2, 1280)
    assert (mine - known).abs().max() <= 1e-5 * known.abs().max().clamp(min=1)


def test_a_checkpoint_with_its_cnn_reads_images(tmp_path: Path):
    c, _, weights, _ = load(NAME)
    made_tokenizer(tmp_path / "tokenizer.json", BERT, c["vocab"])
    prefix = "learnable.imgencoder."
    weights = weights | cnn_weights(f"{prefix}backbone.")
    weights[f"{prefix}learnable.max_pool.0.weight"] = torch.randn(24, 1280, 1, 1) / 36
    copies = {name.replace("encoder.", "encoder_mom.", 1): x for name, x in weights.items()}
    torch.save(
        {"learnable": {k.removeprefix("learnable."): x for k, x in (weights | copies).items()}}, tmp_path / "b.pth"
    )
    (tmp_path / "cfg.json").write_text(json.dumps({"MODEL": c | {"CNN": "tf_efficientnet_b0", "IMG_SIZE": 76}}))
    options = ["--config", str(tmp_path / "cfg.json"), "--heads", "4", "4", "4"]
    assert main(["convert", str(tmp_path / "b.pth"), str(tmp_path / "out"), *options]) == 0
    model = load_model(tmp_path / "out").model
    image = torch.randint(0, 256, (2, 3, 76, 76), dtype=torch.uint8)
    with torch.no_grad():
        states = model.encode_image(image)
        regions = Regions(box=torch.tensor([[[0.0, 0.0, 1.0, 1.0]]] * 2), count=torch.tensor([1, 1]))
        assert model.embed_image(states, regions).shape == (2, 24)
    pixels = (image / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    known = timm_forward(cnn_weights(""), pixels).flatten(2).mT
    assert (states - known).abs().max() <= 1e-5 * known.abs().max()


def test_a_cnn_that_is_not_known_is_named():
    with pytest.raises(UserError, match="resnet50"):
        efficientnet_config("resnet50", 64)
    with pytest.raises(UserError, match="65 pixels"):
        efficientnet_config("tf_efficientnet_b0", 65)
