"""The section of large dimensions: exact problems, exact counts, and a verdict that follows from its runs."""

import json

import numpy as np
import pytest

from applications.bbo import large_search, problems, search_figures
from applications.bbo.problems import Counted

OBJECTIVES = (*large_search.PROBLEMS, problems.rosenbrock)


@pytest.mark.parametrize("make", OBJECTIVES, ids=lambda make: make.__name__)
def test_an_objective_is_zero_at_its_optimum_and_positive_elsewhere(make):
    center = problems.optimum(4, 3)
    values = make(4, 3)(np.stack([center, center + 0.1]))
    assert abs(values[0]) < 1e-25
    assert values[1] > 1e-3


def hessian(make, dimension):
    """Of a quadratic function, by polarisation."""
    f, center, axes = make(dimension, 5), problems.optimum(dimension, 5), np.eye(dimension)
    square = [[f((center + a + b)[None])[0] for a in axes] for b in axes]
    alone = f(center + axes)
    return (np.array(square) - alone[:, None] - alone) / 2


@pytest.mark.parametrize(
    ("make", "curvatures"),
    [
        (problems.sphere, [1, 1, 1, 1]),
        (problems.separable_ellipsoid, [1, 1e2, 1e4, 1e6]),
        (problems.ellipsoid, [1, 1e2, 1e4, 1e6]),
        (problems.cigar, [1, 1e6, 1e6, 1e6]),
        (problems.discus, [1, 1, 1, 1e6]),
        (problems.plane_discus, [1, 1, 1, 1e6]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_curvatures_are_those_of_the_formula(make, curvatures):
    found = hessian(make, 4)
    assert np.linalg.eigvalsh(found) == pytest.approx(curvatures, rel=1e-8)
    crossed = np.abs(found - np.diag(np.diag(found))).max() > 1
    assert crossed == (make not in (problems.sphere, problems.separable_ellipsoid))


def test_a_diagonal_and_one_direction_are_the_covariance_of_cigar_and_plane_discus_alone():
    for make in (problems.cigar, problems.plane_discus, problems.discus):
        covariance = np.linalg.inv(hessian(make, 4))
        # d (I + v v^T) d: off the diagonal all is of rank one, so that each triple has a positive product
        signs = {
            np.sign(np.round(covariance[i, j] * covariance[j, k] * covariance[i, k], 12))
            for i, j, k in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3))
        }
        assert signs == {{problems.cigar: 1.0, problems.plane_discus: 0.0, problems.discus: -1.0}[make]}


def test_the_rosenbrock_valleys_follow_their_formula():
    center, turn = problems.optimum(3, 1), problems.rotation(3, 1)
    y = np.array([[0.5, -1.0, 2.0], [1.0, 2.0, 3.0]])
    values = [100 * ((0.25 + 1) ** 2 + (1 - 2) ** 2) + 0.25 + 4, 100 * ((1 - 2) ** 2 + (4 - 3) ** 2) + 0 + 1]
    assert problems.parallel_rosenbrock(3, 1)(y - 1 + center) == pytest.approx(values, rel=1e-12)
    assert problems.rosenbrock(3, 1)((y - 1) @ turn.T + center) == pytest.approx(values, rel=1e-12)
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-14)


def test_counted_evaluations_are_those_of_each_point():
    f = Counted(lambda x: x[:, 0], 0.5, [2, 3, 6, 7, 20])
    for batch in ([5.0, 4.0, 6.0], [3.0, 0.25, 0.5], [1.0, 0.125]):
        f(np.array(batch)[:, None])
    assert (f.evaluations, f.reached, f.best) == (8, 5, 0.125)
    assert f.within() == [4.0, 4.0, 0.25, 0.25, 0.125]
    assert Counted(lambda x: x[:, 0], 0.5).reached is None


def run(reached, *within):
    return {"reached": reached, "within": list(within), "evaluations": 1, "cpu_seconds": 1.0}


def test_the_verdict_on_auto_follows_from_the_runs(capsys):
    rows = [
        {
            "problem": "sphere",
            "dimension": 100,
            "separable": [run(3000, 1.0, 1e-3, 1e-9, 1e-9, 1e-9)],
            "rank_one": [run(3000, 1.0, 1e-3, 1e-9, 1e-9, 1e-9)],
            "csanes": [run(6000, 10.0, 1e-1, 1e-8, 1e-8, 1e-8)],
            "pycma full": [run(1, 0.0, 0.0, 0.0, 0.0, 0.0)],  # not ours: no choice
        },
        {
            "problem": "cigar",
            "dimension": 100,
            "separable": [run(None, 1e3, 1e3, 1e3, 1e3, 1e3), run(7000, 1.0, 1.0, 1.0, 1.0, 1.0), run(1, *[10.0] * 5)],
            "rank_one": [run(7000, 1.0, 1.0, 1.0, 1e-8, 1e-8)],
            "csanes": [run(None, 1.0, 1.0, 1.0, 1.0, 1.0)],
        },
        {"problem": "sphere", "dimension": 1000} | {name: [run(9, *[1.0] * 5)] for name in ("separable", "rank_one")},
    ]
    table = large_search.automatic(rows)
    assert [(entry["dimension"], entry["budget"], entry["chosen"]) for entry in table] == [
        (100, 10, "separable"),
        (100, 30, "separable"),
        (100, 100, "separable"),
        (100, 300, "rank_one"),
        (100, 1000, "csanes"),
        (1000, 10, "rank_one"),
        (1000, 30, "rank_one"),
        (1000, 100, "rank_one"),
        (1000, 300, "rank_one"),
    ]
    by_budget = [entry["decades"] for entry in table]
    assert by_budget[1]["sphere"] == pytest.approx({"separable": 0, "rank_one": 0, "csanes": 2}, abs=1e-12)
    assert by_budget[3]["sphere"] == {"separable": 0, "rank_one": 0, "csanes": 0}  # below the target nothing is better
    assert by_budget[3]["cigar"] == pytest.approx({"separable": 9, "rank_one": 0, "csanes": 8}, abs=1e-12)
    assert table[1]["mean"] == pytest.approx({"separable": 0.5, "rank_one": 0, "csanes": 1}, abs=1e-12)
    assert table[-1]["mean"] == {"separable": 0, "rank_one": 0}
    assert "| 100 | 300 | rank_one | 4.50 | 0.00 | 4.00 |" in capsys.readouterr().out


def test_the_section_writes_its_result_and_plot(tmp_path, monkeypatch):
    pytest.importorskip("cma")
    monkeypatch.setattr(large_search, "SEEDS", {10: 1, 11: 2})
    monkeypatch.setattr(large_search, "PROBLEMS", (problems.sphere, problems.cigar, problems.ellipsoid))
    monkeypatch.setattr(large_search, "AFFORDABLE", {"pycma full": 10, "ellipsoid": 10})
    monkeypatch.setattr(large_search, "LIMIT", 170)
    monkeypatch.setattr(large_search, "SHORT", 3000)
    assert search_figures.main(["--sections", "large", "--rounds", "2", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "large" / "result.json").read_text(encoding="utf-8"))
    assert [(row["problem"], row["dimension"]) for row in record["rows"]] == [
        ("sphere", 10),
        ("cigar", 10),
        ("ellipsoid", 10),
        ("sphere", 11),
        ("cigar", 11),
    ]
    solvers = {*large_search.OWN, *large_search.PEERS}
    for row in record["rows"]:
        ran = set(row) - {"problem", "dimension"}
        if row["dimension"] == 10:
            assert ran == solvers
        else:  # without what is not affordable, and peers that failed
            failed = {"cigar": set(large_search.PEERS), "sphere": set()}[row["problem"]]
            assert ran == solvers - {"pycma full"} - failed
        for name in ran:
            assert len(row[name]) == large_search.SEEDS[row["dimension"]]
            for one in row[name]:
                assert one["reached"] is not None or min(one["within"]) > 1e-8
                assert sorted(one["within"], reverse=True) == one["within"]
                assert one["reached"] is None or 20 < one["reached"] <= one["evaluations"]
    assert all(one["reached"] is not None for name in solvers - {"snes"} for one in record["rows"][0][name])
    assert [set(row["milliseconds"]) for row in record["times"]] == [solvers, solvers - {"pycma full"}]
    budgets = {
        dimension: [entry["budget"] for entry in record["auto"] if entry["dimension"] == dimension]
        for dimension in (10, 11)
    }
    assert budgets == {10: [10, 30, 100, 300], 11: [10, 30, 100]}
    assert "<svg" in (tmp_path / "large_search.svg").read_text(encoding="utf-8")
