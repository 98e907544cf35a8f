"""The BBOB program: what it counts is exact, an interrupted run goes on to the same result, bad arguments are named."""

import json
import math

import numpy as np
import pytest

import scorefn as sf
from applications.arguments import span
from applications.bbo import bbob, bbob_suite, problems, search_figures
from applications.bbo.bbob_suite import TARGETS, Watched


def written(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def untimed(value):
    """Without CPU seconds and arguments, which differ from run to run."""
    if isinstance(value, dict):
        return {key: untimed(entry) for key, entry in value.items() if key not in ("cpu_seconds", "arguments")}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


# -------------------------------------------------------------------------------------------------- without COCO itself


def test_the_targets_are_those_of_coco():
    assert len(TARGETS) == 51
    assert TARGETS[0] == 100.0
    assert TARGETS[-1] == 1e-8
    assert np.allclose(np.diff(np.log10(TARGETS)), -0.2)


def test_a_target_is_reached_at_the_first_value_that_is_as_low():
    values = iter([1000.0, 103.0, 102.0, 110.0, 5.0, 3.0, 3.0 + 1e-8, 3.0])
    box = Watched(lambda x: next(values), optimum=3.0, budget=8)
    for _ in range(8):
        box(np.zeros(2))
    record = box.record()
    reached = record["reached"]
    assert (record["evaluations"], record["gap"], len(reached)) == (8, 0.0, 51)
    assert reached[0] == 2  # 103 is 100 above
    assert reached[1] == 5
    assert reached[8] == 5  # 10^0.4 = 2.51 is not below 2
    assert reached[9] == 6
    assert reached[-1] == 6


def test_there_is_no_evaluation_beyond_the_budget():
    calls = []
    box = Watched(lambda x: calls.append(x) or float(x[0]), optimum=0.0, budget=1)
    box([200.0])
    with pytest.raises(bbob_suite.Spent):
        box([0.0])
    assert calls == [[200.0]]
    record = box.record()
    assert (record["evaluations"], record["gap"], record["reached"]) == (1, 200.0, [None] * 51)


@pytest.mark.parametrize("solver", bbob.SOLVERS)
@pytest.mark.parametrize("restarts", [True, False])
def test_no_solver_spends_more_than_the_budget(solver, restarts):
    pytest.importorskip("cma")
    box = Watched(lambda x: float(np.sum(np.asarray(x) ** 2)), optimum=-1.0, budget=203)
    stop = bbob.SOLVERS[solver](box, lambda: np.ones(2), 203, 1, restarts)
    assert 180 < box.evaluations <= 203
    assert "maxfevals" in stop


def test_a_folder_that_cannot_be_is_an_argument_to_be_mended(tmp_path, capsys):
    pytest.importorskip("cocoex")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        bbob.main(["--out", str(tmp_path / "file" / "folder"), "--no-peers"])
    assert "cannot be written into (Not a directory): choose another folder" in capsys.readouterr().err


def entry(function, instance, reached, evaluations):
    return {
        "function": function,
        "instance": instance,
        "reached": [*reached, *[None] * (51 - len(reached))],
        "evaluations": evaluations,
        "cpu_seconds": 0.5,
    }


def test_the_summary_is_counted():
    records = [entry(1, 1, range(10, 61), 70), entry(1, 2, [4, 8], 100), entry(2, 1, [], 30)]
    found = bbob.summary(records)
    assert {key: found[key] for key in ("hits", "total", "evaluations", "cpu_seconds")} == {
        "hits": 1,
        "total": 3,
        "evaluations": 200,
        "cpu_seconds": 1.5,
    }
    assert (found["target_hits"], found["target_total"]) == (53, 153)
    assert found["per_function"]["1"]["ert"] == 60 + 100  # the success up to its target, the failure in full
    assert found["per_function"]["2"]["ert"] is None
    assert bbob.table({"scorefn": records}).splitlines()[2:4] == ["| f1 | 1/2 |", "| f2 | 0/1 |"]


def test_the_ecdf_rises_to_the_share_of_targets():
    evaluations, share = bbob.ecdf([entry(1, 1, [4, 8], 100), entry(1, 2, [2], 100)], 2)
    assert evaluations.tolist() == [1.0, 2.0, 4.0]
    assert np.allclose(share, [1 / 102, 2 / 102, 3 / 102])


@pytest.mark.parametrize(("text", "numbers"), [("3", [3]), ("1-3", [1, 2, 3]), ("8,1-2, 2", [1, 2, 8])])
def test_spans(text, numbers):
    assert span(1, 24)(text) == numbers


@pytest.mark.parametrize("text", ["0", "25", "1-25", "3-1", "a", "", "1,,2", "-3", "1-"])
def test_a_span_that_is_none_is_refused(text):
    with pytest.raises(Exception, match=r"1-24"):
        span(1, 24)(text)


@pytest.mark.parametrize(
    "arguments",
    [["--dimension", "7"], ["--functions", "0-3"], ["--instances", "x"], ["--budget", "99"], ["--seed", "-1"]],
)
def test_bad_arguments_are_refused_by_name(arguments, capsys):
    with pytest.raises(SystemExit):
        bbob.main(arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bbob.main([])
    message = capsys.readouterr().err
    assert "pip install coco-experiment cma" in message
    assert "--no-peers" in message
    assert "cma, the peer" not in bbob.missing(peers=False)


def test_the_cost_law_has_the_slope_of_its_points(tmp_path):
    rows = [
        {
            "problem": "sphere",
            "dimension": dimension,
            **{
                solver: {"evaluations": [dimension**2, None], "cpu_seconds": [float(dimension), 1e9]}
                for solver in ("scorefn", "pycma")
            },
        }
        for dimension in (2, 8, 16, 32)
    ]
    places, means = search_figures._means(rows, "scorefn", "evaluations")
    assert search_figures._slope(places, means) == pytest.approx(2.0, abs=1e-12)
    search_figures.plot_law(rows, tmp_path / "law.svg")
    assert "sphere, scorefn ~ D^2.00" in (tmp_path / "law.svg").read_text(encoding="utf-8")


def test_the_spread_of_a_covariance():
    mean, decades = search_figures._spread(np.diag([1.0, 1e4, 1e2]))
    assert mean == pytest.approx(math.log(10.0), abs=1e-12)
    assert decades == pytest.approx(2.0, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- with COCO


@pytest.fixture
def coco():
    pytest.importorskip("cocoex")
    pytest.importorskip("cma")


@pytest.mark.usefixtures("coco")
def test_the_optimum_is_the_lowest_value():
    suite = bbob.Suite(2, range(1, 25), [1, 2])
    draws = np.random.default_rng(0)
    for function in range(1, 25):
        problem = suite.problem(function, 2)
        lowest = min(problem(x) for x in draws.uniform(-5, 5, (200, 2)))
        assert suite.optimum(function, 2) < lowest
        problem.free()


@pytest.mark.usefixtures("coco")
def test_both_solvers_solve_the_sphere_from_the_same_start():
    suite, first = bbob.Suite(2, [1], [1]), []
    for solver in bbob.SOLVERS:
        record = bbob.attempt(solver, suite, 1, 1, budget=1000, seed=3)
        assert record["reached"][-1] is not None
        assert 0 <= record["gap"] <= 1e-8
        assert "ftarget" in record["stop"]
    for solver in ("scorefn", "pycma"):
        starts = []
        original = bbob.SOLVERS[solver]

        def noted(problem, start, *rest, original=original, starts=starts):
            def once():
                starts.append(start())
                return starts[-1]

            return original(problem, once, *rest)

        bbob.SOLVERS[solver] = noted
        try:
            bbob.attempt(solver, suite, 1, 1, budget=1000, seed=3)
        finally:
            bbob.SOLVERS[solver] = original
        first.append(starts[0].tolist())
    assert first[0] == first[1]


@pytest.mark.usefixtures("coco")
def test_the_program_writes_data_result_and_plot_and_goes_on_where_it_was(tmp_path, capsys):
    common = ["--dimension", "2", "--functions", "1,3", "--budget", "300", "--seed", "1"]
    assert bbob.main([*common, "--instances", "1-2", "--out", str(tmp_path / "whole")]) == 0
    whole = written(tmp_path / "whole")
    assert (whole["total"], whole["complete"]) == (4, True)
    assert {"hits", "total", "evaluations", "cpu_seconds", "per_function"} <= set(whole)
    assert set(whole["per_function"]) == {"1", "3"}
    assert whole["per_function"]["1"]["hits"] == 2
    assert whole["peers"]["pycma"]["total"] == 4
    assert (tmp_path / "whole" / "ecdf.png").stat().st_size > 1000
    for solver in ("scorefn", "pycma"):
        assert sorted(path.name for path in (tmp_path / "whole" / "coco" / solver).glob("*.info")) == [
            "bbobexp_f1.info",
            "bbobexp_f3.info",
        ]
    part = tmp_path / "part"
    assert bbob.main([*common, "--instances", "1", "--no-data", "--out", str(part)]) == 0
    assert not (part / "coco").exists()
    assert bbob.main([*common, "--instances", "1-2", "--no-data", "--out", str(part)]) == 0
    assert "4 of 8 runs are in" in capsys.readouterr().out

    def keyed(found):
        return {(r["solver"], r["function"], r["instance"]): untimed(r) for r in found["records"]}

    assert keyed(written(part)) == keyed(whole)
    assert untimed(written(part)["per_function"]) == untimed(whole["per_function"])


@pytest.mark.usefixtures("coco")
def test_ctrl_c_ends_after_a_problem_and_the_run_goes_on_later(tmp_path, monkeypatch):
    arguments = ["--dimension", "2", "--functions", "1", "--instances", "1-3", "--budget", "200", "--no-data"]
    arguments += ["--no-peers", "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr("applications.progress.Interruption.__call__", lambda self: True)
        assert bbob.main(arguments) == 130
    assert (written(tmp_path)["total"], written(tmp_path)["complete"]) == (1, False)
    assert bbob.main(arguments) == 0
    assert (written(tmp_path)["total"], written(tmp_path)["complete"]) == (3, True)
    assert written(tmp_path)["peers"] == {}


@pytest.mark.usefixtures("coco")
def test_a_folder_with_other_settings_is_refused_and_left_alone(tmp_path, capsys):
    arguments = ["--dimension", "2", "--functions", "1", "--instances", "1", "--no-data", "--no-peers"]
    arguments += ["--out", str(tmp_path)]
    bbob.main([*arguments, "--budget", "200"])
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(SystemExit):
        bbob.main([*arguments, "--budget", "300"])
    assert "budget 200 instead of 300" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_bytes() == before
    (tmp_path / "result.json").write_text("[]", encoding="utf-8")
    with pytest.raises(sf.ScorefnError, match="no result of this program"):
        bbob.before(tmp_path, {})
    assert (tmp_path / "result.json").read_text(encoding="utf-8") == "[]"


@pytest.mark.usefixtures("coco")
def test_the_figures_are_those_of_their_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_figures, "SHARES", {2: 0.5})
    monkeypatch.setattr(search_figures, "GOALS", {(1, 2): 200})
    monkeypatch.setattr(
        search_figures, "attempt", lambda solver, suite, f, i, **rest: entry(f, i, [4, 8], 100) | {"solver": solver}
    )
    assert search_figures.main(["--sections", "evaluations", "shares", "--seeds", "2", "--out", str(tmp_path)]) == 0
    (row,) = written(tmp_path / "evaluations")["rows"]
    assert row["scorefn"] == {"hits": 0, "total": 30, "evaluations": 3000, "cpu_seconds": 15.0, "ert": None}
    (row,) = written(tmp_path / "shares")["rows"]
    assert row["pycma"]["share"] == pytest.approx(2 / 51, abs=1e-12)
    assert "| 2 | 0.50 | 0.039 | 0.039 |" in capsys.readouterr().out


@pytest.mark.usefixtures("coco")
def test_both_solvers_reach_the_target_of_an_own_problem():
    for diagonal in (False, True):
        found = search_figures._runs(problems.separable_ellipsoid, 2, 2, lambda: False, diagonal=diagonal)
        for solver in bbob.SOLVERS:
            assert all(20 < count < 2000 for count in found[solver]["evaluations"])


@pytest.mark.usefixtures("coco")
def test_noise_is_walked_from_the_identity():
    for walk in (search_figures._noise_by_scorefn, search_figures._noise_by_pycma):
        assert np.allclose(walk(3, 0, 0), np.eye(3), atol=1e-3)  # pycma makes its axes differ a little
        assert np.linalg.eigvalsh(walk(3, 5, 0)).min() > 0
