"""The page of the scorecard, from the workers' results."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from applications.benchmarks.scorecard import trajectories
from applications.benchmarks.scorecard.environments import PEERS
from applications.benchmarks.scorecard.judge import FALSE_ALARM, TOLERANCE, Judgement, unit_cost, verdict_of
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem

PLAIN = {"right", "no bias found", "refuses"}
WHAT = """The same questions to every library, and one judge: exact anchors, whose gradient is known in closed form
or by enumeration, and trap programs, which invite a known mistake. Each library runs in an environment of its own and
is used as its documentation says."""
AGAIN = """Any row again: `python -m applications.benchmarks.scorecard --peers X --problems Y`, X from the last column
below and Y the heading of a table. What was run is the code in `applications/benchmarks/scorecard/peers/X.py`."""
JUDGED = f"""From n independent estimates, each coordinate's bias with its confidence interval at {FALSE_ALARM:g} for
the row (`scorefn.diagnostics.FixedSample`), relative to the largest exact coordinate. *Right*: the interval lies within
{TOLERANCE:.0%}; equivalence is shown. *No bias found*: the interval holds 0 but reaches further, up to the share that
is printed; a library that is slow or noisy gets no further in the same time. *Biased*: the interval excludes 0.
*Wrong sign*: besides, the answer, or one of its coordinates that matter, points the other way. *Zero*: every estimate
is exactly zero. *Moves*: something moved that must stay. *Undecided*: too few or too skewed estimates for a normal
interval (n < 1000 skewness^2). *Refuses*: a trap is met with an error on purpose. A difference that the library
documents is *a choice*, not a fault."""
COLUMNS = """`variance` is of one estimate, total over the coordinates; `estimates` is n. `cost` is CPU time per single
estimate divided by that of a fixed numpy yardstick in the same process, relative to the first scorefn row of the
table: it is mostly each library's fixed cost per call, which larger problems would hide, and moves by 1.5x between
busy moments."""


@dataclass
class Row:
    """A judged row."""

    peer: str
    problem: str
    record: dict[str, Any]
    judgement: Judgement
    cost: float | None

    @property
    def label(self) -> str:
        """The estimator as it is printed."""
        return str(self.record["estimator"])


@dataclass
class Results:
    """What the workers left: judged rows, versions, and peers that did not start."""

    rows: list[Row]
    versions: dict[str, dict[str, str]]
    failed: dict[str, str]


def load(folder: Path) -> Results:
    """Read and judge every worker's results in a folder."""
    rows, versions, failed = [], {}, {}
    for peer in sorted(path.stem for path in folder.glob("*.json")):
        whole = json.loads((folder / f"{peer}.json").read_text(encoding="utf-8"))
        if "peer" not in whole:
            continue
        versions[peer] = whole["versions"]
        arrays = np.load(folder / f"{peer}.npz") if (folder / f"{peer}.npz").exists() else {}
        for record in whole["rows"]:
            if not record["problem"]:
                failed[peer] = f"{record['status']}: {record['error']}"
                continue
            if record["problem"] not in PROBLEMS:
                continue
            gradients = arrays[record["array"]] if record["array"] else None
            judgement = verdict_of(record, PROBLEMS[record["problem"]], gradients)
            rows.append(Row(peer, record["problem"], record, judgement, unit_cost(record)))
    order = {name: place for place, name in enumerate(PEERS)}
    rows.sort(key=lambda row: order.get(row.peer, 99))
    return Results(rows, versions, failed)


def paragraph(text: str) -> str:
    """One paragraph in lines of 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def cell(text: str) -> str:
    """Text that a table of Markdown can hold."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


def shortened(text: str, most: int = 130) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def title_of(peer: str) -> str:
    return PEERS[peer].title if peer in PEERS else peer


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def reference_cost(rows: list[Row], problem: str) -> float | None:
    """scorefn's first row on the problem that ran: the unit of cost."""
    for row in rows:
        if row.peer == "scorefn" and row.problem == problem and row.cost is not None and not row.record["exact"]:
            return row.cost
    return None


def linked(row: Row) -> str:
    """The method, leading to the library's own words on it."""
    name = f"`{cell(row.label)}`"
    return f"[{name}]({row.record['link']})" if row.record["link"] else name


def verdict(row: Row) -> str:
    """The verdict in bold where something is wrong that nobody chose."""
    name = row.judgement.verdict
    if row.record["choice"] and name not in PLAIN:
        return f"{name} (a choice)"
    return name if name in PLAIN or name in ("not offered", "undecided") else f"**{name}**"


def table(problem: Problem, results: Results) -> list[str]:
    """One problem: what is asked, and a row for every way that a library offers."""
    rows = [row for row in results.rows if row.problem == problem.name and row.judgement.verdict != "not offered"]
    if not rows:
        return []
    unit = reference_cost(results.rows, problem.name)
    exact = ", ".join(f"{value:.6g}" for value in problem.exact[:4]) + (", ..." if len(problem.exact) > 4 else "")
    lines = [f"### {problem.name}", "", cell(problem.ask), ""]
    said = f"Judged: {problem.quantity}; exact: {exact}."
    if problem.judged != "value":
        said = f"Judged: {problem.quantity}."
    if problem.mistake:
        said += f" The mistake it invites: {cell(problem.mistake)}."
    if problem.references:
        known = "; ".join(f"{name} {value:.5g}" for name, value in problem.references.items())
        said += f" Exact variances: {known}."
    lines += [
        said,
        "",
        "| library | method | verdict | | variance | estimates | cost |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for row in rows:
        marks = ""
        for text in (row.record["reading"], row.record["choice"], row.record["note"]):
            if text and text not in notes:
                notes.append(text)
            marks += f" ({notes.index(text) + 1})" if text else ""
        ratio = number(row.cost / unit) if unit and row.cost is not None and not row.record["exact"] else ""
        variance = row.judgement.variance if problem.judged == "value" and not row.record["exact"] else None
        parts = (
            title_of(row.peer),
            linked(row) + marks,
            verdict(row),
            cell(shortened(row.judgement.detail)),
            number(variance),
            str(row.judgement.repeats or ""),
            ratio,
        )
        lines.append("| " + " | ".join(parts) + " |")
    lines.append("")
    lines += [f"({place}) {cell(note)}." for place, note in enumerate(notes, 1)]
    lacking = [row for row in results.rows if row.problem == problem.name and row.judgement.verdict == "not offered"]
    reasons: dict[str, list[str]] = {}
    for row in lacking:
        reasons.setdefault(row.judgement.detail, []).append(title_of(row.peer))
    if reasons:
        said = "; ".join(f"{', '.join(sorted(set(peers)))}: {cell(why)}" for why, peers in reasons.items())
        lines.append(f"\nNot offered: {said}.")
    return [*lines, ""]


def summary(results: Results) -> list[str]:
    """How many rows of each verdict a library has."""
    columns = ("right", "no bias found", "refuses", "a choice", "undecided", "biased", "zero", "wrong sign", "crashes")
    lines = ["| library | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for peer in dict.fromkeys(row.peer for row in results.rows):
        counts = dict.fromkeys(columns, 0)
        for row in results.rows:
            if row.peer != peer:
                continue
            name = row.judgement.verdict
            name = "a choice" if row.record["choice"] and name not in PLAIN else name
            name = "biased" if name in ("not finite", "moves") else name
            if name in counts:
                counts[name] += 1
        lines.append(f"| {title_of(peer)} | " + " | ".join(str(counts[name] or "") for name in columns) + " |")
    lines += [f"| {title_of(peer)} | {cell(trouble)} |" for peer, trouble in results.failed.items()]
    return [*lines, ""]


TRAJECTORIES = {question["name"] for question in trajectories.questions("anchor")}
PARTS = {
    "anchors": ("Scorecard: draws", lambda problem: problem.kind == "anchor" and problem.name not in TRAJECTORIES),
    "trajectories": ("Scorecard: trajectories", lambda problem: problem.name in TRAJECTORIES),
    "traps": ("Scorecard: traps", lambda problem: problem.kind == "trap"),
}


def render(results: Results, today: date | None = None, prose: Path | None = None, name: str = "scorecard") -> str:
    """The first page: ``prose`` (the notes, beside this file by default) after the summary, and links to the parts."""
    versions = [
        f"| {title_of(peer)} | {', '.join(f'{name} {number}' for name, number in found.items())} | "
        f"`python -m applications.benchmarks.scorecard --peers {peer}` |"
        for peer, found in results.versions.items()
        if found
    ]
    notes = (prose or Path(__file__).with_name("notes.md")).read_text(encoding="utf-8").strip()
    measured = f"{today or date.today():%Y-%m-%d}, on a 2-core shared x86-64 machine, one torch thread, CPU seconds"
    lines = [
        "# Scorecard of the field",
        "",
        paragraph(WHAT),
        "",
        "    python -m applications.benchmarks.scorecard --page docs/scorecard.md",
        "",
        paragraph(AGAIN),
        "",
        f"**Measured** on {measured}.",
        "",
        "| library | versions | command |",
        "|---|---|---|",
        *versions,
        "",
        "## How it is judged",
        "",
        paragraph(JUDGED),
        "",
        paragraph(COLUMNS),
        "",
        "## In short",
        "",
        "Rows per verdict. Rows differ in number and difficulty between libraries, so the columns are no ranking.",
        "",
        *summary(results),
        notes,
        "",
        "## The answers",
        "",
        "```{toctree}",
        ":maxdepth: 1",
        "",
        *(f"{name}_{part}" for part in PARTS),
        "```",
    ]
    return "\n".join(lines) + "\n"


def render_part(results: Results, part: str) -> str:
    """The tables of one part: a problem each, and a row for every way that a library offers."""
    title, belongs = PARTS[part]
    lines = [f"# {title}", "", "What the columns mean, and how it is judged: {doc}`scorecard`.", ""]
    for problem in PROBLEMS.values():
        if belongs(problem):
            lines += table(problem, results)
    return "\n".join(lines).replace("\n### ", "\n## ").rstrip() + "\n"


def write(results: Results, path: Path, today: date | None = None) -> list[Path]:
    """The first page at ``path``, and its parts beside it."""
    path.write_text(render(results, today, name=path.stem), encoding="utf-8")
    written = [path]
    for part in PARTS:
        written.append(path.with_name(f"{path.stem}_{part}{path.suffix}"))
        text = render_part(results, part).replace("{doc}`scorecard`", f"{{doc}}`{path.stem}`")
        written[-1].write_text(text, encoding="utf-8")
    return written
