"""Files at URLs, through fsspec: what passes is waited for, anything else is one error that says what to do."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import fsspec

from fastvlp.errors import UserError

T = TypeVar("T")

# Seconds between attempts, a minute in all. At first contact an address may be mistyped, and nobody waits so long.
WAITS: Sequence[float] = (1, 2, 4, 8, 16, 32)
FIRST_WAITS: Sequence[float] = (1, 2)
# Seconds until an answer that does not come counts as an error.
CONNECT_S, READ_S = 15.0, 60.0
# Errors of the client libraries that are no OSError.
_CLIENTS = ("aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3", "s3fs")
_URL = re.compile(r"([a-z0-9+]{2,}(?:::[a-z0-9+]+)*):/+", re.IGNORECASE)


def is_url(place: str | Path) -> bool:
    return _URL.match(str(place)) is not None


def open_url(place: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the place in it. Raises UserError if a driver is missing."""
    options: dict[str, Any] = {}
    if place.startswith(("http://", "https://")):
        options = _http_options()
    elif place.startswith("s3://"):
        options = {"config_kwargs": {"connect_timeout": CONNECT_S, "read_timeout": READ_S}}
    try:
        fs, root = fsspec.core.url_to_fs(place, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{place}: cannot be opened ({error}); install the package, or check the address") from error
    return fs, root


def _http_options() -> dict[str, Any]:
    try:
        from aiohttp import ClientTimeout
    except ImportError:
        return {}  # opening it says what is missing
    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)}}


def attempt(place: str, read: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """Returns the result of `read`. After a temporary error, such as a lost connection or HTTP 503, it tries again, and waits
    longer each time.

    Raises UserError, which names the place, where it does not pass.
    """
    waits = WAITS if waits is None else waits
    for wait in (*waits, None):
        try:
            return read()
        except Exception as error:
            if not _is_of_place(error):
                raise
            if wait is None or not _may_pass(error):
                tries = f", {len(waits) + 1} times in {sum(waits):.0f} s" if wait is None else ""
                raise UserError(f"{place}: cannot read ({_reason(error)}{tries}); {_advice(error)}") from error
            wait = max(wait, _asked_for(error))
            print(f"{place}: {_reason(error)}; trying again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_of_place(error: Exception) -> bool:
    return isinstance(error, OSError | TimeoutError | EOFError) or type(error).__module__.split(".")[0] in _CLIENTS


def _status(error: Exception) -> int | None:
    value = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return value if isinstance(value, int) and 400 <= value < 600 else None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)


def _asked_for(error: Exception) -> float:
    """Seconds that the server asks to wait, at most two minutes."""
    text = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return min(120.0, float(text)) if str(text).isdecimal() else 0.0


def _reason(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        return f"{status} {getattr(error, 'message', '')}".strip()
    if isinstance(error, FileNotFoundError):
        return "not found"
    return str(error).splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _advice(error: Exception) -> str:
    if _status(error) in (401, 403) or isinstance(error, PermissionError):
        return "check your access to it"
    if isinstance(error, FileNotFoundError) or not _may_pass(error):
        return "check the address"
    return "check the address and the network, then run the same command again"


def read_range(fs: Any, place: str, offset: int, length: int) -> bytes:
    """Bytes of a file at a URL. Raises UserError if they cannot be had."""

    def read() -> bytes:
        data: bytes = fs.cat_file(place, start=offset, end=offset + length)
        if len(data) > length:
            data = data[offset : offset + length]  # a server that knows no ranges sends the whole file
        if len(data) != length:
            raise ConnectionError(f"{len(data)} of {length} bytes came")
        return data

    return attempt(place, read)


@contextmanager
def at_hand(source: str | Path, out: Path) -> Iterator[Path]:
    """A path itself; of a URL a copy beside `out`, which is removed when the block ends, in an error too. What an interrupted
    download has fetched whole is not fetched again."""
    if not is_url(source):
        yield Path(source)
        return
    url = _URL.sub(r"\1://", str(source), count=1)  # as a path it has lost a slash
    # Another URL may have files of the same names.
    folder = out.with_name(f"{out.name}.{sha256(url.encode()).hexdigest()[:8]}.download")
    fs, root = open_url(url)
    name = root.rstrip("/").rpartition("/")[2]
    whole = "." in name
    files = [root] if whole else attempt(url, lambda: sorted(fs.find(root)), FIRST_WAITS)
    if not files:
        raise UserError(f"{url}: nothing is listed here; name a file, or download the folder first")
    for file in files:
        inside = name if whole else f"{name}/{file.removeprefix(root).lstrip('/')}"
        _download(fs, file, folder / inside)
    try:
        yield folder / name
    finally:
        rmtree(folder, ignore_errors=True)


def _download(fs: Any, file: str, to: Path) -> None:
    if ".." in to.parts:
        raise UserError(f"{file}: its name points outside of the folder; download it by hand")
    if to.exists():
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f"{to.name}.part")
    attempt(file, lambda: fs.get_file(file, str(part)))
    part.replace(to)
