"""The inputs of embedding: every record and every caption of a split is read, in order, as in training."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from fastvlp.data.loader import Row
from fastvlp.data.pairs import PairData
from fastvlp.data.records.decode import decode
from fastvlp.data.records.shards import Shards
from fastvlp.data.records.transform import Transform
from fastvlp.data.regions import RegionSource
from fastvlp.errors import UserError
from fastvlp.eval.embedding import embed_images, embed_split, embed_texts, image_features, view_keeps
from fastvlp.eval.encoding import Encoding, open_run
from fastvlp.eval.split_reading import Images, open_split, read_captions, read_labels
from fastvlp.model.sizes import brivl_tiny
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


@pytest.fixture
def loaded(runs):
    return replace(open_run(runs["both"]).loaded, show=False, batch_size=4)


@pytest.mark.parametrize(("patches", "keep", "views"), [(196, 0.5, 2), (49, 0.5, 2), (49, 0.25, 4), (9, 1 / 3, 3)])
def test_views_cover_the_image_and_share_no_patch(patches, keep, views):
    seed = torch.arange(50)
    keeps = view_keeps(seed, patches, keep, views)
    assert len(keeps) == views
    assert (torch.cat(keeps, 1).sort(1).values == torch.arange(patches)).all()
    assert all((kept.diff(dim=1) > 0).all() for kept in keeps), "sorted, as in training"
    # One view of several shows its share and nothing else changes.
    assert (view_keeps(seed, patches, keep, 1)[0] == keeps[0]).all()
    first = torch.zeros(patches).index_add(0, keeps[0].flatten(), torch.ones(keeps[0].numel())) / 50
    assert (first - keep).abs().max() < 0.35, "which patches a view shows differs from row to row"


@pytest.mark.parametrize(("keep", "views"), [(0.5, 3), (1.0, 2), (0.0, 1), (1.5, 1), (0.5, 0), (0.001, 1)])
def test_views_that_cannot_be(keep, views):
    with pytest.raises(UserError, match=r"`keep` .* `views`"):
        view_keeps(torch.arange(2), 16, keep, views)


def test_a_split_is_embedded_row_by_row(loaded, world):
    shards = Shards(world / "test")
    captions = read_captions(shards, "captions_zh")
    found = embed_split(loaded, shards, captions)
    assert found.image_of_text_T.tolist() == [i for i, its in enumerate(captions) for _ in its]
    model, transform = loaded.model, Transform(size=32, mode="squash")
    with torch.no_grad():
        for i, record in enumerate(shards):
            image = decode(record, transform).images[:1]
            torch.testing.assert_close(found.image_IE[i : i + 1], model.embed_image(model.encode_image(image)))
            for t in (found.image_of_text_T == i).nonzero()[:, 0].tolist():
                text = captions[i][t - int((found.image_of_text_T < i).sum())]
                alone = model.embed_text(*loaded.tokenizer.encode([text], loaded.max_length))
                torch.testing.assert_close(found.text_TE[t : t + 1], alone, atol=1e-6, rtol=1e-5)


def test_equal_texts_have_equal_vectors(loaded):
    vector = embed_texts(loaded, ["红色", "a", "a long text of other words", "红色", "a"] * 3)
    assert (vector[0::5] == vector[0]).all() and (vector[3] == vector[0]).all() and (vector[4] == vector[1]).all()


def test_masked_views_are_averaged(loaded, world):
    shards = Shards(world / "test")
    whole, one, two = (
        embed_images(replace(loaded, keep=keep, views=views), shards) for keep, views in ((1.0, 1), (0.5, 1), (0.5, 2))
    )
    torch.testing.assert_close(two.norm(dim=1), torch.ones(len(shards)))
    assert not torch.allclose(whole, one) and not torch.allclose(one, two)
    # What is drawn is a row's own, whatever the batch.
    torch.testing.assert_close(embed_images(replace(loaded, keep=0.5, views=2, batch_size=3), shards), two)


def test_a_run_reads_as_in_training_unless_options_differ(runs, world):
    loaded, _, captions = open_run(runs["both"])
    assert (loaded.fit, loaded.max_length, loaded.precision) == ("squash", 40, "fp32")
    assert captions == "captions_zh"
    changed = open_run(runs["both"], Encoding(fit="crop", max_length=7)).loaded
    assert (changed.fit, changed.max_length) == ("crop", 7)
    assert open_split(str(world), "test").url == str(world / "test")


def test_a_split_that_is_not_chosen_is_said(world, capsys):
    for data, split in ((world, "test"), (world / "val", "val")):
        assert open_split(str(data), split).url == str(world / split)
    assert capsys.readouterr().err == ""
    assert open_split(f"{world}/val/", "test").content == open_split(str(world), "val").content
    assert f"{world}/val/: has no folder test" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["batch_size", "max_length"])
def test_encoding_options_are_checked(option):
    with pytest.raises(UserError, match=f"`{option}`"):
        Encoding(**{option: 0})


def test_features_of_a_probe(loaded, runs):
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model, head = loaded.model, loaded.model.embed.image
    with torch.no_grad():
        images = Images(image, None)
        pooled, embedding = image_features(model, images), image_features(model, images, "embedding")
        projected = head.out(pooled)
        torch.testing.assert_close(projected / projected.norm(dim=1, keepdim=True), embedding)
        bare = open_run(runs["flm"]).loaded.model
        torch.testing.assert_close(image_features(bare, images), bare.encode_image(image).mean(1))
        with pytest.raises(UserError, match="no embed"):
            image_features(bare, images, "embedding")


def test_boxes_come_along_for_a_model_that_reads_them(loaded, world, tmp_path):
    """The rows' own in training, and the same in an evaluation, whatever batch they are in."""
    source = RegionSource(whole=True, empty="whole")
    data = PairData(train=str(world / "train"), batch_size=8, regions=source)
    run = TrainConfig(
        name="brivl",
        out=str(tmp_path / "brivl"),
        data=data,
        model=brivl_tiny(size=32),
        objectives={"moco": MoCoConfig(queue=16)},
        optim=OptimConfig(lr=1e-3),
        steps=1,
        vocab=400,
        precision="fp32",
    )
    state = train(run)
    opened = replace(open_run(run.out).loaded, show=False, batch_size=5)
    assert opened.regions == source and loaded.regions is None
    rows = data.rows("train", state.tokenizer, run.model.image.size, strict=True)
    batch, _ = rows.make([Row(i, 0) for i in range(8)])
    with torch.no_grad():
        wanted = opened.model.embed_image(opened.model.encode_image(batch.image), batch.regions)
    torch.testing.assert_close(embed_images(opened, Shards(world / "train"))[:8], wanted)
    with pytest.raises(UserError, match=r"data\.regions"):
        embed_images(replace(opened, regions=None), Shards(world / "train"))


def test_faults_of_the_data_are_named(loaded, world, tmp_path):
    shards = Shards(world / "test")
    with pytest.raises(UserError, match=r"6 records .* 'title'.*`captions`"):
        read_captions(shards, "title")
    with pytest.raises(UserError, match=r"'label'.*`label`"):
        read_labels(shards, "label")
    shutil.copytree(world / "test", tmp_path / "test")
    tar = tmp_path / "test" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(UserError, match="leaves none out"):
        embed_images(loaded, Shards(tmp_path / "test"))
