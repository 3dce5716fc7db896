"""The library's own format, which `Embedder` reads: what it takes to embed, search and answer, and a model card.

Left out is what training alone needs: optimiser, momentum copies, the parameters of an objective. The heads of its abilities
stay, such as those that match an image and a text or choose an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvlp.exporters.card import card_text
from fastvlp.exporters.interface import ExportSource, ExportTarget, largest_difference
from fastvlp.files import write_whole
from fastvlp.model.saved_run import SavedRun
from fastvlp.model.saving import Saved, load_model, save_model
from fastvlp.objectives.saved_objectives import head_names
from fastvlp.plain_json import with_checksum
from fastvlp.search.embedder import usable_abilities


class NativeExport(ExportTarget):
    """A folder for `Embedder` and for whatever reads a run, such as `vlp evaluate`."""

    name = "fastvlp"
    summary = "for Embedder, vlp index and vlp serve"
    files = ("model.json", "model.safetensors", "tokenizer.json", "config.json", "card.json", "README.md")

    def misfit(self, source: ExportSource) -> str | None:
        if usable_abilities(source.saved):
            return None
        config = source.saved.model.config
        if config.single or (config.embed and config.embed.reads_boxes):
            return (
                "nothing to serve: it reads regions of each picture, and a service is given pictures alone; use the run with "
                "`vlp evaluate` and `vlp finetune`, or export a BriVL whose regions are a grid, such as brivl_photos"
            )
        return (
            "nothing to serve: it has no joint space (model.embed), and neither layers that read a text beside the image nor "
            "a head that uses them; export a run of clip, siglip, moco, flm, ar, prefixlm, itm or a task"
        )

    def write(self, source: ExportSource, folder: Path) -> None:
        saved = source.saved
        save_model(folder, saved.model, saved.tokenizer, saved.info, objectives=head_parameters(saved))
        write_whole(folder / "config.json", _json_bytes(with_checksum(reading_config(source.config))))
        write_whole(folder / "card.json", _json_bytes(source.card))
        write_whole(folder / "README.md", card_text(source.card, source.place).encode())

    def differences(self, source: ExportSource, folder: Path) -> Mapping[str, float]:
        saved, written = source.saved, load_model(folder)
        return {
            "parameters": largest_difference(written.model.state_dict(), saved.model.state_dict()),
            "heads": largest_difference(written.objectives, head_parameters(saved)),
        }


def head_parameters(saved: Saved) -> dict[str, Tensor]:
    """Returns the parameters of objectives that an ability of the model needs."""
    kept = head_names(saved)
    return {key: value for key, value in saved.objectives.items() if key.partition(".")[0] in kept}


def reading_config(config: SavedRun) -> dict[str, Any]:
    """Returns the part of a run's config that says how images and texts are read, without the places of its data."""
    data = config.data
    return {
        "name": config.name,
        "precision": config.precision,
        "data": {
            "fit": data.fit,
            "max_length": data.max_length,
            "captions": data.captions,
            "answers": list(data.answers),
        },
    }


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
