"""The second stage: how a pair is scored, that an image is encoded once, and both stages from the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastvlp.batch import Batch
from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.embedding_retrieval import evaluate_retrieval
from fastvlp.eval.encoding import MaskedEncoding, open_run
from fastvlp.eval.evaluation import evaluate_embeddings
from fastvlp.eval.pair_scores import mean_log_likelihood, pair_score
from fastvlp.eval.rerank import score_pairs
from fastvlp.eval.split_reading import image_batches, read_captions
from fastvlp.objectives.ar import AR, ARConfig
from tests.made import made_batch, made_model


@pytest.mark.parametrize("bos", ["blind", "official"])
def test_likelihood_is_the_causal_loss_of_each_row(bos):
    model, batch = made_model().eval(), made_batch(lengths=(5, 9, 3))
    with torch.no_grad():
        scores_of_image = mean_log_likelihood(model, model.encode_image(batch.image), batch.ids, batch.length, bos=bos)
        for b, n in enumerate(batch.length.tolist()):
            alone = Batch(
                image=batch.image[b : b + 1],
                ids=batch.ids[b : b + 1, :n],
                length=batch.length[b : b + 1],
                seed=batch.seed[:1],
            )
            loss = AR(ARConfig(bos=bos))(model, model.encode_image(alone.image), alone)["next"]
            torch.testing.assert_close(scores_of_image[b], -loss.total / loss.count)


@pytest.mark.parametrize(("name", "kind"), [("both", "match"), ("flm", "likelihood")])
def test_pairs_are_scored_as_if_alone_and_images_encoded_once(name, kind, runs, world, monkeypatch):
    loaded, saved, _ = open_run(runs[name])
    loaded = replace(loaded, batch_size=4, show=False)
    shards = Shards(world / "test")
    texts = [text for its in read_captions(shards, "captions_zh") for text in its]
    how, match = pair_score(saved)
    assert how == kind
    texts_of_image = [torch.arange(len(texts)).roll(i)[: 2 + 3 * (i % 2)] for i in range(len(shards))]
    encoded = []
    encode = loaded.model.encode_image
    monkeypatch.setattr(loaded.model, "encode_image", lambda image: encoded.append(len(image)) or encode(image))
    scores_of_image = list(score_pairs(loaded, match, shards, texts, texts_of_image))
    assert encoded == [4, 2]
    images = dict(first_images(loaded, shards))
    with torch.no_grad():
        for i, (scores, its) in enumerate(zip(scores_of_image, texts_of_image)):
            for score, t in zip(scores, its.tolist()):
                ids, length = loaded.tokenizer.encode([texts[t]], loaded.max_length)
                torch.testing.assert_close(match(encode(images[i]), ids, length)[0], score, atol=1e-5, rtol=1e-4)


def first_images(loaded, shards):
    for rows, images in image_batches(shards, loaded):
        yield from ((i, images.image[i - rows.start : i - rows.start + 1]) for i in range(rows.start, rows.stop))


def test_a_matching_head_is_read_as_it_was_trained(runs):
    saved = open_run(runs["both"]).saved
    _, match = pair_score(saved)
    batch = made_batch(lengths=(6, 4), size=32)
    with torch.no_grad():
        image = saved.model.encode_image(batch.image)
        state = saved.model.read(image[:1], batch.ids[:1, :6])[:, 0]
        own = {key.removeprefix("itm."): v for key, v in saved.objectives.items() if key.startswith("itm.")}
        hidden = torch.tanh(state @ own["pool.weight"].T + own["pool.bias"])
        logits = hidden @ own["match.weight"].T + own["match.bias"]
        torch.testing.assert_close(match(image[:1], batch.ids[:1, :6], batch.length[:1]), logits[:, 1] - logits[:, 0])


def test_a_run_that_scores_no_pairs_is_refused(runs):
    saved = open_run(runs["both"]).saved
    with pytest.raises(UserError, match=r"safetensors: .*\bclip$"):
        pair_score(saved._replace(info={"objectives": {"clip": {"type": "CLIPConfig"}}}))
    assert pair_score(saved, "likelihood")[0] == "likelihood" and pair_score(saved, "match")[0] == "match"
    with pytest.raises(UserError, match="`rerank_by` match"):
        pair_score(open_run(runs["flm"]).saved, "match")


@pytest.mark.slow
def test_both_stages_from_the_command_line(runs, world, capsys):
    argv = ["evaluate", "retrieval", str(runs["both"]), "--data", str(world)]
    assert main(argv) == 0
    assert main([*argv, "--rerank", "self", "--top", "3"]) == 0
    assert main([*argv, "--rerank", str(runs["flm"]), "--split", "val", "--keep", "0.5", "--views", "2"]) == 0
    printed = capsys.readouterr().out
    assert "image_to_text/r1" in printed and "reranked" in printed and "rerank " in printed
    files = sorted((runs["both"] / "evaluations").glob("retrieval-*.json"))
    assert [path.name.rpartition("-")[2] for path in files] == ["test.json", "val.json"]
    first, second = json.loads(files[0].read_text())["results"]
    assert first["scores"]["towers"] == second["scores"]["towers"] and set(second["seconds"]) == {
        "embed",
        "rank",
        "rerank",
    }
    assert second["reranked_by"] == "match" and second["settings"]["top"] == 3
    assert first["counts"]["texts"] == 12, "Chinese captions, as in training"
    (third,) = json.loads(files[1].read_text())["results"]
    assert (third["settings"]["keep"], third["settings"]["split"]) == (0.5, "val")
    masked = MaskedEncoding(keep=0.5, views=2)
    by_function = evaluate_retrieval(runs["both"], data=world, rerank=str(runs["flm"]), split="val", encoding=masked)
    assert third["reranked_by"] == "likelihood" and third["scores"] == by_function.scores
    flat = {"rerank": str(runs["flm"]), "split": "val", "keep": 0.5, "views": 2}
    assert evaluate_embeddings("retrieval", runs["both"], data=world, **flat).scores == by_function.scores
    assert by_function.path == files[1] and len(json.loads(files[1].read_text())["results"]) == 3


def test_lists_as_long_as_the_split_leave_the_towers_no_say(runs, world):
    """Whatever the towers' shortlists, with all candidates on them the second stage alone decides."""
    whole, masked = (
        evaluate_retrieval(runs["both"], data=world, rerank="self", top=99, encoding=MaskedEncoding(keep=keep)).scores
        for keep in (1, 0.25)
    )
    assert whole["towers"] != masked["towers"]
    assert whole["reranked"] == masked["reranked"]


def test_faults_are_named_with_their_options(runs, world, capsys):
    argv = ["evaluate", "retrieval", str(runs["both"]), "--data", str(world)]
    for options, parts in (
        (["--top", "0"], ["--top", "not 0"]),
        (["--keep", "0.5", "--views", "3"], ["--keep 0.5", "--views 3"]),
        (["--batch-size", "0"], ["--batch-size", "not 0"]),
        (["--captions", "title"], ["'title'", "--captions"]),
        (["--split", "dev"], ["--split dev", f"{world}: "]),
    ):
        assert main([*argv, *options]) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in parts)
    assert main(["evaluate", "retrieval", str(runs["flm"]), "--data", str(world)]) == 2
    assert f"{runs['flm']}: " in capsys.readouterr().err
