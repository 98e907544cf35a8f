"""The pages of docs/benchmarks, made from the recorded JSON and nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from applications.benchmarks.side_by_side.record import Record, behind, counted

PROGRAM = "python -m applications.benchmarks"
MORE = {  # pages that measure what a suite does not
    "core": ("figures/scan", "figures/reducers", "figures/gradient_statistics"),
    "rl": ("figures/rl_peers",),
    "vi": ("figures/elbo",),
    "bbo": ("gallery/search", "gallery/snes"),
}


def command(suite: str) -> str:
    """What records a suite."""
    return f"OMP_NUM_THREADS=1 {PROGRAM} --suite {suite} --peers --record"


def number(value: float | None) -> str:
    """Three digits, without an exponent where it can be read without; a dash: not known to be finite."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e9:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{value:.2e}"


def cell(interval: Mapping[str, float | None]) -> str:
    """An estimate with its interval."""
    return f"{number(interval['value'])} ({number(interval['low'])} – {number(interval['high'])})"


def suite_page(record: Record) -> str:
    """The page of a suite."""
    name, rows = record["suite"], record["rows"]
    parts = [
        f"# {record['title']}, side by side",
        _filled(f"Generated from {{download}}`{name}.json`; what is typed here is lost. Measure and write anew with"),
        f"    {command(name)}",
        _filled(f"{record['about']} {circumstances(rows)}"),
        _filled(
            "A ratio says how many times better scorefn, the first of each table, does than the contender: above 1 it "
            "is ahead, below 1 behind. Brackets are 95 % intervals; how all this is measured stands in {doc}`index`."
        ),
        f"![Ratios of this page with their intervals]({name}.png)",
        *(_section(row) for row in rows.values()),
        _filled(
            "More of the kind, measured by programs of their own: " + ", ".join(f"{{doc}}`/{p}`" for p in MORE[name])
        ),
    ]
    return "\n\n".join(parts) + "\n"


def circumstances(rows: Mapping[str, Record]) -> str:
    """When, where and with what."""
    dates = sorted({row["date"] for row in rows.values()})
    versions: dict[str, str] = {}
    for row in rows.values():
        versions.update(row["versions"])
    shown = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    machines = {
        f"{row['machine']['cores']}-core {row['machine']['architecture']} machine"
        + (f" ({row['machine']['note']})" if row["machine"]["note"] else "")
        for row in rows.values()
    }
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    seeds = ", ".join(sorted({str(row["seed"]) for row in rows.values()}))
    return f"Measured {when} on a {', '.join(sorted(machines))}, one torch thread, seed {seeds}; {shown}."


def _section(row: Record) -> str:
    parts = [f"## {row['title']}", _filled(f"{row['about']} {row['turns']} turns."), _table(row)]
    parts += [_filled(f"{name} is left out: {why}") for name, why in row["missing"].items()]
    return "\n\n".join(parts)


def _table(row: Record) -> str:
    measures, arrives = row["measures"], any("successes" in c for c in row["contenders"])
    heads = ["who", *(["arrived"] if arrives else [])]
    for measure in measures:
        heads += [measure["title"], "ratio" if len(measures) == 1 else f"ratio of {measure['title']}"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for contender in row["contenders"]:
        name = contender["name"] if contender["role"] != "limit" else f"*limit:* {contender['name']}"
        cells = [name]
        if arrives:
            s = contender["successes"]
            cells.append(f"{s['arrived']} of {s['of']} ({s['low']:.2f} – {s['high']:.2f})")
        for measure in measures:
            ratio = contender["ratios"].get(measure["key"])
            cells += [cell(contender["figures"][measure["key"]]), "" if ratio is None else cell(ratio)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


HOW = """## How it is measured

One run, one thread, CPU seconds of the process that works. Every library has a process of its own, with an environment
of pinned versions (`applications/benchmarks/scorecard/environments.py`), because importing some of them changes torch
for everybody: it is asked over a pipe to do the work once, or often enough that a turn takes some 20 ms, and says what
that took. The contenders of a row take turns in an order that is drawn anew for every turn, so that a busy moment is
busy for all of them: most ratios hold on a busy machine, absolute times do not. What works in large arrays is as fast
as the caches, which neighbours share: on a machine with several times as many busy processes as cores such ratios moved
by up to 1.7 from one run to the next. Record and compare on a quiet one. scorefn and the loops by hand share a process.

Before anybody is timed, all contenders of a row are asked what they compute: the same numbers where the draws are the
same or there are none, the same expected gradient within 5 standard errors where they are not, the same values at the
same points where a search is timed. Where they do not agree, nothing is measured.

A ratio of times is the median of the ratios within a turn; a variance is multiplied with the median time of a step. The
intervals are 95 % percentiles of a bootstrap of turns, with the same turns for both contenders, and Clopper and
Pearson's for shares of seeds. A row that is a whole training has few turns: its intervals are rough. Many intervals
stand on these pages, so that one in twenty misses.

    python -m applications.benchmarks [--suite core|rl|vi|bbo|all] [--peers] [--quick] [--repeats N] [--only ROW]

measures again and says of every ratio whether it is as recorded, faster or slower: slower where its interval and the
recorded one leave a gap of more than a tenth; such a row is measured a second time, and the exit status is 1 if it is
slower again. `--record` writes these pages."""


def index_page(records: Mapping[str, Record]) -> str:
    """The page of all suites."""
    lines = ["| suite | rows | ahead of peers | level | behind | ahead of loops | level | behind |"]
    lines += ["|---|" + "---:|" * 7]
    for name, record in records.items():
        rows = record["rows"]
        counts = [str(n) for role in ("peer", "by hand") for n in counted(rows.values(), role)]
        lines.append(f"| {{doc}}`{name}` | {len(rows)} | {' | '.join(counts)} |")
    worse: list[Any] = []
    for name, record in records.items():
        for row, contender, title, ratio in behind(record["rows"]):
            worse.append(f"| {{doc}}`{name}`: {row['title']} | {title} | {contender['name']} | {cell(ratio)} |")
    everything = {f"{name}/{row}": r for name, record in records.items() for row, r in record["rows"].items()}
    parts = [
        "# Benchmarks",
        _filled("Generated from the JSON beside it; what is typed here is lost. Measure and write anew with"),
        f"    {command('all')}",
        _filled(
            "scorefn beside the loop one would write by hand and beside the libraries of the field, on the same work "
            f"in one run. {circumstances(everything)}"
            if everything
            else "Nothing is recorded yet."
        ),
        _filled(
            "By their 95 % intervals, the ratios to peers and to hand-written loops are above 1 (scorefn is ahead), "
            "not told apart from 1, or below it:"
        ),
        "\n".join(lines),
        "## Where scorefn is behind",
        _filled("Every ratio whose interval lies below 1; the limits, which nobody can pass, are left out.")
        if worse
        else "Nowhere: no interval lies below 1.",
        *(
            ["\n".join(["| work | measure | ahead of scorefn | ratio |", "|---|---|---|---:|", *worse])]
            if worse
            else []
        ),
        HOW,
        "```{toctree}\n:hidden:\n\n" + "\n".join(records) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def pages(records: Mapping[str, Record]) -> dict[str, str]:
    """All pages by file name."""
    return {"index.md": index_page(records), **{f"{name}.md": suite_page(record) for name, record in records.items()}}
