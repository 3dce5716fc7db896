"""A released checkpoint becomes a folder that every command reads: made ones of each layout, through the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
from torch import Tensor

from fastvlp.cli import main
from fastvlp.convert.flip import flip_map
from fastvlp.convert.open_clip import PROJECTIONS, clip_map
from fastvlp.convert.uniter import HEADS, TIED, WORD_AND_MATCH, uniter_encoder
from fastvlp.convert.weight_files import read_weights
from fastvlp.data.regions import RegionSource
from fastvlp.data.tokenize import Tokenizer
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.data.world.detector import WIDTH
from fastvlp.data.world.scene import COMBINATIONS
from fastvlp.model import sizes
from fastvlp.model.inherited_config import inheritable_weights
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saving import Inheritance, inherit, load_model
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.recipes import recipe
from fastvlp.search.embedder import Embedder
from fastvlp.tasks.pretrained import Preprocessing, preprocessing_of
from fastvlp.training.start import make_pretraining

BERT = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
CLIP = ("<|startoftext|>", "<|endoftext|>")
CLASSES = len(COMBINATIONS)


def made_tokenizer(path: Path, specials: tuple[str, ...], vocab: int = 60) -> Tokenizer | None:
    words = [f"w{i}" for i in range(vocab - len(specials))]
    # CLIP's are the last ones of its vocabulary.
    words = [*words, *specials] if specials == CLIP else [*specials, *words]
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, specials[-1]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([*specials])
    inner.save(str(path))
    return Tokenizer.load(path) if specials == BERT else None


def spread(made: dict[str, tuple[str, ...]], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `made` puts together."""
    return {part: x.clone() for ours, parts in made.items() for part, x in zip(parts, state[ours].chunk(len(parts)))}


def model_of(config: ModelConfig, seed: int = 3) -> VLModel:
    torch.manual_seed(seed)
    model = VLModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def uniter_checkpoint(folder: Path) -> tuple[Path, VLModel]:
    tokenizer = made_tokenizer(folder / "tokenizer.json", BERT)
    model = model_of(sizes.with_tokenizer(sizes.uniter(width=64, depth=2, feature=WIDTH), tokenizer))
    state = model.state_dict()
    weights = spread(uniter_encoder(2) | WORD_AND_MATCH, state)
    mask = "uniter.img_embeddings.mask_embedding.weight"
    weights[mask] = torch.stack([torch.ones(WIDTH), weights[mask]])
    objectives = recipe("uniter_demo").objectives
    for name, kind in (("mrfr", "mrfr"), ("mrc_kl", "mrc")):
        weights |= spread(HEADS[kind], objectives[name].build(model.config, tokenizer).state_dict())
    torch.save(weights | {copy: weights[own] for copy, own in TIED.items()}, folder / "uniter.pt")
    return folder / "uniter.pt", model


def clip_checkpoint(folder: Path) -> tuple[Path, VLModel]:
    """As open_clip's training leaves it, over a vocabulary without padding and mask."""
    made_tokenizer(folder / "tokenizer.json", CLIP)
    config = sizes.clip(
        sizes.Tower(1, 64, 1),
        sizes.Tower(2, 64, 1),
        width=16,
        size=32,
        patch=16,
        positions=12,
        activation="gelu",
    )
    tokenizer = Tokenizer.load(folder / "tokenizer.json", complete=True)
    model = model_of(sizes.with_tokenizer(config, tokenizer))
    weights = spread(clip_map(1, 2).sources, model.state_dict())
    weights["visual.conv1.weight"] = weights["visual.conv1.weight"].reshape(64, 3, 16, 16)
    weights["token_embedding.weight"] = weights["token_embedding.weight"][:60]
    weights |= {name: weights[name].T for name in PROJECTIONS} | {"logit_scale": torch.tensor(3.0)}
    saved = {"epoch": 2, "state_dict": {f"module.{name}": x for name, x in weights.items()}, "optimizer": {"state": {}}}
    torch.save(saved, folder / "clip.pt")
    return folder / "clip.pt", model


def flip_checkpoint(folder: Path) -> tuple[Path, VLModel]:
    tokenizer = made_tokenizer(folder / "tokenizer.json", BERT)
    config = sizes.flip_published(sizes.Tower(1, 64, 1), sizes.Tower(1, 64, 1), width=16, size=32, patch=16, length=10)
    model = model_of(sizes.with_tokenizer(config, tokenizer))
    weights = spread(flip_map(1, 1).sources, model.state_dict())
    weights = {name: x.T if name.endswith("/kernel") else x for name, x in weights.items()}
    patches = weights["img_encoder/embedding/kernel"].T
    weights["img_encoder/embedding/kernel"] = patches.reshape(64, 3, 16, 16).permute(2, 3, 1, 0)
    position = "txt_encoder/posembed_encoder/pos_embedding"
    weights |= {position: weights[position][None], "logit_scale": torch.tensor([2.0])}
    weights |= {"img_encoder/posembed_encoder/pos_embedding": torch.zeros(1, 5, 64)}
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "flip.safetensors")
    return folder / "flip.safetensors", model


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(size=32, captions=2), train=24, val=8, test=8, pairs=0, singles=0)
    return folder


def same(found: VLModel, wanted: VLModel, rows: int | None = None) -> None:
    assert found.config == wanted.config
    for name, x in wanted.state_dict().items():
        n = rows if name == "text.word.weight" else None
        assert torch.equal(found.state_dict()[name][:n], x[:n]), name


def inherited(out: Path, objectives: Mapping[str, ObjectiveConfig]) -> Inheritance:
    """Returns how a run would inherit the weights of the model."""
    saved, run = load_model(out), recipe("clip_photos")
    run = replace(run, model=saved.model.config, objectives=objectives, init=str(out))
    return make_pretraining(run, saved.tokenizer)[1]


@pytest.mark.slow
def test_uniter(tmp_path: Path, world: Path, capsys):
    checkpoint, model = uniter_checkpoint(tmp_path)
    out = tmp_path / "made" / "uniter"
    assert main(["convert", str(checkpoint), str(out), "--heads", "2"]) == 0
    saved = load_model(out)
    assert saved.learned("mrc_kl")["classify.bias"].shape == (CLASSES,)
    same(saved.model, model)
    assert preprocessing_of(out) == Preprocessing(
        regions=RegionSource(stored=True, most=100), fit="squash", max_length=62
    )
    short = ["--budget-s", "None", "--steps", "1", "--threads", "1", "--data.workers", "0"]
    places = ["--data.train", f"{world}/train", "--data.val", "None", "--out", str(tmp_path / "run")]
    assert main(["pretrain", "uniter_demo", "--from", str(out), *short, *places]) == 0
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    inherited = next(line for line in lines if line["kind"] == "inherited")
    assert inherited["fresh"] == inherited["dropped"] == [] and "objectives.mrfr.bias" in inherited["loaded"]
    tune = ["--data", str(world), "--steps", "1", "--batch-size", "8", "--out", str(tmp_path / "tuned")]
    assert main(["finetune", "vqa", "--from", str(out), *tune]) == 0
    assert main(["evaluate", "task", str(out), "--data", str(world), "--zero-shot", "--split", "val"]) == 0
    assert main(["export", str(out), str(tmp_path / "export")]) == 2
    assert "nothing to serve" in capsys.readouterr().err and not (tmp_path / "export").exists()


def test_bert_is_what_uniter_begins_with(tmp_path: Path, capsys):
    checkpoint, model = uniter_checkpoint(tmp_path)
    lacks = ("uniter.img_embeddings.", "itm_output.", "feat_regress.", "region_classifier.")
    old = {"uniter.": "bert.", "LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights: dict[str, Tensor] = {"cls.seq_relationship.weight": torch.zeros(2, 64)}
    for name, x in read_weights(checkpoint).items():
        if not name.startswith(lacks):
            for new, earlier in old.items():
                name = name.replace(new, earlier)
            weights[name] = x.clone()
    save_file(weights, tmp_path / "bert.safetensors")
    start = [str(tmp_path / "bert.safetensors"), str(tmp_path / "bert"), "--layout", "uniter_start", "--heads", "2"]
    assert main(["convert", *start]) == 0
    assert "untrained: single.regions, single.match" in capsys.readouterr().out
    found, wanted = load_model(tmp_path / "bert").model, model.state_dict()
    assert found.config == sizes.with_tokenizer(
        sizes.uniter(width=64, depth=2), Tokenizer.load(tmp_path / "tokenizer.json")
    )
    new = {name for name in wanted if name.startswith(("single.regions.", "single.match."))}
    for name, x in found.state_dict().items():
        assert name in new or torch.equal(x, wanted[name]), name
    # A run that starts from it has new weights for what BERT lacks.
    started = VLModel(found.config)
    result = inherit(started, inheritable_weights(load_model(tmp_path / "bert"), found.config))
    assert {*result.fresh} == new and {*result.loaded} == wanted.keys() - new
    assert all(torch.equal(started.state_dict()[name], wanted[name]) for name in result.loaded)


@pytest.mark.parametrize(
    ("options", "checkpoint", "scale"),
    [
        (["--activation", "gelu", "--heads", "1", "1"], clip_checkpoint, 3.0),
        (["--heads", "1", "1"], flip_checkpoint, 2.0),
    ],
)
def test_two_towers_embed_evaluate_and_learn_on(
    tmp_path: Path, world: Path, options: list[str], checkpoint, scale: float
):
    path, model = checkpoint(tmp_path)
    out, texts = tmp_path / "run", ["w1 w2", "w7 w8 w9"]
    assert main(["convert", str(path), str(out), *options]) == 0
    saved = load_model(out)
    same(saved.model, model, rows=60)
    assert saved.objectives == {"clip.log_scale": torch.tensor(scale)}
    began = inherited(out, {"clip": CLIPConfig()})
    assert "objectives.clip.log_scale" in began.loaded and began.fresh == began.dropped == []
    assert main(["export", str(out), str(tmp_path / "export")]) == 0
    embedder = Embedder.load(tmp_path / "export")
    assert embedder.can == {"embed"} and embedder.max_length == 12
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        images = model.embed_image(model.encode_image(pixels))
        words = model.embed_text(*saved.tokenizer.encode(texts, 12))
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    torch.testing.assert_close(torch.from_numpy(embedder.images(pictures)), images)
    torch.testing.assert_close(torch.from_numpy(embedder.texts(texts)), words)
    assert main(["evaluate", "retrieval", str(out), "--data", str(world), "--split", "val"]) == 0


def test_an_openai_file_is_recognised_by_its_size_fields(tmp_path: Path):
    path, _ = clip_checkpoint(tmp_path)
    torch.save(read_weights(path) | {"input_resolution": torch.tensor(32)}, path)
    assert main(["convert", str(path), str(tmp_path / "openai")]) == 0
    config = load_model(tmp_path / "openai").model.config
    assert config.image.layer.activation == config.text.layer.activation == "quick_gelu"
    assert config.image.layer.heads == config.text.layer.heads == 1


def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path: Path, capsys):
    path, _ = uniter_checkpoint(tmp_path)
    weights, damaged = read_weights(path), tmp_path / "damaged.pt"
    damaged.write_bytes(path.read_bytes()[:-2000])
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    torch.save(weights | {"new.weight": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({name: x for name, x in weights.items() if "pooler" not in name}, tmp_path / "less.pt")
    torch.save({"parts": {"model": weights}, "epoch": 1}, tmp_path / "nested.pt")
    torch.save({"some.other": torch.zeros(1)}, tmp_path / "other.pt")
    made_tokenizer(tmp_path / "other.json", BERT, 50)
    heads = ("--heads", "2")
    for file, options, expected in (
        ("absent.pt", (), "absent.pt: no such folder"),
        ("damaged.pt", (), "not readable as weights"),
        ("bad.safetensors", (), "not readable as weights"),
        ("nested.pt", (), "more than named tensors"),
        ("other.pt", (), "nor do some.other"),
        ("more.pt", heads, "left over ['new.weight']"),
        ("less.pt", heads, "missing ['uniter.pooler.dense.bias'"),
        ("uniter.pt", (), "give --heads"),
        ("uniter.pt", ("--heads", "1", "2"), "has 2 numbers"),
        ("uniter.pt", (*heads, "--activation", "gelu"), "leave it out"),
        ("uniter.pt", (*heads, "--tokenizer", str(tmp_path / "other.json")), "use the tokenizer it was trained with"),
        ("uniter.pt", (*heads, "--tokenizer", str(tmp_path / "absent.json")), "give the path of a tokenizer.json"),
        *(
            ("uniter.pt", ("--layout", layout), f"not laid out as {layout}: it has no ")
            for layout in ("openai", "flip", "flm", "brivl", "uniter_start")
        ),
        ("uniter.pt", ("--layout", "open_clip"), "give --heads"),
    ):
        assert main(["convert", str(tmp_path / file), str(tmp_path / "out"), *options]) == 2, file
        error = capsys.readouterr().err
        assert expected in error and ("tokenizer" in error or file in error), error
    assert not [*tmp_path.glob("out*")]
    uniter = ["convert", str(path), str(tmp_path / "out"), *heads]
    assert main([*uniter, "--layout", "unite"]) == 2
    assert "uniter" in capsys.readouterr().err
    assert main(uniter) == 0 and main(uniter) == 2
    assert "something is here already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "a run or an export of fastvlp already" in capsys.readouterr().err
