"""The example of CONTRIBUTING.md works as it stands and is as short as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.world.corpus import WorldConfig, scene_record

ROOT = Path(__file__).parent.parent


def test_a_new_objective_is_one_file_and_a_recipe(tmp_path: Path):
    objective, recipe = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert objective.count("\n") + recipe.count("\n") < 60
    # Not in the folder that Python starts in, which it would search of itself.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "words.py").write_text(objective)
    (tmp_path / "mine" / "flm_words.py").write_text(recipe)
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "demo" / "world" / split) as writer:
            for i in range(6):
                writer.write(scene_record(WorldConfig(), split, i))
    options = [
        "--objectives.words.smoothing", "0.1", "--steps", "2", "--data.batch-size", "4",
        "--vocab", "200", "--out", "run",
    ]  # fmt: skip
    told = subprocess.run(
        [sys.executable, "-m", "fastvlp", "pretrain", "mine/flm_words.py", *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert told.returncode == 0, told.stderr
    assert "words/words" in (tmp_path / "run" / "log.jsonl").read_text()
