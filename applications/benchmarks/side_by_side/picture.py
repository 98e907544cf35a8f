"""The ratios of a suite as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from applications.benchmarks.side_by_side.record import Record

NAMES = {"scorefn": "scorefn, another way", "by hand": "by hand", "peer": "peer", "limit": "limit"}
COLOURS = {"scorefn": "C0", "by hand": "C2", "peer": "C1", "limit": "0.6"}


def plot(record: Record, path: Path) -> None:
    """A point and its interval for every ratio of a row's first measure, on a logarithmic axis; 1 is a draw."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 7}):
        places, place = list[tuple[float, str, bool]](), 0.0
        rows = [row for row in record["rows"].values() if any(_points(row))]
        count = sum(len(list(_points(row))) + 2 for row in rows)
        figure = Figure(figsize=(8, 0.6 + 0.16 * count), layout="constrained")
        axes = figure.subplots()
        for row in rows:
            places.append((place, row["title"], True))
            for name, role, ratio in _points(row):
                place += 1
                low, high = ratio["low"] or ratio["value"], ratio["high"] or ratio["value"]
                axes.plot([low, high], [place, place], color=COLOURS[role], linewidth=2)
                axes.plot(ratio["value"], place, "o", color=COLOURS[role], markersize=3.5)
                places.append((place, name, False))
            place += 2
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        shown = {role for row in rows for _, role, _ in _points(row)}
        for role in COLOURS:
            if role in shown:
                axes.plot([], [], "o-", color=COLOURS[role], markersize=3.5, label=NAMES[role])
        axes.legend(loc="upper right")
        axes.set_yticks([y for y, *_ in places], [text.replace("`", "") for _, text, _ in places])
        for label, (_, _, heading) in zip(axes.get_yticklabels(), places, strict=True):
            label.set_fontweight("bold" if heading else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(place, -1)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("ratio: how many times better scorefn does (above 1: ahead)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _points(row: Record) -> Iterator[tuple[str, str, Any]]:
    """Name, role and ratio of those who have one."""
    key = row["measures"][0]["key"]
    for contender in row["contenders"]:
        ratio = contender["ratios"].get(key)
        if ratio is not None and ratio["value"] is not None:
            yield contender["name"], contender["role"], ratio
