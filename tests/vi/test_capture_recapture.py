"""Capture-recapture: how many there are, by enumeration, and the program; the rest is in test_reducers_table.py."""

import json
from itertools import product

import pytest
import torch

from applications.vi import capture_recapture as recapture


def test_the_number_under_the_guide_is_that_of_independent_coins():
    net = recapture.CaptureRecapture(recapture.Histories(torch.ones(1, 3), 4))
    with torch.no_grad():
        net.parameters.logits.copy_(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    p = net.parameters.logits.detach().double().sigmoid()
    expected = torch.zeros(5, dtype=torch.float64)
    for bits in product((0, 1), repeat=4):
        expected[sum(bits)] += (
            torch.tensor([q if bit else 1 - q for q, bit in zip(p, bits, strict=True)]).double().prod()
        )
    torch.testing.assert_close(net.number(), expected, rtol=0, atol=1e-7)
    assert net.expected_number() == pytest.approx(1 + (net.number() * torch.arange(5)).sum().item(), abs=1e-6)


def test_the_exact_number_has_the_exact_mean():
    found = recapture.exact(recapture.load())
    assert sum(found.number) == pytest.approx(1, abs=1e-12)
    assert 87 + sum(n * p for n, p in enumerate(found.number)) == pytest.approx(found.expected_number, abs=1e-9)


def test_another_way_is_refused():
    with pytest.raises(ValueError, match="way must be 'ScoreFunctionELBO'.*, but it is 'newton'"):
        recapture.fit(way="newton")


def test_the_program_compares_and_writes(tmp_path, capsys):
    assert recapture.main(["--steps", "20", "--compare", "3", "--out", str(tmp_path / "new")]) == 0
    told = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    assert told["complete"] is True
    assert [curve[-1]["step"] for curve in told["curves"].values()] == [20, 3, 3]
    assert told["exact"]["log_evidence"] > told["exact"]["optimum"] > told["curves"][recapture.OURS][-1]["bound"]
    assert (tmp_path / "new" / "capture_recapture.png").stat().st_size > 10_000
    assert "k-hat" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "least"), [("--steps", 1), ("--particles", 2), ("--compare", 0), ("--seed", 0)])
def test_the_program_refuses_before_it_works(option, least, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recapture.main([option, str(least - 1), "--out", str(tmp_path / "none")])
    assert f"it is {least - 1}, but must be {least} or more" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
