"""The one exception whose message is meant for the person at the keyboard, and remedies of what the system refuses."""

from __future__ import annotations

import errno
import json
from importlib.metadata import PackageNotFoundError, distribution


class UserError(Exception):
    """An error that the user can fix. The message names the file, the field or the record, and says what to do."""


def install(extra: str) -> str:
    """The remedy where an optional package is missing: from the checkout that is installed, or from the package index."""
    return f"pip install -e '.[{extra}]'" if is_editable() else f"pip install 'fastvlp[{extra}]'"


def is_editable() -> bool:
    """Whether the package is installed from a checkout (`pip install -e`), or runs from one."""
    try:
        origin = json.loads(distribution("fastvlp").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return True
    return bool(origin.get("dir_info", {}).get("editable"))


_SPACE = "free space, or choose another folder"
_PERMISSION = "ask for the permission, or choose another folder"
_HANDLES = "raise the number of files that may be open with `ulimit -n 4096`, or lower `data.workers`"
_DISK = "the disk or its connection has failed; look at it, then run the same command again"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "files may not be so large here (`ulimit -f`); choose another folder",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "it is read-only here; choose another folder",
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENOTCONN: _DISK,
    errno.ENOMEM: "memory has run out; lower `data.batch_size` or `data.workers`",
    errno.EAGAIN: "no further process can be started (`ulimit -u`); lower `data.workers`",
}


def remedy(error: OSError, otherwise: str | None = None) -> str | None:
    """Returns advice about an error of the operating system; `otherwise` if there is none."""
    return _REMEDIES.get(error.errno or 0, otherwise)
