"""The guide's commands for tuning a public CLIP work as they stand: photographs and a public model become a search."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from fastvlp.cli import main
from tests.convert.public_models import write_model
from tests.installed import skip_without

skip_without("chromadb", install="-e '.[serve]'")

GUIDE = (Path(__file__).parent.parent / "docs/guide/tune-clip.md").read_text(encoding="utf-8")
COLOURS = ("red", "green", "yellow", "small", "large", "left")


@pytest.mark.slow
def test_photographs_and_a_public_model_become_a_search(tmp_path, monkeypatch):
    lines = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)[0].splitlines()
    monkeypatch.chdir(tmp_path)
    # The model of the hub, as a folder of its name.
    write_model("clip", Path("clip-vit-base-patch32"))
    photographs = Path("my_photographs")
    photographs.mkdir()
    for i in range(60):
        Image.new("RGB", (48, 40), (4 * i, 255 - 4 * i, 90)).save(photographs / f"{i}.jpg")
        (photographs / f"{i}.txt").write_text(f"a {COLOURS[i % 6]} circle\na {COLOURS[i % 5]} star\n")
    served = []
    monkeypatch.setattr("fastvlp.serve.server.run", lambda *args: served.append(args))
    commands = [shlex.split(line.replace("openai/", ""), comments=True) for line in lines if line.startswith("vlp ")]
    assert [words[1] for words in commands] == ["data", "finetune", "export", "index", "serve"]
    for words in commands:
        assert main([*words[1:], *(["--port", "0"] if words[1] == "serve" else [])]) == 0, words
    ((embedder, index, pictures, *_),) = served
    from fastvlp.serve.api import create_app

    question = next(shlex.split(line) for line in lines if line.startswith("curl "))
    app = create_app(embedder, index, pictures=pictures)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        path = question[1].removeprefix("http://127.0.0.1:8000")
        answer = client.post(path, json=json.loads(question[-1]))
        assert answer.status_code == 200, answer.text
        found = answer.json()["results"]
        assert len(found) == 3 and all(client.get(hit["image"]).status_code == 200 for hit in found)
        assert "search" in client.get("/").text
