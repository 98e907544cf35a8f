"""Enumeration: equal to sums written out, of every finite support, with problems told apart."""

import pytest
import torch
import torch.distributions as td

import scorefn as sf
from tests.estimators.certificates import PROBLEMS, check_unbiased
from tests.test_anchors import close, doubles

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", PROBLEMS)
def test_value_and_gradient_are_exact(name):
    problem = PROBLEMS[name]

    def estimate(theta, c):
        return sf.Enumerate(problem.batch_ndim)(problem.build(theta), lambda x: problem.f(x, c))

    check_unbiased(problem, estimate, torch.ones(1, 2))


@pytest.mark.parametrize("p", [0.5, 0.3, 0.1, 0.05])
def test_one_bernoulli(p):
    logit = torch.logit(doubles(p)).requires_grad_()
    value = sf.Enumerate()(td.Bernoulli(logits=logit), lambda x: (x - 0.45).square())
    assert close(value.detach(), p * 0.55**2 + (1 - p) * 0.45**2)
    assert close(torch.autograd.grad(value, logit)[0], p * (1 - p) * 0.1)


def test_every_derivative_is_right():
    theta = doubles(0.4).requires_grad_()
    p = torch.sigmoid(theta)
    value, right = sf.Enumerate()(td.Bernoulli(logits=theta), lambda x: x), p
    for _ in range(3):
        value, right = (torch.autograd.grad(v, theta, create_graph=True)[0] for v in (value, right))
        assert close(value.detach(), right.detach())


@pytest.mark.parametrize("batch_ndim", [0, 1])
def test_families_beyond_the_sites(batch_ndim):
    theta, weights = torch.randn(2), torch.randn(2, 2)
    for p, mean in [
        (td.Binomial(4, logits=theta), 4 * theta.sigmoid()),
        (
            td.MixtureSameFamily(td.Categorical(logits=weights), td.Bernoulli(logits=theta.expand(2, 2))),
            (weights.softmax(-1) * theta.sigmoid()).sum(-1),
        ),
        (
            td.MixtureSameFamily(
                td.Categorical(logits=weights), td.Independent(td.Bernoulli(logits=theta.expand(2, 2, 2)), 1)
            ),
            theta.sigmoid().sum().expand(2),
        ),
    ]:
        found = sf.Enumerate(batch_ndim)(p, lambda x, kept=batch_ndim: x.reshape(*x.shape[: 1 + kept], -1).sum(-1))
        torch.testing.assert_close(found, mean if batch_ndim else mean.sum(), rtol=1e-12, atol=1e-12)


def test_several_choices_of_different_sizes():
    logits = torch.randn(3, 5)
    p = sf.trajectories.MultiCategorical([2, 3], logits)
    right = torch.einsum("bi,bj,ij->b", logits[:, :2].softmax(-1), logits[:, 2:].softmax(-1), torch.eye(2, 3))
    found = sf.Enumerate(1)(p, lambda x: (x[..., 0] == x[..., 1]).double())
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_a_users_measure_with_its_support():
    class Coins:
        def __init__(self, theta):
            self.theta = theta

        def enumerate_support(self):
            return {"first": torch.tensor([0.0, 0.0, 1.0, 1.0]), "second": torch.tensor([0.0, 1.0, 0.0, 1.0])}

        def log_prob(self, x):
            first = td.Bernoulli(logits=self.theta).log_prob(x["first"])
            return first + td.Bernoulli(logits=self.theta + x["first"]).log_prob(x["second"])

    theta = doubles(0.3).requires_grad_()
    q = theta.sigmoid()
    right = q * (theta + 1).sigmoid() + (1 - q) * q
    p = Coins(theta)
    found = sf.Enumerate()(p, lambda x: x["second"])
    assert close(found.detach(), right.detach())
    assert close(*[torch.autograd.grad(v, theta)[0] for v in (found, right)])
    x = sf.Enumerate().sample(p)
    assert close((sf.Enumerate().weights(p, x) * x["second"]).sum(), right.detach())


def test_the_points_and_their_weights():
    p = td.Bernoulli(torch.tensor([[0.2, 0.5], [0.9, 0.3], [0.0, 1.0]]))
    for batch_ndim, size, problems in [(None, 64, ()), (1, 4, (3,)), (2, 2, (3, 2))]:
        estimator = sf.Enumerate(batch_ndim)
        x = estimator.sample(p)
        weights = estimator.weights(p, x)
        assert x.shape == (size, 3, 2)
        assert weights.shape == (size, *problems)
        assert len(torch.unique(x, dim=0)) == size
        torch.testing.assert_close(weights.sum(0), torch.ones(problems))


def test_no_nan_in_single_precision():
    logits = torch.tensor([-300.0, 300.0, 0.0], dtype=torch.float32, requires_grad=True)
    sf.Enumerate()(td.Bernoulli(logits=logits), lambda x: x.sum(-1)).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, 0.0, 0.25], dtype=torch.float32))
    ruled_out = torch.tensor([0.0, -torch.inf, 1.0], dtype=torch.float32, requires_grad=True)
    sf.Enumerate()(td.Categorical(logits=ruled_out), lambda x: x.float()).backward()
    assert torch.isfinite(ruled_out.grad).all()


@pytest.mark.parametrize(
    ("p", "f", "batch_ndim", "error", "message"),
    [
        (lambda: td.Bernoulli(torch.full((21,), 0.5)), None, None, sf.ScorefnError, r"2\^21 joint values.*1048576"),
        (lambda: td.Poisson(torch.ones(2)), None, None, sf.ScorefnError, "Poisson cannot be enumerated.*not finite"),
        (lambda: td.Bernoulli(torch.zeros(0)), None, None, sf.ScorefnError, "size 0"),
        (lambda: td.Binomial(torch.tensor([1, 2]), torch.zeros(2)), None, None, sf.ScorefnError, "Binomial"),
        (lambda: object(), None, None, sf.ScorefnError, "object cannot be enumerated"),
        (lambda: td.Bernoulli(torch.zeros(3)), lambda x: x, None, sf.ShapeError, r"Enumerate\(\.\.\., batch_ndim=1\)"),
        (lambda: td.Bernoulli(torch.zeros(3)), lambda x: x[:, None], None, sf.ShapeError, r"\(8, 1, 3\)"),
        (lambda: td.Bernoulli(torch.zeros(3)), None, 1, sf.ShapeError, r"\(2,\).*\(2, 3\)"),
        (lambda: td.Bernoulli(torch.zeros(3)), None, 2, sf.ShapeError, "batch_ndim=2"),
        (lambda: td.Bernoulli(torch.zeros(3)), lambda x: x.sum(-1) / 0, None, sf.NonFiniteError, "nan at draw 0 of 8"),
    ],
)
def test_bad_input_is_refused(p, f, batch_ndim, error, message):
    with pytest.raises(error, match=message):
        sf.Enumerate(batch_ndim)(p(), f or (lambda x: x.sum(-1)))


@pytest.mark.parametrize("batch_ndim", [-1, 1.0, True, "all"])
def test_a_batch_ndim_that_is_no_count_is_refused(batch_ndim):
    with pytest.raises(sf.ScorefnError, match="batch_ndim=.*must be None or an integer"):
        sf.Enumerate(batch_ndim)
