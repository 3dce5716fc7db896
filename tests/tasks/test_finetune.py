import json
import shutil
from dataclasses import replace

import fsspec
import pytest
import torch

from fastvlp.cli import main
from fastvlp.data.records.shards import Shards
from fastvlp.data.regions import RegionSource
from fastvlp.data.splits import find_split
from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.tasks.finetune import evaluate, find_splits, finetune, load_task, plan, task_data, told_in_words
from fastvlp.tasks.options import Evaluate, Finetune
from fastvlp.tasks.vqa import VQAData, frequent_answers, measure


def told(task, source, world, out, **more):
    more = {"steps": 2, "batch_size": 8, "precision": "fp32", **more}
    return Finetune(task=task, source=str(source), data=str(world), out=str(out), **more)


KINDS = ("flm", "mlm", "uniter")
TASKS = ("vqa", "nlvr", "nlvr2", "grounding", "retrieval", "entailment", "vcr")


@pytest.mark.parametrize(
    "kind, task", [(kind, task) for task in TASKS for kind in KINDS] + [("flm", "caption"), ("mlm", "caption")]
)
def test_every_run_takes_every_task(kind, task, runs, world, tmp_path):
    scores, path = finetune(told(task, runs[kind], world, tmp_path / "run"))
    assert json.loads(path.read_text()) == scores
    assert set(scores) == {"val", "test"}
    main_score = scores["test"][{"caption": "cider", "retrieval": "recall"}.get(task, "accuracy")]
    assert 0 <= main_score <= 10

    saved, objective, _ = load_task(tmp_path / "run")
    assert saved.info["reading"] == ("causal" if task == "caption" else "flm" if kind == "flm" else "full")
    assert objective.reading == saved.info["reading"]
    again = evaluate(Evaluate(run=str(tmp_path / "run")))
    assert again == scores["test"]


def test_a_single_stream_reads_the_regions_it_was_pretrained_with(runs, world, tmp_path):
    run = plan(told("nlvr2", runs["uniter"], world, tmp_path / "run"))
    assert run.data.regions == RegionSource(most=20)
    assert run.model.single.types == 3 and run.objectives["nlvr2"].form == "pair-biattn"
    assert plan(told("vqa", runs["uniter"], world, tmp_path / "run")).model.single.types == 2
    assert plan(told("vqa", runs["mlm"], world, tmp_path / "run")).data.regions is None
    with pytest.raises(UserError, match="reads all at once"):
        finetune(told("vqa", runs["uniter"], world, tmp_path / "run", reading="causal"))
    with pytest.raises(UserError, match="single stream"):
        finetune(told("nlvr2", runs["mlm"], world, tmp_path / "run", form="triplet"))
    with pytest.raises(UserError, match="--anchors 0"):
        plan(told("retrieval", runs["uniter"], world, tmp_path / "run", anchors=0))
    with pytest.raises(UserError, match="no fusion"):
        finetune(told("caption", runs["uniter"], world, tmp_path / "caption"))
    with pytest.raises(UserError, match="grounding has ce and rank"):
        plan(told("grounding", runs["mlm"], world, tmp_path / "run", loss="bce"))


def test_the_second_image_starts_as_the_first(runs, world, tmp_path):
    finetune(told("nlvr2", runs["uniter"], world, tmp_path / "run", lr=1e-12, form="triplet"))
    before, after = (load_model(folder).model.state_dict() for folder in (runs["uniter"], tmp_path / "run"))
    before["single.kinds"] = before["single.kinds"][[0, 1, 1]]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0, msg=name)


def test_scores_follow_the_weights_not_the_training_process(runs, world, tmp_path):
    """`vlp evaluate` in a new process sees only the folder."""
    out = tmp_path / "run"
    finetune(told("vqa", runs["mlm"], world, out, reading="causal"))
    assert main(["evaluate", str(out), "--split", "val"]) == 0
    assert main(["evaluate", str(out), "--split", "val"]) == 0
    files = sorted(path.name for path in out.glob("results*.json"))
    assert files == ["results-2.json", "results-3.json", "results.json"]
    first, second = (json.loads((out / name).read_text()) for name in files[:2])
    assert first == second == {"val": json.loads((out / "results.json").read_text())["val"]}
    assert first["val"]["count"] == sum(len(record.info["questions"]) for record in Shards(world / "val"))


def test_the_plan_inherits_the_run(runs, world, tmp_path):
    run = plan(told("vqa", runs["flm"], world, tmp_path / "run", field="questions_zh", reading="full"))
    source = load_model(runs["flm"])
    assert run.model == source.model.config and run.init == str(runs["flm"])
    assert run.objectives["vqa"].reading == "full"
    assert "是" in run.data.answers and run.data.max_length == 50
    assert run.data.val == str(world / "val")
    assert run.checkpoint_every is not None, "a killed fine-tuning goes on from its last checkpoint"
    with pytest.raises(UserError, match="--lr must be above 0"):
        plan(told("vqa", runs["flm"], world, tmp_path / "run", lr=0.0))


def pretrained_as(source, folder, **data):
    """The run's weights with another config of their data, as `vlp convert` writes it."""
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps({"data": data}))
    return folder


STORED = {"stored": True, "most": 100}


def test_images_and_texts_are_seen_as_in_pretraining(runs, world, tmp_path):
    squashed = pretrained_as(runs["uniter"], tmp_path / "squashed", regions=STORED, fit="squash", max_length=62)
    config = load_model(squashed).model.config
    long = replace(config, text=replace(config.text, positions=512))

    def seen(task, source=squashed, model=config, **more):
        data = task_data(told(task, source, world, tmp_path / "run", **more), model)
        return data.fit, data.max_length

    for task in ("vqa", "nlvr2", "grounding", "retrieval"):
        assert seen(task) == seen(task, model=long) == ("squash", 62), "a crop would lose the boxes at the sides"
    assert seen("vqa", fit="crop", max_length=40) == ("crop", 40)
    assert seen("vcr") == ("squash", 64) and seen("vcr", model=long) == ("squash", 224)
    assert seen("vcr", model=long, max_length=100) == ("squash", 100)

    assert seen("vqa", runs["mlm"]) == ("crop", 50), "questions are longer than the captions of a short pretraining"
    assert seen("grounding", runs["mlm"])[0] == "squash", "a text may speak of what a crop cuts off"
    boxed = pretrained_as(runs["mlm"], tmp_path / "boxed", fit="letterbox")
    assert seen("nlvr", boxed)[0] == seen("vqa", boxed)[0] == "letterbox"
    assert seen("vqa", pretrained_as(runs["uniter"], tmp_path / "stored", regions=STORED))[0] == "squash"
    assert seen("vqa", pretrained_as(runs["uniter"], tmp_path / "silent"))[0] == "crop"

    with pytest.raises(UserError, match="--max-length 2"):
        seen("vqa", max_length=2)
    with pytest.raises(UserError, match="max_length 65 exceeds the model's 64"):
        finetune(told("vqa", runs["mlm"], world, tmp_path / "run", max_length=65))
    with pytest.raises(UserError, match=r"config\.json: .*zoom"):
        seen("vqa", pretrained_as(runs["mlm"], tmp_path / "unknown", fit="zoom"))


def test_a_resumed_run_reads_on_as_it_did(runs, world, tmp_path):
    """Also one from when fine-tuning did not ask how its source saw."""
    squashed = pretrained_as(runs["mlm"], tmp_path / "squashed", fit="squash", max_length=62)
    begun = told("vqa", squashed, world, tmp_path / "run", fit="crop", max_length=50)
    finetune(begun)
    again = replace(begun, fit=None, max_length=None, resume=True, steps=3)
    finetune(again)
    assert plan(replace(again, resume=False)).data.fit == "squash"
    with pytest.raises(UserError, match=r"data\.fit: crop then, squash now"):
        finetune(replace(again, fit="squash"))


def test_splits_are_found_where_shards_are_read(world):
    memory = fsspec.filesystem("memory")
    for split in ("train", "val"):
        memory.put(str(world / split), f"/bucket/{split}", recursive=True)
    found = find_splits("memory://bucket/", "vqa")
    assert found == {"train": "memory://bucket/train", "val": "memory://bucket/val"}
    assert Shards(found["val"]).keys == Shards(world / "val").keys
    assert frequent_answers(found["train"]) == frequent_answers(str(world / "train"))
    assert find_splits(f"file://{world}", "nlvr2")["train"] == f"file://{world}/pairs-train"
    with pytest.raises(UserError, match="no split called test"):
        find_split("memory://bucket", "test")
    with pytest.raises(UserError, match=r"nowhere://x/train: cannot look here"):
        find_splits("nowhere://x", "vqa")
    memory.rm("/bucket", recursive=True)


def test_how_captions_were_made_is_told_apart_from_their_scores(runs, world, tmp_path):
    finetune(told("caption", runs["mlm"], world, tmp_path / "run"))
    found = evaluate(Evaluate(run=str(tmp_path / "run"), beams=2, length_penalty=0.5))
    assert found["decoding"] == {"beams": 2, "most": 30, "length_penalty": 0.5}
    said = told_in_words({"test": found})
    assert "cider" in said and "penalty" not in said and "beams" not in said


def test_pretraining_is_what_fine_tuning_starts_from(runs, world, tmp_path):
    """With a rate too small to move anything, the fine-tuned weights are the pretrained ones."""
    finetune(told("nlvr2", runs["flm"], world, tmp_path / "run", lr=1e-12))
    before, after = (load_model(folder).model.state_dict() for folder in (runs["flm"], tmp_path / "run"))
    # Pretraining shows one image; the second one's type starts as the first one's.
    before["fusion.image_type"][1] = before["fusion.image_type"][0]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0, msg=name)


def test_evaluation_refuses_an_unreadable_record(runs, world, tmp_path):
    out = tmp_path / "run"
    finetune(told("vqa", runs["mlm"], world, out))
    damaged = tmp_path / "damaged"
    shutil.copytree(world / "test", damaged / "test")
    tar = damaged / "test" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(UserError, match="leaves none out"):
        evaluate(Evaluate(run=str(out), data=str(damaged)))


def test_what_is_wrong_is_said(runs, world, tmp_path, capsys):
    with pytest.raises(UserError, match="no split called train"):
        plan(told("vqa", runs["mlm"], tmp_path, tmp_path / "run"))
    with pytest.raises(UserError, match="reconstructor"):
        finetune(told("vqa", runs["mlm"], world, tmp_path / "run", reading="flm"))
    assert main(["evaluate", str(runs["flm"])]) == 2
    assert "no fine-tuned run" in capsys.readouterr().err


def test_measures_against_a_loop(runs, world):
    saved = load_model(runs["mlm"])
    answers = frequent_answers(str(world / "train"))[:6]
    data = VQAData(train=str(world / "train"), test=str(world / "test"), batch_size=4, answers=answers)
    made = data.strict("test", saved.tokenizer, saved.model.config.image.size)

    class Fixed(torch.nn.Module):
        def logits(self, model, image_BKD, batch):
            return torch.arange(6.0).flip(0).expand(len(batch), 6)

    found = measure(saved.model, Fixed(), answers, made, 4)
    right = [item.told["answers"].get(answers[0], 0.0) for item in made.items]
    known = [max(item.told["answers"].get(answer, 0.0) for answer in answers) for item in made.items]
    kinds = [item.told["kind"] for item in made.items]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["answerable"] == pytest.approx(sum(known) / len(known))
    existence = [r for r, kind in zip(right, kinds) if kind == "existence"]
    assert found["accuracy/existence"] == pytest.approx(sum(existence) / len(existence))
    assert found["count"] == len(made.items)
