"""Two encoders are tuned on new pairs, by how many there are, and measured before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from fastvlp.batch import Record
from fastvlp.cli import main
from fastvlp.data.records.shards import ShardWriter
from fastvlp.errors import UserError
from fastvlp.eval.embedding_retrieval import evaluate_retrieval
from fastvlp.model.saving import load_model
from fastvlp.tasks.contrast import field_in, finetune_contrast, loss_of
from fastvlp.tasks.contrast_settings import LONGEST_WARMUP, ContrastSettings, plan
from fastvlp.tasks.interpolation import interpolate
from fastvlp.training.loop import train
from tests.convert.public_models import write_model
from tests.training.runs import made_pairs, made_records, made_run

SHORT = {"precision": "fp32", "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return made_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """CLIP as transformers saves it."""
    return write_model("clip", tmp_path_factory.mktemp("public") / "clip").folder


@pytest.fixture(scope="module")
def tuned(pairs, clip, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    finetune_contrast(clip, pairs, out=out, epochs=2, lr=1e-2, **SHORT)
    return out


# ---- what the number of pairs decides ----


def test_a_thousand_pairs_are_read_often():
    made = plan(ContrastSettings(), 1000, 768)
    assert (made.rows, made.batch_size, made.lr) == (128, 128, 5e-5)
    assert made.steps == round(20 * 1000 / 128) and made.locked == 0.5
    assert made.warmup == 0.1 and made.validate_every == 8


def test_a_million_pairs_are_read_few_times():
    few, many = plan(ContrastSettings(), 1000, 768), plan(ContrastSettings(), 1_000_000, 768)
    assert many.lr <= few.lr and many.steps * many.rows / 1_000_000 < few.steps * few.rows / 1000
    assert many.rows > few.rows and many.locked == 0
    assert many.steps * many.warmup <= LONGEST_WARMUP


@pytest.mark.parametrize("pairs", [2, 3, 10, 100, 511, 5000, 99_999, 10**7])
def test_a_plan_fits_any_number_of_pairs(pairs):
    made = plan(ContrastSettings(), pairs, 512)
    assert 1 < made.rows <= max(2, pairs // 4) and made.steps >= 1 and 1 <= made.validate_every <= made.steps
    assert 0 < made.warmup <= 0.1


def test_what_is_given_is_not_decided():
    given = ContrastSettings(epochs=1, batch_size=16, accumulate=2, lr=1e-3, warmup=0.0, layer_decay=1.0, locked=0.25)
    made = plan(given, 1000, 256, ranks=2)
    assert made[:7] == (64, 16, round(1000 / 64), 1e-3, 0.0, 1.0, 0.25)


def test_steps_take_the_place_of_epochs():
    assert plan(ContrastSettings(steps=7), 1000, 256).steps == 7
    with pytest.raises(UserError, match="`steps` and `epochs`"):
        ContrastSettings(steps=7, epochs=1)


def test_micro_batches_and_ranks_share_the_pairs_of_a_step():
    made = plan(ContrastSettings(accumulate=4), 1000, 768, ranks=2)
    assert made.batch_size == 16 and made.rows == 128


def test_a_narrow_model_learns_faster():
    assert plan(ContrastSettings(), 1000, 192).lr == pytest.approx(2e-4)


@pytest.mark.parametrize("wrong", [{"locked": 1.5}, {"alpha": -0.1}, {"lr": 0.0}, {"epochs": -1}, {"batch_size": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=f"`{next(iter(wrong))}` must be"):
        ContrastSettings(**wrong)


def test_one_pair_is_too_few():
    with pytest.raises(UserError, match="contrasted with others"):
        plan(ContrastSettings(), 1, 768)


# ---- a run ----


def test_a_public_model_becomes_a_run_that_other_commands_take(tuned, pairs):
    start, run = load_model(tuned / "start"), load_model(tuned)
    assert run.info["inherited_abilities"] == ["embed"] and run.info["objectives"]["clip"]["type"] == "CLIPConfig"
    config = json.loads((tuned / "config.json").read_text())
    assert config["patience"] == 5 and config["init"] == str(tuned / "start")
    scores = json.loads((tuned / "results.json").read_text())
    options = {"data": pairs, "split": "val"}
    for name, folder in (("val before", tuned / "start"), ("val", tuned)):
        found = evaluate_retrieval(folder, **options).scores["towers"]
        assert scores[name]["recall"] == pytest.approx(found["recall"]), name
        assert 0 < scores[name]["chance"] < 1 and scores[name]["error"] >= 0
    assert scores["val"]["images"] == 6
    # Half of two layers is locked, and so is what comes before them.
    before, after = start.model.state_dict(), run.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("image.blocks.0", "text.blocks.0", "text.word", "image.patch")) for name in moved)
    assert {"image.blocks.1", "text.blocks.1", "embed.image", "embed.text"} <= {
        ".".join(name.split(".")[: 3 if "blocks" in name else 2]) for name in moved
    }


def test_the_temperature_is_the_models_own(tuned, clip):
    read = load_model(tuned / "start").learned("clip")["log_scale"]
    assert read == pytest.approx(load_file(clip / "model.safetensors")["logit_scale"])
    lines = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines()]
    began = next(line for line in lines if line["kind"] == "inherited")
    assert "objectives.clip.log_scale" in began["loaded"]


def test_a_run_is_not_trained_over_and_goes_on(tuned, clip, pairs, tmp_path):
    with pytest.raises(UserError, match="already has a run"):
        finetune_contrast(clip, pairs, out=tuned, **SHORT)
    out = Path(shutil.copytree(tuned, tmp_path / "run"))
    again = finetune_contrast(clip, pairs, out=out, epochs=2, lr=1e-2, resume=True, **SHORT)
    assert again.path.name == "results-2.json"
    assert json.loads(again.path.read_text()) == json.loads((out / "results.json").read_text())
    with pytest.raises(UserError, match=r"optim\.lr"):
        finetune_contrast(clip, pairs, out=out, epochs=2, lr=1e-3, resume=True, **SHORT)


def test_the_command_prints_what_was_chosen_gained_and_lost(clip, pairs, tmp_path, capsys):
    other = tmp_path / "other"
    with ShardWriter(other / "val") as writer:
        for record in made_records(8, seed=5):
            writer.write(record)
    words = ["--out", str(tmp_path / "run"), "--epochs", "1", "--freeze", "image", "--original", str(other)]
    assert main(["finetune", "contrast", "--from", str(clip), "--data", str(pairs), "--threads", "1", *words]) == 0
    said = capsys.readouterr().out
    assert "24 pairs" in said and "temperature" in said and "locked  image, text 1 of 2 layers" in said
    assert "val: mean recall" in said and "original: mean recall" in said and "8 images" in said
    scores = json.loads((tmp_path / "run" / "results.json").read_text())
    assert scores["original"]["images"] == 8 and scores["original before"].keys() == scores["original"].keys()
    before, after = (
        load_model(folder).model.image.state_dict() for folder in (tmp_path / "run/start", tmp_path / "run")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_of_ones_own_goes_on_with_its_loss(pairs, tmp_path):
    for objective, name, kind in (("siglip", "siglip", "SigLIPConfig"), ("moco", "moco", "CLIPConfig")):
        train(made_run(pairs, tmp_path / objective, objective, steps=1))
        assert [
            loss_of(load_model(tmp_path / objective))[0],
            type(loss_of(load_model(tmp_path / objective))[1]).__name__,
        ] == [
            name,
            kind,
        ]
    done = finetune_contrast(tmp_path / "siglip", pairs, out=tmp_path / "run", epochs=1, **SHORT)
    saved = load_model(done.folder)
    # The fusion layers of the run would no longer fit the encoders.
    assert saved.model.config.fusion is None and saved.info["objectives"].keys() == {"siglip"}
    assert not (done.folder / "start").exists()


# ---- between old and new weights ----


@pytest.mark.slow
def test_weights_are_moved_part_of_the_way(tuned, tmp_path):
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    interpolate(run, str(tuned / "start"), 0.25)
    old, new, kept = load_model(tuned / "start"), load_model(tuned), load_model(run)
    for name, value in kept.model.state_dict().items():
        wanted = 0.75 * old.model.state_dict()[name] + 0.25 * new.model.state_dict()[name]
        torch.testing.assert_close(value, wanted, msg=name)
    scale = [saved.learned("clip")["log_scale"] for saved in (old, new, kept)]
    torch.testing.assert_close(scale[2], 0.75 * scale[0] + 0.25 * scale[1])
    assert (run / "tuned.safetensors").read_bytes() == (tuned / "best.safetensors").read_bytes()
    interpolate(run, str(tuned / "start"), 0.25)
    assert all(torch.equal(x, load_model(run).model.state_dict()[name]) for name, x in kept.model.state_dict().items())
    with pytest.raises(UserError, match=r"already averaged with `alpha` 0\.25"):
        interpolate(run, str(tuned / "start"), 0.5)


# ---- data ----


def written(folder: Path, infos: list[dict]) -> Path:
    with ShardWriter(folder) as writer:
        for record, info in zip(made_records(len(infos)), infos):
            writer.write(Record(key=record.key, images=record.images, info=info))
    return folder


def test_captions_are_those_that_the_model_knows(tmp_path):
    both = str(written(tmp_path / "both", [{"captions": ["a box"], "captions_zh": ["盒子"]}]))
    assert field_in(both, "captions") == "captions" and field_in(both, "captions_zh") == "captions_zh"
    assert field_in(both, "captions+captions_zh") == "captions+captions_zh" and field_in(both, "title") == "captions"
    assert field_in(str(written(tmp_path / "zh", [{"captions_zh": ["盒子"]}])), "captions") == "captions_zh"
    with pytest.raises(UserError, match="fields: title"):
        field_in(str(written(tmp_path / "none", [{"title": "x"}])), "captions")


def test_words_that_the_model_does_not_know(pairs, tmp_path):
    train(made_run(pairs, tmp_path / "clip", "clip", steps=1))
    for split in ("train", "val"):
        written(tmp_path / "zh" / split, [{"captions_zh": ["沙滩上的狗"]}] * 8)
    with pytest.raises(UserError, match="100% of the words in 'captions_zh'"):
        finetune_contrast(tmp_path / "clip", tmp_path / "zh", out=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


def test_without_held_out_pairs_a_run_has_to_be_told_its_end(clip, pairs, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(pairs / "train")
    with pytest.raises(UserError, match="`patience`"):
        finetune_contrast(clip, tmp_path / "data", out=tmp_path / "run", **SHORT)
    done = finetune_contrast(clip, tmp_path / "data", out=tmp_path / "run", epochs=1, patience=None, **SHORT)
    assert done.after == {} and (done.folder / "last.safetensors").is_file()


# ---- what cannot be tuned ----


def refused(capsys, source: object, pairs: Path, tmp_path: Path, *words: str) -> str:
    argv = ["finetune", "contrast", "--from", str(source), "--data", str(pairs), "--out", str(tmp_path / "run")]
    assert main([*argv, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_one_encoder_is_joined_first(pairs, tmp_path, capsys):
    for kind, lacks in (("vit", "text"), ("bert", "image")):
        folder = write_model(kind, tmp_path / kind).folder
        capsys.readouterr()
        error = refused(capsys, folder, pairs, tmp_path)
        assert f"no {lacks} encoder" in error and "vlp pretrain clip_photos" in error


def test_a_model_without_a_joint_space(pairs, tmp_path, capsys):
    train(made_run(pairs, tmp_path / "mlm", "mlm", steps=1))
    assert "joint space" in refused(capsys, tmp_path / "mlm", pairs, tmp_path)


def test_what_is_no_model_and_what_is_damaged(clip, pairs, tmp_path, capsys):
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    error = refused(capsys, folder, pairs, tmp_path)
    assert "a llama of transformers" in error and "vlp convert" in error
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(capsys, folder, pairs, tmp_path)
    other = Path(shutil.copytree(clip, tmp_path / "other"))
    for path in other.glob("*token*"):
        path.unlink()
    assert "tokenizer" in refused(capsys, other, pairs, tmp_path)
    assert not (tmp_path / "run" / "start").exists()


def test_without_the_hub_the_offline_way_is_named(pairs, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    error = refused(capsys, "openai/clip-vit-of-nobody", pairs, tmp_path)
    assert "hf download openai/clip-vit-of-nobody" in error and "folder" in error


def test_an_option_that_there_is_not(clip, pairs, tmp_path):
    with pytest.raises(UserError, match="`rate` is no option of contrast"):
        finetune_contrast(clip, pairs, out=tmp_path / "run", rate=1.0)
