"""The files for clusters in the guide: their syntax, and that their commands exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastvlp.recipes import recipe
from fastvlp.training.division import divide

GUIDE = Path(__file__).parent.parent / "docs/guide"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_for_slurm_is_bash():
    subprocess.run(["bash", "-n", GUIDE / "slurm.sh"], check=True)
    text = (GUIDE / "slurm.sh").read_text(encoding="utf-8")
    assert "-m fastvlp pretrain" in text and "--resume" in text


SRUN = """#!/bin/bash
# In place of a run: Slurm's signal comes while it trains, where there is one.
trap 'ended=yes' TERM
echo $$ > "$FOLDER/pid"
[ -n "$SIGNALLED" ] && kill -USR1 "$PPID"
for i in {1..100}; do [ -n "$ended$PLAIN" ] && break; sleep 0.05; done
echo "$LAST_LINE"
exit "$CODE"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("signalled", "line", "code", "requeued", "ends_with"),
    [
        (True, "stopped at step 5 and saved; the same command continues it: `vlp ... --resume`", 1, True, 0),
        (True, "runs/clip_photos: finished after step 9", 0, False, 0),
        (True, "error: the loss is not finite", 1, False, 1),
        (False, "runs/clip_photos: finished after step 9", 0, False, 0),
        (False, "stopped at step 5 and saved; the same command continues it: `vlp ... --resume`", 1, False, 1),
        (False, "error: the loss is not finite", 3, False, 3),
    ],
)
def test_a_job_is_requeued_where_the_signal_stopped_its_run(
    tmp_path: Path, signalled: bool, line: str, code: int, requeued: bool, ends_with: int
):
    stubs = {
        "srun": SRUN,
        "scancel": '#!/bin/bash\nkill -TERM "$(cat "$FOLDER/pid")"\n',
        "scontrol": '#!/bin/bash\n[ "$1" = requeue ] && echo "$2" > "$FOLDER/requeued"\necho first\n',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(text.replace("$PPID", "$(ps -o ppid= -p $$ | tr -d ' ')"))
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NNODES": "4", "FOLDER": str(tmp_path)}
    given |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LAST_LINE": line, "CODE": str(code), "TMPDIR": str(tmp_path)}
    given |= {"SIGNALLED": "yes" if signalled else "", "PLAIN": "" if signalled else "yes"}
    script = ["bash", str(GUIDE / "slurm.sh"), "clip_photos"]
    done = subprocess.run(script, env=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ends_with and line in done.stdout, done.stderr
    assert (tmp_path / "requeued").exists() == requeued


def test_the_job_for_kubernetes_names_its_own_parts():
    service, job = yaml.safe_load_all((GUIDE / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = service["metadata"]["name"]
    assert pod["subdomain"] == name and service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{name}:29500" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8 and "--nproc-per-node=8" in container["args"]


def test_all_numbers_of_machines_of_the_job_can_share_a_step():
    _, job = yaml.safe_load_all((GUIDE / "kubernetes.yaml").read_text(encoding="utf-8"))
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    rows = int(next(re.findall(r"\d+", arg)[0] for arg in args if arg.startswith("--data.batch-size")))
    run = recipe(args[args.index("pretrain") + 1])
    run = replace(run, data=replace(run.data, batch_size=rows))
    least, most = map(int, args[0].removeprefix("--nnodes=").split(":"))
    for began in range(least, most + 1):
        for machines in range(least, most + 1):
            division = divide(run, 8 * began, 8 * machines)
            assert division.micro * machines == began * division.cut
