"""A sheet of pictures with their captions below: the quickest check that images and texts belong together."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

COLUMNS, ROWS = 6, 4
SIDE, TEXT_HEIGHT, GAP = 180, 62, 8
FONT_SIZE, LINES, LINE_WIDTH = 11, 4, 29
# Beginnings of the family names of fonts with Chinese characters.
CHINESE_FONTS = (
    *("Noto Sans CJK", "Noto Sans SC", "Source Han Sans", "WenQuanYi", "PingFang", "Hiragino Sans GB", "Heiti"),
    *("Microsoft YaHei", "SimHei", "SimSun", "Arial Unicode MS", "Droid Sans Fallback", "Noto Serif CJK"),
)
NO_FONT = "(no font for this script)"


def contact_sheet(pictures: Sequence[tuple[Sequence[Image.Image], str]]) -> Image.Image:
    """Draws up to 24 records, each (its images, its text), six to a row."""
    pictures = pictures[: COLUMNS * ROWS]
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT_HEIGHT + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    path, code_points = _find_font()
    font = ImageFont.truetype(path, FONT_SIZE)
    for n, (images, text) in enumerate(pictures):
        x = GAP + n % COLUMNS * (SIDE + GAP)
        y = GAP + n // COLUMNS * (SIDE + TEXT_HEIGHT + GAP)
        width = SIDE // len(images)
        for i, image in enumerate(images):
            small = ImageOps.contain(ImageOps.exif_transpose(image).convert("RGBA"), (width - GAP // 2, SIDE))
            sheet.paste(small, (x + i * width + (width - small.width) // 2, y + (SIDE - small.height) // 2), small)
        draw.multiline_text((x, y + SIDE + 2), _wrap(text, code_points), fill="black", font=font, spacing=2)
    return sheet


def summary_text(info: Mapping[str, Any]) -> str:
    """A text of the record: its first caption in each language, else a statement, a question or its label."""
    captions = [texts[0] for name in ("captions", "captions_zh") if (texts := info.get(name))]
    if captions:
        return "\n".join(captions)
    if info.get("statements"):
        statement = info["statements"][0]
        return f"{statement['text']} [{str(statement['label']).lower()}]"
    if info.get("questions"):
        question = info["questions"][0]
        return f"{question['question']} [{max(question['answers'], key=question['answers'].get, default='')}]"
    return str(info.get("label", ""))


def _wrap(text: str, code_points: frozenset[int]) -> str:
    """Wraps a text to at most LINES lines. A line is replaced by a note if the font, which has these code points, lacks its
    script."""
    lines = []
    for line in text[:400].splitlines():
        missing = sum(ord(c) not in code_points for c in line if not c.isspace())
        if 4 * missing > len(line):
            lines.append(NO_FONT)
        else:
            wide = any(unicodedata.east_asian_width(c) in "WF" for c in line)
            lines += textwrap.wrap(line, LINE_WIDTH // 2 if wide else LINE_WIDTH)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1][: LINE_WIDTH - 1] + "…"]
    return "\n".join(lines)


def _find_font() -> tuple[str, frozenset[int]]:
    """A font file and the code points it has: one with Chinese where the machine has it, else matplotlib's own."""
    import matplotlib
    from matplotlib import font_manager, ft2font

    installed = [(f.name, f.fname) for f in font_manager.fontManager.ttflist]
    chinese = [file for family in CHINESE_FONTS for name, file in installed if name.startswith(family)]
    own = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    for file in (*chinese, own):
        try:
            return file, frozenset(ft2font.FT2Font(file).get_charmap())
        except (OSError, RuntimeError):
            continue
    raise FileNotFoundError(own)
