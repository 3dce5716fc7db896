"""A service over made pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.serve.standins import COLOURS, opened, shade


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """12 items, three shades of each colour."""
    with opened(tmp_path) as client:
        for colour in COLOURS:
            for i in range(3):
                form = {"id": f"{colour}/{i}", "caption": f"{colour} picture", "info": f'{{"shade": {i}}}'}
                added = client.post("/v1/items", data=form, files={"image": shade(colour, i)})
                assert added.status_code == 201, added.text
        yield client
