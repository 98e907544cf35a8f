"""Each criterion ends the search for its own reason, and says which."""

import math

import pytest
import torch

from scorefn.search import SNES
from scorefn.search.progress import Progress
from scorefn.search.stopping import Limits


def stopped(f, x0=(1.0, 2.0, 3.0), sigma0=0.5, **options):
    strategy = SNES(list(x0), sigma0, **{"seed": 0, **options})
    assert strategy.stop == {}
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, f(x))
    return strategy


def sphere(x):
    return x.square().sum(-1)


OFF = {
    "tolx": 0,
    "tolfun": 0,
    "tolfunhist": 0,
    "tolstagnation": 0,
    "tolfacupx": math.inf,
    "tolflatfitness": math.inf,
}


def test_ftarget_counts_when_it_is_met_exactly():
    strategy = stopped(lambda x: x.square().sum(-1).clamp(min=0.25), ftarget=0.25, **OFF)
    assert strategy.stop == {"ftarget": 0.25}
    assert strategy.result.best_f == 0.25


@pytest.mark.parametrize("maxfevals", [7, 20, 21, 27])
def test_maxfevals_is_never_overrun(maxfevals):
    strategy = stopped(sphere, maxfevals=maxfevals)
    assert strategy.stop == {"maxfevals": maxfevals}
    assert strategy.result.evaluations == maxfevals // 7 * 7


def test_maxiter_and_its_default():
    assert stopped(sphere, maxiter=3).result.iterations == 3
    strategy = stopped(lambda x: torch.rand(len(x)), x0=[0.0], popsize=4, **OFF)
    assert set(strategy.stop) == {"maxiter"}
    assert strategy.result.iterations == 100 + 150 * 16 / 2


def test_tolx_waits_for_the_widest_coordinate():
    strategy = stopped(sphere, **{**OFF, "tolx": 1e-3})
    assert strategy.stop == {"tolx": 1e-3}
    assert 1e-4 < strategy.result.sigma.max() < 1e-3


def test_tolfun_needs_the_generation_and_the_recent_ones():
    strategy = stopped(sphere, **{**OFF, "tolfun": 1e-3})
    assert strategy.stop == {"tolfun": 1e-3}
    assert strategy.result.iterations > 10 + 30 * 3 // 7
    assert strategy.result.best_f < 1e-3


def test_tolfun_ignores_best_values_that_agree_while_the_others_do_not():
    strategy = stopped(lambda x: torch.arange(len(x)), **{**OFF, "tolfun": 1e-3, "maxiter": 60})
    assert strategy.stop == {"maxiter": 60}


def test_tolfunhist_sees_a_best_value_that_no_longer_moves():
    def f(x):  # the best values agree, the others do not
        return torch.arange(len(x))

    strategy = stopped(f, **{**OFF, "tolfunhist": 1e-12})
    assert strategy.stop == {"tolfunhist": 1e-12}
    assert strategy.result.iterations == 10 + 30 * 3 // 7


def test_flat_generations_are_tolerated_once_and_the_count_starts_afresh():
    strategy = SNES([0.0], 1.0, seed=0)
    for f, stop in [([1.0] * 4, {}), ([1.0, 1, 1, 2], {}), ([1.0] * 4, {}), ([1.0] * 4, {"tolflatfitness": 1})]:
        strategy.tell(strategy.ask(), f)
        assert strategy.stop == stop


def test_a_flat_generation_with_a_failure_is_not_flat():
    strategy = SNES([0.0], 1.0, seed=0)
    for _ in range(5):
        strategy.tell(strategy.ask(), [1.0, 1.0, math.nan, 1.0])
    assert strategy.stop == {}


def test_steps_below_the_resolution_of_the_mean():
    strategy = stopped(sphere, x0=[1e6 + 0.3, 0.0], sigma0=1e-3, **OFF)
    assert "noeffectcoord" in stopped(lambda x: (x - 1e6).square().sum(-1), x0=[1e6, 1e6], sigma0=1.0, **OFF).stop
    assert strategy.stop


def test_stop_is_a_copy():
    strategy = stopped(sphere, maxiter=1)
    strategy.stop.clear()
    assert strategy.stop == {"maxiter": 1}


def test_of_equal_values_the_first_is_the_best_point():
    strategy = SNES([0.0], 1.0, seed=0)
    x = strategy.ask()
    strategy.tell(x, [5.0, 1.0, 1.0, 2.0])
    strategy.tell(strategy.ask(), [1.0, 3.0, 4.0, 1.0])
    assert torch.equal(strategy.result.best_x, x[1])


def test_the_best_point_is_kept_with_its_value():
    strategy = stopped(sphere, maxiter=30)
    result = strategy.result
    assert sphere(result.best_x) == result.best_f
    torch.nn.init.zeros_(result.best_x)
    assert sphere(strategy.result.best_x) == result.best_f


# ------------------------------------------------------------------------------------------ stagnation and conditioning


def waits(past, options=None, popsize=10, dimension=1, medians=None):
    """What fires after the last generation of a past of best values."""
    medians = past if medians is None else medians
    progress = Progress(iterations=len(past), lowest=list(past), medians=list(medians), spread=1.0, best_f=min(past))
    one = torch.ones(dimension, dtype=torch.float64)
    return Limits(**{"maxiter": 10**9, "tolfunhist": 0, "tolfun": 0, **(options or {})}).fired(
        progress, one, one, one, popsize
    )


def test_stagnation_compares_the_ends_of_its_window_and_looks_every_tenth_generation():
    falling = [1000.0 - k for k in range(300)]
    assert waits(falling) == {}
    level = [1.0, 2.0] * 65
    assert waits(level) == {"tolstagnation": 123.0}
    assert waits(level[:120]) == {}  # the window of 120 + 30 D/N is not full
    assert waits([*level, 1.0]) == {}  # no tenth generation
    assert waits(level, {"tolstagnation": 0}) == {}
    assert waits([1.0, 2.0] * 20, {"tolstagnation": 40}) == {"tolstagnation": 40}
    assert waits([5.0] * 12 + [4.0] * 28, {"tolstagnation": 40}) == {}
    assert waits([5.0] * 12 + [4.0] * 28, {"tolstagnation": 40}, medians=[1.0] * 40) == {}  # both must stagnate
    assert waits([4.0] * 40, {"tolstagnation": 40}, medians=[5.0] * 12 + [4.0] * 28) == {}


def test_the_window_of_stagnation_grows_with_the_search():
    """A fifth of 1000 generations: 200, whose first 60 are higher than the last 60."""
    past = [10.0] * 860 + [9.0] * 140
    assert waits(past, {"tolstagnation": 100}) == {}
    assert waits(past[-250:] + [9.0] * 50, {"tolstagnation": 100}) == {"tolstagnation": 100}


def conditioned(lengths, iterations, **limits):
    dimension = len(lengths)
    rotation, _ = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64, generator=generator_of(3)))
    factor = rotation * torch.tensor(lengths, dtype=torch.float64)
    sigma = factor.square().sum(1).sqrt()
    progress = Progress(iterations=iterations, lowest=[1.0], medians=[1.0])
    return Limits(**{"maxiter": 10**9, "tolx": 0, **limits}).fired(
        progress, torch.ones(dimension, dtype=torch.float64), sigma, sigma, 4, lambda: factor
    )


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def test_the_condition_number_is_that_of_the_covariance():
    assert conditioned([1.0, 0.1, 0.011], 13, tolconditioncov=1e4) == {}
    assert conditioned([1.0, 0.1, 0.0099], 13, tolconditioncov=1e4) == {"tolconditioncov": 1e4}
    assert conditioned([1.0, 0.1, 0.0099], 14, tolconditioncov=1e4) == {}  # looked at every 10 + D generations


def test_an_axis_below_the_resolution_of_the_mean():
    assert conditioned([1.0, 0.1, 1e-16], 13, tolconditioncov=math.inf) == {"noeffectaxis": 0.1}
    assert conditioned([1.0, 0.1, 1e-13], 13, tolconditioncov=math.inf) == {}


def test_noise_ends_with_stagnation():
    generator = generator_of(0)
    strategy = SNES([0.0] * 3, 1.0, seed=0)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, sphere(x) + torch.randn(len(x), generator=generator))
    assert list(strategy.stop) == ["tolstagnation"]
    assert strategy.result.mean.norm() < 2
