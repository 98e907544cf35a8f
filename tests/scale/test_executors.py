"""Over workers a search is the serial one to the bit, whoever is first."""

import math
import multiprocessing
import os
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.scale import Workers, executors
from scorefn.search import CSANES, IPOP, SNES, Evaluator, ProductSearch, minimize, run
from tests.scale import functions
from tests.scale.pools import Delayed, assert_same, pool

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on
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
