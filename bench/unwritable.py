"""Folders that the superuser cannot write to either: without its privilege, read-only mounts, small disks. Linux only."""

from __future__ import annotations

import ctypes
import os
from functools import cached_property
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
# Of linux/sched.h, linux/mount.h and linux/capability.h.
_NEW_MOUNTS = 0x20000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE, _DETACH = 1, 1 << 5, 1 << 12, 1 << 14, 1 << 18, 2
_VERSION_3 = 0x20080522
# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which the superuser passes over the permissions of files.
_OVERRIDE = 1 << 1 | 1 << 2


def without_override() -> None:
    """From now on the permissions of files hold for this process, also where it is the superuser's."""
    if os.geteuid() != 0:
        return
    head, sets = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(_LIBC.capget(head, sets))
    # Effective, permitted and inheritable; of each the first 32, then all again.
    sets[0] &= ~_OVERRIDE & 0xFFFFFFFF
    _check(_LIBC.capset(head, sets))


class Mounts:
    """Mounts that only this process and its children see."""

    @cached_property
    def allowed(self) -> bool:
        """Whether the system lets this process mount at all."""
        try:
            _check(_LIBC.unshare(_NEW_MOUNTS))
            _mount(None, Path("/"), None, _RECURSIVE | _PRIVATE)
        except OSError:
            return False
        return True

    def small(self, folder: Path, kilobytes: int) -> bool:
        """Makes a folder with a file system of so many kB. Returns whether that is allowed."""
        if self.allowed:
            folder.mkdir()
            _mount("tmpfs", folder, "tmpfs", 0, f"size={kilobytes}k")
        return self.allowed

    def enlarge(self, folder: Path) -> None:
        _mount("tmpfs", folder, "tmpfs", _REMOUNT, "size=64m")

    def cover(self, folder: Path) -> None:
        """Lays a read-only mount of a folder over it; files that are open stay writable."""
        assert self.allowed, "not in a namespace of this process's own"
        _mount(str(folder), folder, None, _BIND)
        _mount(None, folder, None, _REMOUNT | _BIND | _READ_ONLY)

    def uncover(self, folder: Path) -> None:
        _check(_LIBC.umount2(os.fsencode(folder), _DETACH))


def _mount(source: str | None, folder: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    source_, kind_, options_ = (None if text is None else text.encode() for text in (source, kind, options))
    _check(_LIBC.mount(source_, os.fsencode(folder), kind_, ctypes.c_ulong(flags), options_))


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
