"""Public models in folders: what `read_images` and `read_texts` make of them computes what transformers computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvlp.convert.encoder_family import ImageFamily, TextFamily
from fastvlp.convert.public_encoders import PublicImages, PublicTexts, find_family, read_images, read_texts
from fastvlp.errors import UserError
from fastvlp.model import masks
from fastvlp.model.inherited_config import same_weights
from fastvlp.model.joint_space import Embed, EmbedConfig, Head
from fastvlp.recipes import recipe
from tests import golden
from tests.towers.public import MAPS, image_models, pair_models, randomised, save, text_models

TOLERANCE = 1e-5
OWN_IMAGES = ("clip", "siglip", "vit", "deit")
OWN_TEXTS = ("bert", "roberta", "xlm-roberta", "clip_text_model")


def built(public: PublicImages | PublicTexts) -> torch.nn.Module:
    module = public.config.build()
    module.load_state_dict(module.resized(public.weights()))
    return module.eval()


def close(mine: Tensor, known: Tensor) -> bool:
    return mine.shape == known.shape and bool((mine - known).abs().max() <= TOLERANCE)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", image_models())
def test_image_states_are_those_of_transformers(name, ours, tmp_path):
    theirs = randomised(image_models()[name])
    public = read_images(str(save(theirs, tmp_path)), ours=ours)
    assert (find_family(ImageFamily, public.folder.config) is not None) == (name in OWN_IMAGES)
    assert public.config.can_drop_patches == (ours and name in OWN_IMAGES)
    public = replace(public, config=replace(public.config, size=64 if name in MAPS else 32))
    image = torch.randn(2, 3, public.config.size, public.config.size)
    known = theirs(pixel_values=image).last_hidden_state
    known = known.flatten(2).transpose(1, 2) if name in MAPS else known
    if ours and name == "clip":
        # The norm that transformers applies to the class token alone.
        known = theirs.post_layernorm(known)
    assert close(built(public)(image), known)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("name", text_models())
def test_text_states_are_those_of_transformers(name, ours, tmp_path):
    theirs = randomised(text_models()[name])
    public = read_texts(str(save(theirs, tmp_path)), ours=ours)
    own = find_family(TextFamily, public.folder.config) is not None
    assert own == (name in OWN_TEXTS) and hasattr(public.config, "layer") == (ours and own)
    encoder = built(replace(public, config=replace(public.config, pad=theirs.config.pad_token_id)))
    length = torch.tensor([9, 6])
    ids = torch.randint(5, 95, (2, 9))
    real = torch.arange(9) < length[:, None]
    ids = torch.where(real, ids, theirs.config.pad_token_id)
    known = theirs(input_ids=ids, attention_mask=real.long(), output_hidden_states=True)
    causal = name == "clip_text_model"
    states = encoder.states(ids, torch.arange(9), mask=None if causal else masks.full(length, 9), causal=causal)
    assert len(states) == 4
    for mine, theirs_ in zip(states, [*known.hidden_states[:-1], known.last_hidden_state], strict=True):
        assert close(mine[real], theirs_[real])


@pytest.mark.parametrize("name", pair_models())
def test_a_model_of_two_encoders_gives_the_vectors_of_transformers(name, tmp_path):
    theirs = randomised(pair_models()[name])
    folder = str(save(theirs, tmp_path))
    images, texts = read_images(folder), read_texts(folder)
    joint = {"clip": 24, "siglip": 32, "chinese_clip": 24}[name]
    head = Head(images.head, images.config.width, joint)
    head.load_state_dict(images.projection())
    image = torch.randn(3, 3, 32, 32)
    known = theirs.get_image_features(pixel_values=image).pooler_output
    assert close(head(built(images)(image)), known / known.norm(dim=-1, keepdim=True))

    # <s> is left out by the joint space where the model has none, and padding has the model's own id.
    reading = texts.reading
    text_head = Head(reading.head, texts.config.width, joint)
    text_head.load_state_dict(texts.projection())
    embed = EmbedConfig(
        width=joint,
        image=images.head,
        text=reading.head,
        text_mask=reading.mask,
        text_start=reading.start,
        text_length=reading.length,
        text_pad=reading.pad,
    )
    pad, end = (reading.pad if name == "siglip" else 0), {"clip": 98, "siglip": 1, "chinese_clip": 7}[name]
    config = replace(texts.config, pad=0, bos=2, eos=end)
    ids = torch.tensor([[2, 9, 8, 7, end], [2, 6, end, 0, 0]])
    length = torch.tensor([5, 3])
    words, count = Embed(embed, images.config, texts.config.width).words(ids, length, config)
    mask = masks.full(count, words.shape[1]) if reading.mask == "full" else None
    states = built(replace(texts, config=config))(
        words, torch.arange(words.shape[1]), mask=mask, causal=reading.mask == "causal"
    )
    given = {} if name == "siglip" else {"attention_mask": (torch.arange(5) < length[:, None]).long()}
    known = theirs.get_text_features(input_ids=words, **given).pooler_output
    assert words.shape[1] == (reading.length or 5) and (name != "siglip" or words[1, -1] == pad)
    assert close(text_head(states, count), known / known.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_one_encoder_of_two_is_loaded_by_transformers_too(name, tmp_path):
    theirs = randomised(pair_models()[name])
    public = read_images(str(save(theirs, tmp_path)), ours=False)
    image = torch.randn(3, 3, 32, 32)
    assert close(built(public)(image), theirs.vision_model(pixel_values=image).last_hidden_state)


def test_the_first_layers_are_those_of_the_whole_model(tmp_path):
    theirs = randomised(text_models()["roberta"])
    folder = str(save(theirs, tmp_path / "text"))
    ids = torch.randint(5, 95, (2, 7))
    known = theirs(input_ids=ids, output_hidden_states=True).hidden_states
    for ours in (True, False):
        encoder = built(read_texts(folder, layers=2, ours=ours))
        assert close(encoder(ids, torch.arange(7)), known[2])
    assert read_texts(folder, layers=0).config.depth == 0
    with pytest.raises(UserError, match="3 layers"):
        read_texts(folder, layers=4)
    image = str(save(randomised(image_models()["vit"]), tmp_path / "image"))
    assert read_images(image, layers=1).config.depth == 1
    cnn = str(save(image_models()["resnet"], tmp_path / "cnn"))
    with pytest.raises(UserError, match="resnet"):
        read_images(cnn, layers=1)


@pytest.mark.parametrize(("name", "prefix"), [("bert", "bert."), ("roberta", "roberta."), ("clip", "vision_model.")])
def test_names_may_have_a_prefix_and_heads_beside_them(name, prefix, tmp_path):
    """As models with heads are saved, and as the first versions of transformers saved them."""
    models = image_models() if name == "clip" else text_models()
    folder = save(randomised(models[name]), tmp_path)
    read = read_images if name == "clip" else read_texts
    plain = read(str(folder)).weights()
    weights = load_file(folder / "model.safetensors")
    old = {
        prefix
        + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x.half()
        for key, x in weights.items()
    }
    save_file({**old, "lm_head.bias": torch.zeros(3)}, folder / "model.safetensors")
    again = read(str(folder)).weights()
    assert again.keys() == plain.keys() and all(x.dtype == torch.float32 for x in again.values())
    assert all(torch.allclose(again[key], x, atol=2e-3) for key, x in plain.items())


def test_weights_may_be_in_several_files_or_pickled(tmp_path):
    folder = save(randomised(text_models()["bert"]), tmp_path)
    plain = read_texts(str(folder)).weights()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(x, plain[name]) for name, x in read_texts(str(folder)).weights().items())
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors"):
        read_texts(str(folder)).weights()
    (folder / "model.safetensors.index.json").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert all(torch.equal(x, plain[name]) for name, x in read_texts(str(folder)).weights().items())


@pytest.mark.parametrize("ours", [True, False])
def test_missing_and_unknown_weights_are_named(ours, tmp_path):
    folder = save(randomised(text_models()["bert"]), tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        read_texts(str(folder), ours=ours).weights()
    if ours:
        save_file({**weights, "encoder.layer.1.surprise": torch.zeros(1)}, folder / "model.safetensors")
        with pytest.raises(UserError, match="surprise"):
            read_texts(str(folder)).weights()


# ---- known answers of another version of transformers ----


def known_folder(name: str, model_type: str, folder: Path, **more):
    config, tolerance, weights, known = golden.load(name)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config, **more}))
    save_file(weights, folder / "model.safetensors")
    return str(folder), tolerance, known


def test_hf_vit(tmp_path):
    folder, tolerance, known = known_folder("hf_vit", "vit", tmp_path)
    states = built(read_images(folder))(known["in.pixel_values"])
    golden.assert_close(states, known["out.last_hidden_state"], tolerance["out.last_hidden_state"], "states")


@pytest.mark.parametrize(("name", "model_type"), [("hf_bert", "bert"), ("hf_roberta", "roberta")])
def test_hf_text(name, model_type, tmp_path):
    folder, tolerance, known = known_folder(name, model_type, tmp_path)
    ids, real = known["in.input_ids"], known["in.attention_mask"].bool()
    public = read_texts(folder)
    encoder = built(replace(public, config=replace(public.config, pad=int(ids[~real][0]))))
    types = known.get("in.token_type_ids")
    second = None
    if types is not None:
        # Our texts have one type; the fixture's second one is given as a vector to add.
        vectors = public.types()
        second = (vectors - vectors[0])[types]
    place = torch.arange(ids.shape[1])
    x = encoder.embed(ids, place, second)
    golden.assert_close(x[real], known["out.embedding_output"][real], tolerance["out.embedding_output"], "embedding")
    for block in encoder.blocks:
        x = block(x, mask=masks.full(real.sum(1), ids.shape[1]))
    golden.assert_close(x[real], known["out.last_hidden_state"][real], tolerance["out.last_hidden_state"], "states")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_hf_pairs(name, tmp_path):
    folder, tolerance, known = known_folder(f"hf_{name}", name, tmp_path)
    images, texts = read_images(folder), read_texts(folder)
    joint = known["out.image_embeds"].shape[-1]
    head, text_head = Head(images.head, images.config.width, joint), Head(texts.reading.head, texts.config.width, joint)
    head.load_state_dict(images.projection())
    text_head.load_state_dict(texts.projection())
    encoder, unnormed = built(images), list[Tensor]()
    encoder.norm.register_forward_pre_hook(lambda module, args: unnormed.append(args[0]))
    states = encoder(known["in.pixel_values"])
    last = unnormed[0] if name == "clip" else states
    golden.assert_close(
        last, known["out.vision.last_hidden_state"], tolerance["out.vision.last_hidden_state"], "states"
    )
    if name == "clip":
        golden.assert_close(
            states[:, 0], known["out.vision.pooler_output"], tolerance["out.vision.pooler_output"], "pooled"
        )
    vectors = head(states)
    golden.assert_close(vectors, known["out.image_embeds"], tolerance["out.image_embeds"], "image")
    ids = known["in.input_ids"]
    length = known["in.attention_mask"].sum(1) if name == "clip" else None
    states = built(texts)(ids, torch.arange(ids.shape[1]), causal=texts.reading.mask == "causal")
    golden.assert_close(text_head(states, length), known["out.text_embeds"], tolerance["out.text_embeds"], "text")
    last = known["out.text.last_hidden_state"]
    real = torch.ones(ids.shape, dtype=torch.bool) if length is None else torch.arange(ids.shape[1]) < length[:, None]
    golden.assert_close(states[real], last[real], tolerance["out.text.last_hidden_state"], "text states")


# ---- the published models that a recipe names ----


def test_flm_base_has_the_encoders_that_it_starts_from():
    """CLIP ViT-B/32 and RoBERTa-base as their config.json state them, at the recipe's image size."""
    clip = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
        "hidden_act": "quick_gelu",
    }
    roberta = {"vocab_size": 50265, "max_position_embeddings": 514, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
    run = recipe("flm_base")
    image = find_family(ImageFamily, {"model_type": "clip_vision_model"}).config(clip)
    text = find_family(TextFamily, {"model_type": "roberta"}).config(roberta)
    assert same_weights(replace(image, depth=run.image_layers), run.model.image) and run.model.image.size == 288
    assert same_weights(text.with_depth(run.text_layers), run.model.text)
