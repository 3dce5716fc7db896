import numpy as np
import torch

from fastvlp.data.records.detections import unpack
from fastvlp.data.world.corpus import CLASS_NAMES, WorldConfig, pair_record, scene_record, single_record
from fastvlp.data.world.detector import WIDTH
from fastvlp.tasks.grounding import overlap

CONFIG = WorldConfig()
RECORDS = [make(CONFIG, "test", i) for make in (scene_record, pair_record, single_record) for i in range(25)]


def sides(record):
    """Yields for each image the detector's regions, the objects, and their overlaps."""
    for side, data in enumerate(record.detected):
        objects = [o for o in record.info["objects"] if o.get("image", 0) == side]
        found = unpack(data)
        box = torch.tensor([o["box"] for o in objects]) / CONFIG.size
        near = overlap(torch.from_numpy(found.box_R4)[:, None], box[None])
        yield found, objects, near


def test_each_object_is_found_once_about_where_it_is():
    for record in RECORDS:
        assert len(record.detected) == len(record.images) == len(record.info["confidences"])
        for (found, objects, near), sure in zip(sides(record), record.info["confidences"]):
            assert found.feature_RF.shape == (len(objects), WIDTH) and sure == sorted(sure, reverse=True)
            assert sorted(near.argmax(1).tolist()) == list(range(len(objects))) and (near.amax(1) > 0.5).all()


def test_a_region_names_its_objects_class_and_its_feature_colour_and_shape():
    """A linear reading fitted to the features of seen combinations knows colour and shape of those that are new."""
    seen = [scene_record(CONFIG, "train", i) for i in range(100)]
    feature, names = [], []
    for record in seen + RECORDS:
        for found, objects, near in sides(record):
            classes = [objects[i]["class"] for i in near.argmax(1).tolist()]
            assert [CLASS_NAMES[i] for i in found.classes_RC.argmax(1)] == classes
            feature.append(found.feature_RF.astype(np.float64))
            names += classes
    x, words = np.concatenate(feature), np.array([name.split() for name in names])
    train = len([o for record in seen for o in record.info["objects"]])
    for part in (0, 1):
        kinds = sorted(set(words[:, part]))
        y = np.array([[word == kind for kind in kinds] for word in words[:, part]], float)
        fit = np.linalg.lstsq(np.c_[x, np.ones(len(x))][:train], y[:train], rcond=None)[0]
        right = (np.c_[x, np.ones(len(x))][train:] @ fit).argmax(1) == y[train:].argmax(1)
        assert right.mean() > 0.95


def test_regions_depend_on_the_record_alone():
    assert scene_record(CONFIG, "train", 7).detected == scene_record(CONFIG, "train", 7).detected
    assert RECORDS[0].detected != RECORDS[1].detected
