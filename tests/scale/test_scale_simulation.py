"""The model of W workers: exact where the answer is known, and near two real workers."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from applications.benchmarks import scale_simulation as program
from applications.benchmarks.scale_simulation import MEAN, Costs, Policy, constant, heavy, lognormal, simulated

FREE = Costs()


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (2, 1), (3, 1), (7, 2), (64, 1), (100, 3), (10_000, 1)])
def test_without_costs_constant_times_make_whole_rounds(workers, batch):
    found = simulated(Policy(63, batch), FREE, workers, constant, generations=3)
    rounds = math.ceil(math.ceil(63 / batch) / workers)
    if 63 % batch == 0:
        assert found.generation == pytest.approx(rounds * batch * MEAN, rel=1e-12)
        assert found.efficiency == pytest.approx(63 / (workers * rounds * batch), rel=1e-12)
    assert found.idle_share == pytest.approx(1 - found.efficiency, abs=1e-12)


@pytest.mark.parametrize("law", [constant, lognormal, heavy])
def test_one_worker_without_costs_is_always_busy(law):
    for policy in (Policy(20), Policy(20, 5), Policy(20, asynchronous=True)):
        found = simulated(policy, FREE, 1, law, generations=5)
        assert found.efficiency == pytest.approx(1.0, abs=1e-12)
        assert found.idle_share == pytest.approx(0.0, abs=1e-12)


def test_costs_of_the_searching_process_bound_the_throughput():
    """A worker that costs nothing: a value takes what sending it, taking it in, and its share of the update take."""
    costs = Costs(send=0.003, send_point=0.0005, receive=0.001, receive_point=0.0001, update=0.05)
    for batch, num in ((1, 20), (5, 4)):
        found = simulated(Policy(20, batch), costs, 50, lambda rng, n: np.zeros(n), generations=4)
        assert found.generation == pytest.approx(num * 0.004 + 20 * 0.0006 + 0.05, rel=1e-12)
    for workers in (1000,):
        for name, policy in program.policies(workers, None).items():
            found = simulated(policy, costs, workers, constant, generations=3)
            assert found.throughput <= policy.popsize / (
                policy.popsize * 0.0006 + policy.popsize / policy.batch * 0.004
            )
            assert 0 <= found.idle_share <= 1, name


def test_the_slowest_ends_a_generation_unless_it_is_dropped():
    """Nine points of 1 s and one of 10 s over ten workers."""
    seconds = np.array([1.0] * 9 + [10.0])
    waits = program.played(Policy(10), FREE, 10, iter([seconds]))
    assert (waits.generation, waits.efficiency) == (10.0, pytest.approx(0.19))
    drops = program.played(Policy(10, drop_slowest=1), FREE, 10, iter([seconds, seconds]))
    assert (drops.generation, drops.efficiency) == (1.0, pytest.approx(0.9))  # the slow one still has its worker
    assert drops.idle_share == pytest.approx(0.0, abs=1e-12)


def test_without_waiting_no_time_is_lost_to_the_slow():
    for law in (lognormal, heavy):
        kept = simulated(Policy(200, asynchronous=True), FREE, 100, law, generations=50)
        lost = simulated(Policy(200), FREE, 100, law, generations=50)
        assert kept.idle_share < 1e-9
        assert kept.efficiency > lost.efficiency


def test_the_laws_have_the_mean():
    rng = np.random.default_rng(0)
    for law, error in ((constant, 1e-12), (lognormal, 4 * MEAN * 0.533 / 1000), (heavy, 0.02 * MEAN)):
        assert law(rng, 1_000_000).mean() == pytest.approx(MEAN, abs=error)


def test_two_real_workers_take_what_the_model_says():
    """On threads, which need no core to sleep: within a fifth, once in three, whatever else the machine does."""
    seconds = [0.004 + 0.004 * np.random.default_rng(seed).random(24) for seed in range(4)]
    with ThreadPoolExecutor(2) as executor:
        costs = program.calibrated(executor, 2, generations=4)
        found = [program.real(executor, seconds, 1) for _ in range(3)]
    errors = [96 / program.played(Policy(24), costs, 2, iter(taken)).throughput / total - 1 for total, taken in found]
    assert min(abs(error) for error in errors) < 0.2


def test_tables_plot_and_bad_arguments(tmp_path, capsys):
    rows = program.scaled(Costs(send=1e-4), MEAN, workers=(1, 10), points=2000)
    program.plot(tmp_path / "scaling.svg", rows)
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000
    table = program.scale_table(rows, (1, 10)).splitlines()
    assert len(table) == 2 + 3 * 4
    assert table[2].startswith("| 0.02 s | constant | a point a batch | 1.000 | 0.99")
    check = program.Check("constant", 2, 4, 0.9, 1.0)
    assert program.check_table([check]).splitlines()[-1] == "| constant | 2 | 4 | 0.900 | 1.000 | -10.0 % |"
    with pytest.raises(SystemExit):
        program.main(["--points", "5"])
    assert "--points: it is 5, but must be 1000 or more" in capsys.readouterr().err
