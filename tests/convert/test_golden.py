"""Known answers of transformers and open_clip through `vlp convert`: a folder as it is published, and what the converted model
computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
from torch import Tensor

from fastvlp.cli import main
from fastvlp.convert.weight_map import Weights
from fastvlp.model import masks
from fastvlp.model.saving import Saved, load_model
from tests.golden import assert_close, load


def write_words(folder: Path, size: int, **special: int) -> None:
    """A tokenizer of `size` words, with special tokens at the given ids."""
    names = {
        "clip": {"bos": "<|startoftext|>", "eos": "<|endoftext|>"},
        "bert": {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"},
        "roberta": {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"},
    }["clip" if size - 1 in special.values() else "bert" if special.get("pad") == 0 else "roberta"]
    words = {f"w{i}": i for i in range(size)}
    for role, i in special.items():
        del words[f"w{i}"]
        words[names[role]] = i
    inner = tokenizers.Tokenizer(models.WordLevel(words, "w10"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([names[role] for role in special])
    inner.save(str(folder / "tokenizer.json"))


def converted(
    name: str, folder: Path, config: dict[str, Any], *, weights: Weights | None = None, **special: int
) -> Saved:
    """The model that `vlp convert` makes of a golden fixture's folder."""
    folder.mkdir(exist_ok=True)
    c, _, own, _ = load(name)
    size = c.get("vocab_size") or c.get("text_config", {}).get("vocab_size") or 100
    if special:
        write_words(folder, size, **special)
    file = "config.json"
    if "model_cfg" in config:
        file = "open_clip_config.json"
    (folder / file).write_text(json.dumps(config))
    target = "open_clip_model.safetensors" if "model_cfg" in config else "model.safetensors"
    save_file({key: x.contiguous() for key, x in (weights or own).items()}, folder / target)
    assert main(["convert", str(folder), str(folder / "out")]) == 0
    return load_model(folder / "out")


def check(found: dict[str, Tensor], name: str, rows: Tensor | None = None) -> None:
    _, tol, _, known = load(name)
    for key, mine in found.items():
        wanted = known[f"out.{key}"]
        assert_close(*((mine, wanted) if rows is None else (mine[rows], wanted[rows])), tol[f"out.{key}"], key)


def lengths_to(ids_BL: Tensor, end: int) -> Tensor:
    """Tokens of each row, up to the first `end`."""
    return (ids_BL == end).int().argmax(1) + 1


def test_clip(tmp_path: Path):
    c, _, _, known = load("hf_clip")
    saved = converted("hf_clip", tmp_path, c | {"model_type": "clip"}, bos=98, eos=99)
    model, ids = saved.model, known["in.input_ids"]
    image = model.embed_image(model.encode_image(known["in.pixel_values"]))
    text = model.embed_text(ids, lengths_to(ids, 99))
    scale = saved.learned("clip")["log_scale"].exp()
    check({"image_embeds": image, "text_embeds": text, "logits_per_image": scale * image @ text.T}, "hf_clip")
    assert saved.tokenizer.added == ("pad", "mask") or saved.tokenizer.pad >= 100


def test_siglip(tmp_path: Path):
    c, _, _, known = load("hf_siglip")
    saved = converted("hf_siglip", tmp_path, c | {"model_type": "siglip"}, eos=1, pad=3)
    model, theirs = saved.model, known["in.input_ids"]
    length = torch.where((theirs == 1).any(1), lengths_to(theirs, 1), theirs.shape[1])
    # Ours begin with a <s> that is left out.
    ids = torch.cat([torch.full_like(theirs[:, :1], saved.tokenizer.bos), theirs], 1)
    image = model.embed_image(model.encode_image(known["in.pixel_values"]))
    text = model.embed_text(ids, length + 1)
    learned = saved.learned("siglip")
    logits = learned["log_scale"].exp() * image @ text.T + learned["bias"]
    check({"image_embeds": image, "text_embeds": text, "logits_per_image": logits}, "hf_siglip")


def test_vit(tmp_path: Path):
    c, _, _, known = load("hf_vit")
    saved = converted("hf_vit", tmp_path, c | {"model_type": "vit"})
    check({"last_hidden_state": saved.model.encode_image(known["in.pixel_values"])}, "hf_vit")
    assert saved.info["untrained"] == ["embed."] and not saved.model.config.text.present


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_bert_and_roberta(name: str, tmp_path: Path):
    c, _, weights, known = load(f"hf_{name}")
    special = {"bert": {"pad": 0, "bos": 1, "eos": 2, "mask": 3}, "roberta": {"bos": 0, "pad": 1, "eos": 2, "mask": 3}}
    saved = converted(f"hf_{name}", tmp_path, c | {"model_type": name}, **special[name])
    ids, real = known["in.input_ids"], known["in.attention_mask"].bool()
    position = torch.arange(ids.shape[1])
    kind = None
    if "in.token_type_ids" in known:
        types = weights["embeddings.token_type_embeddings.weight"]
        kind = known["in.token_type_ids"][..., None] * (types[1] - types[0])
    text = saved.model.text
    x = text.embed(ids, position, kind)
    check({"embedding_output": x}, f"hf_{name}", real)
    for block in text.blocks:
        x = block(x, mask=masks.full(real.sum(1), ids.shape[1]))
    check({"last_hidden_state": x}, f"hf_{name}", real)
    assert not saved.model.config.image.present


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip(quick: bool, tmp_path: Path):
    c, _, weights, known = load("clip_openclip")
    model_cfg = dict(c["model"])
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    if quick:
        # As `custom_text` models are saved.
        model_cfg |= {"custom_text": True}
        own = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
        weights = {f"text.{key}" if key.startswith(own) else key: x for key, x in weights.items()}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    saved = converted("clip_openclip", tmp_path, config, weights=weights, bos=98, eos=99)
    model, ids = saved.model, known["in.text"]
    image = model.embed_image(model.encode_image(known["in.image"]))
    text = model.embed_text(ids, lengths_to(ids, 99))
    scale = saved.learned("clip")["log_scale"].exp()
    found = {"image_features": image, "text_features": text, "logits_per_image": scale * image @ text.T}
    check(found, "clip_openclip")
    assert model.config.image.mean == (0.5, 0.4, 0.3)
    assert json.loads((tmp_path / "out/config.json").read_text())["data"]["fit"] == "squash"


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("", "multimodal_cfg", {"width": 8}),
        ("vision_cfg", "timm_model_name", "vit_base_patch16_siglip_224"),
        ("vision_cfg", "layers", [3, 4, 6, 3]),
        ("vision_cfg", "attentional_pool", True),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "pool_type", "none"),
    ],
)
def test_what_no_model_of_ours_computes_is_named(part: str, field: str, value: Any, tmp_path: Path, capsys):
    c, _, weights, _ = load("clip_openclip")
    config = json.loads(json.dumps(c["model"]))
    (config[part] if part else config)[field] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (field in error or "ResNet" in error) and not (tmp_path / "out").exists()


def test_flip(tmp_path: Path):
    c, _, weights, known = load("flip_forward")
    write_words(tmp_path, 100, pad=0)
    save_file({key: x.contiguous() for key, x in weights.items()}, tmp_path / "flip.safetensors")
    heads = ["--heads", str(c["img_heads"]), str(c["txt_heads"])]
    assert main(["convert", str(tmp_path / "flip.safetensors"), str(tmp_path / "out"), *heads]) == 0
    saved = load_model(tmp_path / "out")
    model, theirs = saved.model, known["in.txt"]
    # Ours begin with <s> and end in </s>, which are left out.
    length = known["in.txt_is_valid"].sum(1).long()
    ids = torch.zeros(len(theirs), theirs.shape[1] + 2, dtype=torch.long)
    ids[:, 0], ids[:, 1:-1] = saved.tokenizer.bos, theirs
    ids[torch.arange(len(ids)), length + 1] = saved.tokenizer.eos
    image = model.embed_image(model.encode_image(known["in.image"].permute(0, 3, 1, 2)))
    check({"full.z_img": image, "full.z_txt": model.embed_text(ids, length + 2)}, "flip_forward")
