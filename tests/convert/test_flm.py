"""FLM through `vlp convert`: pretrained, and fine-tuned by its code for a task, scored by `vlp evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from fastvlp.cli import main
from fastvlp.data.tokenize import Tokenizer, with_new_ends
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model import masks
from fastvlp.model.inherited_config import same_weights
from fastvlp.model.saving import load_model
from fastvlp.search.embedder import Embedder
from fastvlp.tasks.caption import caption
from fastvlp.tasks.task_evaluation import load_task
from fastvlp.tasks.vqa import frequent_answers
from tests.golden import assert_close, load
from tests.parity import test_flm_parity as parity

NAME = "flm_downstream"
ANSWERS = [f"answer {i}" for i in range(17)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, WorldConfig(size=32, captions=2), train=24, val=6, test=6, pairs=6, singles=0)
    return folder


def write_words(path: Path, size: int) -> None:
    """RoBERTa's special tokens at its ids, and words."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "red", "blue", "box", *(f"w{i}" for i in range(size - 8))]
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(words[:5])
    inner.save(str(path))


def saved_by_lightning(folder: Path, weights: dict[str, Tensor], c: dict[str, Any], **more: Any) -> str:
    """The checkpoint of a run of the released code."""
    settings = {"num_heads": c["num_heads"], "max_text_len": c["L"], "vit": "ViT-B/32"} | more
    torch.save({"state_dict": weights, "hyper_parameters": settings, "epoch": 3}, folder / "flm.ckpt")
    return str(folder / "flm.ckpt")


def made(folder: Path, heads: str = "", **more: Any) -> str:
    """The golden checkpoint with the heads of one task, or of all."""
    c, _, weights, _ = load(NAME)
    others = ("vqa_classifier.", "nlvr2_classifier.", "rank_output.")
    write_words(folder / "tokenizer.json", c["vocab_size"])
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    kept = {k: x for k, x in weights.items() if not heads or not k.startswith(others) or k.startswith(heads)}
    return saved_by_lightning(folder, kept, c, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "head", "output"),
    [
        ("vqa", "vqa_classifier.", "vqa.logits"),
        ("nlvr2", "nlvr2_classifier.", "nlvr2.logits"),
        ("retrieval", "rank_output.", ""),
    ],
)
def test_a_fine_tuned_checkpoint_is_a_run_of_its_task(task: str, head: str, output: str, tmp_path: Path, world: Path):
    path, out = made(tmp_path, head), tmp_path / "out"
    answers = ["--answers", str(tmp_path / "answers.json")] if task == "vqa" else []
    assert main(["convert", path, str(out), *answers]) == 0
    tuned, (_, tol, _, known) = load_task(out), load(NAME)
    assert tuned.task.name == task and tuned.data.max_length == 10
    model, objective = tuned.saved.model, tuned.objective
    one = parity.batch_of(known, "in.image_0")
    with torch.no_grad():
        if task == "retrieval":
            states = model.encode_image(one.image)
            own = objective.scores(model, states, one.ids, one.length, None)
            assert_close(own, known["out.irtr.scores"][:, 0], tol["out.irtr.scores"], "scores")
            for i in range(3):
                ids, length = known[f"in.false_text_{i}_ids"], known[f"in.false_text_{i}_masks"].sum(1)
                score = objective.scores(model, states, ids, length, None)
                assert_close(score, known["out.irtr.scores"][:, i + 1], tol["out.irtr.scores"], "scores")
        else:
            if task == "nlvr2":
                images = torch.stack([known["in.image_0"], known["in.image_1"]], 1).flatten(0, 1)
                ids, length, seed = (x.repeat_interleave(2, 0) for x in (one.ids, one.length, one.seed))
                slot = torch.tensor([0, 1]).repeat(len(one))
                one = replace(one, image=images, ids=ids, length=length, seed=seed, slot=slot)
            logits = objective.logits(model, model.encode_image(one.image), one)
            assert_close(logits, known[f"out.{output}"], tol[f"out.{output}"], output)
    assert main(["evaluate", str(out), "--data", str(world), "--split", "val"]) == 0
    scores = json.loads((out / "results.json").read_text())["val"]
    assert scores["weights"] == "model.safetensors" and scores["count"] > 0
    tune = ["--data", str(world), "--steps", "1", "--batch-size", "4", "--precision", "fp32"]
    assert main(["finetune", task, "--from", str(out), *tune, "--out", str(tmp_path / "tuned")]) == 0


def test_answers_are_chosen_by_name(tmp_path: Path, world: Path):
    answers = [*frequent_answers(f"{world}/train", most=17)]
    path = made(tmp_path, "vqa_classifier.")
    numbered = {answer: i for i, answer in enumerate(answers)} | {f"none {i}": i for i in range(len(answers), 17)}
    (tmp_path / "answers.json").write_text(json.dumps(numbered))
    convert = ["convert", path, str(tmp_path / "out"), "--answers", str(tmp_path / "answers.json")]
    assert main(convert) == 0
    assert load_task(tmp_path / "out").data.answers[: len(answers)] == tuple(answers)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "export")]) == 0
    assert "answer" in Embedder.load(tmp_path / "export").can


def test_what_a_fine_tuned_checkpoint_does_not_tell_is_asked_for(tmp_path: Path, capsys):
    path = made(tmp_path)
    out, answers = str(tmp_path / "out"), tmp_path / "answers.json"
    for options, expected in (
        ([], "choose its --task"),
        (["--task", "caption"], "--task caption: its heads are of vqa, nlvr2, retrieval"),
        (["--task", "vqa"], "17 answers"),
        (["--task", "nlvr2", "--activation", "gelu"], "leave it out"),
    ):
        assert main(["convert", path, out, *options]) == 2
        assert expected in (error := capsys.readouterr().err), error
    for content, expected in (
        ("[1, 2]", "neither a list of answers"),
        ('{"a": 3}', "neither a list of answers"),
        ("no", "cannot read"),
    ):
        answers.write_text(content)
        assert main(["convert", path, out, "--task", "vqa", "--answers", str(answers)]) == 2
        assert expected in (error := capsys.readouterr().err), error
    assert main(["convert", path, out, "--task", "nlvr2"]) == 0
    assert main(["evaluate", out]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_captioner_writes_as_the_released_decoding_does(tmp_path: Path, world: Path, capsys):
    c, _, weights, known = load("flm_three_stream")
    V, generator = c["vocab_size"], torch.Generator().manual_seed(0)
    write_words(tmp_path / "tokenizer.json", V)
    tables = ("text_transformer.embeddings.word_embeddings.weight", "fusion_token_embedding.word_embeddings.weight")
    tables += ("text_transformer2.embeddings.word_embeddings.weight", "lm_score.decoder.weight", "lm_score.bias")
    tables += tuple(f"lm_score_{part}" for part in ("r.decoder.weight", "r.bias", "f.decoder.weight", "f.bias"))
    larger = dict(weights)
    for name in tables:
        if name in larger:
            new = torch.randn(2, *larger[name].shape[1:], generator=generator)
            larger[name] = torch.cat([larger[name], new])
    path = saved_by_lightning(tmp_path, larger, c, add_new_bos_token=True)
    assert main(["convert", path, str(tmp_path / "out")]) == 0
    saved = load_model(tmp_path / "out")
    model, words = saved.model, saved.tokenizer
    assert (words.bos, words.eos, words.pad) == (V, V + 1, 1) and saved.info["task"] == "caption"
    assert words.decode([words.bos, 5, 7, words.eos, 2]) == "red box"
    # Theirs: <s> <bos> w ..., where a token sees those from <bos> on. Ours: <bos> w ..., read left to right.
    theirs = torch.tensor([[0, V, 5, 9, 20, 31, 7]])
    whole, config = parity.build()
    whole = type(whole)(replace(config, text=replace(config.text, vocab=V + 2), reconstructor=None))
    whole.load_state_dict(parity.convert.from_flm(larger, whole.config))
    image = known["in.image"][:1]
    with torch.no_grad():
        mask = masks.causal_official(torch.tensor([7]), 7)
        wanted = whole.head(whole.read(whole.encode_image(image), theirs, mask=mask))[:, 1:]
        found = model.causal_head(model.read(model.encode_image(image), theirs[:, 1:], causal=True))
    assert_close(found, wanted, 1e-5, "logits")
    written = caption(model.eval(), words, image)
    assert isinstance(written[0], str)
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(world), "--split", "val"]) == 0


@pytest.mark.slow
def test_pretrained_and_its_baselines(tmp_path: Path, world: Path):
    c, _, weights, _ = load("flm_three_stream")
    wanted, config = parity.build()
    write_words(tmp_path / "tokenizer.json", c["vocab_size"])
    path = saved_by_lightning(tmp_path, weights, c, span_corruption_rate=0.4)
    assert main(["convert", path, str(tmp_path / "flm")]) == 0
    saved = load_model(tmp_path / "flm")
    assert all(torch.equal(x, wanted.state_dict()[name]) for name, x in saved.model.state_dict().items())
    assert same_weights(saved.model.config, config)
    objective = saved.info["objectives"]["flm"]
    assert saved.info["reading"] == "flm" and (objective["bos"], objective["span_rate"]) == ("official", 0.4)
    lacks = ("fusion_layers_", "token_type_embeddings_flm", "cross_modal_text_pooler_f")
    one_stream = {name: x for name, x in weights.items() if not name.startswith(lacks)}
    for task, head in (("mlm", "lm_score"), ("ar", "mlm_score")):
        path = saved_by_lightning(tmp_path, {k: x for k, x in one_stream.items() if not k.startswith(head)}, c)
        assert main(["convert", path, str(tmp_path / task)]) == 0
        saved = load_model(tmp_path / task)
        assert [*saved.info["objectives"]] == [task] and saved.model.reconstructor is None
    tune = ["--data", str(world), "--steps", "1", "--batch-size", "8", "--out", str(tmp_path / "tuned")]
    assert main(["finetune", "vqa", "--from", str(tmp_path / "flm"), *tune]) == 0
    assert main(["export", str(tmp_path / "flm"), str(tmp_path / "export")]) == 0
    assert Embedder.load(tmp_path / "export").can == {"match"}


def test_new_ends_keep_the_ids_of_all_other_words(tmp_path: Path):
    write_words(tmp_path / "tokenizer.json", 20)
    old = Tokenizer.load(tmp_path / "tokenizer.json")
    new = with_new_ends(old)
    ids, length = new.encode(["red w3 box"], 10)
    assert ids[0, 1:-1].tolist() == old.encode(["red w3 box"], 10)[0][0, 1:-1].tolist()
    assert ids[0, 0] == 20 and ids[0, -1] == 21 and length.item() == 5
    again = with_new_ends(old)
    assert again.vocab_size == new.vocab_size == 22
