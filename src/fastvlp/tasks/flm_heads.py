"""Checkpoints that the released code of FLM (arXiv 2303.14038; TencentARC/FLM bd8b19d) has fine-tuned, as runs of our tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fastvlp.config import to_json
from fastvlp.convert.checkpoint_source import Checkpoint
from fastvlp.convert.flm import FLM, TASK_HEADS, flm_config, flm_settings, from_flm, is_captioner
from fastvlp.convert.interface import Layout, Release, Stated
from fastvlp.convert.weight_map import WeightMap, Weights, apply_map, weight_and_bias
from fastvlp.data.tokenize import with_new_ends
from fastvlp.errors import UserError
from fastvlp.model.encoders.text_transformer import TextTransformerConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.tasks.caption import CaptionConfig, CaptionData
from fastvlp.tasks.item_data import TaskData
from fastvlp.tasks.nlvr2 import NLVR2Config, NLVR2Data
from fastvlp.tasks.retrieval import RetrievalConfig, RetrievalData
from fastvlp.tasks.vqa import VQAConfig, VQAData

# Our task -> the head that the released code calls otherwise. Captions are written by the head of pretraining.
HEADS = dict(zip(("vqa", "nlvr2", "retrieval"), TASK_HEADS, strict=True))
CAPTION = "caption"
READING: dict[str, Any] = {"reading": "flm", "bos": "official"}


def head_weights(weights: Weights, task: str) -> dict[str, Tensor]:
    """Parameters of the task's objective: the pooler of the reconstructor's row 0, and the classifier."""
    theirs = HEADS[task]
    parts = sorted({name.removeprefix(theirs).rpartition(".")[0] for name in weights if name.startswith(theirs)})
    sources = weight_and_bias("pool", "cross_modal_text_pooler_f.dense")
    for part in parts:
        sources |= weight_and_bias(
            f"head.{part}" if part else "head", f"{theirs}{part}" if part else theirs.rstrip(".")
        )
    own = {name: x for name, x in weights.items() if name.startswith((theirs, "cross_modal_text_pooler_f."))}
    return apply_map(own, WeightMap(sources=sources), layout=f"the released FLM code's {theirs}*")


class FLMTunedLayout(Layout):
    name = "flm_tuned"
    summary = "FLM as fine-tuned by its code for vqa, nlvr2, retrieval or caption"
    options = ("heads", "answers", "task")

    @classmethod
    def recognises(cls, source: Checkpoint) -> bool:
        heads = any(name.startswith(TASK_HEADS) for name in source.names)
        return source.names >= FLM and (heads or is_captioner(source))

    def read(self, source: Checkpoint, stated: Stated) -> Release:
        task = self.task(source, stated)
        config = flm_config(source, stated)
        data: dict[str, Any] = {
            "train": "",
            "batch_size": 64,
            "max_length": flm_settings(source).get("max_text_len", 50),
        }
        if task == CAPTION:
            return self.captioner(source, stated, data)
        weights, answers = source.weights, len(source.weights.get("vqa_classifier.3.bias", ()))
        kinds: dict[str, tuple[ObjectiveConfig, Any]] = {
            "vqa": (VQAConfig(**READING, answers=answers), VQAData),
            "nlvr2": (NLVR2Config(**READING), NLVR2Data),
            "retrieval": (RetrievalConfig(**READING, loss="cross-entropy"), RetrievalData),
        }
        objective, kind = kinds[task]
        if task == "vqa":
            data["answers"] = self.answers(stated, answers)
        return Release(
            config=config,
            weights=from_flm(weights, config, head="lm_score" if "lm_score.bias" in weights else "mlm_score"),
            data=_as_json(kind(**data)),
            objectives={task: objective},
            objective_weights={f"{task}.{name}": x for name, x in head_weights(weights, task).items()},
        )

    def task(self, source: Checkpoint, stated: Stated) -> str:
        """The task whose head is read. Raises UserError if there are several or none, or not the one that is stated."""
        tasks_with_heads = [task for task, head in HEADS.items() if any(name.startswith(head) for name in source.names)]
        tasks_with_heads += (
            [CAPTION] if is_captioner(source) or (stated.task == CAPTION and not tasks_with_heads) else []
        )
        if stated.task is not None and stated.task not in tasks_with_heads:
            raise UserError(f"`task` {stated.task}: its heads are of {', '.join(tasks_with_heads) or 'no task'}")
        if len(tasks_with_heads) != 1 and stated.task is None:
            raise UserError(f"it has the heads of {', '.join(tasks_with_heads) or 'no task'}: choose its `task`")
        return stated.task or tasks_with_heads[0]

    def answers(self, stated: Stated, count: int) -> tuple[str, ...]:
        """The answers to choose from. Raises UserError if they are not those of the file's outputs."""
        if len(stated.answers) != count:
            given = f"has {len(stated.answers)}" if stated.answers else "is missing"
            raise UserError(
                f"it chooses from {count} answers, which its file does not name, and `answers` {given}: a JSON list of them in "
                "the order of its outputs (label2ans of the data set it was trained on)"
            )
        return stated.answers

    def captioner(self, source: Checkpoint, stated: Stated, data: dict[str, Any]) -> Release:
        """The forward stream alone, which decoding reads in the released code. Its <bos> and <eos> are <s> and </s> here: the
        place of <s>, which no other token sees, is left out, so that the positions begin with the next one."""
        whole = flm_config(source, stated)
        assert isinstance(whole.text, TextTransformerConfig)
        text = replace(whole.text, position_offset=whole.text.position_offset + 1, positions=whole.text.positions - 1)
        forward = replace(whole, reconstructor=None, separate_heads=False)
        own = from_flm(source.weights, forward, head="lm_score_r" if whole.separate_heads else "lm_score")
        return Release(
            config=replace(forward, text=text),
            weights=own,
            data=_as_json(CaptionData(**data)),
            objectives={CAPTION: CaptionConfig()},
            renew_words=with_new_ends,
        )


def _as_json(data: TaskData) -> dict[str, Any]:
    value = to_json(data)
    assert isinstance(value, dict)
    return value
