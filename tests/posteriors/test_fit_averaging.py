"""Iterate averages of an autoregression, whose every moment is known: SGD on a quadratic with Gaussian noise.

x' = x - rate (curvature x + noise) is x' = rho x - rate noise, rho = 1 - rate curvature. An estimate that is quadratic
in the iterates has as expectation its sum over the columns of a square root of their covariance: those columns, as the
coordinates of one parameter, make an exact test of it.
"""

import itertools
import math

import pyro
import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.posteriors import IterateAverage
from scorefn.posteriors.batch_means import lugsail


def covariance(rho, n):
    """Of a stationary autoregression with unit innovations."""
    t = torch.arange(n, dtype=torch.float64)
    return rho ** (t[:, None] - t[None, :]).abs() / (1 - rho**2)


def variance_of_mean(rho, n):
    """In closed form: ``s^2/n [(1 + rho)/(1 - rho) - 2 rho (1 - rho^n)/(n (1 - rho)^2)]``."""
    return ((1 + rho) / (1 - rho) - 2 * rho * (1 - rho**n) / (n * (1 - rho) ** 2)) / n / (1 - rho**2)


def autoregression(rho, n, coordinates=1, seed=0, start=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((coordinates,), start, dtype=torch.float64)
    for _ in range(n):
        x = rho * x + torch.randn(coordinates, generator=generator, dtype=torch.float64)
        yield x


def fed(iterates, **options):
    average = IterateAverage(**options)
    for x in iterates:
        average.update({"x": x})
    return average


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.5])
def test_the_closed_form_of_the_tests(rho):
    assert variance_of_mean(rho, 60) == pytest.approx(float(covariance(rho, 60).mean()), rel=1e-12)


@pytest.mark.parametrize(("rho", "n"), [(0.0, 640), (0.5, 640), (0.9, 640), (0.97, 1920)])
def test_the_expected_standard_error_is_that_of_the_mean(rho, n):
    """32 blocks: plain batch means fall short by 2 rho/((1 - rho^2) b), and lugsail makes most of it up."""
    b = n // 32
    root = torch.linalg.cholesky(covariance(rho, n))
    single, double = (float(part.sum()) for part in lugsail(root.reshape(n // b, b, n).mean(1)))
    for found, length in ((single, b), (double, 2 * b)):
        # A sample variance of a dependent batch means: the mean of their variances less that of all pairs.
        a = n // length
        exact = (variance_of_mean(rho, length) - variance_of_mean(rho, n)) / (a - 1)
        assert found == pytest.approx(exact, rel=1e-9)
    truth = variance_of_mean(rho, n)
    error = abs(2 * double - single - truth) / truth
    assert error < (0.06 if rho < 0.95 else 0.12)  # an effective sample size of 29 is the last
    assert error <= abs(double - truth) / truth + 1e-9


@pytest.mark.parametrize("n", [200, 1000, 5000])
def test_sums_over_blocks_are_those_of_the_iterates(n):
    """Whatever was merged, mean, R-hat, error and effective size are those of the iterates in the window."""
    iterates = torch.stack(list(autoregression(0.8, n, coordinates=3)))
    average = fed(iterates, max_r_hat=100.0, max_mcse=1e-9)
    window, blocks = average.window, len(average._means) - average._first()
    end = len(average._means) * average._length
    tail = iterates[end - window : end]
    torch.testing.assert_close(average.average()["x"], tail.mean(0), rtol=1e-12, atol=1e-12)
    half = blocks // 2 * average._length
    first, second = tail[-2 * half : -half], tail[-half:]
    within = (first.var(0) + second.var(0)) / 2
    r_hat = ((half - 1) / half + (first.mean(0) - second.mean(0)) ** 2 / 2 / within).sqrt().max()
    assert average.r_hat == pytest.approx(float(r_hat), rel=1e-10)
    if blocks >= 16:
        means = tail.reshape(blocks, -1, 3).mean(1)
        single, double = lugsail(means)
        error = torch.maximum(double, 2 * double - single)
        torch.testing.assert_close(average.mcse()["x"], error.sqrt())
        torch.testing.assert_close(average.ess()["x"], tail.var(0) / error)
    assert len(average._means) < 64


@pytest.mark.parametrize(("rho", "n"), [(0.0, 640), (0.9, 640), (0.9, 1000), (-0.5, 1000)])
def test_the_expected_error_of_the_tail_average_is_that_of_its_window(rho, n):
    average = fed(torch.linalg.cholesky(covariance(rho, n)), max_r_hat=100.0)
    assert 0 < average.window < n
    exact = variance_of_mean(rho, average.window)
    assert float(average.average()["x"].square().sum()) == pytest.approx(exact, rel=1e-9)


def test_the_tail_average_knows_how_near_the_optimum_it_is():
    """200 coordinates of one autoregression, standardised: between a normal variable and a t of 7 degrees of freedom.

    At least 8 batches are behind each standard error. The counts are 5 standard deviations from those of 200 trials of
    probability .914 (t, below 2) and .683 (normal, below 1): a false alarm in more than a million.
    """
    average = fed(autoregression(0.9, 4000, coordinates=200), max_mcse=10.0)
    assert average.stationary
    z = (average.average()["x"] / average.mcse()["x"]).abs()
    assert (z < 2).sum() > 163
    assert (z < 1).sum() < 170


def test_of_an_odd_number_of_blocks_the_oldest_is_left_out():
    means = torch.randn(17, 3, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(lugsail(means), lugsail(means[1:]), strict=True))


def test_the_start_of_a_window_outlives_merges():
    average, starts = IterateAverage(max_mcse=1e-9), []
    ramp = torch.linspace(100.0, 0.0, 300, dtype=torch.float64).unsqueeze(1)
    for x in (*ramp, *autoregression(0.0, 4000)):
        average.update({"x": x})
        if average.stationary:
            starts.append(len(average._means) * average._length - average.window)
    assert len(starts) > 3000
    assert starts[0] > 0
    assert all(earlier <= later for earlier, later in itertools.pairwise(starts))
    assert starts[-1] - starts[0] < average._length


def test_it_stops_when_the_error_is_small_enough_and_not_before():
    rho, tolerance = 0.9, 0.25
    average, steps = IterateAverage(max_mcse=tolerance), 0
    for x in autoregression(rho, 100_000, start=200.0):
        average.update({"x": x})
        steps += 1
        if average.converged:
            break
    assert average.converged
    assert average.num_updates == steps
    assert variance_of_mean(rho, steps) ** 0.5 < 1.3 * tolerance  # about 1600 iterates are needed
    assert steps < 6000
    assert abs(average.average()["x"].item()) < 4 * tolerance


def test_a_fit_that_still_moves_is_not_stationary():
    drift = (torch.full((1,), 0.01 * step) + torch.randn(1) * 0.01 for step in range(3000))
    average = fed(drift)
    assert not average.stationary
    assert not average.converged
    assert average.r_hat > 1.1


def test_a_window_that_turns_out_to_drift_is_given_up():
    average = fed(autoregression(0.5, 1000), max_mcse=1e-9)
    assert average.stationary
    for step in range(1000):
        average.update({"x": torch.tensor([0.05 * step], dtype=torch.float64)})
    assert not average.stationary


def test_the_slowest_coordinate_decides():
    calm = torch.stack(list(autoregression(0.5, 2000)))
    both = torch.cat([calm, torch.linspace(0, 10, 2000).double().unsqueeze(1)], 1)
    assert fed(calm, max_mcse=0.2).converged
    assert not fed(both, max_mcse=0.2).converged


def test_errors_count_in_the_units_of_the_scale():
    iterates = [100 * x for x in autoregression(0.5, 2000)]
    assert not fed(iterates, max_mcse=0.2).converged
    seen = []

    def scale(average):
        seen.append(average)
        return {"x": torch.tensor(100.0)}

    assert fed(iterates, max_mcse=0.2, scale=scale).converged
    assert set(seen[0]) == {"x"}


def test_the_least_effective_sample_size_is_kept():
    iterates = list(autoregression(0.9, 1600))
    assert fed(iterates, max_mcse=10.0).converged
    assert not fed(iterates, max_mcse=10.0, min_ess=1e4).converged


def test_parameters_that_never_move_are_converged():
    average = fed([torch.ones(2)] * 1000)
    assert average.converged
    assert average.r_hat <= 1
    assert torch.equal(average.average()["x"], torch.ones(2))
    assert float(average.mcse()["x"].max()) == 0
    assert float(average.ess()["x"].min()) == average.window


def test_a_jump_between_two_constants_is_not_stationary():
    average = fed([torch.zeros(1)] * 16 + [torch.ones(1)] * 15, min_window=16)
    assert average.window == 31
    assert average.r_hat == math.inf


def test_before_there_is_a_window_the_later_half_is_averaged():
    average = IterateAverage()
    assert math.isnan(average.r_hat)
    for step in range(5):
        average.update({"x": torch.tensor(float(step))})
    assert average.average()["x"].item() == 2.0
    assert average.window == 5
    with pytest.raises(sf.ScorefnError, match="There are 0 blocks of 12 iterates in the window"):
        average.mcse()


def net():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module.register_buffer("steps", torch.zeros(1))
    return module


def test_a_module_is_averaged_applied_and_restored():
    module, average, seen = net(), IterateAverage(), []
    for _ in range(300):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        average.update(module)
        seen.append(module[0].weight.detach().clone())
    own = {name: value.clone() for name, value in module.state_dict().items()}
    blocks = 300 // 12
    expected = torch.stack(seen[300 - (300 - blocks * 12) - average.window : blocks * 12]).double().mean(0).float()
    with average.applied(module):
        torch.testing.assert_close(module[0].weight.detach(), expected)
        assert module[0].weight.requires_grad
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    with pytest.raises(RuntimeError, match="mine"), average.applied(module):
        raise RuntimeError("mine")
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    average.apply(module)
    torch.testing.assert_close(module[0].weight.detach(), expected)


def test_the_param_store_is_averaged_without_its_constraints():
    with pyro.get_param_store().scope():
        pyro.param("rate", torch.tensor(1.0), constraint=torch.distributions.constraints.positive)
        store, average = pyro.get_param_store(), IterateAverage()
        for value in (1.0, 4.0):
            with torch.no_grad():
                pyro.param("rate").unconstrained().fill_(math.log(value))
            average.update(store)
        with average.applied(store):
            assert pyro.param("rate").item() == pytest.approx(2.0)  # the geometric mean
        assert pyro.param("rate").item() == pytest.approx(4.0)


@pytest.mark.parametrize("seen", [1, 7, 150, 800, 1500])
def test_it_goes_on_from_its_state_to_the_bit(seen):
    iterates = list(autoregression(0.8, 2000, coordinates=2))
    whole = fed(iterates[:seen])
    resumed = IterateAverage()
    resumed.load_state_dict(whole.state_dict())
    for average in (whole, resumed):
        for x in iterates[seen:]:
            average.update({"x": x})
    assert torch.equal(whole.average()["x"], resumed.average()["x"])
    assert (whole.window, whole.r_hat, whole.converged) == (resumed.window, resumed.r_hat, resumed.converged)


def test_the_state_survives_saving(tmp_path):
    average = fed(autoregression(0.5, 500))
    torch.save(average.state_dict(), tmp_path / "state.pt")
    resumed = IterateAverage()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.average()["x"], average.average()["x"])
    assert resumed.average()["x"].dtype == torch.float64
    assert repr(resumed) == repr(average)


def test_a_state_is_not_shared_with_what_it_was_taken_from():
    average = fed(autoregression(0.5, 205))
    state = average.state_dict()
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    average.update({"x": torch.zeros(1)})
    assert all(torch.equal(state[k], v) if isinstance(v, torch.Tensor) else state[k] == v for k, v in before.items())


def test_a_new_phase_forgets():
    average = fed(autoregression(0.5, 2000), max_mcse=0.3)
    assert average.converged
    average.reset()
    assert (average.num_updates, average.converged, average.window) == (0, False, 0)
    average.update({"y": torch.zeros(2)})


def test_refusals():
    for options, message in [
        ({"min_window": 10}, "min_window must be at least 16, but it is 10"),
        ({"max_r_hat": 1.0}, "max_r_hat must be above 1"),
        ({"max_r_hat": math.inf}, "max_r_hat must be above 1, .* and finite, but it is inf"),
        ({"max_mcse": 0.0}, "max_mcse must be above 0"),
        ({"max_mcse": math.inf}, "max_mcse must be above 0 and finite, but it is inf"),
        ({"max_mcse": math.nan}, "max_mcse must be .* but it is nan"),
        ({"min_ess": math.inf}, "min_ess must be above 0 and finite, but it is inf: no fit .* Leave it out"),
        ({"min_ess": -1}, "min_ess must be above 0 and finite, but it is -1"),
        ({"min_ess": 0}, "min_ess must be above 0 and finite, but it is 0"),
        ({"min_ess": math.nan}, "min_ess must be above 0 and finite, but it is nan"),
        ({"max_blocks": 30}, "multiple of 4 and at least 32, but it is 30"),
    ]:
        with pytest.raises(sf.ScorefnError, match=message):
            IterateAverage(**options)
    with pytest.raises(sf.ScorefnError, match="There are no iterates to average"):
        IterateAverage().average()
    with pytest.raises(sf.ScorefnError, match="Tensor has no parameters to read"):
        IterateAverage().update(torch.zeros(3))
    with pytest.raises(sf.ScorefnError, match="no floating-point parameters"):
        IterateAverage().update({"n": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(sf.ScorefnError, match=r"units for \['y'\], but the parameters are \['x'\]"):
        fed(autoregression(0.5, 2000), scale=lambda average: {"y": torch.ones(1)})


def test_bad_iterates_change_nothing():
    average = fed(autoregression(0.5, 500))
    before = str(average.state_dict())
    with pytest.raises(sf.NonFiniteError, match=r"Parameters \['x'\] are NaN or infinite after 500 finite iterates"):
        average.update({"x": torch.tensor([math.nan])})
    with pytest.raises(sf.ShapeError, match=r"x is \(2,\) but was \(1,\)"):
        average.update({"x": torch.zeros(2)})
    with pytest.raises(sf.ShapeError, match=r"\['x', 'y'\] are not in both"):
        average.update({"y": torch.zeros(1)})
    module = nn.Linear(2, 2)
    own = module.weight.detach().clone()
    with pytest.raises(sf.ShapeError, match="other parameters"), average.applied(module):
        pass
    assert torch.equal(module.weight, own)
    state = average.state_dict()
    for change, message in [
        ({"mean": torch.zeros(5)}, "does not fit together"),
        ({"updates": 3}, "3 updates where the blocks hold 500"),
        ({"start": 1000}, "does not fit together"),
    ]:
        with pytest.raises(sf.ScorefnError, match=message):
            average.load_state_dict({**state, **change})
    with pytest.raises(sf.ScorefnError, match=r"The state lacks \['squares'\]"):
        average.load_state_dict({key: value for key, value in state.items() if key != "squares"})
    assert str(average.state_dict()) == before
