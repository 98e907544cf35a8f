"""Executors that break, hang, or are none: a search goes on to the bit, or says what is wrong and the repair."""

import functools
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

import scorefn as sf
from scorefn.scale import Workers
from scorefn.scale.executors import _kill
from scorefn.scale.transport import whoami
from scorefn.search import SNES, minimize, run_asynchronously, run_by_seeds
from tests.scale import functions

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on
STRATEGY = functools.partial(SNES, [0.0, 0.0], 0.5, seed=0, popsize=6)
SEARCHES = {
    "minimize": lambda fun, executor: minimize(fun, [0.0, 0.0], 0.5, seed=0, maxfevals=60, executor=executor),
    "run_by_seeds": lambda fun, executor: run_by_seeds(STRATEGY(), fun, executor, maxfevals=60),
    "run_asynchronously": lambda fun, executor: run_asynchronously(STRATEGY(), fun, executor, maxfevals=60),
}
every_search = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)


def assert_all_ended(processes):
    deadline = time.monotonic() + 10.0
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.01)


@pytest.mark.parametrize(("kind", "what"), [("pool", functions.dies), ("reusable", functions.hangs)])
def test_a_loky_pool_is_killed_and_made_anew(kind, what, tmp_path):
    loky = pytest.importorskip("loky")
    made, processes = [], []

    def factory():
        assert_all_ended(processes)
        executor = loky.ProcessPoolExecutor(2) if kind == "pool" else loky.get_reusable_executor(2, timeout=300)
        made.append(executor)
        list(executor.map(functions.asleep, [np.zeros(1)] * 4))
        executor.submit(whoami).result()
        processes.extend((executor._processes or {}).values())
        return executor

    wanted = minimize(functions.sphere, [0.0] * 4, 0.2, seed=3, maxfevals=40)
    fun = functools.partial(functions.once, tmp_path, what)
    workers = Workers(
        factory,
        timeout=1.0 if what is functions.hangs else None,
        startup=20.0 if what is functions.hangs else 60.0,
        batch=1,
    )
    result = minimize(fun, [0.0] * 4, 0.2, seed=3, maxfevals=40, executor=workers)
    assert (result.fun, result.x.tobytes()) == (wanted.fun, wanted.x.tobytes())
    assert sum(record.resubmitted for record in result.workers) > 0
    assert sum(record.failed for record in result.workers) == 0
    assert len(made) >= 2
    assert len(processes) == 2 * len(made)
    assert_all_ended(processes)


def test_a_process_that_cannot_be_killed_keeps_no_other_one_alive():
    class Stubborn:
        exitcode = None

        def kill(self):
            raise AttributeError("'Popen' object has no attribute 'kill'")

    process = multiprocessing.get_context("fork").Process(target=functions.hangs, args=(0,))
    process.start()
    for each in (Stubborn(), object(), process):
        _kill(each)
    process.join(10.0)
    assert process.exitcode == -9
    _kill(process)  # it has ended
    process.close()
    _kill(process)


class Plain:
    """Runs each call at once; has no shutdown, and after ``calls`` calls takes none, or returns something else."""

    num_workers = 2

    def __init__(self, calls=10**9, otherwise=None):
        self.calls, self.otherwise = calls, otherwise

    def submit(self, fn, /, *args):
        self.calls -= 1
        if self.calls < 0 and self.otherwise is None:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = Future()
        future.set_result(fn(*args) if self.calls >= 0 else self.otherwise)
        return future


class Foreign(Plain):
    """As a pool of other processes, which shares no memory."""

    def submit(self, fn, /, *args):
        future = super().submit(fn, *args)
        if fn.__name__ == "whoami" and self.calls >= 0:
            future = Future()
            future.set_result(("elsewhere", 1, ""))
        return future


@every_search
@pytest.mark.parametrize("kind", [Plain, Foreign])
@pytest.mark.parametrize("factory", [False, True])
def test_an_executor_that_takes_no_further_work(search, kind, factory):
    executor = kind(12)
    with pytest.raises(
        sf.ScorefnError, match=rf"The {kind.__name__} took no further work .*RuntimeError: cannot"
    ) as caught:
        search(functions.sphere, (lambda: executor) if factory else executor)
    assert "Keep it open until the search has ended, or give a function that makes one" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_pool_that_is_shut_down_in_the_middle():
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(sf.ScorefnError, match="The ThreadPoolExecutor took no further work") as caught:
            minimize(functions.sphere, [0.0], 0.5, executor=executor, callback=lambda _: executor.shutdown(wait=False))
        assert "after shutdown" in str(caught.value.__cause__)


@every_search
def test_shutdown_is_optional(search):
    assert search(functions.sphere, Plain).nfev > 1
    with pytest.raises(KeyError, match="never"):
        search(functions.fails, Plain)


@every_search
@pytest.mark.parametrize("kind", [Plain, Foreign])
@pytest.mark.parametrize("calls", [0, 1, 2, 12])
def test_futures_that_return_something_else(search, kind, calls):
    with pytest.raises(sf.ScorefnError, match=rf"A future of the {kind.__name__} returned 17, which .* fn\(\*args\)"):
        search(functions.sphere, kind(calls, otherwise=17))


@every_search
def test_a_factory_that_needs_arguments(search):
    def made(number, *, context):
        return ThreadPoolExecutor(number)

    for factory in (lambda a: ThreadPoolExecutor(a), made, functools.partial(made, 2)):
        with pytest.raises(sf.ScorefnError, match="called without arguments, but .* needs some .*functools.partial"):
            search(functions.sphere, factory)
    assert search(functions.sphere, functools.partial(made, 2, context=None)).nfev > 1


@every_search
def test_a_factory_that_raises_keeps_its_error(search):
    def made():
        raise TypeError("no such pool")

    with pytest.raises(TypeError, match="no such pool") as caught:
        search(functions.sphere, made)
    assert "scorefn called executor, <function" in caught.value.__notes__[0]


@pytest.mark.parametrize("search", [run_by_seeds, run_asynchronously])
def test_a_callback_that_is_none_is_refused_before_the_first_point(search):
    seen = []
    with pytest.raises(sf.ScorefnError, match="callback must be a function of the strategy, or None, but it is 3"):
        search(STRATEGY(), seen.append, Plain, callback=3)
    assert not seen
    strategy = STRATEGY()
    assert search(strategy, functions.sphere, Plain, callback=lambda given: given is strategy).stop == {"callback": 1}


def test_a_pool_of_processes_is_made_anew_as_ever(tmp_path):
    fork = multiprocessing.get_context("fork")
    fun = functools.partial(functions.once, tmp_path, functions.dies)
    result = run_by_seeds(STRATEGY(), fun, lambda: ProcessPoolExecutor(2, mp_context=fork), maxfevals=40)
    assert result.fun == run_by_seeds(STRATEGY(), functions.sphere, maxfevals=40).fun


class Deadly:
    """A function whose arrival ends the process."""

    def __call__(self, x):
        return 0.0

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_dies_while_it_loads_fun():
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(1, context) as pool,
        pytest.raises(sf.ScorefnError, match="^A worker died while it loaded fun"),
    ):
        minimize(Deadly(), [0.0] * 3, 0.2, seed=0, maxfevals=20, executor=pool)
