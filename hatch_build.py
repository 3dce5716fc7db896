"""The description of the package on its page in a registry: README.md, whose links lead to the repository.

A registry shows the text alone, so relative links and pictures would be dead there. The address of the repository is written
once, in pyproject.toml; where it is empty, links become their text and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# A picture, alone or as a link; and a link. Neither where it has an address or is on the same page.
PICTURE = re.compile(r"\[?!\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^)#]+)\)(\]\([^)]*\))?")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?!https?:|#)(?P<path>[^)]+)\)")


def published(readme: str, repository: str) -> str:
    """The text of README.md with absolute links, or with none within the repository where its address is empty."""
    if not repository:
        return LINK.sub(r"\g<text>", PICTURE.sub("", readme))
    text = PICTURE.sub(rf"![\g<text>]({repository}/raw/HEAD/\g<path>)", readme)
    return LINK.sub(rf"[\g<text>]({repository}/blob/HEAD/\g<path>)", text)


class PublishedReadme(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        repository = self.config["repository"].rstrip("/")
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": published(readme, repository)}
        if repository:
            changes = f"{repository}/blob/HEAD/CHANGELOG.md"
            metadata["urls"] = {"Repository": repository, "Changes": changes, "Issues": f"{repository}/issues"}
