"""The page holds everything, asks no other host for anything, and trusts no text."""

import html.parser
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from fastvlp.comparison.charts import Dot, Line, Point, dot_chart, line_chart, nice_ticks, short
from fastvlp.comparison.progress import print_tables
from fastvlp.comparison.report import page, write_report
from fastvlp.comparison.results import (
    AnsweredQuestion,
    ArmRun,
    Comparison,
    LossPoint,
    Measurement,
    Sample,
    TrainingCost,
)
from fastvlp.comparison.summary import code_note

PICTURE = "data:image/png;base64,iVBORw0KGgo="


class Balanced(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def comparison_of(seeds: int = 2, marks: int = 2) -> Comparison:
    arms = ["flm", "mlm", "<b>odd</b>"]
    runs = []
    for seed in range(seeds):
        for i, arm in enumerate(arms):
            run = ArmRun(arm=arm, seed=seed)
            for m in range(marks):
                spent = TrainingCost(
                    time=10.0 * (m + 1), cpu=1, wait=0.1, steps=5 * (m + 1), pairs=40 * (m + 1), tokens=400
                )
                scores = {"vqa": 0.3 + 0.1 * m * (i + 1) + 0.01 * seed, "cider": 0.2, "own metric": 3.0}
                run.marks.append(Measurement(share=0.5 * (m + 1), spent=spent, scores=scores))
                run.curve.append(LossPoint(spent=spent, losses={"x/a": 2.0 - m, "x/b": 3.0 - m}))
            runs.append(run)
    samples = [
        Sample(
            key="0",
            picture=PICTURE,
            references=['"two" <circles> & 圆形'],
            captions=dict.fromkeys(arms, "<script>alert(1)</script>"),
            questions=[
                AnsweredQuestion(question="what <i>?", right="red", answers=dict(zip(arms, ("red", "blue", "<u>"))))
            ],
        )
    ]
    return Comparison(
        arms=arms,
        reference="mlm",
        budget_s=20,
        seeds=seeds,
        shares=[0.5, 1.0],
        about={"device": "a machine", "command": "vlp compare <x>", "date": "today"},
        settings={"slice_s": 5.0},
        configs={arm: {"name": arm, "optim": {"lr": 1e-3 * (i + 1)}, "same": 1} for i, arm in enumerate(arms)},
        runs=runs,
        samples=samples,
    )


def test_the_page_is_whole_and_stands_alone(tmp_path: Path) -> None:
    write_report(comparison_of(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert not {"script", "link", "iframe"} & set(parser.seen)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[\w/:.]""", text)
    assert "http" not in text
    assert parser.seen.count("img") == 1
    assert "prefers-color-scheme: dark" in text


def test_texts_are_texts() -> None:
    text = page(comparison_of())
    assert "<script>" not in text and "<b>odd" not in text and "<u>" not in text and "<circles>" not in text
    assert "&lt;circles&gt; &amp; 圆形" in text


def test_every_part_is_there() -> None:
    text = page(comparison_of())
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings[:3] == ["VQA accuracy", "CIDEr", "own metric"] and len(headings) == 8
    assert "a machine" in text
    assert text.count('<svg viewBox="0 0 360') == 3 * 4
    assert text.count('class="wrong"') == 2 and text.count('class="right"') == 1
    differing = text[text.index("<h2>Configurations") : text.index("<details>")]
    assert "optim.lr" in differing and "same" not in differing


@pytest.mark.parametrize(("seeds", "marks"), [(1, 0), (1, 1), (3, 2)])
def test_a_comparison_under_way_has_a_page(seeds: int, marks: int) -> None:
    parser = Balanced()
    parser.feed(page(comparison_of(seeds, marks)))
    assert not parser.open


def test_chance_and_what_the_text_alone_gives_are_lines_of_every_plot_of_their_score() -> None:
    comparison = comparison_of()
    comparison.chance, comparison.blind = {"vqa": 0.125}, {"vqa": 0.25}
    text = page(comparison)
    section = text[text.index("<h2>VQA accuracy") : text.index("<h2>CIDEr")]
    assert "12.5 %" in section and "25.0 %" in section
    for kind, name in (("chance", "chance"), ("blind", "text alone")):
        assert section.count(f'class="target {kind}"') == 3 == section.count(f">{name}</text>")
    heights = {
        kind: float(re.findall(f'class="target {kind}"[^>]* y1="([^"]+)"', section)[0]) for kind in ("chance", "blind")
    }
    assert heights["blind"] < heights["chance"], "heights count downwards"
    assert 'class="target blind"' not in text.replace(section, "")


def test_the_answer_comes_first() -> None:
    comparison = comparison_of()
    comparison.chance, comparison.blind = {"vqa": 0.125}, {"vqa": 0.25}
    text = page(comparison)
    answer = text[: text.index("<h2>")]
    assert (
        '<p class="lead">&lt;b&gt;odd&lt;/b&gt; reached' in answer and "<b>60.5" in answer and "<b>40.5" not in answer
    )
    assert "text alone" in answer and "25.0 %" in answer and "12.5 %" in answer
    assert "optim.lr" in answer, "what the arms differ in"


def test_it_says_how_the_arms_took_turns() -> None:
    comparison = comparison_of()
    assert "in turns of 5 s, on one device" in page(comparison)
    comparison.settings, comparison.counted = {"slice_s": 7.0, "steps": True}, "steps"
    assert "in turns of 7 steps, on one device" in page(comparison)
    comparison.added = {"<b>odd</b>": {"date": "later"}}
    assert "flm and mlm in turns of 7 steps, on one device" in page(comparison)
    comparison.added = {"mlm": {}, "<b>odd</b>": {}}
    assert "in turns of" not in page(comparison)


def test_it_says_where_parts_were_measured_with_other_code() -> None:
    comparison = comparison_of()
    comparison.about |= {"commit": "aaa", "torch": "2.9"}
    assert code_note(comparison) is None
    comparison.added = {"flm": {"commit": "aaa", "torch": "2.9"}}
    assert code_note(comparison) is None
    comparison.continued = [{"commit": "bbb", "torch": "2.9", "date": "tomorrow"}]
    assert "tomorrow: commit bbb, not aaa" in str(code_note(comparison))
    assert "commit bbb, not aaa" in page(comparison)
    console = Console(width=200, record=True, file=io.StringIO())
    print_tables(comparison, console)
    assert "commit bbb, not aaa" in console.export_text()


def test_a_score_that_was_measured_once_has_bars_in_place_of_curves() -> None:
    comparison = comparison_of(seeds=1)
    comparison.chance, comparison.blind = {"vqa": 0.125}, {"vqa": 0.25}
    for run in comparison.runs:
        del run.marks[0].scores["vqa"]
    text = page(comparison)
    section = text[text.index("<h2>VQA accuracy") : text.index("<h2>CIDEr")]
    assert section.count("<svg viewBox") == 1 and 'class="target blind"' in section and "<table" not in section


def test_bars_lie_where_their_values_say() -> None:
    svg = dot_chart([Dot("a", 0, 50, 40, 60), Dot("b", 1, 100, 100, 100)], levels={"chance": 25})
    (low, high), (same, same_too) = re.findall(r'class="whisker arm\d" x1="([^"]+)" x2="([^"]+)"', svg)
    chance = re.search(r'class="target chance" x1="([^"]+)"', svg)
    assert chance is not None and same == same_too
    assert float(high) - float(low) == pytest.approx(0.2 * (float(same) - 8), abs=0.3)
    assert float(chance[1]) - 8 == pytest.approx(0.25 * (float(same) - 8), abs=0.3)
    assert dot_chart([], levels={}) == ""


def test_a_comparison_before_its_first_run_has_a_page() -> None:
    comparison = comparison_of()
    comparison.runs, comparison.samples = [], []
    assert 'class="lead"' not in page(comparison) and 'class="warning"' not in page(comparison)


def test_points_lie_where_their_values_say() -> None:
    line = Line("a", 0, [Point(0, 0, 0, 0), Point(10, 50, 40, 60), Point(20, 100, 100, 100)])
    svg = line_chart([line], label="x")
    path = re.search(r'class="line arm0" d="M([^"]+)"', svg)
    assert path is not None
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, p.split())) for p in path[1].split("L")]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11) and y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert x0 < x2 and y0 > y2
    assert svg.count('class="whisker') == 1 and svg.count("<circle") == 3
    assert line_chart([], label="x") == ""


def test_one_point_and_equal_values_are_drawn() -> None:
    assert "<circle" in line_chart([Line("a", 0, [Point(0, 0, 0, 0)])], label="x")
    assert "nan" not in line_chart([Line("a", 1, [Point(5, 2, 2, 2), Point(6, 2, 2, 2)])], label="x", target=2)


def test_ticks_are_round_and_cover() -> None:
    assert nice_ticks(0, 100) == [0, 25, 50, 75, 100]
    assert nice_ticks(0.31, 0.58) == [0.3, 0.4, 0.5, 0.6]
    assert [short(v) for v in (0.25, 12, 1500, 2.5e6)] == ["0.25", "12", "1.5k", "2.5M"]
