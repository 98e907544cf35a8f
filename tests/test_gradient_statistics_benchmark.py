"""The benchmark of gradient statistics: what it compares is the same, whatever it costs."""

from __future__ import annotations

import json

import pytest
import torch

from applications.benchmarks import gradient_statistics as benchmark


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_problem_is_made_in_sweeps_with_the_exact_variance():
    """Five standard errors of a sample variance, by its own fourth moment."""
    torch.manual_seed(0)
    for problem in benchmark.problems():
        problem.sweeps(100)  # raises where it is looped
        if problem.exact is not None:
            found = benchmark.sf.diagnostics.gradient_statistics(
                (problem.p, problem.f, problem.estimator), problem.parameters, 20_000
            )
            error = float(found.squared_deviations.std()) / 20_000**0.5
            assert abs(found.total_variance - problem.exact) < 5 * error


def test_all_ways_to_the_variances_agree():
    policy = benchmark.Policy(40, torch.float64)
    exact = policy.by_loop()
    assert benchmark.difference(policy.by_meter(), exact) < 1e-12
    assert benchmark.difference(policy.by_vmap(), exact) < 1e-12
    assert benchmark.difference(policy.by_loop(40), exact) == 0.0
    assert benchmark.difference(policy.by_loop(4), exact) > 0.05  # micro-batches only estimate them
    assert benchmark.exactness(20) < 1e-12


def test_the_program(tmp_path, monkeypatch, capsys):
    some = benchmark.problems()[:2]
    monkeypatch.setattr(benchmark, "problems", lambda: some)
    options = ["--repeats", "100", "--rounds", "1", "--steps", "2", "--draws", "32", "--out", str(tmp_path)]
    assert benchmark.main(options) == 0
    printed = capsys.readouterr().out
    for word in ("a coin, DisARM", "`GradientMeter`", "overhead", "0.0609"):
        assert word in printed
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["complete"]
    assert [row["problem"] for row in record["repeats"]] == [problem.name for problem in some]
    assert len(record["training"]) == 4
    assert (tmp_path / "gradient_statistics.png").stat().st_size > 1000


@pytest.mark.parametrize("option", [["--repeats", "9"], ["--rounds", "0"], ["--draws", "x"]])
def test_bad_arguments_are_named(option, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(option)
    assert option[0] in capsys.readouterr().err
