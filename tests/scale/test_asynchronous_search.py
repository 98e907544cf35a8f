"""An asynchronous search over workers."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import scorefn as sf
from scorefn.scale import Workers
from scorefn.search import CSANES, SNES, run_asynchronously
from tests.scale import functions

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on


@pytest.mark.parametrize("method", ["csanes", "snes", "pgpe", "rank_one"])
def test_an_asynchronous_search_finds_it_too(method, processes):
    kinds = {"csanes": CSANES, "snes": SNES, "pgpe": sf.search.PGPE, "rank_one": sf.search.RankOneCSANES}
    strategy = kinds[method](torch.zeros(3), 0.5, seed=0, ftarget=1e-3)
    result = run_asynchronously(strategy, functions.sphere, processes, maxfevals=20_000)
    assert result.best_fun <= 1e-3
    assert result.nfev == strategy.result.evaluations + 1
    assert len(result.workers) == result.nit


def test_an_asynchronous_search_never_waits_for_the_slowest_and_keeps_the_budget():
    calls, free = [], threading.Event()

    def fun(x):
        calls.append(x)
        if len(calls) == 3:
            free.wait(60)
        return functions.sphere(x)

    result = run_asynchronously(
        SNES([0.0, 0.0], 0.5, popsize=6, seed=0), fun, executor := ThreadPoolExecutor(3), maxfevals=32
    )
    free.set()
    executor.shutdown()
    assert result.nit == 5
    assert result.nfev == 31
    assert len(calls) <= 32


def test_an_asynchronous_search_with_failures_and_with_what_it_cannot_take(processes):
    with pytest.warns(RuntimeWarning, match="failed ones"):
        result = run_asynchronously(
            SNES([0.0, 0.0], 0.9, popsize=8, seed=0),
            partial(functions.bad_points, functions.fails),
            processes,
            maxfevals=50,
        )
    assert result.failed > 0
    with pytest.raises(KeyError, match="never"):
        run_asynchronously(SNES([0.0, 0.0], 0.5), functions.fails, processes)
    with pytest.raises(sf.ScorefnError, match="N always the same, but it is"):
        run_asynchronously(sf.search.CoordinateSearch([0.0], 0.5), functions.sphere, processes)
    with pytest.raises(sf.ScorefnError, match="batch=3 and drop_slowest=0 mean nothing"):
        run_asynchronously(SNES([0.0], 0.5), functions.sphere, Workers(processes, batch=3))
