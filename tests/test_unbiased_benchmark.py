"""The program that holds the tests of unbiasedness to their word: its pieces, against exact answers."""

import json

import pytest
import torch

from applications.benchmarks import false_alarms, unbiased
from scorefn.diagnostics import FixedSample, Hotelling, Sequential


def test_the_simulated_laws_have_no_bias():
    torch.manual_seed(0)
    law = false_alarms.leave_one_out_law()
    rows, first, second = law.rows(20_000), torch.sigmoid(torch.tensor(0.5)), torch.sigmoid(torch.tensor(-0.7))
    # E f = E (a + b - .6)^2, in closed form
    slopes = [q * (1 - q) * (1 - 1.2 + 2 * other) for q, other in ((first, second), (second, first))]
    assert law.mean.tolist() == pytest.approx([float(slope) for slope in slopes], rel=1e-6)
    assert len(rows.unique(dim=0)) <= 16
    assert ((rows.mean(0) - law.mean).abs() < 5 * rows.std(0) / 20_000**0.5).all()
    for case in unbiased.calibration_cases():
        assert case.law.rows(5).shape == (5, len(case.law.mean))


@pytest.mark.parametrize("test", [FixedSample(), Hotelling(600, 60), Sequential(600, 300, 600)])
def test_alarms_are_counted(test):
    """A bias that is far from any doubt, none at all, and rows that are too skewed to be judged."""
    ones = torch.ones(1, dtype=torch.float64)

    def counted(rows):
        return false_alarms.false_alarms(false_alarms.Case(false_alarms.Law("", rows, ones), test, 600), 4, 0.01)

    noise = torch.linspace(-1, 1, 600, dtype=torch.float64).unsqueeze(1)[torch.arange(600) * 7 % 600]
    skewed = torch.zeros(600, 1, dtype=torch.float64).index_fill_(0, torch.tensor([3]), 600.0)
    found = [counted(lambda count, rows=rows: rows) for rows in (2 + noise, 1 + noise, skewed)]
    assert [(one["alarms"], one["guarded"]) for one in found] == [(4, 0), (0, 0), (0, 4)]
    assert [one["within"] for one in found] == [False, True, True]


def test_the_binomial_interval():
    low, high = false_alarms.binomial_interval(10, 0.5, 0.05)
    assert (low, high) == (2, 8)
    assert false_alarms.binomial_interval(10_000, 0.01) == (75, 126)


def test_a_spoiled_estimator_is_one_percent_too_long_in_one_coordinate():
    toy = next(t for t in unbiased.toys() if t.name == "C, p = 0.3")
    p = toy.build(toy.params)
    wrong = toy.nudged(0.01)(p)
    x = p.sample((3,))
    right, off = (torch.autograd.grad(q.log_prob(x).sum(), toy.params)[0] for q in (p, wrong))
    assert torch.equal(p.log_prob(x), wrong.log_prob(x))
    assert float(off[0]) == pytest.approx(1.01 * float(right[0]), rel=1e-12)
    assert torch.equal(off[1:], right[1:])


@pytest.mark.parametrize("index", range(4))
def test_what_can_be_enumerated_is_found_exactly(index):
    toy = next(t for t in unbiased.toys() if t.name == "B, eta = 0")
    row = unbiased.detection(toy, toy.estimators[(0, 2, 3, 4)[index]], 4000)
    assert (row["right"]["verdict"], row["wrong"]["verdict"]) == ("unbiased", "biased")
    assert row["wrong"]["method"] == "exact"
    assert row["wrong"]["largest_bias"] == pytest.approx(0.01, rel=1e-9)


def test_the_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(unbiased, "calibration_cases", lambda cases=unbiased.calibration_cases: cases()[:2])
    assert unbiased.main(["--parts", "calibration", "--runs", "20", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert [row["runs"] for row in record["calibration"]] == [20, 20]
    assert "`Hotelling`" in (tmp_path / "tables.md").read_text()
    assert "2 of 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        unbiased.main(["--runs", "0"])
