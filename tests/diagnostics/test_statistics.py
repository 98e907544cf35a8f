"""Gradient statistics against numpy; the comparison's ranking and table."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.diagnostics import Estimation, compare, gradient_statistics, sample_gradients
from scorefn.diagnostics.replicas import replicas


class Recorded:
    """An estimate whose gradients are the rows of a table, in turn."""

    def __init__(self, rows, parameter):
        self.rows, self.parameter, self.calls = rows, parameter, 0

    def __call__(self):
        self.calls += 1
        return (self.rows[self.calls - 1] * self.parameter).sum()


@pytest.fixture
def parameter():
    return torch.zeros(3, dtype=torch.float64, requires_grad=True)


def rows(repeats, deviation=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(repeats, 3, generator=generator, dtype=torch.float64)
    return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + deviation * noise


def test_moments_are_numpys(parameter):
    table = rows(50)
    estimate = Recorded(table, parameter)
    found = gradient_statistics(estimate, parameter, 50)
    data = table.numpy()
    assert estimate.calls == found.repeats == 50
    np.testing.assert_allclose(found.mean[0], data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance[0], data.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error[0], data.std(0, ddof=1) / 50**0.5, rtol=1e-12)
    total = data.var(0, ddof=1).sum()
    assert found.total_variance == pytest.approx(total, rel=1e-12)
    signal = (data.mean(0) ** 2).sum() - total / 50
    assert found.signal_to_noise == pytest.approx(signal / total, rel=1e-10)
    assert found.seconds > 0
    assert parameter.grad is None


def test_signal_to_noise_is_without_bias_and_never_negative(parameter):
    noise = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    assert gradient_statistics(Recorded(noise, parameter), parameter, 2).signal_to_noise == 0.0
    still = torch.ones(3, 3, dtype=torch.float64)
    assert gradient_statistics(Recorded(still, parameter), parameter, 3).signal_to_noise == float("inf")


def test_the_parameters_of_a_module():
    """`module.parameters()` can be walked once only."""
    module = nn.Linear(2, 1)
    inputs = iter(torch.randn(5, 2))
    found = gradient_statistics(lambda: module(next(inputs)).sum(), module.parameters(), 5)
    assert [m.shape for m in found.mean] == [(1, 2), (1,)]
    assert found.variance[1].item() == 0.0


def test_a_parameter_without_influence_has_no_gradient(parameter):
    other = torch.zeros(2, requires_grad=True)
    found = gradient_statistics(Recorded(rows(5), parameter), [parameter, other], 5)
    assert found.mean[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("repeats", [1, 0, -3])
def test_too_few_repeats(parameter, repeats):
    with pytest.raises(sf.ScorefnError, match=f"at least 2.*{repeats}"):
        gradient_statistics(Recorded(rows(5), parameter), parameter, repeats)


def test_an_estimate_that_is_no_scalar(parameter):
    with pytest.raises(sf.ShapeError, match=r"scalar.*\(3,\).*mean"):
        gradient_statistics(lambda: parameter * 1, parameter, 5)
    with pytest.raises(sf.ShapeError, match="scalar"):
        compare({"a": lambda: parameter[:1] * 1}, parameter, repeats=5)
    with pytest.raises(sf.ScorefnError, match="require grad"):
        gradient_statistics(lambda: torch.zeros(()), parameter, 5)


def test_comparison_ranks_by_variance_times_cost(parameter):
    estimates = {
        "noisy": Recorded(rows(40, 10.0), parameter),
        "quiet": Recorded(rows(40, 0.1), parameter),
        "middling": Recorded(rows(40, 1.0), parameter),
    }
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = compare(estimates, parameter, exact=(exact,), repeats=40)
    assert found.names == ("quiet", "middling", "noisy")  # a hundredfold each: no clock can turn that round
    for name, estimate in estimates.items():
        data = estimate.rows.numpy()
        z = np.abs(data.mean(0) - exact.numpy()) / (data.std(0, ddof=1) / 40**0.5)
        assert found.bias_z[name] == pytest.approx(z.max(), rel=1e-9)
        assert found.statistics[name].total_variance == pytest.approx(data.var(0, ddof=1).sum(), rel=1e-12)
        assert found.cost(name) == found.statistics[name].total_variance * found.statistics[name].seconds


def test_a_bias_shows_in_the_comparison(parameter):
    table = rows(1000, 0.1)
    wrong = torch.tensor([1.1, -2.0, 0.5], dtype=torch.float64)
    found = compare({"a": Recorded(table, parameter)}, parameter, exact=[wrong], repeats=1000)
    assert found.bias_z["a"] > 20


def test_exact_may_be_a_tensor_or_walked_once(parameter):
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for given in (exact, iter([exact])):
        estimates = {name: Recorded(rows(9), parameter) for name in "ab"}
        assert set(compare(estimates, parameter, exact=given, repeats=9).bias_z) == {"a", "b"}


@pytest.mark.parametrize("exact", [(), (torch.ones(3), torch.ones(3)), (torch.ones(1),), (torch.ones(3, 1),)])
def test_an_exact_gradient_that_does_not_fit(parameter, exact):
    with pytest.raises(sf.ShapeError):
        compare({"a": Recorded(rows(9), parameter)}, parameter, exact=exact, repeats=9)


def test_the_table(parameter):
    estimates = {"leave-one-out": Recorded(rows(9), parameter), "none": Recorded(rows(9, 5.0), parameter)}
    exact = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    lines = str(compare(estimates, parameter, exact=[exact], repeats=9)).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["estimator", "variance", "SNR"]
    assert lines[1].startswith("leave-one-out")
    assert lines[2].startswith("none")
    assert len({len(line) for line in lines}) == 1
    bare = str(compare({"a": Recorded(rows(9), parameter)}, parameter, repeats=9)).splitlines()
    assert bare[1].split()[-1] == "-"


def test_a_comparison_of_nothing(parameter):
    with pytest.raises(sf.ScorefnError, match="at least one estimate"):
        compare({}, parameter)


def test_estimates_are_taken_in_turn(parameter):
    order = []

    def named(name):
        def estimate():
            order.append(name)
            return parameter.sum()

        return estimate

    compare({"a": named("a"), "b": named("b")}, parameter, repeats=3)
    assert order[-4:] == ["a", "b", "a", "b"]


def test_an_estimate_that_is_not_a_number_is_named_not_ranked():
    parameter = torch.ones(2, requires_grad=True)
    estimates = {"broken": lambda: (parameter * torch.nan).sum(), "fine": lambda: parameter.sum()}
    with pytest.raises(sf.NonFiniteError, match="broken"):
        sf.diagnostics.compare(estimates, parameter, repeats=3)


# ---------------------------------------------------------------------------------------- parts known, and minibatches


def bernoulli():
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    return logits, torch.distributions.Bernoulli(logits=logits)


def weighted(x):
    return (x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).sum(-1).square()


def test_noise_scale_and_deviations_are_of_the_table(parameter):
    table = rows(50)
    found = gradient_statistics(Recorded(table, parameter), parameter, 50)
    data = table.numpy()
    total = data.var(0, ddof=1).sum()
    signal = (data.mean(0) ** 2).sum() - total / 50
    assert found.noise_scale == pytest.approx(total / signal, rel=1e-10)
    np.testing.assert_allclose(found.squared_deviations, ((data - data.mean(0)) ** 2).sum(1), rtol=1e-12)
    assert found.squared_deviations.sum().item() / 49 == pytest.approx(found.total_variance, rel=1e-12)
    assert found.evaluations is found.within is found.between is found.monte_carlo_share is None
    assert "can only be called again" in found.looped


def test_sweeps_and_the_loop_measure_the_same_law():
    """Mean and variance of both against the exact ones, by enumeration of the pairs of draws."""
    logits, p = bernoulli()
    estimator = partial(sf.expectation, num_samples=2)
    values = sf.Enumerate().sample(p)
    pairs = torch.stack([values[[i, j]] for i in range(8) for j in range(8)], 1)  # [2, 64, 3]
    weight = p.log_prob(pairs).sum((0, -1)).exp().detach()
    found = replicas(Estimation(p, weighted, estimator), (logits,)).gradients_at(pairs)
    mean = weight @ found
    exact = sf.diagnostics.exact_gradient(p, weighted, logits)[0]
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-12)
    variance = weight @ (found - mean).square()
    torch.manual_seed(0)
    for subject, repeats in (((p, weighted, estimator), 40_000), (lambda: estimator(p, weighted).sum(), 2000)):
        statistics = gradient_statistics(subject, logits, repeats)
        z = (statistics.mean[0] - mean) / statistics.standard_error[0]
        assert float(z.abs().max()) < 5
        fourth = weight @ (found - mean).pow(4)
        error = ((fourth - variance.square()) / repeats).sqrt()
        assert float(((statistics.variance[0] - variance) / error).abs().max()) < 5
    assert logits.grad is None


def test_evaluations_are_counted():
    logits, p = bernoulli()
    for estimator, count in (
        (partial(sf.expectation, num_samples=6), 6),
        (sf.DisARM(3), 6),
        (sf.LocalExpectation(), 4),
    ):
        found = gradient_statistics((p, weighted, estimator), logits, 40)
        assert found.evaluations == count
        assert found.looped is None
        assert found.seconds > 0


def test_few_repeats_and_own_estimators_are_looped():
    logits, p = bernoulli()

    def own(p, f):
        return sf.expectation(p, f, 4)

    assert "no more than 32" in gradient_statistics((p, weighted, sf.DisARM()), logits, 10).looped
    found = gradient_statistics((p, weighted, own), logits, 40)
    assert "own is not among" in found.looped
    assert found.evaluations == 4
    assert found.mean[0].shape == (3,)


def test_a_graph_behind_p_is_kept():
    weight = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
    p = torch.distributions.Bernoulli(logits=(weight @ weight).sum(0).sin())
    for repeats in (5, 50):
        gradient_statistics((p, weighted, sf.DisARM()), weight, repeats)
    sf.DisARM()(p, weighted).backward()


def test_the_noise_of_minibatches_is_split():
    """Batch r has the gradients r + u_rm: one-way analysis of variance, by numpy."""
    parameter = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 5, 2, generator=generator, dtype=torch.float64) + torch.arange(6.0).reshape(6, 1, 1)
    calls = [0] * 6

    def subject(batch):
        calls[batch] += 1
        return (table[batch, (calls[batch] - 1) % 5] * parameter).sum()

    found = gradient_statistics(subject, parameter, 30, batches=range(6))
    data = np.stack([np.roll(table[r].numpy(), -1, 0) for r in range(6)])  # the first call only looked
    within = data.var(1, ddof=1).mean(0)
    means = data.mean(1)
    between = means.var(0, ddof=1) - within / 5
    assert found.repeats == 30
    assert found.within == pytest.approx(within.sum(), rel=1e-10)
    assert found.between == pytest.approx(between.sum(), rel=1e-10)
    assert found.total_variance == pytest.approx((within + between).sum(), rel=1e-10)
    np.testing.assert_allclose(found.variance[0], within + between, rtol=1e-10)
    np.testing.assert_allclose(found.mean[0], means.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.standard_error[0], means.std(0, ddof=1) / 6**0.5, rtol=1e-10)
    assert found.monte_carlo_share == pytest.approx(within.sum() / (within + between).sum(), rel=1e-10)
    signal = (means.mean(0) ** 2).sum() - (means.var(0, ddof=1) / 6).sum()
    assert found.signal_to_noise == pytest.approx(signal / (within + between).sum(), rel=1e-10)
    assert found.squared_deviations.shape == (30,)


def test_minibatches_of_estimations():
    logits, p = bernoulli()

    def subject(target):
        return p, lambda x: (x - target).square().sum(-1), sf.DisARM()

    found = gradient_statistics(subject, logits, 200, batches=[0.1, 0.4, 0.9])
    assert found.looped is None
    assert found.evaluations == 2
    assert found.repeats == 198
    assert 0 < found.monte_carlo_share < 1
    one = gradient_statistics(subject, logits, 200, batches=[0.4])
    assert one.between == 0.0
    assert one.monte_carlo_share == 1.0
    assert one.within == pytest.approx(one.total_variance)


def test_batches_that_cannot_be_split(parameter):
    for batches, message in (([], "no batches"), (range(6), "10 repeats on 6 batches.*repeats=12")):
        with pytest.raises(sf.ScorefnError, match=message):
            gradient_statistics(lambda batch: parameter.sum(), parameter, 10, batches=batches)
    with pytest.raises(sf.ScorefnError, match="function of one minibatch"):
        gradient_statistics((1, 2, 3), parameter, 10, batches=[0])


def test_sample_gradients():
    logits, p = bernoulli()
    assert sample_gradients((p, weighted, sf.DisARM()), logits, 50).shape == (50, 3)
    assert sample_gradients(lambda: sf.DisARM()(p, weighted).sum(), (logits,), 3).shape == (3, 3)
    for params, count, message in (
        ((), 3, "no parameters"),
        (logits.detach(), 3, "require grad"),
        (logits, 0, "count"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            sample_gradients((p, weighted, sf.DisARM()), params, count)


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (lambda q: lambda: 1.0, "returned a float.*not .item"),
        (lambda q: lambda: None, "returned a NoneType"),
        (lambda q: lambda: q.detach().sum(), "does not require grad"),
        (lambda q: lambda: 0 * q.sum() + 2, "constant.*always 2.*gradient 0"),
        (lambda q: 3.0, "callable without arguments"),
        (lambda q: (1, 2, 3), "int is not a measure"),
        (lambda q: (torch.distributions.Bernoulli(logits=q), lambda x: 1 + 0 * x[:, 0], sf.DisARM()), "constant.*rare"),
    ],
)
@pytest.mark.parametrize("repeats", [4, 40])
def test_estimates_that_say_nothing(parameter, subject, message, repeats):
    with pytest.raises(sf.ScorefnError, match=message):
        gradient_statistics(subject(parameter), parameter, repeats)
    assert parameter.grad is None


def test_an_estimate_of_other_parameters(parameter):
    other = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match="none of the given parameters"):
        gradient_statistics(lambda: other.sum(), parameter, 4)


def test_repeats_that_are_no_number(parameter):
    for repeats in (2.5, "9", True, None):
        with pytest.raises(sf.ScorefnError, match="repeats must be an integer of at least 2"):
            gradient_statistics(parameter.sum, parameter, repeats)


def test_a_graph_that_is_gone(parameter):
    hidden = parameter.exp()
    with pytest.raises(sf.ScorefnError, match=r"graph that the estimate before it has freed.*\(p, f, estimator\)"):
        gradient_statistics(lambda: hidden.exp().sum(), parameter, 4)
