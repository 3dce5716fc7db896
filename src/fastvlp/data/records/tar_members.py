"""The members of a tar that may be damaged or hostile: names, sizes and places are checked before anything is read."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator

from fastvlp.files import MOST_BYTES

# The longest name, or list of extended attributes, of a member.
MOST_HEADER = 1 << 20

_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# Line ends and the like would be taken for the end of a name elsewhere; a byte that is no UTF-8 has no place in a text.
_NO_NAME = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class CheckedMember(tarfile.TarInfo):
    """A member whose header is refused where it claims a size that would be allocated in vain, or that leads backwards."""

    def _proc_member(self, tar: tarfile.TarFile) -> CheckedMember:
        if self.size < 0:
            raise tarfile.ReadError(f"{clean_name(self.name)} has a negative size")
        if self.type in _EXTENDED and self.size > MOST_HEADER:
            raise tarfile.ReadError(f"a name or attributes of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order. Raises tarfile.TarError or OSError at the first damage."""
    end = -1
    try:
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # tarfile would keep every header
            if member.size < 0 or member.offset <= end:
                raise tarfile.ReadError(f"{clean_name(member.name)} lies before the member that it follows")
            end = member.offset
            member.name = clean_name(member.name)
            yield member
    except (tarfile.TarError, OSError):
        raise
    # Given hostile bytes, tarfile raises anything from IndexError to RecursionError.
    except Exception as error:
        raise tarfile.ReadError(str(error) or type(error).__name__) from error


def fault(member: tarfile.TarInfo) -> str | None:
    """Returns the reason why a plain member is not read; None if nothing is wrong. A sparse one may claim any size."""
    if member.issparse():
        return f"{member.name} is a sparse file"
    if member.size > MOST_BYTES:
        return f"{member.name} has {member.size} bytes, more than {MOST_BYTES >> 30} GiB"
    return None


def clean_name(name: str) -> str:
    """The name with control characters, and bytes that are no UTF-8, as escapes."""
    return _NO_NAME.sub(lambda found: _escape(found[0]), name)


def _escape(character: str) -> str:
    # A byte that is no UTF-8 is decoded as U+DC80 to U+DCFF.
    return f"\\x{ord(character) & 0xFF:02x}"
