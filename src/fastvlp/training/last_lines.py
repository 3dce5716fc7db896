"""The lines of the log after the last step of a run."""

from __future__ import annotations

from collections import deque
from statistics import fmean

from fastvlp.training.log import RunLog
from fastvlp.training.state import StepReport, TrainState

# Steps over which the last losses are averaged.
LAST = 20
# A loss above this share of what guessing gives is at chance.
AT_CHANCE = 0.97


def log_chance(state: TrainState, last: deque[StepReport], log: RunLog) -> None:
    """Logs which losses of the last steps are not lower than by guessing, so that the model has learned nothing by them."""
    if not last:
        return
    for name, objective in state.pretraining.all_objectives().items():
        for term, chance in objective.chance_losses(last[-1].pairs).items():
            losses = [report.losses[f"{name}/{term}"] for report in last if f"{name}/{term}" in report.losses]
            if losses and fmean(losses) > AT_CHANCE * chance:
                log.event(
                    "chance",
                    step=state.step,
                    elapsed=state.elapsed,
                    text=f"{name}/{term} is {fmean(losses):.3f}, and guessing among {last[-1].pairs} pairs gives {chance:.3f}: "
                    "the model has learned nothing by it; train for more steps, or at another rate (`optim.lr`)",
                    term=f"{name}/{term}",
                    loss=fmean(losses),
                    chance=chance,
                )
