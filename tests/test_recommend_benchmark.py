"""The benchmark of ``recommend``: its truths against closed forms, its score, its program."""

import json

import pytest
import torch

from applications.benchmarks import recommend as benchmark


@pytest.mark.parametrize(
    ("problem", "n", "name", "exact"),
    [
        (benchmark.shared(0.0), 2, "leave-one-out", 0.0072750),
        (benchmark.shared(0.0), 4, "leave-one-out", 0.0019875),
        (benchmark.shared(0.0), 2, "UnorderedSet", 0.0061125),
        (benchmark.shared(-4.0), 2, "leave-one-out", 3.81025e-4),
        (benchmark.many(0.5), 2, "leave-one-out", 200 * 1.25e-9),
        (benchmark.many(0.5), 2, "DisARM", 200 * 1.2438e-9),
    ],
)
def test_the_truth_is_the_exact_variance(problem, n, name, exact):
    """Within 5 standard errors of a variance from 3000 repeats."""
    p, f, parameters = problem.make()
    found = [c for c in benchmark.shortlist(p, f, n).candidates if c.name == name]
    work = benchmark.Estimation(p, f, found[0].estimator)
    gradients = benchmark.sample_gradients(work, parameters, 3000)
    deviations = (gradients - gradients.mean(0)).square().sum(1)
    assert abs(float(deviations.mean()) - exact) < 5 * float(deviations.std()) / 3000**0.5 + 1e-4 * exact


def test_ratios_are_to_the_least_price_and_noise_free_ones_are_alike():
    truth = benchmark.Truth(benchmark.coin(0.5), 4, 1000, 200, 200)
    assert truth.best("evaluations") == "Enumerate"  # DisARM has no noise either, at 4 evaluations instead of 2
    assert truth.ratio("Enumerate", "evaluations") == truth.ratio("DisARM", "evaluations") == 1.0
    assert truth.ratio("leave-one-out", "evaluations") == float("inf")


def test_a_pathwise_gradient_counts_only_where_it_is_right():
    assert "pathwise" not in benchmark.Truth(benchmark.jump(), 2, 200, 200, 200).variance
    assert "pathwise" in benchmark.Truth(benchmark.gamma(), 2, 200, 200, 200).variance


def test_the_score():
    cells = [
        benchmark.Cell("a", 2, "seconds", "x", "x", ratio, decided, 1.0, 10, 0.1)
        for ratio, decided in ((1.0, True), (1.05, False), (1.2, True), (1.3, False))
    ]
    assert benchmark.score(cells, "seconds") == {
        "cells": 4,
        "within_10_percent": 2,
        "decided": 2,
        "decided_within_10_percent": 1,
    }
    assert "| a | 2 | seconds | x | x | 1.200 | yes (1.00) | 10 | 0.1 |" in benchmark.table(cells)


def test_the_program(tmp_path, capsys):
    arguments = ["--budget", "2000", "--repeats", "1000", "--samples", "2", "--first", "1", "--out", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["complete"] is True
    assert [cell["winner"] for cell in record["cells"]] == ["Enumerate", "Enumerate"]
    assert record["scores"]["evaluations"]["within_10_percent"] == 1
    assert (tmp_path / "recommend.png").exists()
    assert "one coin, p = 0.5" in capsys.readouterr().out
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("option", "value"), [("--budget", "3"), ("--samples", "1"), ("--repeats", "x")])
def test_bad_arguments_are_refused_by_name(option, value, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([option, value])
    assert option in capsys.readouterr().err
