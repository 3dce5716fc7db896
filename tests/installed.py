"""Skips the tests of a package that is not installed, without importing the package."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def skip_without(*packages: str, install: str) -> None:
    """Skips the module that calls this where a package is missing.

    Unlike `pytest.importorskip` it imports nothing: every worker collects every module, and few of them run its tests.
    `install`: what to install.
    """
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {install}", allow_module_level=True)
