"""Takes the pictures of the README from what `make demo` made: docs/report.png and docs/search.png.

    make demo
    make pictures

It needs a browser: Debian's chromium, or the one that $CHROMIUM names.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastvlp.errors import UserError

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
WIDTH = 1160


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the pictures."""

    demo: Path = Path("demo")
    """Folder with report/report.html, export and index."""
    out: Path = Path("docs")
    """Folder for report.png and search.png."""
    query: str = "purple and green shapes on a black background"
    """Text of the search."""
    ready_s: float = 120.0
    """Seconds within which the service has to answer."""


def browser_path() -> str:
    """Raises UserError where no browser is installed."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(path).exists():
        raise UserError(f"no browser at {path}; install chromium (apt-get install chromium), or set $CHROMIUM to one")
    return path


@contextmanager
def serving(options: Options) -> Iterator[str]:
    """Serves the demo's model and index, at the address that is given, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", str(options.demo / "export"), "--index", str(options.demo / "index"), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "fastvlp", *command], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(address, process, options.ready_s)
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Raises UserError where nothing answers in this time, or the service has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise UserError(f"{address}: the service does not answer; try `make serve`")


def take_report(browser: Any, report: Path, out: Path) -> None:
    """The top of the report: its answer and the curves of the first score."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1400}, color_scheme="light")
    page.goto(report.resolve().as_uri())
    end = page.locator("h2").nth(1).bounding_box()["y"] - 20
    page.screenshot(path=out, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": end})
    page.close()


def take_search(browser: Any, address: str, query: str, out: Path) -> None:
    """The search page with the results of a query."""
    page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme="light")
    page.goto(address)
    page.wait_for_selector(".tile img.here")
    page.fill("#text", query)
    page.keyboard.press("Enter")
    page.wait_for_selector("#grid li:first-child .score")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=out)
    page.close()


def main(options: Options) -> None:
    for name in ("report/report.html", "export", "index"):
        if not (options.demo / name).exists():
            raise UserError(f"{options.demo / name}: not there; make it with `make demo`")
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play, serving(options) as address:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        take_report(browser, options.demo / "report" / "report.html", options.out / "report.png")
        take_search(browser, address, options.query, options.out / "search.png")
        browser.close()
    print(f"{options.out / 'report.png'}, {options.out / 'search.png'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        sys.exit(f"error: {error}")
