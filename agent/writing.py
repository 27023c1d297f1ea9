"""Files that are written whole or not at all, so that a reader never meets half of one."""

import json
import os
from pathlib import Path
from typing import Any

from agent.errors import UserError


def write_json(file: Path, content: Any) -> None:
    """Write plain values, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}); choose another --out") from None
