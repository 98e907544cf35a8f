"""Arguments of the programs."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """An argument that counts something."""

    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number: give {least} or more") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"it is {value}, but must be {least} or more")
        return value

    return count
