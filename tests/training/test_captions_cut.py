import json
from dataclasses import replace
from pathlib import Path

from fastvlp.training.loop import train
from tests.training.runs import made_pairs, made_run


def test_a_run_says_at_its_start_what_is_cut_of_its_captions(tmp_path: Path) -> None:
    data = made_pairs(tmp_path / "data")
    for max_length, cut in ((5, True), (32, False)):
        run = made_run(data, tmp_path / f"run{max_length}", "prefixlm", steps=1, vocab=400)
        run = replace(run, data=replace(run.data, max_length=max_length))
        state = train(run)
        lines = [json.loads(line) for line in (state.run.folder / "log.jsonl").read_text().splitlines()]
        events = [line for line in lines if "cut" in line.values()]
        assert len(events) == cut
        if cut:
            assert events[0]["captions"] == 48 and 0 < events[0]["cut"] < 48 and events[0]["max_length"] == 5
