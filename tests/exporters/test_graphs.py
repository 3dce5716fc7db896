"""Encoders are captured for any number of inputs."""

from __future__ import annotations

import torch

from fastvlp.exporters.graphs import TextGraph
from fastvlp.model.saving import load_model
from tests.exporters.made_runs import CAPTIONS, clip_shaped, made_run, with_one_layer


def test_a_captured_text_encoder_takes_any_number_of_texts(tmp_path):
    own = load_model(made_run(tmp_path / "run", with_one_layer(clip_shaped())))
    graph = TextGraph(own.model).eval()
    ids, length = own.tokenizer.encode(CAPTIONS, 24)
    mask = (torch.arange(ids.shape[1]) < length[:, None]).long()
    any_shape = dict.fromkeys(range(2), torch.export.Dim.DYNAMIC)
    captured = torch.export.export(graph, (ids, mask), dynamic_shapes=(any_shape, any_shape), strict=False).module()
    # So many that texts of like lengths are encoded together outside of a graph.
    many = (ids.repeat(50, 1), mask.repeat(50, 1))
    with torch.no_grad():
        torch.testing.assert_close(captured(*many), graph(*many), rtol=0, atol=1e-5)
