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


def span(least: int, most: int) -> Callable[[str], list[int]]:
    """An argument that lists whole numbers and ranges of them, such as ``1-4,8``: ascending, each once."""

    def numbers(text: str) -> list[int]:
        found = set[int]()
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or not (last if dash else first).isdecimal():
                raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers and ranges such as {least}-{most}")
            low, high = int(first), int(last if dash else first)
            if low > high or low < least or high > most:
                raise argparse.ArgumentTypeError(f"{part.strip()!r} is not within {least}-{most}, ascending")
            found.update(range(low, high + 1))
        return sorted(found)

    return numbers
