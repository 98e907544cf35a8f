"""The benchmarks side by side: everybody does the same work, pages are the record's, a worse ratio is reported."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from applications.benchmarks import __main__ as program
from applications.benchmarks.contenders import pairs, posteriors
from applications.benchmarks.side_by_side import measures, record, turns
from applications.benchmarks.side_by_side.page import pages
from applications.benchmarks.side_by_side.picture import plot
from applications.benchmarks.side_by_side.room import Room, RoomError
from applications.benchmarks.side_by_side.row import Contender, Row, Suite
from applications.benchmarks.side_by_side.work import agree, exactly, on_average
from applications.benchmarks.side_by_side.worker import Worker, serve
from applications.benchmarks.suites import SUITES

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
ROWS = [row for suite in SUITES.values() for row in suite.rows]
AT_HOME = ("scorefn", "by hand", "limit")


@pytest.fixture(autouse=True)
def _as_before():
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    validates = torch.distributions.Distribution._validate_args
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)
    torch.distributions.Distribution.set_default_validate_args(validates)


class Here:
    """A room in this process."""

    def __init__(self):
        self.worker = Worker()

    def ask(self, do, **order):
        try:
            return json.loads(json.dumps(self.worker.obey({"do": do, **order})))
        except ValueError as error:
            raise RoomError(str(error)) from None

    def close(self):
        pass


@pytest.fixture
def at_home(monkeypatch):
    room = Here()
    monkeypatch.setattr(turns.House, "room", lambda self, contender: room)
    return room


# ------------------------------------------------------------------------------------------------------ the same work


def small_net(data, size=20):
    """A belief net as ``contenders.posteriors`` trains it, untrained and small."""
    draws = np.random.default_rng(0)
    np.savez(
        data,
        images=draws.integers(0, 2, (60, 8)).astype(np.float32),
        encoder=draws.standard_normal((8, size), np.float32),
        decoder=draws.standard_normal((size, 8), np.float32),
        prior=np.zeros(size, np.float32),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_contenders_of_a_row_do_the_same_work(row, tmp_path, monkeypatch):
    """scorefn's, the loops by hand, and Pyro's losses, which are at home here as well."""
    monkeypatch.setattr(pairs, "ANSWERS", 10)
    monkeypatch.setattr(pairs, "WARM_UP", 2)
    data = {}
    if row.prepare is not None:
        data = {"data": str(tmp_path / "data.npz")}
        {"belief_net_data": small_net, "mixture_data": posteriors.mixture_data}[row.prepare.split(":")[1]](data["data"])
    worker, answers = Worker(), {}
    for contender in row.contenders:
        if contender.role in AT_HOME or contender.room == "pyro":
            options = {**contender.options, **data}
            worker.obey({"do": "make", "name": contender.name, "work": contender.work, "options": options, "seed": 0})
            answers[contender.name] = worker.obey({"do": "answer", "name": contender.name, "seed": 0})["answer"]
    turns.check(row.name, answers)
    by_hand = [c.name for c in row.contenders if c.role in ("scorefn", "by hand")]
    if len(by_hand) > 1 and row.name != "cartpole-threshold":
        assert sum(answers[name] is not None for name in by_hand) > 1


def test_who_computes_something_else_is_named():
    answers = {"ours": {"mean": [1.0, 2.0], "error": [0.0, 0.0]}, "silent": None}
    turns.check("row", {**answers, "theirs": {"mean": [1.0, 2.0005], "error": [0.0, 0.0]}})
    with pytest.raises(turns.Disagreement, match=r"row: theirs computes \(1, 2.1\) where ours computes \(1, 2\)"):
        turns.check("row", {**answers, "theirs": {"mean": [1.0, 2.1], "error": [0.0, 0.0]}})
    turns.check("row", {**answers, "theirs": {"mean": [1.0, 2.1], "error": [0.0, 0.03]}})


def test_answers():
    one, draws = exactly([1.0, 2.0]), iter(range(100))
    assert (one.mean, one.error) == ([1.0, 2.0], [0.0, 0.0])
    found = on_average(lambda: [float(next(draws))], 100)
    assert found.mean == [49.5]
    assert found.error == [pytest.approx(np.arange(100).std(ddof=1) / 10)]
    assert not agree({"mean": [1.0], "error": [0.0]}, {"mean": [1.0, 1.0], "error": [0.0, 0.0]})


# ----------------------------------------------------------------------------------------------------------- measures


def test_ratios_and_figures_of_known_turns():
    own = [{"cpu": 2.0, "work": 2.0}, {"cpu": 1.0, "work": 1.0}, {"cpu": 4.0, "work": 1.0}]
    other = [{"cpu": 3.0, "work": 1.0}, {"cpu": 2.0, "work": 1.0}, {"cpu": 4.0, "work": 1.0}]
    assert measures.figures(measures.TIME, own)["value"] == 1000.0
    assert measures.ratios(measures.TIME, own, other)["value"] == 2.0  # of 3, 2 and 1
    assert measures.ratios(measures.RATE, own, other)["value"] == 2.0
    same = measures.ratios(measures.TIME, own, own)
    assert (same["value"], same["low"], same["high"]) == (1.0, 1.0, 1.0)
    priced = [{"cpu": 2.0, "work": 1.0, "value": v} for v in (1.0, 2.0, 6.0)]
    assert measures.figures(measures.PRICE, priced)["value"] == 6.0  # mean 3, median 2


def test_a_median_that_did_not_arrive_is_not_known():
    own = [{"cpu": 1.0, "work": 100.0, "value": 1.0}] * 3
    some = [{"cpu": 1.0, "work": 300.0, "value": 1.0}] * 3 + [{"cpu": 1.0, "work": 9.0, "value": None}] * 2
    never = [{"cpu": 1.0, "work": 9.0, "value": None}] * 3
    assert measures.ratios(measures.EVALUATIONS, own, own)["value"] == 1.0
    assert measures.figures(measures.EVALUATIONS, some)["value"] == 300.0
    assert measures.figures(measures.EVALUATIONS, some)["high"] is None
    assert measures.figures(measures.EVALUATIONS, never)["value"] is None
    assert measures.ratios(measures.EVALUATIONS, own, never)["value"] is None
    assert measures.ratios(measures.EVALUATIONS, never, never)["value"] is None
    assert measures.successes(some)["arrived"] == 3


@pytest.mark.parametrize(
    ("arrived", "low", "high"),
    [(0, 0.0, 1 - 0.025**0.2), (5, 0.025**0.2, 1.0), (3, 0.1466, 0.9473)],
)
def test_the_binomial_interval_is_exact(arrived, low, high):
    assert measures.binomial_interval(arrived, 5) == pytest.approx((low, high), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_room_of_another_process():
    with Room(Path(sys.executable)) as room:
        assert room.ask("versions", packages=["numpy", "no-such-package"])["versions"].keys() == {"python", "numpy"}
        with pytest.raises(RoomError, match="ModuleNotFoundError: No module named 'no_such_module'"):
            room.ask("make", name="a", work="no_such_module:f", options={}, seed=0)


def test_a_process_that_ends_is_reported_with_its_last_words(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such environment >&2\nexit 3\n")
    python.chmod(0o755)
    with Room(python) as room, pytest.raises(RoomError, match="its process ended with 3: no such environment"):
        room.ask("versions", packages=[])


def test_what_goes_wrong_in_a_worker_is_an_answer():
    orders, answers = io.StringIO('{"do": "run", "name": "nobody", "turn": 0, "calls": 1}\n'), io.StringIO()
    serve(orders, answers)
    assert json.loads(answers.getvalue())["trouble"] == "KeyError: 'nobody'"


# ---------------------------------------------------------------------------------------------------- record and pages


@pytest.mark.parametrize("name", ["index", *SUITES])
def test_the_pages_are_those_of_the_record(name):
    records = {suite: record.read(DOCS / f"{suite}.json") for suite in SUITES}
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == pages(records)[f"{name}.md"]
    assert name == "index" or (DOCS / f"{name}.png").stat().st_size > 10_000


def test_everything_is_recorded():
    for name, suite in SUITES.items():
        rows = record.read(DOCS / f"{name}.json")["rows"]
        assert list(rows) == [row.name for row in suite.rows]
        for row in suite.rows:
            there = [contender["name"] for contender in rows[row.name]["contenders"]]
            assert there == [c.name for c in row.contenders if c.name not in rows[row.name]["missing"]]


def tiny(name="tiny"):
    def one(name, how, role):
        options = {"num_samples": 4, "size": 3, "how": how}
        return Contender(name, "applications.benchmarks.contenders.bits:expectation", options, role)

    contenders = (one("ours", "scorefn", "scorefn"), one("theirs", "loop", "by hand"), one("peer", "tensors", "peer"))
    return Row(name, "Tiny", "Nothing much.", contenders, (measures.TIME,), turns=3, shortest=0.0)


@pytest.fixture
def run(at_home, monkeypatch, tmp_path):
    """The program with one tiny row, in this process."""
    monkeypatch.setattr(program, "SUITES", {"core": Suite("core", "Core", "All.", (tiny(),))})
    monkeypatch.setattr(program, "plot", lambda record, path: None)
    where = ["--recorded", str(tmp_path / "docs"), "--out", str(tmp_path / "out")]
    return lambda *arguments: program.main([*arguments, *where])


def doctored(folder, factor):
    path = folder / "docs" / "core.json"
    whole = json.loads(path.read_text())
    for contender in whole["rows"]["tiny"]["contenders"]:
        for ratio in contender["ratios"].values():
            ratio.update({key: factor * value for key, value in ratio.items()})
    path.write_text(json.dumps(whole))


def test_a_ratio_made_worse_is_reported(run, tmp_path, capsys):
    assert run("--peers", "--record", "--note", "busy") == 0
    assert "tiny: CPU ms against theirs: " in capsys.readouterr().out
    texts = {path.name: path.read_text() for path in (tmp_path / "docs").glob("*.md")}
    assert texts == pages({"core": record.read(tmp_path / "docs" / "core.json")})
    assert "(busy), one torch thread" in texts["core.md"].replace("\n", " ")
    doctored(tmp_path, 1e3)
    assert run("--peers", "--repeats", "2") == 1
    said = capsys.readouterr()
    assert "slower than recorded, measured again: tiny" in said.out
    assert said.err.count("slower than recorded: tiny: CPU ms against ") == 2
    doctored(tmp_path, 1e-6)
    assert run() == 0  # without peers
    said = capsys.readouterr()
    assert said.out.count(": faster") == 1
    assert not said.err


def test_the_picture(tmp_path):
    ratio = {"value": 2.0, "low": None, "high": 3.0}
    contenders = [{"name": "peer", "role": "peer", "ratios": {"cpu": ratio}}]
    row = {"title": "Row", "measures": [{"key": "cpu"}], "contenders": contenders}
    plot({"rows": {"row": row}}, tmp_path / "core.png")
    assert (tmp_path / "core.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_kept_where_they_were_measured_alike(run, monkeypatch, tmp_path, capsys):
    assert run("--quick") == 0
    saved = json.loads((tmp_path / "out" / "core" / "tiny.json").read_text())
    assert {name: len(samples) for name, samples in saved["samples"].items()} == {"ours": 3, "theirs": 3}
    assert run("--quick", "--resume") == 0
    assert "tiny: kept from" in capsys.readouterr().out
    assert run("--quick", "--resume", "--repeats", "2") == 0
    assert "tiny: kept from" not in capsys.readouterr().out
    monkeypatch.setattr(program, "version", lambda package: "another one")
    assert run("--quick", "--resume", "--repeats", "2") == 0
    assert "tiny: kept from" not in capsys.readouterr().out


def test_a_row_that_was_slower_for_a_moment_is_no_failure(run, monkeypatch, capsys):
    """The first comparison says slower; the row is measured again, and the second one decides."""
    assert run("--peers", "--record") == 0
    slower = record.Verdict("tiny", "theirs", "CPU ms", 1.0, 2.0, "slower")
    verdicts = iter([[slower], [slower._replace(word="as recorded")]])
    monkeypatch.setattr(program, "compare", lambda new, old: next(verdicts))
    capsys.readouterr()
    assert run("--peers", "--repeats", "2") == 0
    said = capsys.readouterr()
    assert "slower than recorded, measured again: tiny" in said.out
    assert not said.err


def test_an_interrupted_run_writes_no_row(run, monkeypatch, tmp_path):
    calls = iter([False, False, True])
    monkeypatch.setattr(program.Interruption, "__call__", lambda self: next(calls, True))
    assert run("--peers", "--record") == 130
    assert not (tmp_path / "docs").exists()


def test_a_peer_that_cannot_work_is_left_out_and_scorefn_is_not(run, at_home, monkeypatch, tmp_path, capsys):
    ask = at_home.ask

    def failing(who):
        def asked(do, **order):
            if do == "make" and order["name"] == who:
                raise RoomError("not installed: no network")
            return ask(do, **order)

        return asked

    at_home.ask = failing("peer")
    assert run("--peers", "--record") == 0
    assert "peer is left out: not installed: no network" in (tmp_path / "docs" / "core.md").read_text()
    at_home.ask = failing("theirs")
    assert run("--peers") == 1
    assert "tiny: not installed: no network" in capsys.readouterr().err


def test_verdicts_need_a_gap_between_the_intervals():
    def rows(value, low, high):
        ratio = {"value": value, "low": low, "high": high}
        contenders = [{"name": "peer", "role": "peer", "ratios": {"cpu": ratio}}]
        return {"row": {"measures": [{"key": "cpu", "title": "CPU ms"}], "contenders": contenders}}

    def word(new, old):
        return [verdict.word for verdict in record.compare(new, old)]

    then = rows(2.0, 1.9, 2.1)
    assert word(rows(1.5, 1.4, 1.7), then) == ["slower"]
    assert word(rows(1.5, 1.4, 1.72), then) == ["as recorded"]
    assert word(rows(2.5, 2.4, 2.6), then) == ["faster"]
    assert word(rows(2.5, 2.3, 2.6), then) == ["as recorded"]
    assert word(rows(1.0, 0.9, None), then) == ["as recorded"]
    assert word(rows(None, None, None), then) == []
    assert word(rows(1.0, 0.9, 1.1), {}) == ["not recorded"]
    assert word(rows(1.0, 0.9, 1.1), rows(None, None, None)) == ["not recorded"]


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "nlp"], "argument --suite: invalid choice: 'nlp'"),
        (["--only", "scan-128x8,scan-9x9"], "argument --only: there is no row 'scan-9x9': choose among expectation"),
        (["--only", "scan-128x8", "--suite", "rl"], "--only scan-128x8: the suite rl has no such row"),
        (["--repeats", "1"], "argument --repeats: it is 1, but must be 2 or more"),
        (["--record"], "--record needs --peers: the pages compare with them"),
        (["--record", "--peers", "--quick"], "--record and --quick exclude each other"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, said, capsys):
    with pytest.raises(SystemExit) as refused:
        program.main(arguments)
    assert refused.value.code == 2
    assert said in capsys.readouterr().err


def test_rows_have_names_of_their_own_and_factories_that_exist():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.contenders[0].role == "scorefn"
        assert len({contender.name for contender in row.contenders}) == len(row.contenders)
        for contender in row.contenders:
            module, factory = contender.work.split(":")
            source = Path(*module.split(".")).with_suffix(".py")
            assert f"\ndef {factory}(" in (Path(__file__).parents[1] / source).read_text(encoding="utf-8")
