"""The plain importance-weighted bound, exact over all draws, and what stands in for each weight, by brute force."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal

import scorefn as sf
from scorefn.posteriors import ArithmeticMean, BoundOnly, GeometricMean, importance_weighted_elbo
from scorefn.posteriors.importance_weighted import without_each
from tests.posteriors.problems import number

EXACT = 1e-10


def brute_force(log_w, mean):
    """Bound and share without each particle, one after the other."""
    N = len(log_w)
    bound, share = torch.zeros_like(log_w), torch.ones_like(log_w)
    for n in range(N):
        others = torch.cat([log_w[:n], log_w[n + 1 :]])
        replaced = torch.cat([others, mean(others)[None]])
        if (replaced > -torch.inf).any():
            bound[n] = replaced.logsumexp(0) - math.log(N)
            share[n] = replaced.softmax(0)[-1]
    return bound, share


EXTREME = [
    [0.3, -1.2, 0.8, 0.1],
    [1e4, 0.0, -3.0, 2.0],
    [-1e4, -1e4 - 1, -1e4 + 2],
    [-torch.inf, 0.5, 0.2],
    [-torch.inf, -torch.inf, 0.2],
    [-torch.inf, 1e5, -1e5, -torch.inf],
    [0.7, 0.2],
    [-torch.inf, 0.2],
    [0.7],
]


@pytest.mark.parametrize("log_w", EXTREME)
def test_the_bound_without_each_particle(log_w):
    log_w = number(log_w)
    for baseline, mean in (
        (GeometricMean(), lambda others: others.mean() if len(others) else number(-torch.inf)),
        (ArithmeticMean(), lambda others: others.logsumexp(0) - math.log(max(len(others), 1))),
    ):
        for ours, truth in zip(without_each(log_w, baseline), brute_force(log_w, mean), strict=True):
            digits = (
                1e-15 * log_w[log_w.isfinite()].abs().max().item()
            )  # a logarithm of 1e4 has twelve behind its point
            torch.testing.assert_close(ours, truth, rtol=0, atol=1e-15 + 10 * digits)
            assert ours.isfinite().all()


def test_a_dominating_weight_leaves_the_others_their_digits():
    """Taking 1e8 off a sum in single precision would leave nothing of the other weights."""
    log_w = torch.tensor([1e8, 0.3, -0.4, 0.9])
    bound, _ = without_each(log_w, GeometricMean())
    torch.testing.assert_close(bound[0], brute_force(log_w, torch.mean)[0][0])


TABLE = number([0.2, -0.7, 1.1])


class Prescribed(Categorical):
    """Returns given draws instead of sampling."""

    def __init__(self, logits, given):
        super().__init__(logits=logits)
        self.given = given

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.given


@pytest.mark.parametrize("baseline", [GeometricMean(), ArithmeticMean(), BoundOnly(), None])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_plain_bound_over_all_draws(num_samples, baseline):
    """Every tuple is a problem of its own, with parameters of its own."""
    tuples = torch.cartesian_prod(*[torch.arange(3)] * num_samples).reshape(-1, num_samples).T
    M = tuples.shape[1]
    logits = number([0.3, -0.2, 0.9]).expand(M, 3).clone().requires_grad_()
    scale = number(0.8).expand(M).clone().requires_grad_()
    estimate = importance_weighted_elbo(
        lambda z: scale * TABLE[z], Prescribed(logits, tuples), num_samples, baseline=baseline
    )
    assert estimate.shape == (M,)
    gradient = torch.autograd.grad(estimate.sum(), [logits, scale])
    log_q = Categorical(logits=logits).log_prob(tuples)
    probability = log_q.sum(0).exp()
    bound = (scale * TABLE[tuples] - log_q).logsumexp(0) - math.log(num_samples)
    exact = torch.autograd.grad((probability * bound).sum(), [logits, scale])
    torch.testing.assert_close(estimate, bound, rtol=0, atol=1e-14)
    for ours, truth in zip(gradient, exact, strict=True):
        mean = (probability.reshape(-1, *[1] * (ours.ndim - 1)) * ours).sum(0)
        torch.testing.assert_close(mean, truth.sum(0), rtol=0, atol=EXACT)


def test_plain_bound_of_problems_and_black_boxes():
    logits = torch.zeros(4, 5, requires_grad=True)
    assert importance_weighted_elbo(lambda z: z.sum(-1), Bernoulli(logits=logits), 8).shape == (4,)
    assert importance_weighted_elbo(lambda z: z.sum((-1, -2)), Bernoulli(logits=logits), 8).shape == ()
    mean = torch.zeros((), requires_grad=True)
    importance_weighted_elbo(lambda z: -(z.numpy() ** 2) / 2, Normal(mean, 1.0), 16).backward()
    assert mean.grad is not None


def test_plain_bound_with_impossible_draws():
    logits = torch.zeros(3, requires_grad=True)
    table = torch.tensor([0.0, -torch.inf, 1.0])
    importance_weighted_elbo(lambda z: table[z], Prescribed(logits, torch.tensor([0, 1, 1])), 3).backward()
    assert logits.grad.isfinite().all()
    with pytest.raises(sf.NonFiniteError, match="All 2 particles have weight 0"):
        importance_weighted_elbo(lambda z: table[z], Prescribed(logits, torch.tensor([1, 1])), 2)
    several = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(sf.NonFiniteError, match=r"in 1 of 2 problems, namely \[1\]"):
        importance_weighted_elbo(lambda z: table[z], Prescribed(several, torch.tensor([[1, 1], [2, 1]])), 2)


@pytest.mark.parametrize("log_joint", [lambda z: z.sum(), lambda z: z.sum(-1, keepdim=True), lambda z: z.sum(0)])
def test_plain_shapes_are_refused_never_repaired(log_joint):
    with pytest.raises(sf.ShapeError, match="log_joint returned shape"):
        importance_weighted_elbo(log_joint, Bernoulli(logits=torch.zeros(4, 5, requires_grad=True)), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_samples": 0}, "integer of at least 1"), ({"num_samples": 2, "baseline": sf.LeaveOneOut()}, "are one draw")],
)
def test_plain_arguments_are_refused(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        importance_weighted_elbo(lambda z: z, Bernoulli(logits=torch.zeros(4, requires_grad=True)), **options)


def test_a_bound_that_wraps_no_baseline_is_refused():
    with pytest.raises(sf.ScorefnError, match="are one draw"):
        BoundOnly(None)
