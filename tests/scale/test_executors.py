"""Over workers a search is the serial one to the bit, whoever is first and whatever dies on the way."""

import math
import multiprocessing
import os
import queue
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.scale import Workers, executors
from scorefn.search import CSANES, IPOP, SNES, Evaluator, ProductSearch, minimize, run, run_asynchronously
from tests.scale import functions

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on
FORK = multiprocessing.get_context("fork")


def pool(num=2):
    return ProcessPoolExecutor(num, mp_context=FORK, initializer=sf.scale.one_thread)


@pytest.fixture(scope="module")
def processes():
    with pool() as executor:
        yield executor


class Delayed(Executor):
    """Runs each call at once, in this process, and hands the answers back in the opposite order."""

    num_workers = 3

    def __init__(self):
        self.futures = queue.LifoQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        self.futures.put((future, fn(*args, **kwargs)))
        return future

    def _answer(self):
        while True:
            time.sleep(0.0005)
            future, value = self.futures.get()
            if future.set_running_or_notify_cancel():
                future.set_result(value)


def assert_same(result, wanted):
    for name in ("x", "best_x", "mean", "sigma"):
        assert np.asarray(getattr(result, name)).tobytes() == np.asarray(getattr(wanted, name)).tobytes()
    for name in ("fun", "best_fun", "nfev", "nit", "stop", "failed", "restarts"):
        assert getattr(result, name) == getattr(wanted, name)
    for name in ("nfev", "best", "median", "sigma", "run"):
        assert getattr(result.history, name).tobytes() == getattr(wanted.history, name).tobytes()


CASES = {
    "csanes": {"method": "csanes"},
    "separable": {"method": "separable"},
    "snes": {"method": "snes"},
    "pgpe": {"method": "pgpe"},
    "openai_es": {"method": "openai_es"},
    "restarts": {"restarts": IPOP(2), "maxiter": 12, "maxfevals": 500},
    "bounds": {"bounds": (-0.4, 0.8)},
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_the_serial_run_to_the_bit(case, processes):
    options = {"maxfevals": 300, "seed": 3, **CASES[case]}
    wanted = minimize(functions.sphere, np.zeros(4), 0.5, **options)
    result = minimize(functions.sphere, np.zeros(4), 0.5, executor=processes, **options)
    assert_same(result, wanted)
    assert wanted.workers == ()
    assert len(result.workers) == result.nit


@pytest.mark.parametrize(
    "workers",
    [
        lambda: ThreadPoolExecutor(1),
        lambda: ThreadPoolExecutor(3),
        lambda: ThreadPoolExecutor(64),
        Workers(lambda: ThreadPoolExecutor(3), batch=1),
        Workers(lambda: ThreadPoolExecutor(3), batch=1000, timeout=60.0),
        Workers(lambda: ThreadPoolExecutor(3), num_workers=5),
        Delayed(),
    ],
)
@pytest.mark.parametrize("tensors", [False, True])
def test_neither_the_number_of_workers_nor_who_is_first_matters(workers, tensors):
    start = torch.zeros(3) if tensors else np.zeros(3)
    wanted = minimize(functions.uneven, start, 0.5, seed=1, maxfevals=150, maximize=True, tolfun=0.0)
    result = minimize(functions.uneven, start, 0.5, seed=1, maxfevals=150, maximize=True, tolfun=0.0, executor=workers)
    assert_same(result, wanted)
    assert type(result.x) is type(wanted.x)


def test_vectorized_functions_get_batches(processes):
    shapes = []

    def fun(x):
        shapes.append(x.shape)
        return functions.rows(x)

    options = {"seed": 1, "maxfevals": 200, "vectorized": True, "popsize": 10, "method": "snes"}
    wanted = minimize(functions.rows, np.zeros(3), 0.5, **options)
    assert_same(minimize(functions.rows, np.zeros(3), 0.5, executor=processes, **options), wanted)
    assert_same(minimize(fun, np.zeros(3), 0.5, executor=lambda: ThreadPoolExecutor(2), **options), wanted)
    assert set(shapes) == {(5, 3), (1, 3)}


def test_a_batch_that_raises_is_evaluated_row_by_row_in_the_end(processes):
    options = {"seed": 1, "maxfevals": 40}
    wanted = minimize(functions.as_nan, np.full(3, 0.2), 0.5, **options)
    workers = Workers(processes)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="Evaluations that fail 3 times .* KeyError"):
            result = minimize(functions.bad_rows, np.full(3, 0.2), 0.5, executor=workers, vectorized=True, **options)
        assert_same(result, wanted)


def test_one_worker_process_and_a_spawned_one():
    wanted = minimize(functions.sphere, np.zeros(3), 0.5, seed=1, maxfevals=60)
    spawn = multiprocessing.get_context("spawn")
    workers = Workers(lambda: ProcessPoolExecutor(1, mp_context=spawn), timeout=5.0)
    assert_same(minimize(functions.sphere, np.zeros(3), 0.5, seed=1, maxfevals=60, executor=workers), wanted)


def test_points_of_several_parts_travel(processes):
    def made():
        return ProductSearch({"x": SNES([2.0], 1.0, popsize=6, seed=0), "y": SNES([0.0, 0.0], 1.0, popsize=6, seed=1)})

    wanted = run(made(), functions.parts, maxfevals=60)
    result = run(made(), functions.parts, maxfevals=60, executor=processes)
    assert result.fun == wanted.fun
    assert torch.equal(result.best_x["y"], wanted.best_x["y"])


def test_a_loop_of_ones_own(processes):
    ours, theirs = (CSANES([0.0, 0.0], 0.5, seed=2) for _ in range(2))
    with Evaluator(functions.sphere, processes, arrays=True) as evaluate:
        for _ in range(10):
            x, y = ours.ask(), theirs.ask()
            ours.tell(x, evaluate(x))
            theirs.tell(y, [functions.sphere(point) for point in y])
    assert torch.equal(ours.mean, theirs.mean)
    assert [record.generation for record in evaluate.records] == list(range(10))
    assert processes.submit(abs, -1).result() == 1  # left open


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


MACHINE = functions.Machine()


@pytest.mark.parametrize(
    ("fun", "named"),
    [
        (lambda x: 0.0, r"fun is a lambda, .*<lambda> \(test_executors\.py, line \d+\)"),
        (MACHINE, r"fun\.parts\['valve'\] is a lambda, Machine\.__init__\.<locals>\.<lambda>"),
        (MACHINE.method, r"fun\.__self__\.parts\['valve'\] is a lambda"),
        (partial(functions.bad_points, MACHINE), r"fun\.args\[0\]\.parts\['valve'\]"),
        (partial(functions.sphere, x=threading.Lock()), r"fun\.keywords\['x'\] is a _thread\.lock"),
        (functions.closure(), r"fun is a closure over number, closure\.<locals>\.inner"),
    ],
)
def test_what_cannot_be_pickled_is_named(fun, named, processes):
    with pytest.raises(sf.ScorefnError, match=f"fun cannot be sent to the workers, as {named}.*loky"):
        minimize(fun, [0.0, 0.0], 0.5, executor=processes)


def test_loky_takes_what_pickle_does_not():
    loky = pytest.importorskip("loky")
    wanted = minimize(lambda x: float((x**2).sum()), [1.0, 2.0], 0.5, seed=1, maxfevals=60)
    workers = Workers(partial(loky.get_reusable_executor, 2), timeout=30.0)
    result = minimize(lambda x: float((x**2).sum()), [1.0, 2.0], 0.5, seed=1, maxfevals=60, executor=workers)
    assert_same(result, wanted)


def test_a_worker_without_the_module_is_told_by_name(tmp_path, monkeypatch, processes):
    (tmp_path / "only_here.py").write_text("def fun(x):\n    return 0.0\n")
    processes.submit(abs, 1).result()  # they were forked before the path was known
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    with pytest.raises(sf.ScorefnError, match="A worker cannot import 'only_here', which fun needs"):
        minimize(only_here.fun, [0.0], 0.5, executor=processes)
    monkeypatch.delattr(only_here, "fun")
    monkeypatch.setattr(functions, "gone", lambda x: 0.0, raising=False)
    functions.gone.__qualname__ = functions.gone.__name__ = "gone"
    functions.gone.__module__ = functions.__name__
    with pytest.raises(sf.ScorefnError, match="A worker cannot load fun .*gone.*Put fun into a module"):
        minimize(functions.gone, [0.0], 0.5, executor=processes)


class Without(Executor):
    """An engine whose workers lack this library."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_exception(ModuleNotFoundError("No module named 'scorefn'", name="scorefn"))
        return future


class Silent(Executor):
    """An engine that nobody runs."""

    def submit(self, fn, /, *args, **kwargs):
        return Future()


def test_engines_that_cannot_work():
    with pytest.raises(sf.ScorefnError, match="A worker of the Without cannot import 'scorefn': install"):
        minimize(functions.sphere, [0.0], 0.5, executor=Without())
    with pytest.raises(sf.ScorefnError, match=r"No worker of the Silent answered within 0\.1 s"):
        minimize(functions.sphere, [0.0], 0.5, executor=Workers(Silent(), startup=0.1))
    with pytest.raises(sf.ScorefnError, match="executor must make an object that has submit"):
        minimize(functions.sphere, [0.0], 0.5, executor=lambda: None)
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    with pytest.raises(sf.ScorefnError, match="the ThreadPoolExecutor takes no work"):
        minimize(functions.sphere, [0.0], 0.5, executor=closed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": 4}, "executor must have submit"),
        ({"attempts": 0}, "attempts must be an integer of at least 1, but it is 0"),
        ({"attempts": None}, "attempts must be an integer"),
        ({"drop_slowest": -1}, "drop_slowest must be an integer of at least 0"),
        ({"batch": 1.5}, "batch must be an integer"),
        ({"num_workers": True}, "num_workers must be an integer"),
        ({"timeout": 0}, "timeout must be a positive number of seconds"),
        ({"timeout": math.inf}, "timeout must be a positive number of seconds"),
        ({"startup": None}, "startup must be a positive number of seconds"),
        ({"report": 1}, "report must be a function"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        Workers(**{"executor": ThreadPoolExecutor, **options})


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


class Client:
    """What Dask's executor knows of its cluster."""

    def nthreads(self):
        return {"one": 3, "two": 4}


@pytest.mark.parametrize(
    ("executor", "number"),
    [(ThreadPoolExecutor(3), 3), (Delayed(), 3), (SimpleNamespace(_client=Client()), 7), (object(), os.cpu_count())],
)
def test_how_many_workers_an_executor_has(executor, number):
    assert executors.num_workers(executor) == number


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


def test_limits_callback_and_progress_are_as_ever(processes):
    lines, seen = [], []
    result = minimize(
        functions.sphere,
        [0.0, 0.0],
        0.5,
        seed=0,
        popsize=6,
        executor=Workers(processes, report=seen.append),
        callback=lambda strategy: strategy.result.iterations == 3,
        progress=lines.append,
    )
    assert result.stop == {"callback": 1}
    assert tuple(seen) == result.workers
    assert [record.evaluations for record in seen] == [6, 6, 6]
    assert all(record.bytes_sent > 6 * 2 * 8 and record.workers == 2 for record in seen)
    assert "/s  idle" in lines[0]
    slow = minimize(functions.asleep, [0.0, 0.0], 0.5, seed=0, timeout=0.03, executor=processes)
    assert "timeout" in slow.stop


def test_scalars():
    written = []

    class Writer:
        def add_scalar(self, tag, value, step):
            written.append((tag, step))

    report = partial(sf.scale.log_scalars, Writer(), prefix="es")
    minimize(
        functions.sphere,
        [0.0],
        0.5,
        popsize=4,
        maxfevals=9,
        executor=Workers(lambda: ThreadPoolExecutor(1), report=report),
    )
    assert len(written) == 12
    assert written[0] == ("es/evaluations_per_second", 0)
    assert written[-1] == ("es/dropped", 1)


def test_a_long_function_is_sent_once_per_worker():
    fun = partial(functions.ballast, b"0" * 100_000)
    with pool(1) as executor:
        result = minimize(fun, [0.0, 0.0], 0.5, popsize=6, maxfevals=19, seed=0, executor=executor)
    wanted = minimize(functions.sphere, [0.0, 0.0], 0.5, popsize=6, maxfevals=19, seed=0)
    assert_same(result, wanted)
    assert max(record.bytes_sent for record in result.workers) < 5000  # sent before the first generation


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
