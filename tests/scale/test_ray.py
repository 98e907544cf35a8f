"""Ray's workers as an executor: the same search to the bit, and an address that does not answer."""

import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import scorefn as sf
from scorefn.scale import RayExecutor, Workers
from scorefn.search import minimize
from tests.scale import functions

ROOT = str(Path(__file__).parents[2])


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sf.ScorefnError, match=r"pip install scorefn\[scale\]"):
        RayExecutor()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers must be an integer of at least 1, but it is 0"),
        ({"timeout": 0}, "timeout must be a positive number of seconds"),
        ({"address": 6379}, "address must be text"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        RayExecutor(**options)


class TestAddresses:
    """Nothing here starts Ray."""

    @pytest.fixture(autouse=True)
    def ray(self):
        pytest.importorskip("ray")

    def test_where_nothing_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        begin = time.monotonic()
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(sf.ScorefnError, match="does not answer .*refused.*ray start --head"):
                RayExecutor(address)
        assert time.monotonic() - begin < 10

    def test_where_something_listens_that_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            begin = time.monotonic()
            with pytest.raises(sf.ScorefnError, match="did not answer as Ray does within 1 s"):
                RayExecutor(f"127.0.0.1:{server.getsockname()[1]}", timeout=1.0)
            assert time.monotonic() - begin < 5

    @pytest.mark.parametrize("address", ["ray://:1", "host:port"])
    def test_what_is_no_address(self, address):
        with pytest.raises(sf.ScorefnError, match="A Ray address is 'host:port'"):
            RayExecutor(address)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestLocally:
    """One local Ray for all of them."""

    @pytest.fixture(scope="class")
    def executor(self):
        pytest.importorskip("ray")
        path = {"env_vars": {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}}
        with RayExecutor(num_workers=2, num_cpus=2, include_dashboard=False, runtime_env=path) as executor:
            yield executor

    @pytest.mark.parametrize("fun", [functions.sphere, lambda x: float(((x - 1.0) ** 2).sum())])
    def test_the_search_is_the_serial_one(self, executor, fun):
        wanted = minimize(functions.sphere, np.zeros(4), 0.5, seed=1, maxfevals=150)
        result = minimize(fun, np.zeros(4), 0.5, seed=1, maxfevals=150, executor=Workers(executor, startup=300.0))
        assert result.x.tobytes() == wanted.x.tobytes()
        assert result.history.best.tobytes() == wanted.history.best.tobytes()

    @pytest.mark.parametrize("what", [functions.dies, functions.hangs])
    def test_a_lost_task_costs_no_other_one_and_needs_no_factory(self, executor, what, tmp_path):
        wanted = minimize(functions.sphere, np.zeros(4), 0.5, seed=1, maxfevals=60)
        fun = partial(functions.once, str(tmp_path), what)
        workers = Workers(executor, timeout=2.0 if what is functions.hangs else None, startup=20.0)
        minimize(functions.sphere, np.zeros(4), 0.5, maxfevals=60, executor=workers)
        result = minimize(fun, np.zeros(4), 0.5, seed=1, maxfevals=60, executor=workers)
        assert result.x.tobytes() == wanted.x.tobytes()
        assert sum(record.failed for record in result.workers) == 0
        assert sum(record.resubmitted for record in result.workers) > 0

    def test_a_ray_that_was_there_before_stays(self, executor):
        import ray

        with RayExecutor(num_workers=1) as guest:
            assert guest.submit(abs, -3).result(60) == 3
        assert ray.is_initialized()
        with pytest.raises(RuntimeError, match="shut down"):
            guest.submit(abs, -3)
