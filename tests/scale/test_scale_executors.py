"""The program that measures evaluations over workers: its figures add up."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from applications.benchmarks import scale_executors as program
from scorefn.search import minimize


def test_figures_on_threads(monkeypatch):
    monkeypatch.setattr(program, "SLEEP", 0.005)
    with ThreadPoolExecutor(2) as executor:
        assert 0 < program.overhead(executor, 3, 20) < 0.1
        assert 0.2 < program.efficiency(executor, 2, 16) < 1.2
        assert program.identical(executor, "bounds", 60)


def test_a_single_bit_is_seen():
    one, same = (minimize(program.sphere, np.zeros(2), 0.5, seed=1, maxfevals=40) for _ in range(2))
    assert program.equal(one, same)
    same.x[0] = np.nextafter(same.x[0], np.inf)
    assert not program.equal(one, same)


def test_the_table_and_bad_arguments(capsys):
    found = {"overhead": 2e-5, "efficiency": 0.95, "identical": dict.fromkeys(program.METHODS, True)}
    assert program.table({"pool": found}).splitlines()[-1] == "| pool | 0.020 ms | 0.950 | 7 of 7 |"
    with pytest.raises(SystemExit):
        program.main(["--popsize", "1"])
    assert "--popsize: it is 1, but must be 4 or more" in capsys.readouterr().err
