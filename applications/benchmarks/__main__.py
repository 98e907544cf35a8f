"""scorefn beside the loop one would write by hand and beside its peers, on the same work, in one run.

    python -m applications.benchmarks [--suite core|rl|vi|bbo|all] [--peers] [--repeats N] [--quick] [--only ROW]
        [--record] [--resume] [--environments DIR] [--out DIR]

Contenders take turns, each library in a process of its own; what is read off are CPU seconds of the process that works,
as ratios with 95 % intervals. Every ratio is compared with the recorded one in docs/benchmarks: the exit status is 1 if
any is slower, by intervals that leave a gap of more than a tenth, and is so again when its row is measured a second
time. JSON, tables and plots are left in ``--out``; ``--record`` writes the record and its pages, which are never typed.
``--render`` measures nothing and writes the pages anew from the record. Ctrl-C ends after the present turn; rows are
saved as they come, and ``--resume`` goes on after them.

Peers are installed where they are first asked for, with pinned versions, into ``--environments`` (see ``scorecard``).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from applications.arguments import at_least
from applications.benchmarks.side_by_side.page import PROGRAM, pages, suite_page
from applications.benchmarks.side_by_side.picture import plot
from applications.benchmarks.side_by_side.record import Record, compare, read, row_record, suite_record, write
from applications.benchmarks.side_by_side.room import RoomError
from applications.benchmarks.side_by_side.row import Row, Suite
from applications.benchmarks.side_by_side.turns import Disagreement, House, measure
from applications.benchmarks.suites import SUITES
from applications.progress import Interruption, show_line

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def row_named(text: str) -> list[str]:
    """An argument that lists rows."""
    known = [row.name for suite in SUITES.values() for row in suite.rows]
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no row {name!r}: choose among {', '.join(known)}")
    return found


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; combinations that make no sense are refused."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--peers", action="store_true", help="other libraries take part, not only loops by hand")
    parser.add_argument("--repeats", type=at_least(2), help="turns of every row; each has a number of its own")
    parser.add_argument("--quick", action="store_true", help="few turns and short trainings: a look at the ratios")
    parser.add_argument("--only", type=row_named, default=[], help="rows, separated by commas")
    parser.add_argument("--record", action="store_true", help="write docs/benchmarks: JSON, pages and plots")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the pages from the JSON")
    parser.add_argument("--resume", action="store_true", help="keep rows that --out has, measured with these options")
    parser.add_argument("--note", default="", help="said of the machine on the pages")
    parser.add_argument("--environments", type=Path, default=Path("runs/scorecard/environments"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--recorded", type=Path, default=DOCS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.record and not options.peers:
        parser.error("--record needs --peers: the pages compare with them")
    if options.record and options.quick:
        parser.error("--record and --quick exclude each other: quick intervals are too wide to be compared with")
    if options.only and options.suite != "all":
        lacking = [name for name in options.only if name not in [row.name for row in SUITES[options.suite].rows]]
        if lacking:
            parser.error(f"--only {lacking[0]}: the suite {options.suite} has no such row")
    return options


def settings(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """What a saved row must have been measured with to be kept: options, versions and work."""
    return {
        "peers": options.peers,
        "quick": options.quick,
        "repeats": options.repeats,
        "versions": [version("scorefn"), version("torch"), platform.python_version()],
        "work": [[c.name, c.work, dict(c.options)] for c in row.contenders],
    }


def measured_row(row: Row, house: House, folder: Path, options: argparse.Namespace, stop: Any) -> Record | None:
    """A row, kept from before or measured now and saved at once; None where it was told to stop."""
    saved = folder / f"{row.name}.json"
    if options.resume and saved.exists():
        kept = json.loads(saved.read_text(encoding="utf-8"))
        if kept["settings"] == settings(row, options):
            show_line(f"{row.name}: kept from {saved}", last=True)
            kept_row: Record = kept["row"]
            return kept_row
    turns = options.repeats or (row.quick_turns if options.quick else row.turns)
    begin = time.perf_counter()
    found = measure(
        row,
        house,
        turns,
        peers=options.peers,
        quick=options.quick,
        folder=folder,
        shown=lambda line: show_line(f"{line:<100.100}", last=False) if sys.stdout.isatty() else None,
        should_stop=stop,
    )
    if found is None:
        return None
    record = row_record(row, found, options.note)
    write(saved, {"settings": settings(row, options), "row": record, "samples": found.samples})
    for name, why in found.missing.items():
        show_line(f"{row.name}: {name} is left out: {why}", last=True)
    show_line(f"{row.name + ':':<24} {turns} turns in {time.perf_counter() - begin:.0f} s", last=True)
    return record


def measured_suite(suite: Suite, options: argparse.Namespace, stop: Any) -> tuple[dict[str, Record], list[str]]:
    """Its rows as far as they were measured, and what failed. Processes live as long as the suite."""
    rows: dict[str, Record] = {}
    failed: list[str] = []
    house = House(options.environments)
    try:
        for row in suite.rows:
            if stop():
                break
            if options.only and row.name not in options.only:
                continue
            try:
                record = measured_row(row, house, options.out / suite.name, options, stop)
            except (RoomError, Disagreement) as error:
                failed.append(f"{row.name}: {error}")
                show_line(failed[-1], last=True)
                continue
            if record is not None:
                rows[row.name] = record
    finally:
        house.close()
    return rows, failed


def render(folder: Path) -> None:
    """All pages and plots of the record in a folder."""
    records = {name: read(folder / f"{name}.json") for name in SUITES if (folder / f"{name}.json").exists()}
    for name, text in pages(records).items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, record in records.items():
        plot(record, folder / f"{name}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compare, write."""
    options = parsed(arguments)
    if options.render:
        render(options.recorded)
        return 0
    wanted = list(SUITES.values()) if options.suite == "all" else [SUITES[options.suite]]
    if options.only:
        wanted = [suite for suite in wanted if any(row.name in options.only for row in suite.rows)]
    slower, trouble = [], []
    with Interruption() as interrupted:
        for suite in wanted:
            rows, failed = measured_suite(suite, options, interrupted)
            trouble += failed
            if not rows:
                continue
            old = read(options.recorded / f"{suite.name}.json")
            suspects = sorted({found.row for found in compare(rows, old["rows"]) if found.word == "slower"})
            if suspects:  # by a busy moment, perhaps
                show_line(f"slower than recorded, measured again: {', '.join(suspects)}", last=True)
                again = argparse.Namespace(**{**vars(options), "only": suspects, "resume": False})
                rows.update(measured_suite(suite, again, interrupted)[0])
            record = suite_record(suite, {"rows": {}}, rows)
            write(options.out / f"{suite.name}.json", record)
            (options.out / f"{suite.name}.md").write_text(suite_page(record), encoding="utf-8")
            plot(record, options.out / f"{suite.name}.png")
            for verdict in compare(rows, old["rows"]):
                print(verdict)
                slower += [verdict] if verdict.word == "slower" else []
            if options.record:
                write(options.recorded / f"{suite.name}.json", suite_record(suite, old, rows))
                render(options.recorded)
        stopped = interrupted()
    print(f"Tables and plots are in {options.out}.")
    for line in [*trouble, *(f"slower than recorded: {verdict}" for verdict in slower)]:
        print(line, file=sys.stderr)
    return 130 if stopped else int(bool(slower or trouble))


if __name__ == "__main__":
    sys.exit(main())
