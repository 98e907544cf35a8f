"""The table of the scan: every candidate computes the same, and the page says where its numbers come from."""

import re

import pytest
import torch

from applications.benchmarks import scan


@pytest.mark.parametrize("shape", [(40, 3), (1, 2), (20, 300)])
def test_all_candidates_compute_the_same(shape):
    scans = scan.candidates(*shape, peers=False)
    assert len(scans) >= 4
    scan.check(scans)


def test_a_candidate_that_computes_something_else_is_named():
    scans = scan.candidates(40, 3, peers=False)
    scans["wrong"] = lambda: torch.zeros(40, 3)
    with pytest.raises(AssertionError, match="wrong computes something else"):
        scan.check(scans)


def test_the_page(monkeypatch, tmp_path, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(scan, "SHAPES", ((128, 8), (5, 2)))
    monkeypatch.setattr(scan.table, "__defaults__", (scan.SHAPES,))
    try:
        scan.main(["--repeats", "2", "--out", str(tmp_path / "scan.md"), "--date", "2026-11-21"])
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "scan.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "Measured 2026-11-21" in text
    assert re.search(r"\| 128 x 8 \|.*\| 0\.11 \|", text)
    assert re.search(r"\| 5 x 2 \|.*\|  \|", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
