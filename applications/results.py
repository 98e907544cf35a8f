"""What a program leaves behind: one ``result.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_result(folder: Path, options: Mapping[str, Any], record: Mapping[str, Any]) -> Path:
    """Write ``result.json``, the arguments first; an old one is never left half overwritten.

    Args:
        folder: made where it is missing.
        options: the arguments of the program, written as text.
        record: what was found, as JSON takes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / "result.json", folder / "result.json.part"
    whole = {"arguments": {name: str(value) for name, value in options.items()}, **record}
    part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
