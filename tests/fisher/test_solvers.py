"""Estimated information and its solvers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Gamma,
    Independent,
    LowRankMultivariateNormal,
    Normal,
)

import scorefn as sf
from scorefn.fisher.solvers import Scores, automatic
from tests.fisher.cases import dense_truth, flat, network, refused

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_solvers_on_a_gpu():
    module = nn.Linear(3, 4).cuda()
    p = Categorical(logits=module(torch.randn(3).cuda()))
    draws = sf.draw(p, lambda x: (x - 1.3).square(), 12)
    params = tuple(module.parameters())
    solvers = (sf.Woodbury(), sf.DenseSolve(), sf.ConjugateGradients(tolerance=1e-13))
    ours = [flat(sf.natural_gradient(p, draws, params=params, damping=0.01, solver=solver)) for solver in solvers]
    assert all(part.is_cuda and torch.allclose(part, ours[0], rtol=1e-8, atol=1e-10) for part in ours)


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [(sf.Woodbury(), 1e-10), (sf.DenseSolve(), 1e-10), (sf.ConjugateGradients(tolerance=1e-13), 1e-8), (None, 1e-10)],
)
def test_the_solvers_agree(solver, tolerance, damping):
    p, draws, params = network()
    loo = sf.LeaveOneOut()
    truth = dense_truth(draws, params, damping, loo)
    ours = sf.natural_gradient(p, draws, params=params, baseline=loo, damping=damping, solver=solver)
    assert [part.shape for part in ours] == [param.shape for param in params]
    assert (flat(ours) - truth).abs().max() < tolerance * truth.abs().max()


def test_the_solvers_agree_off_the_span_of_the_scores():
    """A pathwise part is a gradient that no score has."""
    module = nn.Linear(5, 3)
    context = torch.randn(5)
    p = Categorical(logits=module(context))
    draws = sf.draw(p, lambda x: module(context)[x].square(), 4)
    params = tuple(module.parameters())
    truth = dense_truth(draws, params, 1e-3)
    for solver in (sf.Woodbury(), sf.DenseSolve(), sf.ConjugateGradients(tolerance=1e-13)):
        ours = sf.natural_gradient(p, draws, params=params, damping=1e-3, solver=solver)
        assert (flat(ours) - truth).abs().max() < 1e-9 * truth.abs().max()


@pytest.mark.parametrize("solver", [sf.Woodbury(), sf.DenseSolve(), sf.ConjugateGradients()])
def test_the_solvers_in_single_precision(solver):
    p, draws, params = network(torch.float32)
    double = dense_truth(draws, params, 1e-2)
    ours = flat(sf.natural_gradient(p, draws, params=params, damping=1e-2, solver=solver))
    assert ours.dtype == torch.float32
    assert (ours - double).abs().max() < 1e-3 * double.abs().max()


def test_the_operator_is_its_matrix():
    for count in (5, 200):  # rows by backward passes, columns by double ones
        _, draws, params = network(draws=count)
        scores = Scores(draws.log_prob[:, 0], params, torch.full((count,), 1 / count))
        S = scores.matrix()
        R, P = scores.shape
        assert S.shape == (R, P)
        u, v = torch.randn(R), torch.randn(P)
        assert torch.allclose(scores.times(v), S @ v, atol=1e-12)
        assert torch.allclose(scores.transposed(u), S.mT @ u, atol=1e-12)
        rows = torch.autograd.grad(draws.log_prob[3, 0], params, retain_graph=True)
        assert torch.allclose(S[3], flat(rows) / count**0.5, atol=1e-14)


@pytest.mark.parametrize("count", [5, 200])
def test_the_matrix_takes_no_more_backward_passes_than_needed(count):
    class Counted(Scores):
        passes = 0

        def times(self, vector):
            self.passes += 1
            return super().times(vector)

        def transposed(self, vector):
            self.passes += 1
            return super().transposed(vector)

    _, draws, params = network(draws=count)
    scores = Counted(draws.log_prob[:, 0], params, torch.ones(count))
    scores.matrix()
    assert scores.passes == min(scores.shape)


def test_woodbury_does_not_lose_the_digits_that_a_small_damping_costs():
    """In single precision throughout, the error would be that of g / damping."""

    class Given:
        def __init__(self, S):
            self.S, self.shape = S, tuple(S.shape)

        def matrix(self):
            return self.S

    S, damping = torch.randn(6, 40).float(), 1e-5
    gradient = S.mT @ torch.randn(6).float()
    double = S.double()
    truth = torch.linalg.solve(double.mT @ double + damping * torch.eye(40), gradient.double())
    error = (sf.Woodbury()(Given(S), gradient, damping) - truth).abs().max() / truth.abs().max()
    assert error < 1e-6


def test_the_solver_is_chosen_by_size():
    assert automatic((100, 100)) == sf.DenseSolve()
    assert automatic((100, 101)) == sf.Woodbury()
    assert automatic((10**5, 128)) == sf.DenseSolve()
    assert automatic((10**5, 129)) == sf.ConjugateGradients()
    assert automatic((128, 2**19)) == sf.Woodbury()
    assert automatic((128, 2**19 + 1)) == sf.ConjugateGradients()


def test_a_solver_may_be_ones_own():
    p, draws, params = network()
    ours = sf.natural_gradient(p, draws, params=params, solver=lambda scores, gradient, damping: gradient)
    plain = torch.autograd.grad(sf.surrogate(draws).mean(), params)
    assert all(map(torch.equal, ours, plain))


def test_conjugate_gradients_may_stop_early():
    p, draws, params = network()
    (steepest,) = (flat(torch.autograd.grad(sf.surrogate(draws).mean(), params, retain_graph=True)),)
    early = flat(
        sf.natural_gradient(p, draws, params=params, damping=0.1, solver=sf.ConjugateGradients(max_iterations=1))
    )
    assert torch.nn.functional.cosine_similarity(early, steepest, dim=0) > 1 - 1e-12
    zero = replace(draws, fx=torch.zeros_like(draws.fx))
    natural = sf.natural_gradient(p, zero, params=params, damping=0.1, solver=sf.ConjugateGradients())
    assert not flat(natural).any()


def test_a_singular_information_names_damping():
    p, draws, params = network()
    for solver in (sf.DenseSolve(), sf.Woodbury(), sf.ConjugateGradients(), None):
        refused(
            lambda solver=solver: sf.natural_gradient(p, draws, params=params, solver=solver),
            "singular", "damping=1e-3",
        )  # fmt: skip
    logits = torch.zeros(3, requires_grad=True)  # a shift changes nothing, but f depends on it
    p = Categorical(logits=logits)
    draws = sf.draw(p, lambda x: x + logits.sum(), 50)
    for solver in (sf.DenseSolve(), sf.ConjugateGradients(), None):
        refused(
            lambda solver=solver: sf.natural_gradient(p, draws, params=logits, solver=solver),
            "singular", "damping=1e-3",
        )  # fmt: skip
    zero_column = LowRankMultivariateNormal(torch.zeros(3), torch.zeros(3, 1), torch.ones(3))
    ones = {"loc": torch.ones(3), "cov_factor": torch.ones(3, 1), "cov_diag": torch.ones(3)}
    fisher = sf.fisher_information(zero_column)
    refused(lambda: fisher.solve(ones), "singular", "damping=1e-3")
    assert torch.allclose(fisher.solve(ones, damping=1.0)["cov_factor"], torch.ones(3, 1))
    for p, name in (
        (Bernoulli(logits=torch.tensor(2000.0)), "logits"),
        (Categorical(logits=torch.tensor([0.0, -2000.0])), "logits"),
    ):
        fisher = sf.fisher_information(p)
        refused(lambda fisher=fisher, name=name: fisher.solve({name: fisher.parameters[name]}), "singular", "damping")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_information_is_seen_whichever_way_it_is_rounded(dtype):
    for size in (2, 4, 9):
        for _ in range(40):
            logits = torch.randn(size, dtype=dtype, requires_grad=True)
            p = Categorical(logits=logits)
            draws = sf.draw(p, lambda x: x.to(dtype), 100)
            with pytest.raises(sf.ScorefnError, match="singular"):
                sf.natural_gradient(p, draws, params=logits, solver=sf.DenseSolve())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ill_conditioned_information_is_no_singular_one(dtype):
    """Units that differ by 10^6, and a gamma distribution whose parameters nearly say the same."""
    loc = torch.tensor([0.0, 0.0], dtype=dtype, requires_grad=True)
    p = Independent(Normal(loc, torch.tensor([1e-3, 1e3], dtype=dtype)), 1)
    draws = sf.draw(p, lambda x: x.sum(-1), 100)
    (ours,) = sf.natural_gradient(p, draws, params=loc, solver=sf.DenseSolve())
    assert torch.isfinite(ours).all()
    a = torch.tensor(1e6, dtype=dtype)
    ones = {"concentration": torch.ones_like(a), "rate": torch.ones_like(a)}
    natural = sf.fisher_information(Gamma(a, torch.ones_like(a))).solve(ones)
    assert torch.allclose(natural["concentration"].double(), torch.tensor(2e12 + 2e6), rtol=1e-5)


def test_an_infinite_information():
    refused(
        lambda: sf.fisher_information(Bernoulli(probs=torch.tensor(1.0))).solve({"probs": torch.tensor(1.0)}),
        "not finite", "boundary",
    )  # fmt: skip


@dataclass
class Straight:
    """Scores A of a linear log-probability."""

    R: int
    P: int
    null: int = 0
    condition: float = 4.0
    unit: float = 1.0

    def scores(self, dtype):
        generator = torch.Generator().manual_seed(self.R + self.P)
        U, _, V = torch.linalg.svd(
            torch.randn(self.R, self.P, generator=generator, dtype=torch.float64), full_matrices=False
        )
        S = torch.logspace(0, -np.log10(self.condition) / 2, self.P, dtype=torch.float64)
        S[self.P - self.null :] = 0
        units = torch.logspace(0, np.log10(self.unit), self.P, dtype=torch.float64)
        A = ((U * S) @ V * units).to(dtype)
        theta = torch.zeros(self.P, dtype=dtype, requires_grad=True)
        gradient = A.T @ torch.randn(self.R, generator=generator, dtype=torch.float64).to(dtype)
        return Scores(A @ theta, (theta,), torch.ones(self.R, dtype=dtype)), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("R", "P"), [(60, 20), (300, 140), (160, 140)])
def test_conjugate_gradients_refuse_the_same_singular_informations_as_the_dense_solver(R, P, dtype):
    for case in (Straight(R, P), Straight(R, P, condition=1e3), Straight(R, P, unit=10.0)):
        scores, gradient = case.scores(dtype)
        dense = sf.DenseSolve()(scores, gradient, 0.0)
        iterated = sf.ConjugateGradients()(scores, gradient, 0.0)
        assert (iterated - dense).norm() < sf.ConjugateGradients().tolerance * case.condition * dense.norm()
    for case in (Straight(R, P, null=1), Straight(R, P, null=5), Straight(R, P, null=1, unit=1e4)):
        scores, gradient = case.scores(dtype)
        state = torch.get_rng_state()
        for solver in (sf.DenseSolve(), sf.ConjugateGradients()):
            refused(lambda solver=solver: solver(scores, gradient, 0.0), "singular", "damping=1e-3")  # noqa: B023
        assert torch.equal(torch.get_rng_state(), state)
    early = sf.ConjugateGradients(max_iterations=10**4)(*Straight(R, P, null=1).scores(torch.float64), 0.0)
    assert early.isfinite().all()
