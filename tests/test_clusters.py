"""The files for clusters in the guide: their syntax, and that their commands exist."""

from __future__ import annotations

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
