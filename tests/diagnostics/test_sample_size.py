"""The number of draws that follows the noise: exact measurements in, exact numbers out."""

import itertools
import math
import pickle

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import SampleSize
from scorefn.diagnostics.halves import moments


def test_it_settles_where_the_target_is_reached():
    """|g|^2 = 2 and V = 30: a ratio of 4 needs 60 draws."""
    size, seen = SampleSize(4.0, most=1000), []
    for _ in range(8):
        size.update(2.0, 30.0)
        seen.append(size.num_samples)
    assert seen == [4, 8, 16, 32, 60, 60, 60, 60]
    assert size.noise_scale == pytest.approx(15.0)
    assert size.signal_to_noise == pytest.approx(4.0)
    assert not size.out_of_reach
    for _ in range(300):
        size.update(30.0, 30.0)
    assert size.num_samples == 4


def test_one_update_is_the_norm_test_smoothed():
    """The ratio of decayed means, and never the mean of ratios."""
    size, values = SampleSize(1.0, least=50, most=60, decay=0.5, hysteresis=1.0), [(2.0, 9.0), (-1.0, 5.0), (4.0, 7.0)]
    for signal, variance in values:
        size.update(signal, variance)
    weights = [0.125, 0.25, 0.5]
    signal, variance = (sum(w * v[i] for w, v in zip(weights, values, strict=True)) for i in (0, 1))
    assert size.noise_scale == pytest.approx(variance / signal, rel=1e-12)


def test_hysteresis_holds_small_changes():
    size = SampleSize(1.0, least=2, most=1000, decay=0.0, hysteresis=1.2)
    for _ in range(8):
        size.update(1.0, 100.0)
    assert size.num_samples == 100
    for variance in (119.0, 84.0, 120.0):
        size.update(1.0, variance)
        assert size.num_samples == 100
    size.update(1.0, 121.0)
    assert size.num_samples == 121


def test_out_of_reach_is_said_and_most_is_never_passed():
    size = SampleSize(4.0, least=2, most=100)
    for _ in range(20):
        size.update(0.1, 30.0)
        assert size.num_samples <= 100
    assert size.num_samples == 100
    assert size.out_of_reach
    assert size.signal_to_noise == pytest.approx(100 * 0.1 / 30)
    assert repr(size) == "SampleSize(num_samples=100, SNR 0.333 of 4, out of reach)"
    size.update(-100.0, 30.0)  # no signal at all
    assert size.noise_scale == math.inf
    assert size.num_samples == 100


def test_without_noise_the_least_is_enough():
    size = SampleSize(4.0, least=3, most=100)
    assert size.num_samples == 3
    assert math.isnan(size.noise_scale)
    assert not size.out_of_reach
    size.update(1.0, 0.0)
    assert (size.noise_scale, size.signal_to_noise, size.num_samples) == (0.0, math.inf, 3)


def test_multiples_for_couplings():
    size = SampleSize(1.0, least=3, most=31, multiple=4, decay=0.0, hysteresis=1.0)
    assert size.num_samples == 4
    for _ in range(3):
        size.update(1.0, 9.0)
    assert size.num_samples == 12
    for _ in range(3):
        size.update(1.0, 1000.0)
    assert size.num_samples == 28
    assert size.out_of_reach


def test_signal_and_variance_of_the_halves_are_unbiased():
    """All four draws of a bit, without baseline: |g|^2 and the variance of one draw, exactly."""
    theta = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    p = Bernoulli(logits=theta)
    total = torch.zeros(2, dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=4):
        x = torch.tensor(bits, dtype=torch.float64)
        surrogate = (2 + 3 * x) * p.log_prob(x)
        found = moments(surrogate, theta)
        total += p.log_prob(x).sum().exp().detach() * torch.tensor(
            [found.agreement, found.variance], dtype=torch.float64
        )
    q = p.probs.item()
    g = 3 * q * (1 - q)
    variance = q * (5 * (1 - q)) ** 2 + (1 - q) * (2 * q) ** 2 - g**2
    torch.testing.assert_close(total, torch.tensor([g**2, variance], dtype=torch.float64), rtol=1e-12, atol=0)


def draws_of(N, logits):
    return sf.draw(Bernoulli(logits=logits), lambda x: (x - 0.45).square().sum(-1), N)


def test_it_observes_every_so_many_calls():
    torch.manual_seed(0)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    size, twin = SampleSize(4.0, least=8, most=64, every=3), SampleSize(4.0, least=8, most=64)
    for call in range(7):
        surrogate = sf.surrogate(draws_of(size.num_samples, logits), baseline=sf.LeaveOneOut())
        if call % 3 == 0:
            found = moments(surrogate, logits)
            twin.update(found.agreement, found.variance)
        size.observe(surrogate, logits)
        assert size.noise_scale == twin.noise_scale
        assert size.num_samples == twin.num_samples
    assert logits.grad is None


def test_a_known_gradient_saves_a_pass():
    torch.manual_seed(0)
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    surrogate = sf.surrogate(draws_of(10, logits), baseline=sf.LeaveOneOut())
    known = torch.autograd.grad(surrogate.mean(), logits, retain_graph=True)
    one, two = SampleSize(1.0, most=64), SampleSize(1.0, most=64)
    one.observe(surrogate, logits)
    two.observe(surrogate, logits, gradient=known)
    assert one.noise_scale == pytest.approx(two.noise_scale, rel=1e-10)


def test_the_state_goes_on():
    size, other = SampleSize(4.0, most=100), SampleSize(4.0, most=100)
    for _ in range(5):
        size.update(2.0, 30.0)
    other.load_state_dict(pickle.loads(pickle.dumps(size.state_dict())))
    for each in (size, other):
        each.update(1.0, 25.0)
    assert size.state_dict() == other.state_dict()


def test_a_bad_state_changes_nothing():
    size = SampleSize(4.0, most=100, multiple=2)
    size.update(2.0, 30.0)
    state = size.state_dict()
    for change, message in [
        ({"num_samples": 101}, "The state has num_samples = 101, but here it is a multiple of 2 from 2 to 100"),
        ({"num_samples": 5}, "multiple of 2"),
        ({"num_samples": 2.5}, "num_samples must be an integer"),
        ({"signal": math.nan}, "signal must be a finite number"),
        ({"variance": -1.0}, "this is not a state that was saved"),
        ({"weight": 1.5}, "this is not a state that was saved"),
        ({"calls": -1}, "this is not a state that was saved"),
        ({"other": 1}, r"The state of a SampleSize has \['calls', .*\], but this one has"),
    ]:
        with pytest.raises(sf.ScorefnError, match=message):
            size.load_state_dict({**state, **change})
        assert size.state_dict() == state
    with pytest.raises(sf.ScorefnError, match="but this one has list"):
        size.load_state_dict([])


def test_refusals():
    for bad in (0, -1.0):
        with pytest.raises(sf.ScorefnError, match=r"target must be above 0"):
            SampleSize(bad, most=9)
    for bad in (math.nan, math.inf, "4", None, torch.ones(2), True):
        with pytest.raises(sf.ScorefnError, match=r"target must be a finite number"):
            SampleSize(bad, most=9)
    for bad in (1.0, -0.1):
        with pytest.raises(sf.ScorefnError, match=r"decay must lie in \[0, 1\)"):
            SampleSize(1.0, most=9, decay=bad)
    with pytest.raises(sf.ScorefnError, match="hysteresis must be a factor of 1 or more, but it is 0.5"):
        SampleSize(1.0, most=9, hysteresis=0.5)
    with pytest.raises(sf.ScorefnError, match="There is no multiple of 1 from least=10 to most=9"):
        SampleSize(1.0, least=10, most=9)
    for name in ("least", "most", "multiple", "every"):
        with pytest.raises(sf.ScorefnError, match=f"{name} must be an integer of at least 1, but it is 0"):
            SampleSize(1.0, **{"most": 9, name: 0})
    size = SampleSize(1.0, most=9)
    before = size.state_dict()
    for signal, variance, message in [
        (math.nan, 1.0, "signal must be a finite number"),
        (1.0, math.inf, "variance must be a finite number"),
        (1.0, -1.0, "variance must not be negative"),
    ]:
        with pytest.raises(sf.ScorefnError, match=message):
            size.update(signal, variance)
        assert size.state_dict() == before
    with pytest.raises(sf.ShapeError, match="The surrogate is a scalar"):
        size.observe(torch.zeros((), requires_grad=True) * 2, [torch.zeros((), requires_grad=True)])
    assert size.state_dict() == before
