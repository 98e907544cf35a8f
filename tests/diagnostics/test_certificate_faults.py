"""What invites a wrong verdict of ``check_unbiased``: the right one, or an error that says what is wrong."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Gamma, Independent, MultivariateNormal, Normal

import scorefn as sf
from scorefn.diagnostics import FixedSample, Hotelling, Sequential, check_unbiased, exact_gradient
from scorefn.diagnostics.guards import Unchanged, density_fault

PAIR = partial(sf.expectation, num_samples=2)


@pytest.fixture
def logits():
    return torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)


def f(x):
    return (x.sum(-1) - 1.2).square()


# ------------------------------------------------------------------------------------------------ rounding and zero


@pytest.mark.parametrize("constant", [3.0, 3e6])
@pytest.mark.parametrize("baseline", ["default", None])
def test_a_constant_f_has_gradient_zero(logits, constant, baseline):
    estimator = PAIR if baseline else partial(PAIR, baseline=None)
    found = check_unbiased((Bernoulli(logits=logits), lambda x: 0 * x.sum(-1) + constant, estimator), params=logits)
    assert (found.verdict, found.method) == ("unbiased", "exact")
    assert "zero to rounding" in found.reason


def test_a_bias_at_a_stationary_point_is_one(logits):
    def off(p, f):
        return PAIR(p, f) + 0.1 * p.logits.sum()

    found = check_unbiased((Bernoulli(logits=logits), lambda x: 0 * x.sum(-1) + 3, off), params=logits)
    assert found.verdict == "biased"
    assert "is zero, and the exact mean is 0.1 " in found.reason


def test_a_gradient_below_rounding_asks_for_another_point(logits):
    f_of_one = partial(PAIR, baseline=None)
    found = check_unbiased((Bernoulli(logits=logits), lambda x: f(x) + 1e9, f_of_one), params=logits)
    assert found.verdict == "inconclusive"
    assert "subtract a constant from f" in found.reason


def test_float32_beside_a_large_constant(logits):
    single = logits.detach().float().requires_grad_()
    p = Bernoulli(logits=single)
    found = check_unbiased((p, lambda x: 1e6 + f(x), PAIR), params=single)
    assert found.verdict == "inconclusive"
    assert "use float64" in found.reason
    right = exact_gradient(Bernoulli(logits=logits), f, logits)[0]
    # 2^16 is a power of 2, 1 / 4 its unit in the last place over 2^6: f is exact there, and nothing else is lost
    exact = exact_gradient(p, lambda x: 2.0**16 + x.sum(-1).square(), single)[0]
    plain = exact_gradient(Bernoulli(logits=logits), lambda x: x.sum(-1).square(), logits)[0]
    assert torch.allclose(exact.double(), plain, rtol=2e-6, atol=0)
    shifted = exact_gradient(Bernoulli(logits=logits), lambda x: 1e6 + f(x), logits)[0]
    assert torch.allclose(shifted, right, rtol=1e-8, atol=0)


# ----------------------------------------------------------------------------------------------- hidden randomness


def test_a_random_f_has_no_exact_reference(logits):
    generator = np.random.default_rng(0)
    for noise in (torch.randn, lambda n: torch.as_tensor(generator.standard_normal(n))):
        found = check_unbiased(
            (Bernoulli(logits=logits), lambda x, noise=noise: f(x) + 0.1 * noise(len(x)).double(), PAIR),
            params=logits,
            repeats=4000,
            bias=0.5,
        )
        assert (found.verdict, found.method) == ("unbiased", "fixed sample")
        assert "f is random" in found.remark
        assert "relative to the library's own estimate" in found.reason


def test_a_private_generator_is_found_by_making_all_again(logits):
    generator = np.random.default_rng(0)
    p = Bernoulli(logits=logits)

    def rare(p, f):
        return PAIR(p, f) * (11.0 if generator.random() < 0.01 else 1.0)

    def roulette(p, f):
        return PAIR(p, f) * (2.0 if generator.random() < 0.5 else 0.0)

    for estimator in (rare, roulette):
        found = check_unbiased((p, f, estimator), params=logits, repeats=2000)
        assert found.verdict == "inconclusive"
        assert "two results on the same draws" in found.remark
    assert check_unbiased((p, f, roulette), params=logits, repeats=4000, bias=0.4)


# ------------------------------------------------------------------------------------------------ sampler and density


class Steeper(Bernoulli):
    def log_prob(self, value):
        return 1.3 * super().log_prob(value)


class Fair(Bernoulli):
    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.rand(*sample_shape, *self.batch_shape).lt(0.5).double()


class Same(Bernoulli):
    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return super().sample(sample_shape)


class SteeperNormal(Normal):
    def log_prob(self, value):
        return 1.3 * super().log_prob(value)


class WiderNormal(Normal):
    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return 1.2 * super().sample(sample_shape)


@pytest.mark.parametrize("test", [None, FixedSample(300)])
def test_another_density_than_that_of_the_draws_never_passes(logits, test):
    mean = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    unit = torch.ones((), dtype=torch.float64)
    for p, params, message in (
        (Steeper(logits=logits), logits, "of the 8 values of Steeper sum to 0.56"),
        (Independent(Steeper(logits=logits), 1), logits, "sum to 0.56"),
        (Fair(logits=logits), logits, "sample and log_prob are of two laws"),
        (SteeperNormal(mean, unit), mean, "no density of the normal"),
        (WiderNormal(mean, unit), mean, "do not follow the normal"),
    ):
        found = check_unbiased((p, lambda x: x.reshape(len(x), -1).sum(1).square(), PAIR), params=params, test=test)
        assert found.verdict == "inconclusive"
        assert message in found.reason
    assert check_unbiased((Same(logits=logits), f, PAIR), params=logits)


def test_the_total_is_exact_and_right_samplers_pass(logits):
    q = logits.detach().sigmoid()
    total = (q**1.3 + (1 - q) ** 1.3).prod()
    assert f"{float(total):.6g}" in density_fault(Steeper(logits=logits), 1e-9)

    class Plain(MultivariateNormal):
        pass

    tril = torch.tensor([[1.0, 0.0], [0.7, 0.4]], dtype=torch.float64)
    assert not density_fault(Plain(torch.zeros(2, dtype=torch.float64), scale_tril=tril), 1e-9)
    p = Bernoulli(logits=logits)
    p.sample = lambda sample_shape: torch.ones(*sample_shape, 3, dtype=torch.float64)
    assert "two laws" in density_fault(p, 1e-9)
    p.sample = lambda sample_shape: torch.full((*sample_shape, 3), 0.5, dtype=torch.float64)
    assert "not in its support" in density_fault(p, 1e-9)


def test_a_right_reference_is_not_blamed_for_a_wrong_density(logits):
    right = exact_gradient(Bernoulli(logits=logits), f, logits)[0]
    found = check_unbiased((Steeper(logits=logits), f, PAIR), right, logits)
    assert found.verdict != "unbiased"
    assert "sum to 0.56" in str(found)
    assert "reference" not in found.remark


# ------------------------------------------------------------------------------------------------------- parameters


def test_parameters_that_the_estimate_does_not_reach(logits):
    p = Bernoulli(logits=logits)
    exact = exact_gradient(p, f, logits)[0]
    for other in (logits.detach().clone().requires_grad_(), logits * 1):
        for subject, given in (((p, f, PAIR), None), (lambda: PAIR(p, f), exact)):
            for test in (None, FixedSample(10)):
                with pytest.raises(sf.ScorefnError, match=r"depends on none.*\(3,\).*not copies"):
                    check_unbiased(subject, given, [other], test=test)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert check_unbiased((p, f, PAIR), params=[logits, unused]).bias.shape == (5,)


def test_an_estimate_that_changes_the_parameters_is_refused_and_undone(logits):
    p, before = Bernoulli(logits=logits), logits.detach().clone()

    def moved(p, f):
        logits.data.add_(0.1)
        return PAIR(p, f)

    def stepped(p, f):
        value = PAIR(p, f)
        value.backward(retain_graph=True)
        return value

    for grad in (None, torch.ones(3, dtype=torch.float64)):
        logits.grad = grad
        for estimator, message in ((moved, r"values of params\[0\]"), (stepped, r"params\[0\].grad")):
            with pytest.raises(sf.ScorefnError, match=message):
                check_unbiased((p, f, estimator), params=logits)
            with pytest.raises(sf.ScorefnError, match=message):
                check_unbiased(lambda estimator=estimator: estimator(p, f), before, logits, repeats=5)
            assert torch.equal(logits.detach(), before)
            assert logits.grad is grad
            assert grad is None or bool((grad == 1).all())

    def interrupted():
        with Unchanged([logits]):
            logits.data.add_(1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(logits.detach(), before)


# ------------------------------------------------------------------------------------------------------------- words


def test_a_passing_sample_says_which_events_it_has_not_excluded():
    q = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    exact = torch.ones(1, dtype=torch.float64)
    open_ended = check_unbiased(lambda: q.sum(), exact, q, repeats=5000)
    assert "rarer than about 0.2 in one estimate were not excluded" in open_ended.reason
    assert "rarer" not in check_unbiased(lambda: q.sum(), exact, q, repeats=5000, rarest=0.5).reason


def test_a_verdict_by_the_own_estimate_says_so():
    rate = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    p = Gamma(torch.tensor(2.0, dtype=torch.float64), rate)
    found = check_unbiased((p, torch.sqrt, PAIR), params=rate, repeats=1000)
    assert found.reason.endswith("relative to the library's own estimate, not to an exact gradient.")


# ------------------------------------------------------------------------------------------------------------ errors


def test_arguments_of_another_type(logits):
    subject = (Bernoulli(logits=logits), f, PAIR)
    for options, message in (
        ({"params": torch.nn.Linear(2, 2)}, "params is a Linear.*module.parameters"),
        ({"params": 3}, "params is a int"),
        ({"params": torch.zeros(0, requires_grad=True)}, r"hold no numbers.*\(0,\)"),
        ({"exact": 3.0}, r"exact\[0\] is a float"),
        ({"exact": 3}, r"exact\[0\] is a int"),
        ({"exact": [1.0, 2.0, 3.0]}, r"exact\[0\] is a float"),
        ({"exact": np.ones(3)}, "exact is a ndarray.*as_tensor"),
        ({"exact": np.ones(())}, "exact is a ndarray"),
        ({"exact": torch.ones(3) * 1j}, r"exact\[0\] is of torch.complex64"),
        ({"bias": "x"}, "bias='x' must be positive"),
        ({"bias": 1.0}, "bias=1.0 must be below 1"),
        ({"bias": float("nan")}, "bias=nan"),
        ({"rarest": "x"}, "rarest='x' must be a probability"),
        ({"false_alarm": "x"}, "false_alarm='x' must be a probability"),
        ({"false_alarm": None}, "false_alarm=None"),
        ({"test": 3}, "test=3 is no sampling test"),
        ({"test": FixedSample}, "is no sampling test: give an instance"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            check_unbiased(subject, **{"params": logits, **options})


@pytest.mark.parametrize("test", [FixedSample(), Hotelling(), Sequential()])
def test_what_is_judged_is_a_tensor_of_real_numbers(test):
    for rows, kind in (
        (np.ones((5, 2)), "a ndarray"),
        ([[1.0, 2.0]], "a list"),
        (torch.ones(5, 2).long(), "of torch.int64"),
        (torch.ones(5, 2) * 1j, "of torch.complex64"),
    ):
        with pytest.raises(sf.ScorefnError, match=f"gradients must be .* {kind}"):
            test.judge(rows, torch.ones(2))
    with pytest.raises(sf.ScorefnError, match="exact must be .* a list"):
        test.judge(torch.rand(5, 2), [1.0, 1.0])
    with pytest.raises(sf.ScorefnError, match="rarest='x'"):
        type(test)(rarest="x")


def test_estimates_without_a_gradient(logits):
    p = Bernoulli(logits=logits)
    with pytest.raises(sf.ScorefnError, match="complex128.*real part"):
        check_unbiased((p, f, lambda p, f: PAIR(p, f) * 1j), params=logits)
    with pytest.raises(sf.ScorefnError, match=r"dimension of size 0.*\(0,\)"):
        check_unbiased((Bernoulli(logits=logits[:0]), f, PAIR), params=logits)


def test_a_graph_that_was_freed(logits):
    p = Bernoulli(logits=2.0 * logits)
    PAIR(p, f).backward()
    for call in (
        lambda: check_unbiased((p, f, PAIR), params=logits),
        lambda: check_unbiased(lambda: PAIR(p, f), torch.ones(3), logits),
        lambda: exact_gradient(p, f, logits),
    ):
        with pytest.raises(sf.ScorefnError, match="freed by an earlier backward.*retain_graph=True"):
            call()
