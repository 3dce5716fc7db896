import errno
import os
from pathlib import Path

import pytest

from fastvlp.errors import UserError
from fastvlp.files import whole_file, write_whole


def test_a_file_has_its_name_when_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    path, named = tmp_path / "a.json", []
    monkeypatch.setattr(os, "fsync", lambda file: named.append(path.exists()))
    write_whole(path, b"all")
    assert named == [False] and path.read_bytes() == b"all"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"

    def half(self, data):
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match=r"a\.json: cannot write \(No space left on device\); free space"):
        write_whole(path, b"third")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_others_may_read_a_file_that_a_library_made_for_its_owner(tmp_path):
    (tmp_path / "a.tmp").touch(0o600)  # left by a process that was killed
    with whole_file(tmp_path / "a", "a.tmp") as part:
        part.unlink()
        part.touch(0o600)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
