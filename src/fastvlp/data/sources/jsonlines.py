"""JSON lines, the base of several formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.errors import UserError


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """One JSON object a line, blank lines skipped; UserError naming file and line otherwise."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg}); one JSON object a line is expected") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; convert it with `iconv -t UTF-8`") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
