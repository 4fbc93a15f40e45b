"""Build hook: the README as an index of packages shows it, where neither pictures nor links relative to it exist."""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"!\[([^\]]*)\]\((?!\w+:)([^)#\s]+)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)")


def for_an_index(text: str) -> str:
    """Pictures and links to files of the source distribution become their names."""
    text = PICTURE.sub(r"*\1: `\2` in the source distribution.*  ", text)
    return LINK.sub(r"\1 (`\2`)", text)


class Metadata(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text)}
