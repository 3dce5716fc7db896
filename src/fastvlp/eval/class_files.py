"""Files with the names of classes, and with the templates around a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvlp.errors import UserError

# flip7, openai80 and the names in imagenet.tsv: Copyright (c) 2021 OpenAI, MIT licence (prompts/LICENSE-openai-clip). zh7 is
# ours.
PROMPTS = Path(__file__).with_name("prompts")


def read_classes(path: Path) -> dict[str, list[str]]:
    """Reads {label: names} from JSON, or from a text file with a class in each line, whose name is the label.

    Raises UserError for a class that occurs twice or has no name.
    """
    text = _read(path)
    if path.suffix == ".json":
        return _json_classes(path, text)
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name = " ".join(line.split())
        if name in lines:
            raise UserError(f"{path}:{number}: class {name!r} is also in line {lines[name]}; remove one")
        if name:
            lines[name] = number
    if not lines:
        raise UserError(f"{path}: no class in it; write one in each line")
    return {name: [name] for name in lines}


def _json_classes(path: Path, text: str) -> dict[str, list[str]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            line = text[: text.rfind(json.dumps(twice, ensure_ascii=False))].count("\n") + 1
            raise UserError(f"{path}:{line}: class {twice!r} occurs twice; remove one")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write {{label: name}} or {{label: [names]}}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: no class in it; write {{label: name}} or {{label: [names]}}")
    classes = {label: names if isinstance(names, list) else [names] for label, names in content.items()}
    for label, names in classes.items():
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{path}: class {label!r} has {content[label]!r}; give it a name or a list of names")
    return classes


def read_templates(name: str) -> list[str]:
    """The templates of this name that come with fastvlp, or those in this file. Raises UserError for a line that does not
    have `{}` once."""
    own = sorted(path.stem for path in PROMPTS.glob("*.txt"))
    path = PROMPTS / f"{name}.txt" if name in own else Path(name)
    if name not in own and not path.is_file():
        raise UserError(f"`templates` {name}: no such file; give a file, or one of {', '.join(own)}")
    templates = [(number, line.strip()) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    for number, template in templates:
        if template.count("{}") != 1:
            raise UserError(f"{path}:{number}: {template!r} must have {{}} once, in the place of the class's name")
    if not templates:
        raise UserError(
            f"{path}: no template in it; write one in each line, with {{}} in the place of the class's name"
        )
    return [template for _, template in templates]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({error}); give a text file in UTF-8") from error
