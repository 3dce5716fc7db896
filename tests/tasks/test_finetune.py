import json
import shutil
from dataclasses import replace
from itertools import islice
from unittest.mock import patch

import fsspec
import pytest
import torch

from fastvlp.cli import main
from fastvlp.data.augment import AugmentConfig
from fastvlp.data.records.shards import Shards
from fastvlp.data.regions import RegionSource
from fastvlp.data.splits import find_split, find_splits
from fastvlp.errors import UserError
from fastvlp.eval.caption_metrics import WORDS_NOTE
from fastvlp.model.encoders.vit import resize_positions
from fastvlp.model.saving import load_model
from fastvlp.tasks.finetune import data_for
from fastvlp.tasks.interface import make_task
from fastvlp.tasks.nlvr2 import NLVR2Task
from fastvlp.tasks.pretrained import load_pretrained
from fastvlp.tasks.task_evaluation import evaluate_task, load_task
from fastvlp.tasks.task_scores import TaskScores, format_scores
from fastvlp.tasks.vqa import VQAData, VQATask, frequent_answers, measure
from fastvlp.training.loop import start
from fastvlp.training.optim import OptimConfig
from fastvlp.training.trained_parts import LastLayers
from tests.tasks.tuning import planned, tune

TASKS = ("vqa", "nlvr", "nlvr2", "grounding", "retrieval", "entailment", "vcr")
# Each task and each kind of model once in the fast tests. In the slow ones each task with a single stream, which reads regions,
# and with a model of fusion layers: with two streams over the text and with one in turn.
FAST = {("flm", "vqa"), ("mlm", "nlvr"), ("uniter", "nlvr2"), ("uniter", "grounding"), ("mlm", "retrieval")}
FAST |= {("flm", "entailment"), ("mlm", "vcr"), ("flm", "caption")}
PAIRS = sorted(FAST | {("flm", "nlvr2"), ("mlm", "grounding")} | {("uniter", task) for task in TASKS})


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, task", [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in PAIRS]
)
def test_every_run_can_be_tuned_on_every_task(kind, task, runs, world, tmp_path):
    scores, path = tune(task, runs[kind], world, tmp_path / "run")
    assert json.loads(path.read_text()) == scores
    assert set(scores) == {"val", "test"}
    main_score = scores["test"][{"caption": "cider", "retrieval": "recall"}.get(task, "accuracy")]
    assert 0 <= main_score <= 10

    tuned = load_task(tmp_path / "run")
    reading = tuned.saved.info["reading"]
    assert reading == ("causal" if task == "caption" else "flm" if kind == "flm" else "full")
    assert tuned.objective.reading == reading and tuned.task.name == task
    again = evaluate_task(str(tmp_path / "run"))
    assert again.scores == {"test": scores["test"]} == json.loads(again.path.read_text())


def test_a_single_stream_reads_the_regions_it_was_pretrained_with(runs, world, tmp_path):
    run = planned("nlvr2", runs["uniter"], world, tmp_path / "run")
    assert run.data.regions == RegionSource(most=20)
    assert run.model.single.types == 3 and run.objectives["nlvr2"].form == "pair-biattn"
    assert planned("vqa", runs["uniter"], world, tmp_path / "run").model.single.types == 2
    assert planned("vqa", runs["mlm"], world, tmp_path / "run").data.regions is None
    with pytest.raises(UserError, match="full `reading`"):
        tune("vqa", runs["uniter"], world, tmp_path / "run", reading="causal")
    with pytest.raises(UserError, match="single stream"):
        tune("nlvr2", runs["mlm"], world, tmp_path / "run", form="triplet")
    with pytest.raises(UserError, match="`anchors` 0"):
        planned("retrieval", runs["uniter"], world, tmp_path / "run", anchors=0)
    with pytest.raises(UserError, match="single stream over words"):
        tune("caption", runs["uniter"], world, tmp_path / "caption")
    with pytest.raises(UserError, match=r"grounding: `loss` cannot be 'bce'"):
        planned("grounding", runs["mlm"], world, tmp_path / "run", loss="bce")


def test_the_second_image_starts_as_the_first(runs, world, tmp_path):
    tune("nlvr2", runs["uniter"], world, tmp_path / "run", lr=1e-12, form="triplet")
    before, after = (load_model(folder).model.state_dict() for folder in (runs["uniter"], tmp_path / "run"))
    before["single.kinds"] = before["single.kinds"][[0, 1, 1]]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0, msg=name)


def test_scores_follow_the_weights_not_the_training_process(runs, world, tmp_path):
    """`vlp evaluate` in a new process sees only the folder."""
    out = tmp_path / "run"
    tune("vqa", runs["mlm"], world, out, reading="causal")
    assert main(["evaluate", str(out), "--split", "val"]) == 0
    assert main(["evaluate", str(out), "--split", "val"]) == 0
    files = sorted(path.name for path in out.glob("results*.json"))
    assert files == ["results-2.json", "results-3.json", "results.json"]
    first, second = (json.loads((out / name).read_text()) for name in files[:2])
    assert first == second == {"val": json.loads((out / "results.json").read_text())["val"]}
    assert first["val"]["count"] == sum(len(record.info["questions"]) for record in Shards(world / "val"))


def test_the_run_inherits_model_and_options(runs, world, tmp_path):
    run = planned("vqa", runs["flm"], world, tmp_path / "run", field="questions_zh", reading="full")
    source = load_model(runs["flm"])
    assert run.model == source.model.config and run.init == str(runs["flm"])
    assert run.objectives["vqa"].reading == "full"
    assert "是" in run.data.answers and run.data.max_length == 50
    assert run.data.val == str(world / "val")
    assert run.checkpoint_every is not None, "a killed fine-tuning can be resumed"
    with pytest.raises(UserError, match="`lr` must be above 0"):
        planned("vqa", runs["flm"], world, tmp_path / "run", lr=0.0)


def test_a_fine_tuning_takes_the_options_of_a_run(runs, world, tmp_path):
    augment, last = AugmentConfig(flip=0.5), LastLayers(image=1)
    rates = OptimConfig(lr=5e-6, cross_multiplier=5, head_multiplier=50, warmup=0.2, parts={"text": 0.5, "image": 2.0})
    given = {"accumulate": 4, "augment": augment, "train_last": last, "image_size": 64, "optim": rates, "ema": 0.9}
    run = planned("vqa", runs["flm"], world, tmp_path / "run", **given)
    assert (run.accumulate, run.augment, run.train_last, run.ema) == (4, augment, last, 0.9)
    assert run.model.image.size == 64 and run.optim == rates
    usual = planned("vqa", runs["flm"], world, tmp_path / "run")
    assert usual.optim == VQATask.optim and usual.model.image.size == 32
    assert planned("vqa", runs["flm"], world, tmp_path / "run", lr=1e-3, optim=rates).optim == replace(rates, lr=1e-3)
    caption = planned("caption", runs["flm"], world, tmp_path / "run", lr=1e-3)
    assert caption.optim == replace(VQATask.optim, lr=1e-3, head_multiplier=1)

    words = (
        f"finetune vqa --from {runs['flm']} --data {world} --out {tmp_path / 'run'} --accumulate 4 --ema 0.9 --steps 2 "
    )
    words += "--image-size 64 --augment.flip 0.5 --train-last.image 1 --optim.lr 5e-6 --optim.cross-multiplier 5 "
    words += (
        "--optim.head-multiplier 50 --optim.warmup 0.2 --optim.parts text 0.5 image 2 --precision fp32 --batch-size 8"
    )
    with patch("fastvlp.tasks.finetune.train_and_score", return_value=TaskScores({}, tmp_path)) as stopped:
        assert main(words.split()) == 0
    assert stopped.call_args.args[0] == run


def test_batches_may_be_of_so_many_tokens(runs, world, tmp_path):
    """As UNITER is tuned: words and regions, 20 of each image at most."""
    run = planned("vqa", runs["uniter"], world, tmp_path / "run", max_tokens=400)
    state = start(run)
    sizes = [batch.regions.count.add(batch.length).max() * len(batch) for batch, _ in islice(state.train.batches(), 3)]
    assert max(sizes) <= 400 and len({len(batch) for batch, _ in islice(state.train.batches(), 3)}) > 1, sizes


@pytest.mark.slow
def test_images_may_be_larger_than_in_pretraining(runs, world, tmp_path):
    """Positions are resized; what is scored later has the new size too."""
    tune("vqa", runs["flm"], world, tmp_path / "run", image_size=48, lr=1e-12, augment=AugmentConfig(flip=0.5))
    tuned = load_task(tmp_path / "run")
    image, source = tuned.saved.model.image, load_model(runs["flm"]).model.image
    (batch,) = islice(tuned.batches("test"), 1)
    assert batch.image.shape[2:] == (48, 48) and image.config.grid == 3
    known = resize_positions(source.position, 3, source.config.prefix)
    torch.testing.assert_close(image.position, known, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"`image_size` 40: .*patches of 16"):
        planned("vqa", runs["flm"], world, tmp_path / "run", image_size=40)
    with pytest.raises(UserError, match="`accumulate` must be at least 1"):
        tune("vqa", runs["flm"], world, tmp_path / "other", accumulate=0)


def pretrained_as(source, folder, **data):
    """The run's weights with another config of their data, as `vlp convert` writes it."""
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps({"data": data}))
    return folder


STORED = {"stored": True, "most": 100}


@pytest.mark.slow
def test_images_and_texts_are_prepared_as_in_pretraining(runs, world, tmp_path):
    squashed = pretrained_as(runs["uniter"], tmp_path / "squashed", regions=STORED, fit="squash", max_length=62)
    config = load_model(squashed).model.config
    long = replace(config, text=replace(config.text, positions=512))

    def seen(task, source=squashed, model=config, **options):
        start = load_pretrained(str(source))
        start = start._replace(config=model)
        data = data_for(make_task(task, {}), start, str(world), **options)
        return data.fit, data.max_length

    for task in ("vqa", "nlvr2", "grounding", "retrieval"):
        assert seen(task) == seen(task, model=long) == ("squash", 62), "a crop would lose the boxes at the sides"
    assert seen("vqa", fit="crop", max_length=40) == ("crop", 40)
    assert seen("vcr") == ("squash", 64) and seen("vcr", model=long) == ("squash", 224)
    assert seen("vcr", model=long, max_length=100) == ("squash", 100)

    assert seen("vqa", runs["mlm"]) == ("crop", 50), "questions are longer than short captions"
    assert seen("grounding", runs["mlm"])[0] == "squash", "a text may speak of what a crop cuts off"
    boxed = pretrained_as(runs["mlm"], tmp_path / "boxed", fit="letterbox")
    assert seen("nlvr", boxed)[0] == seen("vqa", boxed)[0] == "letterbox"
    assert seen("vqa", pretrained_as(runs["uniter"], tmp_path / "stored", regions=STORED))[0] == "squash"
    assert seen("vqa", pretrained_as(runs["uniter"], tmp_path / "silent"))[0] == "crop"

    with pytest.raises(UserError, match="`max_length` 2"):
        seen("vqa", max_length=2)
    with pytest.raises(UserError, match="65 exceeds the model's 64"):
        tune("vqa", runs["mlm"], world, tmp_path / "run", max_length=65)
    with pytest.raises(UserError, match=r"config\.json: .*zoom"):
        seen("vqa", pretrained_as(runs["mlm"], tmp_path / "unknown", fit="zoom"))


@pytest.mark.slow
def test_a_resumed_run_prepares_images_as_before(runs, world, tmp_path):
    """Also one that was begun before fine-tuning followed the preprocessing of pretraining."""
    squashed = pretrained_as(runs["mlm"], tmp_path / "squashed", fit="squash", max_length=62)
    places = (squashed, world, tmp_path / "run")
    tune("vqa", *places, fit="crop", max_length=50)
    tune("vqa", *places, resume=True, steps=3)
    assert planned("vqa", *places, steps=3).data.fit == "squash"
    with pytest.raises(UserError, match=r"data\.fit: crop then, squash now"):
        tune("vqa", *places, resume=True, steps=3, fit="squash")


def test_splits_are_found_where_shards_are_read(world):
    memory = fsspec.filesystem("memory")
    for split in ("train", "val"):
        memory.put(str(world / split), f"/bucket/{split}", recursive=True)
    found = find_splits("memory://bucket/")
    assert found == {"train": "memory://bucket/train", "val": "memory://bucket/val"}
    assert Shards(found["val"]).keys == Shards(world / "val").keys
    assert frequent_answers(found["train"]) == frequent_answers(str(world / "train"))
    assert find_splits(f"file://{world}", NLVR2Task.split_prefixes)["train"] == f"file://{world}/pairs-train"
    with pytest.raises(UserError, match="nowhere"):
        find_split("nowhere", "train")
    with pytest.raises(UserError, match="no split called test"):
        find_split("memory://bucket", "test")
    with pytest.raises(UserError, match=r"nowhere://x/train: cannot be opened"):
        find_splits("nowhere://x")
    memory.rm("/bucket", recursive=True)


@pytest.mark.slow
def test_options_of_decoding_are_saved_beside_the_scores(runs, world, tmp_path):
    tune("caption", runs["mlm"], world, tmp_path / "run")
    scores = evaluate_task(str(tmp_path / "run"), beams=2, length_penalty=0.5).scores
    assert scores["test"]["decoding"] == {"beams": 2, "most": 30, "length_penalty": 0.5}
    printed = format_scores(scores)
    assert "cider" in printed and "penalty" not in printed and "beams" not in printed
    assert f" test note: {WORDS_NOTE}" in printed
    with pytest.raises(UserError, match="`beams` 0"):
        evaluate_task(str(tmp_path / "run"), beams=0)


def test_fine_tuning_starts_from_the_pretrained_weights(runs, world, tmp_path):
    """With a rate too small to move anything, the fine-tuned weights are the pretrained ones."""
    tune("nlvr2", runs["flm"], world, tmp_path / "run", lr=1e-12)
    before, after = (load_model(folder).model.state_dict() for folder in (runs["flm"], tmp_path / "run"))
    # Pretraining shows one image; the second one's type starts as the first one's.
    before["fusion.image_type"][1] = before["fusion.image_type"][0]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0, msg=name)


def test_evaluation_refuses_an_unreadable_record(runs, world, tmp_path):
    out = tmp_path / "run"
    tune("vqa", runs["mlm"], world, out)
    damaged = tmp_path / "damaged"
    shutil.copytree(world / "test", damaged / "test")
    tar = damaged / "test" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(UserError, match="leaves none out"):
        evaluate_task(str(out), data=str(damaged))


def test_errors_name_what_is_wrong(runs, world, tmp_path, capsys):
    with pytest.raises(UserError, match="no split called train"):
        planned("vqa", runs["mlm"], tmp_path, tmp_path / "run")
    with pytest.raises(UserError, match="reconstructor"):
        tune("vqa", runs["mlm"], world, tmp_path / "run", reading="flm")
    assert main(["evaluate", str(runs["flm"])]) == 2
    assert "no fine-tuned run" in capsys.readouterr().err


def test_vqa_scores_are_those_of_a_loop(runs, world):
    saved = load_model(runs["mlm"])
    answers = frequent_answers(str(world / "train"))[:6]
    data = VQAData(train=str(world / "train"), test=str(world / "test"), batch_size=4, answers=answers)
    made = data.evaluation_items("test", saved.tokenizer, saved.model.config.image.size)

    class Fixed(torch.nn.Module):
        def logits(self, model, image_BKD, batch):
            return torch.arange(6.0).flip(0).expand(len(batch), 6)

    found = measure(saved.model, Fixed(), answers, made, 4)
    right = [item.entry["answers"].get(answers[0], 0.0) for item in made.items]
    known = [max(item.entry["answers"].get(answer, 0.0) for answer in answers) for item in made.items]
    kinds = [item.entry["kind"] for item in made.items]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["answerable"] == pytest.approx(sum(known) / len(known))
    existence = [r for r, kind in zip(right, kinds) if kind == "existence"]
    assert found["accuracy/existence"] == pytest.approx(sum(existence) / len(existence))
    assert found["count"] == len(made.items)
    # Here the first of the answers is always chosen.
    assert found["chance"] == found["accuracy"]
