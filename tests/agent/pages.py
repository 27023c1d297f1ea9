"""Pages of documentation, taken apart into what can be run."""

import re
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(?:^`(?P<file>[^`\n]+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the file whose name stands alone above it, or None."""

    language: str
    text: str
    file: str | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page of docs/, in order."""
    text = (DOCS / page).read_text()
    found = [Block(match["language"], match["text"], match["file"]) for match in BLOCK.finditer(text)]
    assert len(found) == text.count("\n```") / 2, "a block was not understood"
    return found
