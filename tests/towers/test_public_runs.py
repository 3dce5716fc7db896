"""Recipes start from public encoders: they train, resume bit for bit, are exported, and load without the public folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlp.cli import main
from fastvlp.convert.public_encoders import read_images, read_texts, read_tokenizer
from fastvlp.convert.public_folder import open_public
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.recipes import recipe
from fastvlp.search.embedder import Embedder
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train
from fastvlp.training.public_start import with_public_encoders
from tests.towers.public import write_public

PAIRS = {"clip_bert": ("clip", "bert"), "siglip_xlmr": ("siglip", "xlm-roberta"), "cnn_roberta": ("resnet", "roberta")}
# Each recipe, and each pair of encoders twice.
RUNS = (
    ("clip_bert", "clip_photos"),
    ("clip_bert", "mlm_photos"),
    ("siglip_xlmr", "brivl_photos"),
    ("siglip_xlmr", "flm_photos"),
    ("cnn_roberta", "flm_photos"),
    ("cnn_roberta", "moco_photos"),
)
# A step that changes nothing.
STILL = ("--steps", "1", "--optim.lr", "1e-12")
PUBLIC = ("clip", "siglip", "bert", "xlm-roberta", "roberta", "mpnet", "resnet", "efficientnet", "vit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    write_world(folder / "world", WorldConfig(size=32, captions=2), train=24, val=4, test=4, pairs=0, singles=0)
    for name in PUBLIC:
        write_public(name, folder / name)
    return folder


def pretrain(folder: Path, recipe: str, out: Path, *options: str) -> int:
    world = folder / "world"
    fixed = (
        f"--data.train {world / 'train'} --data.val {world / 'val'} --data.batch-size 8 --precision fp32 --device cpu "
        "--optim.warmup 0 --optim.decay constant --validate-every None --log-every 1 --budget-s None --threads 1"
    )
    return main(["pretrain", recipe, "--out", str(out), *fixed.split(), *options])


def encoders(folder: Path, *names: str | None) -> list[str]:
    return [word for part, name in zip(("image", "text"), names) if name for word in (f"--{part}", str(folder / name))]


def logged(run: Path, kind: str) -> dict:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == kind)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "last.pt")["pretraining"]


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "name"), RUNS)
def test_recipes_train_resume_and_are_served(pair, name, folder, tmp_path, monkeypatch):
    public = encoders(folder, *PAIRS[pair])
    assert pretrain(folder, name, tmp_path / "a", *public, "--steps", "3") == 0
    assert pretrain(folder, name, tmp_path / "b", *public, "--steps", "2") == 0
    assert pretrain(folder, name, tmp_path / "b", *public, "--steps", "3", "--resume") == 0
    straight, resumed = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    inherited = logged(tmp_path / "a", "inherited")
    parts = {name.split(".")[0] for name in inherited["loaded"] + inherited["resized"]}
    assert {"image", "text"} <= parts and not any(key.startswith(("image.", "text.")) for key in inherited["fresh"])

    # Nothing of the public folders is needed from here on.
    monkeypatch.setattr("fastvlp.convert.public_folder.open_public", None)
    model = load_model(tmp_path / "a").model
    assert model.config.image.size == (64 if pair == "cnn_roberta" else 32) and model.config.text.width == 32
    if name == "mlm_photos":
        return
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "export")]) == 0
    embedder = Embedder.load(tmp_path / "export", device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    if "embed" in embedder.can:
        vector = embedder.images([picture]) @ embedder.texts(["a red circle"]).T
        assert vector.shape == (1, 1) and np.isfinite(vector).all()
    else:
        assert len(embedder.caption([picture])) == 1


@pytest.mark.parametrize("name", ["efficientnet", "vit"])
def test_an_image_encoder_alone_keeps_the_texts_of_the_recipe(name, folder, tmp_path):
    assert pretrain(folder, "clip_photos", tmp_path, *encoders(folder, name), "--steps", "1", "--vocab", "200") == 0
    config = load_model(tmp_path).model.config
    assert config.text == replace(recipe("clip_photos").model.text, **special_ids(config.text))
    assert config.embed.image.pool == ("mean" if name == "efficientnet" else "first")
    assert config.embed.width == recipe("clip_photos").model.embed.width


def special_ids(text) -> dict[str, int]:
    return {name: getattr(text, name) for name in ("vocab", "pad", "bos", "eos", "mask")}


def test_encoders_without_a_joint_space_keep_the_heads_of_the_recipe(folder):
    run = recipe("clip_photos")
    head = replace(run.model.embed.text, hidden=64, skip=True, dropout=0.1)
    run = replace(run, model=replace(run.model, embed=replace(run.model.embed, image=head, text=head)))
    made = with_public_encoders(run, image=str(folder / "efficientnet"), text=str(folder / "bert")).model.embed
    for own in (made.image, made.text):
        assert (own.pool, own.hidden, own.skip, own.dropout) == ("mean", 64, True, 0.1)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_encoders_of_a_model_bring_its_joint_space(name, folder, tmp_path, capsys):
    """Before its first step the run's model gives the public model's vectors."""
    import transformers as hf

    source = str(folder / name)
    objective = {"clip": "clip_photos", "siglip": "siglip_photos"}[name]
    assert pretrain(folder, objective, tmp_path, *encoders(folder, name, name), *STILL) == 0
    saved = load_model(tmp_path)
    theirs = {"clip": hf.CLIPModel, "siglip": hf.SiglipModel}[name].from_pretrained(source).eval()
    image = torch.randn(2, 3, 32, 32)
    known = theirs.get_image_features(pixel_values=image).pooler_output
    vectors = saved.model.embed_image(saved.model.encode_image(image))
    assert (vectors - known / known.norm(dim=-1, keepdim=True)).abs().max() <= 1e-5
    ids, length = saved.tokenizer.encode(["a red circle", "two rings and a star"], 20)
    if name == "clip":
        real = torch.arange(ids.shape[1]) < length[:, None]
        # Padding is one of the tokens that the tokenizer was given.
        given = {"input_ids": ids.where(real, 0), "attention_mask": real.long()}
    else:
        padded = torch.full((2, 24), 1)
        for row, own, n in zip(padded, ids, length):
            row[: n - 1] = own[1:n]
        given = {"input_ids": padded}
    theirs_text = theirs.get_text_features(**given).pooler_output
    vectors = saved.model.embed_text(ids, length)
    assert (vectors - theirs_text / theirs_text.norm(dim=-1, keepdim=True)).abs().max() <= 1e-5
    scale = saved.learned({"clip": "clip", "siglip": "siglip"}[name])
    assert torch.allclose(scale["log_scale"], theirs.logit_scale.reshape(()), atol=1e-5)
    inherited, said = logged(tmp_path, "inherited"), capsys.readouterr().out
    for words in (f"starts from {source}: loaded image ", "resized text.word.weight", "tokens added: ", "mask"):
        assert words in said
    assert inherited["fresh"] == [] and "text.word.weight" in inherited["resized"]


def test_sizes_lengths_and_layers_may_be_chosen(folder, tmp_path):
    options = ["--image-layers", "1", "--text-layers", "2", "--model.image.size", "48", "--data.max-length", "40"]
    more = ["--data.fit", "letterbox", "--model.embed.text.pool", "first"]
    public = encoders(folder, "clip", "bert")
    assert pretrain(folder, "clip_photos", tmp_path, *public, *options, *more, "--steps", "1") == 0
    config = load_model(tmp_path).model.config
    assert (config.image.depth, config.text.depth, config.image.size, config.text.positions) == (1, 2, 48, 40)
    assert (
        config.embed.text.pool == "first"
        and json.loads((tmp_path / "config.json").read_text())["data"]["fit"] == "letterbox"
    )
    assert {"image.position", "text.position.weight"} <= {*logged(tmp_path, "inherited")["resized"]}
    assert pretrain(folder, "clip_photos", tmp_path, *public, *options, *more, "--steps", "2", "--resume") == 0


def test_patches_of_ours_may_be_left_out_and_those_of_transformers_not(folder, tmp_path, capsys):
    keep = ["--keep", "0.5", "--steps", "1"]
    assert pretrain(folder, "clip_photos", tmp_path / "a", *encoders(folder, "vit", "bert"), *keep) == 0
    assert pretrain(folder, "clip_photos", tmp_path / "b", *encoders(folder, "resnet", "bert"), *keep) == 2
    assert "whole images" in capsys.readouterr().err


def test_the_fields_alone_are_enough_in_python(folder, tmp_path):
    plain = recipe("flm_photos")
    world = folder / "world"
    data = replace(plain.data, train=f"{world}/train", val=None, batch_size=4)
    run = replace(plain, data=data, out=str(tmp_path), steps=1, budget_s=None, precision="fp32", threads=1)
    run = replace(run, image=str(folder / "resnet"), text=str(folder / "mpnet"))
    state = train(run)
    assert state.run.model.text.width == 32 and state.run.data.fit == "centre"
    assert state.model.config.reconstructor.layer.width == state.model.config.fusion.layer.width == 32
    assert with_public_encoders(run, image=run.image, text=run.text).model.image == state.model.config.image
    again = train(replace(run, steps=2), resume=True)
    assert again.step == 2


def test_a_single_stream_begins_with_the_layers_of_a_bert(folder, tmp_path):
    run = recipe("uniter_end2end")
    adapted = with_public_encoders(run, image=str(folder / "clip"), text=str(folder / "bert"))
    single = adapted.model.single
    assert (single.depth, single.layer.width, single.regions.feature) == (3, 32, 32)
    assert (
        pretrain(
            folder, "uniter_end2end", tmp_path, *encoders(folder, "clip", "bert"), "--steps", "1", "--optim.lr", "1e-12"
        )
        == 0
    )
    model = load_model(tmp_path).model
    public = read_texts(str(folder / "bert"))
    state = public.weights()
    for name in ("blocks.0.attend.qkv.weight", "blocks.2.mlp_norm.bias"):
        assert torch.allclose(model.single.state_dict()[name], state[name], atol=1e-6)
    types = public.types()
    assert torch.allclose(model.single.kinds, torch.stack([torch.zeros(32), types[1]]), atol=1e-6)
    with pytest.raises(UserError, match="mpnet"):
        with_public_encoders(run, text=str(folder / "mpnet"))
    with pytest.raises(UserError, match="regions"):
        with_public_encoders(recipe("uniter_demo"), image=str(folder / "clip"))


def test_what_does_not_fit_is_refused(folder, tmp_path, capsys):
    small = folder / "small.json"
    from fastvlp.data.tokenize import Tokenizer

    Tokenizer.train([f"word{i} {i * 7919}" for i in range(3000)], "wordpiece", vocab_size=900).save(small)
    cases = {
        "tokenizer": [*encoders(folder, "clip", "bert"), "--tokenizer", str(small)],
        "init": [*encoders(folder, "clip"), "--init", str(tmp_path / "none")],
        "layers": [*encoders(folder, "clip"), "--image-layers", "9"],
        "no such folder": ["--image", str(tmp_path / "nothing")],
        "whole number of patches": [*encoders(folder, "clip"), "--model.image.size", "45"],
    }
    for words, options in cases.items():
        assert pretrain(folder, "clip_photos", tmp_path / "run", *options, "--steps", "1") == 2
        assert words in capsys.readouterr().err


def test_new_tokens_that_an_objective_reads_must_be_trained(folder, tmp_path, capsys):
    """CLIP's vocabulary has no mask, and SigLIP's no <s> either."""
    for name, text, token in (("mlm_photos", "clip", "mask"), ("flm_photos", "siglip", "bos")):
        public = encoders(folder, "vit", text)
        assert pretrain(folder, name, tmp_path / "a", *public, "--freeze", "text", "--steps", "1") == 2
        message = capsys.readouterr().err
        assert token in message and name.partition("_")[0] in message
        assert pretrain(folder, name, tmp_path / name, *public, "--freeze", "text.blocks", "--steps", "1") == 0
    assert (
        pretrain(
            folder, "clip_photos", tmp_path / "b", *encoders(folder, "clip", "clip"), "--freeze", "text", "--steps", "1"
        )
        == 0
    )


def test_the_whole_public_encoder_is_loaded(folder, tmp_path):
    assert (
        pretrain(
            folder,
            "clip_photos",
            tmp_path,
            *encoders(folder, "resnet", "roberta"),
            "--steps",
            "1",
            "--optim.lr",
            "1e-12",
        )
        == 0
    )
    state = load_model(tmp_path).model.state_dict()
    for part, public in (("image", read_images(str(folder / "resnet"))), ("text", read_texts(str(folder / "roberta")))):
        for name, value in public.weights().items():
            if "position" not in name:
                assert torch.allclose(state[f"{part}.{name}"].float(), value.float(), atol=1e-6), name


def test_a_token_that_nobody_ever_trained_is_not_read(folder, tmp_path, capsys):
    """CLIP's tokenizer has no mask: its new vector is random, and stays so where the table of words is frozen."""
    frozen = ("--freeze", "text.word")
    assert main(["convert", str(folder / "clip"), str(tmp_path / "clip")]) == 0
    for source in (encoders(folder, None, "clip"), ["--from", str(tmp_path / "clip")]):
        capsys.readouterr()
        assert pretrain(folder, "mlm_photos", tmp_path / "run", *source, *frozen, *STILL) == 2
        error = capsys.readouterr().err
        assert "objective mlm reads mask" in error and "--freeze" in error
    assert pretrain(folder, "ar_photos", tmp_path / "ar", "--from", str(tmp_path / "clip"), *frozen, *STILL) == 0


def test_texts_get_the_prefix_that_their_encoder_was_trained_with(folder, tmp_path):
    plain, run = read_tokenizer(open_public(folder / "bert")), tmp_path / "run"
    assert (
        pretrain(folder, "clip_photos", run, *encoders(folder, None, "bert"), "--text-prefix", "a red: ", *STILL) == 0
    )
    # It is kept with the model, so that all that embeds texts by it agrees.
    saved = load_model(run).tokenizer
    assert torch.equal(saved.encode(["small circle"], 20)[0], plain.encode(["a red: small circle"], 20)[0])
    assert pretrain(folder, "clip_photos", tmp_path / "other", "--text-prefix", "a red: ", *STILL) == 2
