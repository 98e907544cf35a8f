"""Whatever dies, hangs or is interrupted on the way."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.scale import Workers
from scorefn.search import CSANES, minimize, run
from tests.scale import functions
from tests.scale.pools import assert_same, pool

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on


@pytest.mark.parametrize(
    ("what", "timeout"),
    [(functions.dies, None), (functions.dies, 5.0), (functions.hangs, 0.2), (functions.fails, None)],
)
def test_what_is_lost_once_is_evaluated_again(what, timeout, tmp_path):
    wanted = minimize(functions.sphere, np.zeros(4), 0.5, seed=1, maxfevals=60)
    workers = Workers(pool, timeout=timeout, startup=0.5 if what is functions.hangs else 60.0)
    fun = partial(functions.once, tmp_path, what)
    result = minimize(fun, np.zeros(4), 0.5, seed=1, maxfevals=60, executor=workers)
    assert_same(result, wanted)
    assert sum(record.resubmitted for record in result.workers) > 0
    assert sum(record.failed for record in result.workers) == 0


@pytest.mark.parametrize("what", [functions.dies, functions.fails, functions.leaves])
def test_what_fails_again_and_again_is_a_failed_evaluation_and_no_other_point_suffers(what):
    options = {"seed": 1, "maxfevals": 40}
    wanted = minimize(functions.as_nan, np.full(3, 0.2), 0.5, **options)
    fun = partial(functions.bad_points, what)
    with pytest.warns(RuntimeWarning, match=r"Evaluations that fail 2 times are failed ones, NaN") as seen:
        result = minimize(fun, np.full(3, 0.2), 0.5, executor=Workers(pool, attempts=2), **options)
    assert_same(result, wanted)
    assert result.failed == wanted.failed == sum(record.failed for record in result.workers) > 1
    assert len(seen) == 1


def test_without_a_factory_a_broken_pool_or_one_that_hangs_ends_the_search_with_the_repair():
    with pool() as executor, pytest.raises(sf.ScorefnError, match="The executor broke .* lambda: ProcessPoolExecutor"):
        minimize(functions.dies, np.zeros(2), 0.5, executor=executor)
    with pytest.raises(sf.ScorefnError, match="No worker of the ProcessPoolExecutor could be started"):
        minimize(functions.sphere, np.zeros(2), 0.5, executor=executor)
    free = threading.Event()
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(sf.ScorefnError, match=r"All 2 workers hang: none answered within timeout=0\.05 s"):
            minimize(lambda x: free.wait(60), [0.0], 0.5, executor=Workers(executor, timeout=0.05, startup=0.05))
        free.set()


def test_the_first_generation_raises_what_fun_raises_if_nothing_succeeds(processes):
    with pytest.raises(KeyError, match="never") as caught:
        minimize(functions.fails, [0.0, 0.0], 0.5, executor=processes)
    assert "functions.py" in "".join(caught.value.__notes__)
    with pytest.raises(sf.ScorefnError, match="fun must return a real number, but it returned str") as caught:
        minimize(functions.no_number, [0.0, 0.0], 0.5, executor=processes)
    assert len(caught.value.__notes__) == 1
    with pytest.raises(sf.ScorefnError, match="No evaluation succeeded, and the first failure was Local: it cannot"):
        minimize(functions.raises_a_local_class, [0.0, 0.0], 0.5, executor=processes)


def test_a_first_generation_that_hangs_or_dies_to_the_last_point_says_so():
    with pytest.raises(sf.ScorefnError, match="first failure was BrokenProcessPool"):
        minimize(functions.dies, [0.0, 0.0], 0.5, popsize=4, executor=Workers(pool, attempts=1))
    workers = Workers(pool, attempts=1, timeout=0.05, startup=0.5)
    with pytest.raises(sf.ScorefnError, match=r"first failure was an evaluation that took longer than timeout=0\.05 s"):
        minimize(functions.hangs, [0.0, 0.0], 0.5, popsize=4, executor=workers)


def test_the_slowest_may_be_left_out():
    def fun(x):
        time.sleep(0.15 if x[0] > 1.0 else 0.0)
        return functions.sphere(x)

    options = {"seed": 1, "maxfevals": 25, "popsize": 8}
    wanted = minimize(functions.sphere, np.full(3, 0.2), 0.5, **options)
    workers = Workers(lambda: ThreadPoolExecutor(8), drop_slowest=1)
    result = minimize(fun, np.full(3, 0.2), 0.5, executor=workers, **options)
    assert [record.dropped for record in result.workers] == [1] * result.nit
    assert result.failed == result.nit
    assert wanted.failed == 0
    with pytest.raises(sf.ScorefnError, match="drop_slowest=8 leaves nothing of a generation of 8 points"):
        minimize(fun, [0.0], 0.5, popsize=8, executor=Workers(lambda: ThreadPoolExecutor(2), drop_slowest=8))


def test_an_interrupt_cancels_what_waits_and_the_search_goes_on_from_the_last_whole_generation():
    calls = []

    def fun(x):
        calls.append(x)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return functions.sphere(x)

    strategy, twin = (CSANES([0.0, 0.0], 0.5, seed=0, popsize=10) for _ in range(2))
    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        run(strategy, fun, executor=Workers(executor, batch=1))
    assert len(calls) <= 27
    assert strategy.result.evaluations == 20
    for _ in range(2):
        x = twin.ask()
        twin.tell(x, [functions.sphere(point) for point in x])
    assert torch.equal(strategy.mean, twin.mean)


def test_an_interrupt_on_a_worker_is_one_here_and_no_process_stays_behind():
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        minimize(functions.interrupted, [0.0, 0.0], 0.5, executor=pool)
    end = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before and time.monotonic() < end:
        time.sleep(0.05)
    assert set(multiprocessing.active_children()) <= before


def test_a_late_evaluation_keeps_its_worker_until_its_time_is_over():
    free = threading.Event()

    def fun(x):
        if len(calls) < 1:
            calls.append(x)
            free.wait(60)
        return functions.sphere(x)

    calls = []
    with ThreadPoolExecutor(2) as executor:
        workers = Workers(executor, drop_slowest=1, timeout=0.3, startup=0.1)
        result = minimize(fun, [0.0, 0.0], 0.5, popsize=6, seed=0, maxfevals=13, executor=workers)
        free.set()
    assert [record.dropped for record in result.workers] == [1, 1]
