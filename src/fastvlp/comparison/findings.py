"""The result of a comparison in sentences: which arms reached the final score of the reference sooner, and which are ahead
at the end."""

from __future__ import annotations

from collections.abc import Sequence

from fastvlp.comparison.metrics.interface import Score
from fastvlp.comparison.results import Comparison
from fastvlp.comparison.summary import (
    Speedup,
    Spread,
    Summary,
    format_score,
    measured_scores,
    spread,
    summarise,
    within_noise,
)
from fastvlp.config import flatten

# More fields that differ than this are left to the table of configurations.
DIFFERENCES = 8
# Scores over fewer images than this are said to say little.
FEW_IMAGES = 100


def findings(comparison: Comparison) -> list[str]:
    """Sentences about the arms; the first is the headline. Empty before anything was scored.

    First how much sooner arms reached the final scores of the reference, then for each score who is ahead, beside chance and
    what the texts alone give, and last that few images were scored. No winner is named within two standard errors.
    """
    rows, scores = summarise(comparison), measured_scores(comparison)
    sooner = [sentence for score in scores for sentence in speed_sentences(comparison, rows, score)]
    standings = [standing for score in scores if (standing := standing_sentence(comparison, rows, score))]
    return sooner + standings + few_images(comparison, scores)


def few_images(comparison: Comparison, scores: Sequence[Score]) -> list[str]:
    """A sentence where few images were scored, with the titles of the scores if their numbers differ. Empty where there were
    enough, or the number is not known."""
    known = {score.title: n for score in scores if (n := comparison.images.get(score.name))}
    few = {title: n for title, n in known.items() if n < FEW_IMAGES}
    if not few:
        return []
    if len({*known.values()}) == 1:
        n = min(few.values())
        return [f"Only {n} image{'s were' if n > 1 else ' was'} scored: so few say little."]
    return [
        f"Few images were scored, and so few say little: {_listed([f'{few[title]} for {title}' for title in few])}."
    ]


def speed_sentences(comparison: Comparison, rows: Sequence[Summary], score: Score) -> list[str]:
    """A sentence for each arm that reached the final score of the reference and kept it, and one for those that never did.

    An arm that only touched the score on its way, or that its errors may have kept from it, has none.
    """
    timed = {row.arm: row.speedups[score.name] for row in rows if row.speedups[score.name].n}
    timed.pop(comparison.reference, None)
    final = f"the final {in_sentence(score.title)} of {comparison.reference}"
    finals = {row.arm: end.mean for row in rows if (end := row.final(score.name))}
    kept = [arm for arm in timed if finals[arm] >= finals[comparison.reference]]
    reached = [f"{arm} {words}." for arm in kept if (words := describe_speedup(timed[arm], final))]
    never = [arm for arm, speed in timed.items() if not speed.ratio]
    return reached + ([f"{_listed(never)} did not reach {final}."] if never else [])


def describe_speedup(speed: Speedup, final: str) -> str:
    """Describes how soon an arm reached `final`, the score of the reference, to end a sentence whose subject is the arm; empty
    where it is not known how late that may have been."""
    low, high = speed.range or (0.0, None)
    if high is None:
        return ""
    mean = sum(speed.shares) / len(speed.shares)
    some = f", in {speed.reached} of {speed.n} seeds" if speed.reached < speed.n else ""
    bound = "at most " if speed.at_least else ""
    source = f"over {len(speed.shares)} seeds" if len(speed.shares) > 1 else "within two standard errors of the scores"
    share = f"in {bound}{mean:.2f} of its time ({low:.2f} to {high:.2f} {source}){some}"
    return f"reached {final} {share}{', so perhaps no sooner' if may_be_equal(speed) else ''}"


def may_be_equal(speed: Speedup) -> bool:
    """Whether an arm may be as slow as the reference: by the spread over seeds, or by the errors of a single run's scores."""
    if speed.ratio is not None and speed.ratio.n > 1:
        return within_noise(speed.ratio, Spread(1.0, 0.0, speed.ratio.n))
    return speed.range is not None and speed.range[0] < 1 < (speed.range[1] or 2.0)


def standing_sentence(comparison: Comparison, rows: Sequence[Summary], score: Score) -> str:
    """Returns a sentence that says which arm is ahead at the end by a score, with the scores of chance and of the texts
    alone; empty if no arm has the score."""
    finals = {row.arm: final for row in rows if (final := row.final(score.name))}
    if not finals:
        return ""
    order = sorted(finals, key=lambda arm: -finals[arm].mean)
    best = order[0]
    close = [arm for arm in order[1:] if within_noise(finals[arm], finals[best])]
    behind = [arm for arm in order[1:] if arm not in close]
    values = {arm: f"{arm} {format_score(score, final)}" for arm, final in finals.items()}
    sentence = f"{score.title}{f' ({score.note})' if score.note else ''}: {values[best]}"
    if behind:
        sentence += f" leads {_listed([values[arm] for arm in behind])}"
    if close:
        named = _listed([values[arm] for arm in close])
        certain = all(final.n > 1 or final.error for final in finals.values())
        why = "within two standard errors" if certain else "how far single runs differ is not known"
        sentence += f"; {named} may be as good ({why})" if behind else f", {named}; no winner ({why})"
    return f"{sentence}.{_levels(comparison, score)}"


def _levels(comparison: Comparison, score: Score) -> str:
    known = (("the text alone gives", comparison.blind), ("chance", comparison.chance))
    levels = [f"{name} {format_score(score, spread([at[score.name]]))}" for name, at in known if score.name in at]
    return f" {levels[0][0].upper()}{', '.join(levels)[1:]}." if levels else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def in_sentence(title: str) -> str:
    """A title inside a sentence: abbreviations stay as they are."""
    return title if title[:2].isupper() or not title[:1].isalpha() else f"{title[0].lower()}{title[1:]}"


def differences(comparison: Comparison) -> list[str]:
    """The parts of the configs in which the arms differ, such as `objectives` or `model.reconstructor`."""
    flat = [flatten(comparison.configs[arm]) for arm in comparison.arms]
    names = dict.fromkeys(name for one in flat for name in one)
    differ = [name for name in names if any(one.get(name) != flat[0].get(name) for one in flat)]
    parts = [name.split(".") for name in differ if name not in ("name", "out")]
    return list(dict.fromkeys(part[0] if part[0] == "objectives" else ".".join(part[:2]) for part in parts))
