"""Points rebuilt from seeds: the same search to the bit for any workers, and no byte more in more dimensions."""

import functools
import multiprocessing
import pickle
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.scale import Workers, seeds, transport
from scorefn.scale.transport import whoami
from scorefn.search import CSANES, PGPE, SNES, OpenAIES, SeparableCSANES, by_seeds, rebuilt, run_by_seeds
from scorefn.search.rebuilt import RebuiltSums
from tests.scale import functions

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
KINDS = (SNES, PGPE, OpenAIES, SeparableCSANES)
KEY = bytes(range(16))


def sphere(x):
    return (x - 1.0).square().sum()


def made(kind=SNES, dimension=5, popsize=12, **options):
    return kind(torch.zeros(dimension, dtype=torch.float64), 0.5, popsize=popsize, **{"seed": 3, **options})


def search(strategy, executor=None, fun=sphere, **options):
    return run_by_seeds(strategy, fun, executor, **{"maxfevals": 100, **options})


def assert_same(result, wanted):
    for name in ("x", "best_x", "mean", "sigma"):
        assert np.asarray(getattr(result, name)).tobytes() == np.asarray(getattr(wanted, name)).tobytes()
    for name in ("fun", "best_fun", "nfev", "nit", "stop", "failed"):
        assert getattr(result, name) == getattr(wanted, name)


class Islands(Executor):
    """Workers that share nothing, in this process; ``pick`` says who gets which call, and all bytes are counted."""

    def __init__(self, num_workers, pick=None):
        self.num_workers = num_workers
        self.held = [({}, {}) for _ in range(num_workers)]
        self.pick = pick or (lambda call: call % num_workers)
        self.calls = self.bytes = 0
        self.log = []

    def submit(self, fn, /, *args):
        future = Future()
        future.set_running_or_notify_cancel()
        if fn is whoami:
            future.set_result(("island", 0, ""))
            return future
        sent = pickle.dumps((fn, args), protocol=5)
        island = self.pick(self.calls)
        self.calls += fn is seeds.answer_by_seeds
        own = seeds._replicas, transport._held
        seeds._replicas, transport._held = self.held[island]
        try:
            fn, args = pickle.loads(sent)
            back = pickle.dumps(fn(*args), protocol=5)
            future.set_result(pickle.loads(back))
            self.log.append((island, len(sent) + len(back)))
            self.bytes += len(sent) + len(back)
        except Exception as error:
            future.set_exception(error)
        finally:
            seeds._replicas, transport._held = own
        return future


# ------------------------------------------------------------------------------------------------------ noise and sums


def test_noise_depends_on_key_generation_and_individual_alone():
    again = [seeds.noise(KEY, 3, 5, 6, torch.float64) for _ in range(2)]
    assert torch.equal(*again)
    assert torch.equal(seeds.noise(KEY, 3, 5, 3, torch.float64), again[0][:3])
    words = np.frombuffer(KEY, "<u8")
    stream = np.random.Generator(np.random.Philox(key=words, counter=[0, 0, 5, 3]))
    assert again[0].tolist() == stream.standard_normal(6).tolist()
    others = [seeds.noise(*where, 6, torch.float64) for where in ((bytes(16), 3, 5), (KEY, 5, 3), (KEY, 3, 6))]
    assert not any(bool((other == again[0]).any()) for other in others)
    assert seeds.noise(KEY, 3, 5, 6, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kept", [0, 1 << 26])
def test_sums_are_those_over_all_points(paired, kept, monkeypatch):
    monkeypatch.setattr(rebuilt, "_KEPT", kept)
    drawn = []

    def draw(k):
        drawn.append(k)
        return seeds.noise(KEY, 0, k, 7, torch.float64)

    z = torch.stack([draw(k) for k in range(4 if paired else 8)])
    z = torch.cat([z, -z]) if paired else z
    drawn.clear()
    w, sums = torch.randn(8, dtype=torch.float64), RebuiltSums(draw, 8, paired)
    for found, wanted in (
        (sums.first(w), w @ z),
        (sums.second(w), w @ z.square()),
        (sums.square_lengths(), z.square().sum(1)),
    ):
        assert torch.allclose(found, wanted, rtol=1e-14, atol=1e-14)
    assert len(drawn) == (1 if kept else 2) * (4 if paired else 8)
    assert torch.equal(RebuiltSums(draw, 8, paired).square_lengths(), sums.square_lengths())


@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_teaches_what_telling_its_points_teaches(kind):
    """The exact answer: the same points and values, told to a strategy that knows nothing of seeds."""
    points, values = [], []
    one, other = made(kind), made(kind)

    def noted(x):
        points.append(x.clone())
        values.append(float(sphere(x)))
        return values[-1]

    search(one, fun=noted, maxfevals=13)
    other.tell(torch.stack(points[:12]), torch.tensor(values[:12]))
    assert one.result.iterations == other.result.iterations == 1
    assert torch.allclose(one.mean, other.mean, rtol=1e-12)
    assert torch.allclose(one.sigma, other.sigma, rtol=1e-12)
    assert torch.equal(one.result.best_x, other.result.best_x)
    assert torch.equal(points[12], one.mean)


# -------------------------------------------------------------------------------------------------------- to the bit


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=FORK, initializer=sf.scale.one_thread) as executor:
        yield executor


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_threads_and_islands_are_the_serial_run_to_the_bit(kind, processes):
    wanted = search(made(kind, 1200, dtype=torch.float32) if kind is not SNES else made(kind, 1200))
    for executor in (
        processes,
        lambda: ThreadPoolExecutor(3),
        Islands(5),
        Workers(Islands(2), batch=1),
    ):
        strategy = made(kind, 1200, dtype=torch.float32) if kind is not SNES else made(kind, 1200)
        assert_same(search(strategy, executor), wanted)


def asleep(x):
    time.sleep(float(abs(x[0])) % 0.002)
    return float("nan") if x[1] > 0.6 else float(x[0] > 0.2)


def test_failures_ties_and_maximize_are_the_serial_run_to_the_bit(processes):
    """Values are 0, 1 or none."""
    wanted = search(made(popsize=20), fun=asleep, maxfevals=200, maximize=True)
    assert wanted.failed > 3
    assert_same(search(made(popsize=20), processes, fun=asleep, maxfevals=200, maximize=True), wanted)


@pytest.mark.parametrize("what", [functions.dies, functions.fails])
def test_a_worker_that_dies_or_an_evaluation_that_raises_changes_nothing(what, tmp_path):
    fun = functools.partial(functions.once, tmp_path, what)
    (tmp_path / "done").touch()
    wanted = search(made(), fun=fun)
    (tmp_path / "done").unlink()
    result = search(made(), lambda: ProcessPoolExecutor(2, mp_context=FORK), fun=fun)
    assert_same(result, wanted)
    assert sum(record.resubmitted for record in result.workers) > 0


@pytest.mark.parametrize("executor", [None, "processes"])
def test_it_goes_on_from_a_saved_state_to_the_bit(executor, processes):
    executor = processes if executor else None
    wanted = made()
    search(wanted, maxfevals=97)
    half, rest = made(), made(seed=9)
    search(half, executor, maxfevals=49)
    rest.load_state_dict(half.state_dict())
    search(rest, executor, maxfevals=49)
    assert rest.result.iterations == wanted.result.iterations == 8
    assert torch.equal(rest.mean, wanted.mean)
    assert torch.equal(rest.result.best_x, wanted.result.best_x)


# ------------------------------------------------------------------------------------------------- who gets the state


def sent(result):
    return [record.states_sent for record in result.workers]


def test_every_worker_gets_the_state_once():
    result = search(made(), Islands(2))
    assert sent(result) == [2] + [0] * 7
    assert sent(search(made(), Islands(3, lambda call: call % 2), maxfevals=97))[1:] == [0] * 7


@pytest.mark.parametrize(("again", "states"), [(1, [1, 0, 1, 0, 0]), (2, [1, 1, 0, 0, 0]), (3, [1, 1, 0, 1, 0])])
def test_who_missed_one_generation_follows_and_who_missed_more_gets_the_state(again, states):
    """One batch a generation; the second worker has generation 0, and then none before ``again``."""
    strategy = made()
    islands = Islands(2, lambda call: 1 if strategy.result.iterations in (0, again) else 0)
    result = search(strategy, Workers(islands, batch=12), maxfevals=61)
    assert_same(result, search(made(), maxfevals=61))
    assert sent(result) == states


def test_a_worker_with_other_bits_gets_the_state_again_and_changes_nothing():
    islands, wanted = Islands(2), search(made())

    def spoil(strategy):
        if strategy.result.iterations == 3:
            (replica,) = islands.held[0][0].values()
            replica.strategy.adopt({**replica.strategy._state, "location": replica.strategy.location.detach() + 1e-16})
            replica._mark = None

    result = search(made(), islands, callback=spoil)
    assert_same(result, wanted)
    assert sent(result) == [2, 0, 0, 1, 0, 0, 0, 0]


def test_a_worker_that_draws_other_noise_is_refused(monkeypatch):
    noise = by_seeds.noise

    def other(*key, **shape):
        return noise(*key, **shape) + (seeds._replicas is not own)

    own = seeds._replicas
    monkeypatch.setattr(by_seeds, "noise", other)
    with pytest.raises(sf.ScorefnError, match=r"draws other numbers than this process .* numpy .* same versions"):
        search(made(), Islands(2))


def test_a_worker_keeps_few_searches():
    islands = Islands(1)
    for seed in range(4):
        search(made(seed=seed), islands, maxfevals=25)
    assert len(islands.held[0][0]) == 2


@pytest.mark.parametrize(("popsize", "workers"), [(100, 2), (1000, 2), (100, 6)])
def test_what_is_sent_does_not_grow_with_the_dimension(popsize, workers):
    found = []
    for dimension in (10, 20_000 if popsize == 100 else 1000):
        islands, marks = Islands(workers), []
        search(made(dimension=dimension, popsize=popsize), islands, maxfevals=4 * popsize + 1,
               callback=lambda s, islands=islands, marks=marks: marks.append(islands.bytes))  # fmt: skip
        found.append((marks[3] - marks[2]) / popsize)
    assert found[0] <= 64
    assert abs(found[0] - found[1]) < 0.2  # lengths of floats as text, in pickles of times


# ----------------------------------------------------------------------------------------------------------- refusals


def test_reports_reach_the_caller():
    seen = []
    result = search(made(), Workers(Islands(2), report=seen.append))
    assert seen == list(result.workers)
    assert isinstance(seen[0], sf.scale.SeedRecord)
    assert seen[0].bytes_sent > 0
    assert search(made()).workers == ()


@pytest.mark.parametrize("bad", [CSANES([0.0, 0.0], 0.5), "snes", SNES])
def test_other_strategies_are_refused(bad):
    with pytest.raises(sf.ScorefnError, match="strategy must be SNES, PGPE, OpenAIES or SeparableCSANES"):
        search(bad)


def test_what_cannot_be_pickled_is_named(processes):
    strategy = made(PGPE, optimizer=lambda mean: torch.optim.Adam(mean, lr=0.1))
    with pytest.raises(sf.ScorefnError, match=r"strategy.*_optimizer.* is a lambda.*functools.partial"):
        search(strategy, processes)
    with pytest.raises(sf.ScorefnError, match=r"fun cannot be sent to the workers, as fun is a lambda"):
        search(made(), processes, fun=lambda x: 0.0)
    partial = functools.partial(torch.optim.Adam, lr=0.1)
    assert_same(search(made(PGPE, optimizer=partial), processes), search(made(PGPE, optimizer=partial)))


def test_another_search_of_the_same_seed_does_not_disturb():
    """It goes on where the other one has left its replicas, a generation later, from another start."""
    islands, options = Islands(2), {"maxfevals": 49}
    search(made(), islands, **options)
    results = []
    for executor in (islands, None):
        strategy = SNES(torch.ones(5, dtype=torch.float64), 0.1, popsize=12, seed=3)
        search(strategy, fun=functions.sphere, maxfevals=61)
        results.append(search(strategy, executor, fun=functions.sphere, maxfevals=61))
    assert_same(*results)
    assert sent(results[0])[0] == 2
