"""Results of a comparison that nobody measured."""

from fastvlp.comparison.results import ArmRun, Comparison


def comparison_of(*runs: ArmRun) -> Comparison:
    """A comparison of 40 seconds, timed against `mlm`."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    return Comparison(
        arms=arms,
        reference="mlm",
        budget_s=40,
        seeds=len({run.seed for run in runs}),
        shares=[0.25, 0.5, 1.0],
        about={},
        settings={},
        configs={arm: {"name": arm, "objectives": {arm: {"type": arm}}, "data": {"train": "a"}} for arm in arms},
        runs=list(runs),
    )
