import math
from dataclasses import replace

import pytest
import torch

from fastvlp.cli import main
from fastvlp.data.loader import Row
from fastvlp.data.pairs import PairData
from fastvlp.data.records.shards import Shards
from fastvlp.errors import UserError
from fastvlp.eval.ranks import ranks, recall
from fastvlp.model.saving import load_model
from fastvlp.objectives.itm import ITMConfig
from fastvlp.objectives.objective import combine
from fastvlp.random import hash64
from fastvlp.tasks import retrieval
from fastvlp.tasks.interface import NoOptions
from fastvlp.tasks.retrieval import RetrievalConfig, RetrievalTask, hardest
from fastvlp.tasks.task_evaluation import evaluate_task, load_task, load_zero_shot
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.train_config import TrainConfig
from tests.made import made_batch, made_model, made_tokenizer
from tests.made_single import region_batch, row_of, single_model
from tests.tasks.tuning import planned, tune

LENGTHS, COUNTS = (7, 4, 9, 5, 6, 8), (3, 1, 5, 2, 4, 2)


def made(kind, **options):
    model = single_model() if kind == "single" else made_model()
    objective = RetrievalConfig(reading="full", **options).build(model.config, made_tokenizer())
    batch = region_batch(lengths=LENGTHS, counts=COUNTS) if kind == "single" else made_batch(lengths=LENGTHS)
    module = Pretraining(model, {"task": objective})
    return module, batch


def alone(module, batch, image, text):
    """The score of one pair, read without any other or padding."""
    objective, n = module.objectives["task"], int(batch.length[text])
    one = row_of(batch, image) if batch.regions is not None else None
    regions = None if one is None else one.regions
    feature = module.model.encode_image(batch.image[image : image + 1], regions=regions)
    length = batch.length[text : text + 1]
    return objective.scores(module.model, feature, batch.ids[text : text + 1, :n], length, regions).item()


def test_the_hardest_of_a_table_of_scores():
    score = torch.tensor([[9.0, 1, 5, 3], [2, 9, 7, 8], [0, 0, 9, 4]])
    wrong = torch.tensor([[False, True, True, True], [True, False, True, True], [False, False, False, True]])
    place, real = hardest(score, wrong, 2)
    assert place[0].tolist() == [2, 3] and place[1].tolist() == [3, 2] and place[2, 0] == 3
    assert real.tolist() == [[True, True], [True, True], [True, False]]
    assert hardest(score, wrong, 31)[0].shape == (3, 3)


@pytest.mark.parametrize("kind", ["single", "fusion"])
def test_random_negatives_are_a_hinge_on_one_other_of_each_kind(kind):
    module, batch = made(kind)
    objective, losses = module.objectives["task"], module(batch)
    drawn = objective.random(batch)
    for name, (place, real) in drawn.items():
        total = 0.0
        for b, other in enumerate(place[:, 0].tolist()):
            assert other != b and real[b]
            pair = (other, b) if name == "image" else (b, other)
            right, wrong = (torch.tensor(alone(module, batch, *p)).sigmoid().item() for p in ((b, b), pair))
            total += max(0.0, 0.2 + wrong - right)
        loss = losses[f"task/{name}"]
        assert loss.count == module.counts(batch)[f"task/{name}"] == 6
        assert loss.total.item() == pytest.approx(total, rel=1e-4, abs=1e-5)
    # The mean over all negatives, as in the released code.
    mean = sum(loss.total for loss in losses.values()) / 12
    torch.testing.assert_close(combine(losses), mean)
    moved = replace(batch, seed=torch.tensor([hash64(int(s), 1) for s in batch.seed]))
    assert any(not objective.random(moved)[name][0].equal(drawn[name][0]) for name in drawn)


@pytest.mark.parametrize("kind", ["single", "fusion"])
def test_hard_negatives_are_the_best_scored_of_the_batch(kind):
    """Their scores are those of each pair read alone: no row loses a region to another's padding."""
    module, batch = made(kind, negatives="hard", anchors=2, keep=3, margin=2.0)
    losses = module(batch)
    totals = {"image": 0.0, "text": 0.0}
    for name in totals:
        for anchor in range(2):
            pairs = [(k, anchor) if name == "image" else (anchor, k) for k in range(6) if k != anchor]
            best = sorted((alone(module, batch, *pair) for pair in pairs), reverse=True)[:3]
            right = torch.tensor(alone(module, batch, anchor, anchor)).sigmoid()
            totals[name] += sum((2.0 + torch.tensor(score).sigmoid() - right).item() for score in best)
        assert losses[f"task/{name}"].count == module.counts(batch)[f"task/{name}"] == 6
        assert losses[f"task/{name}"].total.item() == pytest.approx(totals[name], rel=1e-4)
    torch.testing.assert_close(combine(losses).item(), sum(totals.values()) / 6, rtol=1e-4, atol=0)
    combine(losses).backward()
    assert module.objectives["task"].head.weight.grad.abs().sum() > 0
    assert module.training, "scoring without gradients leaves training as it was"


@pytest.mark.parametrize("kind", ["single", "fusion"])
def test_cross_entropy_chooses_the_own_text_among_candidates(kind):
    """FLM's loss (arXiv 2303.14038; compute_irtr of its code): one text of an image is right, the others are drawn."""
    module, batch = made(kind, loss="cross-entropy", candidates=4)
    module, objective = module.double(), module.objectives["task"]
    place_BN, real_BN = objective.random_texts(batch, 3)
    total = 0.0
    for b, others in enumerate(place_BN.tolist()):
        assert len({b, *others}) == 4 and real_BN[b].all()
        right, *wrong = (math.exp(alone(module, batch, b, t)) for t in (b, *others))
        total -= math.log(right / (right + sum(wrong)))
    losses = module(batch)
    assert losses.keys() == module.counts(batch).keys() == {"task/text"}
    loss = losses["task/text"]
    assert loss.count == module.counts(batch)["task/text"] == 6
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    moved = replace(batch, seed=torch.tensor([hash64(int(s), 1) for s in batch.seed]))
    assert not objective.random_texts(moved, 3)[0].equal(place_BN)


def test_a_text_that_is_the_own_one_again_is_no_candidate():
    """A row with fewer wrong texts than candidates chooses among those that there are; without any it does not count."""
    module, batch = made("fusion", loss="cross-entropy", candidates=16)
    ids, length = batch.ids.clone(), batch.length.clone()
    ids[1:4], length[1:4] = ids[0], length[0]
    module, same = module.double(), replace(batch, ids=ids, length=length)
    score = [[alone(module, same, b, t) for t in range(6)] for b in range(6)]
    total = 0.0
    for b in range(6):
        wrong = [t for t in range(6) if not ids[t].equal(ids[b])]
        total -= math.log(math.exp(score[b][b]) / sum(math.exp(score[b][t]) for t in (b, *wrong)))
    losses = module(same)
    assert losses["task/text"].total.item() == pytest.approx(total, rel=1e-9) and losses["task/text"].count == 6
    one = replace(batch, ids=ids[:1].expand(6, -1), length=length[:1].expand(6))
    assert all(loss.total == 0 and loss.count == 0 for loss in module(one).values())


def test_the_loss_is_that_of_the_models_paper(runs, world, tmp_path):
    """FLM and METER (fusion layers) choose among sixteen, UNITER (a single stream) has hinges."""

    def chosen(kind, **options):
        return planned("retrieval", runs[kind], world, tmp_path / "run", **options).objectives["retrieval"].loss

    assert chosen("flm") == chosen("mlm") == "cross-entropy" and chosen("uniter") == "hinge"
    assert chosen("flm", loss="hinge") == chosen("flm", negatives="hard") == "hinge"
    assert chosen("uniter", loss="cross-entropy") == "cross-entropy"
    with pytest.raises(UserError, match="`negatives`"):
        chosen("uniter", loss="cross-entropy", negatives="hard")
    with pytest.raises(UserError, match="`candidates` 1"):
        chosen("flm", candidates=1)


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_a_pair_with_the_same_text_is_never_wrong(negatives):
    module, batch = made("fusion", negatives=negatives, anchors=6, keep=4)
    ids, length = batch.ids.clone(), batch.length.clone()
    ids[1:4], length[1:4] = ids[0], length[0]
    same = replace(batch, ids=ids, length=length)
    losses = module(same)
    assert losses["task/text"].count == (6 if negatives == "random" else 4 * 2 + 2 * 4)
    one = replace(batch, ids=ids[:1].expand(6, -1), length=length[:1].expand(6))
    assert all(loss.total == 0 and loss.count == 0 for loss in module(one).values())
    with pytest.raises(UserError, match="single readable pair"):
        module.objectives["task"].wrong(replace(batch, ids=ids[:1], seed=batch.seed[:1], image=batch.image[:1]))


@pytest.fixture(scope="module")
def matched(runs, world, tmp_path_factory):
    """Folders of runs that learned to match: a single stream, and a fusion model."""
    folder = tmp_path_factory.mktemp("itm")
    config = load_model(runs["mlm"]).model.config
    train(
        TrainConfig(
            name="itm",
            out=str(folder / "itm"),
            data=PairData(train=str(world / "train"), batch_size=8, max_length=40),
            model=config,
            objectives={"itm": ITMConfig()},
            optim=OptimConfig(lr=1e-3),
            steps=2,
            tokenizer=str(runs["mlm"] / "tokenizer.json"),
            precision="fp32",
        )
    )
    return {"single": runs["uniter"], "fusion": folder / "itm"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "fusion"])
def test_zero_shot_is_the_matching_heads_score(kind, matched, world):
    tuned = load_zero_shot(str(matched[kind]), str(world))
    saved, data = tuned.saved, replace(tuned.data, train=str(world / "train"), test=str(world / "test"))
    texts = [text for i in range(6) for text in Shards(data.test).info(i)["captions"]]
    found = retrieval.score_all(tuned._replace(data=data), "test", texts)
    rows = data.rows("test", saved.tokenizer, saved.model.config.image.size, strict=True)
    batch, _ = rows.make([Row(i, 0) for i in range(6)])
    if kind == "fusion":
        itm = ITMConfig().build(saved.model.config, saved.tokenizer)
        itm.load_state_dict({k.removeprefix("itm."): v for k, v in saved.objectives.items()})
    for i in range(6):
        ids, length = saved.tokenizer.encode(texts, data.max_length)
        with torch.no_grad():
            image_BKD = saved.model.encode_image(batch.image, regions=batch.regions)[[i] * len(texts)]
            if kind == "single":
                regions = replace(batch.regions, box=batch.regions.box[[i] * 30], count=batch.regions.count[[i] * 30])
                logits = saved.model.single.match(saved.model.read_regions(image_BKD, regions, ids, length).pooled)
            else:
                logits = itm.scores(saved.model, image_BKD, ids, length)
        torch.testing.assert_close(found[i], logits[:, 1], atol=1e-5, rtol=1e-5)
    scores = evaluate_task(str(matched[kind]), data=str(world), zero_shot=True).scores["test"]
    own = torch.arange(6).repeat_interleave(5)
    known = recall(*ranks(lambda i, t: found[i, t], own, 6))
    assert {name: scores[name] for name in known} == pytest.approx(known)
    assert scores["images"] == 6 and scores["count"] == 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "fusion"])
def test_the_ranking_head_starts_as_a_copy_and_stays_what_it_became(kind, matched, world, tmp_path):
    options = {"lr": 1e-12, "negatives": "hard", "steps": 3}
    scores = tune("retrieval", matched[kind], world, tmp_path / "still", **options).scores["test"]
    zero = evaluate_task(str(matched[kind]), data=str(world), zero_shot=True).scores["test"]
    assert {n: scores[n] for n in scores if "/" in n} == {n: zero[n] for n in zero if "/" in n}
    tune("retrieval", matched[kind], world, tmp_path / "run", lr=1e-2, steps=3)
    tuned = load_task(tmp_path / "run")
    saved, objective = tuned.saved, tuned.objective
    if kind == "single":
        pretrained = load_model(matched[kind]).model.single.match
        assert objective.head.weight.data_ptr() != saved.model.single.match.weight.data_ptr()
        torch.testing.assert_close(saved.model.single.match.weight, pretrained.weight)
        assert not torch.allclose(objective.head.weight, pretrained.weight[1:], atol=1e-4)
    # Evaluating it reads its own head: the released script overwrites it.
    own = RetrievalTask.score(tuned, "test", NoOptions())
    again = evaluate_task(str(tmp_path / "run")).scores["test"]
    assert {n: again[n] for n in own} == own and own != {n: zero[n] for n in own}
    with pytest.raises(UserError, match="without `zero_shot`"):
        evaluate_task(str(tmp_path / "run"), data=str(world), zero_shot=True)


def test_a_run_that_did_not_learn_to_match_is_not_scored(runs, world, capsys):
    with pytest.raises(UserError, match="did not learn image-text matching"):
        evaluate_task(str(runs["mlm"]), data=str(world), zero_shot=True)
    assert main(["evaluate", str(runs["uniter"]), "--zero-shot"]) == 2
    assert "needs --data" in capsys.readouterr().err


def test_every_image_meets_every_text_once(runs, world, monkeypatch):
    """Chunks of texts change nothing, and equal captions share one score."""
    monkeypatch.setattr(retrieval, "ROWS", 7)
    tuned = load_zero_shot(str(runs["uniter"]), str(world))
    tuned = tuned._replace(data=replace(tuned.data, test=str(world / "test"), batch_size=4))
    texts = [text for i in range(6) for text in Shards(world / "test").info(i)["captions"]]
    found = retrieval.score_all(tuned, "test", texts)
    monkeypatch.setattr(retrieval, "ROWS", 100)
    whole = retrieval.score_all(tuned, "test", texts)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert found.shape == (6, 30) and found.isfinite().all()
