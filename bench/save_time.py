"""How long a save stops the training, written before the training goes on and written beside it, in turns.

    python bench/save_time.py

A run of two towers of 80 M parameters saves to a temporary folder (TMPDIR): the state, and the weights alone, 16 bytes a
parameter. `stopped` are the seconds in which no step can be computed, `written` those until all is on the disk, and `step` is
the median of the steps meanwhile, or of ten steps after a save for which the training waits. Rows are appended to
bench/results/save_time.jsonl.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from records import RESULTS, append, stamp

from fastvlp.data.pairs import PairData
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model.sizes import clip_b32
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.training.checkpoint import finish_save, save
from fastvlp.training.loop import StepReport, TrainConfig, start, steps
from fastvlp.training.optim import OptimConfig


def main(rounds: int = 3, threads: int = 1, out: Path = RESULTS / "save_time.jsonl") -> None:
    """
    Args:
        rounds: Turns of each way to save.
        threads: CPU threads.
        out: File that rows are appended to.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder) / "world", WorldConfig(size=32), train=64, val=1, test=1, pairs=0, singles=0)
        model = clip_b32()
        model = replace(model, image=replace(model.image, size=64, depth=9), text=model.text.with_depth(4))
        data = PairData(train=f"{folder}/world/train", batch_size=2)
        run = TrainConfig(
            name="saved",
            out=f"{folder}/run",
            data=data,
            model=model,
            objectives={"clip": CLIPConfig()},
            optim=OptimConfig(lr=1e-4),
        )
        state = start(replace(run, vocab=300, steps=1 << 20, threads=threads, precision="fp32", device="cpu"))
        parameters, reports = sum(p.numel() for p in state.pretraining.parameters()), steps(state)
        for _ in range(3):
            next(reports)
        for turn in range(rounds):
            for background in (False, True):
                began, spent = time.perf_counter(), time.process_time()
                save(state, background=background)
                stopped, spent = time.perf_counter() - began, time.process_time() - spent
                taken: list[StepReport] = []
                while (
                    not taken
                    or (state.saving is not None and not state.saving.done())
                    or (not background and len(taken) < 10)
                ):
                    taken.append(next(reports))
                written = time.perf_counter() - began if background else stopped
                finish_save(state)
                row: dict[str, Any] = {"turn": turn, "background": background, "parameters": parameters}
                row |= {"stopped": stopped, "stopped_cpu": spent, "written": written, "steps": len(taken)}
                row |= {"step": median(report.seconds for report in taken), "longest": max(r.seconds for r in taken)}
                if turn == 0:  # the largest so far: later turns would repeat that of the first save in the background
                    row |= {"most_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}
                append(out, [stamp("cpu", "save_time.py") | row])
                print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        reports.close()


if __name__ == "__main__":
    tyro.cli(main)
