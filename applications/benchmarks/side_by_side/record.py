"""What is kept of a row, and how a new run compares with what was recorded."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from applications.benchmarks.side_by_side.measures import figures, ratios, successes
from applications.benchmarks.side_by_side.row import Contender, Row, Suite
from applications.benchmarks.side_by_side.turns import SEED, Measured

Record = dict[str, Any]
MARGIN = 0.1


def row_record(row: Row, measured: Measured, note: str) -> Record:
    """A row as JSON takes it: everything that its page says."""
    present = [contender for contender in row.contenders if contender.name in measured.samples]
    return {
        "title": row.title,
        "about": row.about,
        "date": str(date.today()),
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "note": note},
        "seed": SEED,
        "turns": len(measured.samples[present[0].name]),
        "versions": measured.versions,
        "missing": measured.missing,
        "measures": [{"key": m.key, "title": m.title, "lower": m.lower} for m in row.measures],
        "contenders": [_contender_record(row, contender, measured) for contender in present],
    }


def _contender_record(row: Row, contender: Contender, measured: Measured) -> Record:
    first, own = row.contenders[0], measured.samples[contender.name]
    reference = measured.samples[first.name]
    found: Record = {"name": contender.name, "role": contender.role}
    found["figures"] = {m.key: figures(m, own) for m in row.measures}
    found["ratios"] = {} if contender == first else {m.key: ratios(m, reference, own) for m in row.measures}
    if any(m.succeeds for m in row.measures):
        found["successes"] = successes(own)
    return found


def write(path: Path, whole: Mapping[str, Any]) -> None:
    """JSON; an old file is never left half overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> Record:
    """What ``write`` wrote; a file that is not there holds no rows."""
    if not path.exists():
        return {"rows": {}}
    whole: Record = json.loads(path.read_text(encoding="utf-8"))
    return whole


def suite_record(suite: Suite, old: Mapping[str, Any], new: Mapping[str, Record]) -> Record:
    """New rows in the place of old ones, in the order of the suite; rows that it no longer has are dropped."""
    rows = {**old["rows"], **new}
    order = [row.name for row in suite.rows if row.name in rows]
    return {"suite": suite.name, "title": suite.title, "about": suite.about, "rows": {n: rows[n] for n in order}}


class Verdict(NamedTuple):
    """A ratio beside the recorded one.

    Attributes:
        row: its name.
        contender: likewise.
        measure: the measure's title.
        ratio: as measured now.
        recorded: as recorded.
        word: ``as recorded``, ``faster``, ``slower`` or ``not recorded``.
    """

    row: str
    contender: str
    measure: str
    ratio: float
    recorded: float | None
    word: str

    def __str__(self) -> str:
        before = "" if self.recorded is None else f", recorded {self.recorded:.3g}"
        return f"{self.row}: {self.measure} against {self.contender}: {self.ratio:.3g}{before}: {self.word}"


def compare(new: Mapping[str, Record], old: Mapping[str, Record]) -> Iterator[Verdict]:
    """Every ratio that is finite, beside the recorded one.

    It is slower where its interval and the recorded one leave a gap of more than a tenth, and faster likewise.
    """
    for name, row in new.items():
        before = {c["name"]: c for c in old.get(name, {}).get("contenders", ())}
        titles = {m["key"]: m["title"] for m in row["measures"]}
        for contender in row["contenders"]:
            for key, ratio in contender["ratios"].items():
                if ratio["value"] is None:
                    continue
                recorded = before.get(contender["name"], {}).get("ratios", {}).get(key)
                known = recorded is not None and recorded["value"] is not None
                yield Verdict(
                    name,
                    contender["name"],
                    titles[key],
                    ratio["value"],
                    recorded["value"] if known else None,
                    _word(ratio, recorded) if known else "not recorded",
                )


def _word(now: Mapping[str, float | None], then: Mapping[str, float | None]) -> str:
    """An end that is not known is no border."""
    if now["high"] is not None and then["low"] is not None and now["high"] < then["low"] * (1 - MARGIN):
        return "slower"
    if now["low"] is not None and then["high"] is not None and now["low"] > then["high"] * (1 + MARGIN):
        return "faster"
    return "as recorded"


def behind(rows: Mapping[str, Record]) -> Iterator[tuple[Record, Record, str, Mapping[str, Any]]]:
    """Where somebody is ahead of scorefn by more than the interval: row, contender, measure's title, ratio."""
    for row in rows.values():
        titles = {m["key"]: m["title"] for m in row["measures"]}
        for contender in row["contenders"]:
            for key, ratio in contender["ratios"].items():
                if contender["role"] in ("peer", "by hand") and ratio["high"] is not None and ratio["high"] < 1:
                    yield row, contender, titles[key], ratio


def counted(rows: Iterable[Record], role: str) -> tuple[int, int, int]:
    """How many ratios to contenders of a role are above 1, not told apart from 1, and below it, by their intervals."""
    above = level = below = 0
    for row in rows:
        for contender in row["contenders"]:
            for ratio in contender["ratios"].values() if contender["role"] == role else ():
                if ratio["low"] is not None and ratio["low"] > 1:
                    above += 1
                elif ratio["high"] is not None and ratio["high"] < 1:
                    below += 1
                else:
                    level += 1
    return above, level, below
