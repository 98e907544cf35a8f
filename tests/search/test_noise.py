"""Learning rates by signal-to-noise ratio: the formula, its limits, and a search that needs them."""

import math

import numpy as np
import pytest
import torch

import scorefn as sf
from scorefn.search import CSANES, SignalToNoise

CPU = torch.device("cpu")


def reference(changes, beta, alpha=1.4, gamma=0.1):
    """Rates after each change, written out from the paper."""
    eta, drift, power, rates = 1.0, 0.0, 0.0, []
    for change in changes:
        drift = (1 - beta) * drift + beta * change
        power = (1 - beta) * power + beta * float((change**2).sum())
        square = float((drift**2).sum())
        snr = (square - beta / (2 - beta) * power) / (power - square)
        eta *= np.exp(min(gamma * eta, beta) * np.clip(snr / (alpha * eta) - 1, -1, 1))
        eta = min(1.0, eta)
        rates.append(eta)
    return rates


@pytest.mark.parametrize("signal", [0.0, 0.3, 5.0])
def test_the_rates_are_the_published_formula(signal):
    generator = np.random.default_rng(0)
    steps = generator.normal(size=(60, 4)) + signal
    exponents = generator.normal(size=(60, 4, 4)) + signal * np.eye(4)
    exponents = exponents + exponents.transpose(0, 2, 1)
    rule = SignalToNoise()
    state, found = rule.start(4, CPU), []
    for step, exponent in zip(steps, exponents, strict=True):
        state = rule.after(state, torch.tensor(step), torch.tensor(exponent))
        found.append((state["mean_rate"], state["shape_rate"]))
    mean, shape = zip(*found, strict=True)
    assert mean == pytest.approx(reference(steps, 0.1), rel=1e-12)
    assert shape == pytest.approx(reference(exponents / math.sqrt(2), 0.03), rel=1e-12)


def test_noise_alone_lowers_a_rate_and_signal_alone_keeps_it():
    rule = SignalToNoise()
    generator = torch.Generator().manual_seed(0)
    state, zero = rule.start(10, CPU), torch.zeros(10, 10, dtype=torch.float64)
    for _ in range(400):
        state = rule.after(state, torch.randn(10, dtype=torch.float64, generator=generator), zero)
    assert state["mean_rate"] < 0.05
    assert state["shape_rate"] < 0.05  # nothing at all is no signal
    state = rule.start(10, CPU)
    for _ in range(400):
        state = rule.after(state, torch.ones(10, dtype=torch.float64), zero)
    assert state["mean_rate"] == 1.0


def test_a_rule_has_no_memory_of_its_own():
    rule = SignalToNoise()
    state = rule.start(2, CPU)
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    step, exponent = torch.ones(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    once, twice = rule.after(state, step, exponent), rule.after(state, step, exponent)
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(state[name])) for name in before)
    assert all(torch.equal(torch.as_tensor(once[name]), torch.as_tensor(twice[name])) for name in once)
    assert set(once) == set(state)


def rastrigin(x):
    return 10 * x.shape[1] + (x.square() - 10 * torch.cos(2 * math.pi * x)).sum(1)


def test_the_default_popsize_solves_a_multimodal_problem():
    def ended(**options):
        strategy = CSANES([3.0] * 5, 2.0, seed=0, ftarget=1e-8, maxiter=6000, tolstagnation=0, **options)
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, rastrigin(x))
        return strategy

    plain, careful = ended(), ended(learning_rate=SignalToNoise())
    assert plain.result.best_f > 0.9  # a local optimum
    assert careful.stop == {"ftarget": 1e-8}
    assert repr(careful).startswith("CSANES(dimension=5")


def test_noise_is_averaged_out():
    def ended(**options):
        strategy = CSANES([3.0] * 5, 1.0, seed=0, maxiter=1500, tolstagnation=0, **options)
        generator = torch.Generator().manual_seed(1)
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, x.square().sum(1) + torch.randn(len(x), generator=generator))
        return float(strategy.mean.square().sum())

    assert ended(learning_rate=SignalToNoise()) < 0.2 * ended()


def test_a_search_with_it_goes_on_from_its_state_to_the_bit():
    def steps(strategy, num):
        for _ in range(num):
            x = strategy.ask()
            strategy.tell(x, rastrigin(x))

    strategy, other = (CSANES([3.0] * 3, 2.0, seed=seed, learning_rate=SignalToNoise()) for seed in (0, 1))
    steps(strategy, 10)
    other.load_state_dict(strategy.state_dict())
    steps(strategy, 20)
    steps(other, 20)
    assert torch.equal(strategy.mean, other.mean)
    assert torch.equal(strategy.sigma, other.sigma)
    with pytest.raises(sf.ScorefnError, match="no state of CSANES"):
        CSANES([3.0] * 3, 2.0).load_state_dict(strategy.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be positive, but it is 0.0"),
        ({"beta_mean": 1.0}, "beta_mean must be positive and below 1, but it is 1.0"),
        ({"beta_shape": -0.1}, "beta_shape must be positive and below 1"),
        ({"gamma": math.nan}, "gamma must be positive"),
    ],
)
def test_constants_that_make_no_sense(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        SignalToNoise(**options)
