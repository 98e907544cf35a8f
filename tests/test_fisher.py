"""Fisher information is the covariance of the score, and natural gradients are what they are called.

The truth is a finite sum everywhere: supports are enumerated, Gauss-Hermite nodes are exact for the normals' scores,
and the trapezoid rule on a whole line has an error below rounding. Scores are torch's own derivatives of log_prob.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Chi2,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfCauchy,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
    kl_divergence,
)

import scorefn as sf
from scorefn.fisher.solvers import Scores, automatic
from scorefn.reducers.quantiles import uniform_shape
from scorefn.reducers.sufficient_statistics import sufficient_statistics
from scorefn.search import SNES
from tests.oracles import coordinates

pytestmark = pytest.mark.usefixtures("float64")


# ------------------------------------------------------------------------------------------------------- the families


def hermite(dimensions: int, nodes: int = 8) -> tuple[Tensor, Tensor]:
    """Nodes `[M, D]` and weights `[M]` of a standard normal."""
    node, weight = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    index = coordinates(*[nodes] * dimensions)
    return node[index], (weight / weight.sum())[index].prod(-1)


def line(low: float, high: float, step: float, to_x: Callable, slope: Callable, p) -> tuple[Tensor, Tensor]:
    """The trapezoid rule in u, for x = to_x(u)."""
    u = torch.arange(low, high, step)
    x = to_x(u)
    return x, p.log_prob(x).exp() * slope(u) * step


def finite(support: Tensor, p) -> tuple[Tensor, Tensor]:
    return support, p.log_prob(support).exp()


def positive(p):
    return line(-90.0, 6.0, 0.02, torch.exp, torch.exp, p)


def unit_interval(p):
    return line(-70.0, 30.0, 0.02, torch.sigmoid, lambda u: u.sigmoid() * (-u).sigmoid(), p)


def both_sides(p):
    """The two half-lines that meet in the kink of a Laplace."""
    parts = [line(-90.0, 6.0, 0.02, lambda u, s=s: p.loc + s * p.scale * u.exp(), lambda u: p.scale * u.exp(), p)
             for s in (-1, 1)]  # fmt: skip
    return torch.cat([x for x, _ in parts]), torch.cat([weight for _, weight in parts])


def broken_stick(p):
    """Three categories: the first part, and how the rest is divided."""
    u = torch.arange(-70.0, 70.0, 0.4)
    first, share = (u[index] for index in coordinates(len(u), len(u)).T)
    rest = (-first).sigmoid()
    x = torch.stack([first.sigmoid(), rest * share.sigmoid(), rest * (-share).sigmoid()], -1)
    slope = first.sigmoid() * rest * rest * share.sigmoid() * (-share).sigmoid()
    return x, p.log_prob(x).exp() * slope * 0.4**2


def log_normal_nodes(p):
    x, weight = normal_nodes(p)
    return x.exp(), weight


def normal_nodes(p):
    z, weight = hermite(1)
    return p.loc + p.scale * z[:, 0], weight


def multivariate_nodes(p):
    z, weight = hermite(p.event_shape[0], 5)
    return p.loc + z @ torch.linalg.cholesky(p.covariance_matrix).mT, weight


def pair_nodes(p):
    z, weight = hermite(2)
    return p.base_dist.loc + p.base_dist.scale * z, weight


TRIL = [[0.7, 0.0, 0.0], [-0.4, 1.3, 0.0], [0.2, 0.9, 0.5]]
FACTOR = [[0.7, -0.3], [-0.4, 1.3], [0.2, 0.9], [1.1, 0.1], [0.4, -0.6]]


@dataclass(frozen=True)
class Case:
    """A distribution, by constructor and parameters, with nodes `x [M, *event]` and their probabilities."""

    name: str
    make: Callable
    values: dict
    nodes: Callable
    still: int = 0  # directions in which the distribution does not change

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self.values.items()}

    @property
    def p(self):
        return self.make(**self.parameters)


def independent_normal(**parameters):
    return Independent(Normal(**parameters), 1)


def independent_bernoulli(**parameters):
    return Independent(Bernoulli(**parameters), 1)


counts, tail = torch.arange(8.0, dtype=torch.float64), torch.arange(400.0, dtype=torch.float64)
bits = coordinates(2, 2).double()
CASES = [
    Case("Normal", Normal, {"loc": 0.3, "scale": 1.7}, normal_nodes),
    Case("Independent(Normal)", independent_normal, {"loc": [0.3, -1.0], "scale": [1.7, 0.2]}, pair_nodes),
    Case("MultivariateNormal", MultivariateNormal, {"loc": [0.3, -1.0, 2.0], "scale_tril": TRIL}, multivariate_nodes),
    Case(
        "LowRank 1", LowRankMultivariateNormal,
        {"loc": [0.3, -1.0, 2.0], "cov_factor": [[0.7], [-0.4], [1.2]], "cov_diag": [0.5, 1.2, 0.8]},
        multivariate_nodes,
    ),
    Case(
        "LowRank 2", LowRankMultivariateNormal,
        {"loc": [0.3, -1.0, 2.0, 0.0, 1.0], "cov_factor": FACTOR, "cov_diag": [0.5, 1.2, 0.8, 0.3, 1.0]},
        multivariate_nodes, still=1,
    ),
    Case("Bernoulli logits", Bernoulli, {"logits": 0.8}, partial(finite, torch.tensor([0.0, 1.0]).double())),
    Case("Bernoulli probs", Bernoulli, {"probs": 0.2}, partial(finite, torch.tensor([0.0, 1.0]).double())),
    Case("Independent(Bernoulli)", independent_bernoulli, {"probs": [0.2, 0.7]}, partial(finite, bits)),
    Case("Binomial logits", partial(Binomial, total_count=7), {"logits": -0.6}, partial(finite, counts)),
    Case("Binomial probs", partial(Binomial, total_count=7), {"probs": 0.3}, partial(finite, counts)),
    Case("Categorical logits", Categorical, {"logits": [0.4, -1.0, 0.3, 2.0]}, partial(finite, torch.arange(4)), 1),
    Case("Categorical probs", Categorical, {"probs": [0.1, 0.2, 0.4, 0.3]}, partial(finite, torch.arange(4)), 1),
    Case("OneHot logits", OneHotCategorical, {"logits": [0.4, -1.0, 0.3]}, partial(finite, torch.eye(3).double()), 1),
    Case("OneHot probs", OneHotCategorical, {"probs": [0.1, 0.6, 0.3]}, partial(finite, torch.eye(3).double()), 1),
    Case("Poisson", Poisson, {"rate": 2.3}, partial(finite, torch.arange(40.0, dtype=torch.float64))),
    Case("Exponential", Exponential, {"rate": 1.8}, positive),
    Case("Gamma", Gamma, {"concentration": 0.8, "rate": 1.4}, positive),
    Case("Gamma, large", Gamma, {"concentration": 6.5, "rate": 0.9}, positive),
    Case("Chi2", Chi2, {"df": 1.7}, positive),
    Case("Beta", Beta, {"concentration1": 0.8, "concentration0": 2.5}, unit_interval),
    Case("Dirichlet", Dirichlet, {"concentration": [0.8, 2.5, 1.3]}, broken_stick),
    Case("LogNormal", LogNormal, {"loc": 0.3, "scale": 0.7}, log_normal_nodes),
    Case("Laplace", Laplace, {"loc": 0.3, "scale": 1.7}, both_sides),
    Case("Geometric logits", Geometric, {"logits": -0.6}, partial(finite, tail)),
    Case("Geometric probs", Geometric, {"probs": 0.3}, partial(finite, tail)),
    Case("NegativeBinomial logits", partial(NegativeBinomial, 3.5), {"logits": -0.6}, partial(finite, tail)),
    Case("NegativeBinomial probs", partial(NegativeBinomial, 3.5), {"probs": 0.3}, partial(finite, tail)),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def free(name: str, value: Tensor) -> Tensor:
    """Positions of the numbers of a parameter that can change."""
    if name != "scale_tril":
        return torch.arange(value.numel())
    return torch.ones_like(value).tril().flatten().nonzero().flatten()


def packed(vector: dict[str, Tensor], lead: int = 0) -> Tensor:
    """`[..., *shape]` of each parameter to `[..., P]`."""
    parts = []
    for name, value in vector.items():
        flat = value.reshape(*value.shape[:lead], -1)
        parts.append(flat[..., free(name, value[(0,) * lead])])
    return torch.cat(parts, -1)


def unpacked(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    vector, start = {}, 0
    for name, value in like.items():
        index = free(name, value)
        vector[name] = torch.zeros(value.numel()).index_put((index,), flat[start : start + len(index)])
        vector[name] = vector[name].reshape(value.shape)
        start += len(index)
    return vector


def moments(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the weights, E[score] `[P]` and E[score score^T] `[P, P]`."""
    x, weight = case.nodes(case.p)
    leaves = {
        name: value.expand(len(x), *value.shape).clone().requires_grad_() for name, value in case.parameters.items()
    }
    scores = torch.autograd.grad(case.make(**leaves).log_prob(x).sum(), list(leaves.values()))
    S = packed(dict(zip(leaves, scores, strict=True)), lead=1)
    return weight.sum(), weight @ S, S.mT @ (weight[:, None] * S)


@each_case
def test_it_is_the_covariance_of_the_score(case):
    total, mean, truth = moments(case)
    assert abs(total - 1) < 1e-12
    assert mean.abs().max() < 1e-10
    fisher = sf.fisher_information(case.p)
    assert list(fisher.parameters) == list(case.values)
    gap = (fisher.dense() - truth).abs().max()
    assert gap < 1e-10, f"off by {gap:.3g}"


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "Laplace"], ids=lambda case: case.name)
def test_it_is_the_hessian_of_the_divergence(case):
    """Not of a Laplace: its divergence is smooth in the location, but made of |d|, whose kink stops autograd."""
    parameters = case.parameters
    x, weight = case.nodes(case.p)

    def divergence(flat):
        p, q = case.p, case.make(**unpacked(flat, parameters))
        if isinstance(p, NegativeBinomial):  # torch has no closed form
            return weight @ (p.log_prob(x) - q.log_prob(x))
        return kl_divergence(p, q)

    hessian = torch.autograd.functional.hessian(divergence, packed(parameters))
    rough = case.name.startswith(("Gamma", "Chi2", "Beta", "Dirichlet"))  # torch's trigamma has nine digits
    tolerance = 2e-8 if rough else 1e-10
    assert (sf.fisher_information(case.p).dense() - hessian).abs().max() < tolerance


def test_the_trigamma_function_has_all_its_digits():
    """psi'(1) = pi^2/6, psi'(1/2) = pi^2/2, and psi'(x) = 1/x + 1/(2 x^2) + 1/(6 x^3) - ... for large x."""
    a = torch.tensor([1.0, 0.5, 1e6])
    truth = torch.tensor([torch.pi**2 / 6, torch.pi**2 / 2, 1e-6 + 0.5e-12 + 1e-18 / 6])
    ours = sf.fisher_information(Gamma(a, 1.0)).dense()[:, 0, 0]
    assert ((ours - truth) / truth).abs().max() < 1e-14


def gradient_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """A gradient as draws give it: a combination of scores."""
    x, weight = case.nodes(case.p)
    leaves = {name: value.clone().requires_grad_() for name, value in case.parameters.items()}
    fx = torch.randn(len(x), generator=torch.Generator().manual_seed(seed))
    objective = (weight * fx * case.make(**leaves).log_prob(x)).sum()
    return dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))


@each_case
def test_solving_undoes_multiplying(case):
    fisher, gradient = sf.fisher_information(case.p), gradient_of(case)
    solution = fisher.solve(gradient)
    again = fisher.product(solution)
    for name in gradient:
        size = gradient[name].abs().max()
        assert (again[name] - gradient[name]).abs().max() < 1e-11 * max(1.0, size), name


@each_case
def test_products_are_those_of_the_matrix(case):
    fisher, gradient = sf.fisher_information(case.p), gradient_of(case)
    ours = packed(fisher.product(gradient))
    assert torch.allclose(ours, fisher.dense() @ packed(gradient), rtol=1e-12, atol=1e-12)


@each_case
def test_damping_is_added_to_the_diagonal(case):
    fisher, gradient = sf.fisher_information(case.p), gradient_of(case)
    for damping in (1e-3, 0.7):
        dense = fisher.dense() + damping * torch.eye(packed(gradient).numel())
        truth = torch.linalg.solve(dense, packed(gradient))
        assert torch.allclose(packed(fisher.solve(gradient, damping=damping)), truth, rtol=1e-9, atol=1e-11)


@each_case
def test_what_does_not_change_the_distribution_is_left_out(case):
    dense = sf.fisher_information(case.p).dense()
    values = torch.linalg.eigvalsh(dense)
    assert int((values < 1e-12 * values.max()).sum()) == case.still
    if case.still and "probs" not in case.values:  # the shortest solution
        gradient = gradient_of(case)
        shortest = torch.linalg.pinv(dense, rtol=1e-10) @ packed(gradient)
        assert torch.allclose(packed(sf.fisher_information(case.p).solve(gradient)), shortest, atol=1e-9)


@pytest.mark.parametrize("name", ["logits", "probs"])
def test_the_solution_of_a_categorical_sums_to_zero(name):
    fisher = sf.fisher_information(Categorical(**{name: torch.tensor([[0.3, 0.1, 0.6], [0.2, 0.5, 0.3]])}))
    value = fisher.parameters[name]
    solution = fisher.solve({name: torch.randn(2, 3)})[name]
    assert solution.shape == value.shape
    assert solution.sum(-1).abs().max() < 1e-12


@each_case
@pytest.mark.parametrize("batch", [(2,), (3, 2), (1, 1)])
def test_batches_are_problems_of_their_own(case, batch):
    scale = 1 + 0.05 * torch.arange(float(torch.Size(batch).numel())).reshape(batch)
    many = {name: value * scale.reshape(*batch, *[1] * value.ndim) for name, value in case.parameters.items()}
    fisher = sf.fisher_information(case.make(**many))
    gradient = {
        name: value.expand(*batch, *value.shape) * scale.reshape(*batch, *[1] * value.ndim)
        for name, value in gradient_of(case).items()
    }
    if "logits" not in case.values and "probs" not in case.values and not case.still:
        assert fisher.batch_shape == batch
    dense = fisher.dense()
    solution, damped = fisher.solve(gradient), fisher.solve(gradient, damping=0.1)
    for index in np.ndindex(*batch):
        p = case.make(**{name: value[index] for name, value in many.items()})
        single = sf.fisher_information(p)
        assert torch.allclose(dense[index], single.dense(), rtol=1e-13, atol=1e-13)
        part = {name: value[index] for name, value in gradient.items()}
        for ours, truth in ((solution, single.solve(part)), (damped, single.solve(part, damping=0.1))):
            assert all(torch.allclose(ours[name][index], truth[name], rtol=1e-10, atol=1e-12) for name in part)


@each_case
def test_single_precision(case):
    fisher, gradient = sf.fisher_information(case.p), gradient_of(case)
    single = sf.fisher_information(case.make(**{name: value.float() for name, value in case.parameters.items()}))
    assert single.dense().dtype == torch.float32
    assert torch.allclose(single.dense().double(), fisher.dense(), rtol=1e-4, atol=1e-5)
    solution, truth = single.solve({name: value.float() for name, value in gradient.items()}), fisher.solve(gradient)
    for name, value in solution.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), truth[name], rtol=2e-4, atol=2e-4 * float(truth[name].abs().max()))


def test_independent_is_block_diagonal():
    loc, scale = torch.randn(4, 3, 2), torch.rand(4, 3, 2) + 0.5
    base = Normal(loc, scale)
    fisher = sf.fisher_information(Independent(base, 2))
    assert fisher.batch_shape == (4,)
    dense = fisher.dense()
    assert dense.shape == (4, 12, 12)
    truth = torch.diag_embed(torch.cat([scale.pow(-2).flatten(1), 2 * scale.pow(-2).flatten(1)], -1))
    assert torch.allclose(dense, truth)
    nested = sf.fisher_information(Independent(Independent(base, 1), 1))
    assert torch.equal(nested.dense(), dense)
    assert nested.rebuild(loc=loc, scale=scale).event_shape == (3, 2)
    assert torch.equal(sf.fisher_information(Independent(base, 0)).dense(), sf.fisher_information(base).dense())


@pytest.mark.parametrize("name", ["MultivariateNormal", "LowRank 2", "Categorical logits", "Categorical probs"])
def test_independent_of_families_with_events(name):
    case = next(case for case in CASES if case.name == name)
    many = {key: torch.stack([value, 1.1 * value]) for key, value in case.parameters.items()}
    base = sf.fisher_information(case.make(**many))
    joint = sf.fisher_information(Independent(case.make(**many), 1))
    assert joint.batch_shape == ()
    gradient = {key: torch.stack([value, 2 * value]) for key, value in gradient_of(case).items()}
    for damping in (0.0, 0.1):
        ours, truth = joint.solve(gradient, damping=damping), base.solve(gradient, damping=damping)
        assert all(torch.allclose(ours[key], truth[key], rtol=1e-12, atol=1e-14) for key in truth)
    blocks, dense = base.dense(), joint.dense()
    assert dense.shape == (2 * blocks.shape[-1],) * 2
    assert torch.allclose(torch.linalg.eigvalsh(dense), torch.linalg.eigvalsh(blocks).flatten().sort()[0], atol=1e-11)


@each_case
def test_it_can_be_pickled(case):
    """Also where Independent has joined problems, once or twice."""
    many = case.make(**{name: value.expand(2, 3, *value.shape).clone() for name, value in case.parameters.items()})
    joined = [many, Independent(many, 1), Independent(Independent(many, 1), 1)]
    for p in (case.p, *joined):
        fisher = sf.fisher_information(p)
        twin = pickle.loads(pickle.dumps(fisher))
        assert torch.equal(twin.dense(), fisher.dense())
        rebuilt = twin.rebuild(**twin.parameters)
        assert type(rebuilt) is type(p)
        assert (rebuilt.batch_shape, rebuilt.event_shape) == (p.batch_shape, p.event_shape)
        x = p.sample((2,))
        assert torch.allclose(rebuilt.log_prob(x), p.log_prob(x), rtol=1e-12)


def test_a_multivariate_normal_is_taken_in_its_triangle_whatever_it_was_made_with():
    L = torch.tensor(TRIL)
    loc, covariance = torch.zeros(3), L @ L.mT
    for p in (MultivariateNormal(loc, covariance), MultivariateNormal(loc, precision_matrix=covariance.inverse())):
        fisher = sf.fisher_information(p)
        assert list(fisher.parameters) == ["loc", "scale_tril"]
        assert torch.allclose(fisher.dense(), sf.fisher_information(MultivariateNormal(loc, scale_tril=L)).dense())


def test_the_natural_gradient_of_a_covariance():
    """V L^T + L V^T = 2 S G S, with G the gradient in the covariance: CMA's rank-mu update."""
    L = torch.tensor(TRIL)
    covariance, x = (L @ L.mT).requires_grad_(), torch.randn(6, 3)
    fx = torch.randn(6)
    (G,) = torch.autograd.grad((fx * MultivariateNormal(torch.zeros(3), covariance).log_prob(x)).mean(), covariance)
    S = covariance.detach()
    p = MultivariateNormal(torch.zeros(3), covariance)
    V = sf.natural_gradient(p, sf.Draws(x, p.log_prob(x).unsqueeze(-1), fx.unsqueeze(-1)))["scale_tril"]
    truth = 2 * S @ G @ S
    assert torch.allclose(V @ L.mT + L @ V.mT, truth, atol=1e-12)
    weighted = torch.einsum("n,ni,nj->ij", fx, x, x) / 6 - fx.mean() * S
    assert torch.allclose(truth, weighted, atol=1e-12)


def test_pyro_distributions_are_taken_as_they_are():
    dist = pytest.importorskip("pyro.distributions")
    loc, scale = torch.zeros(2, requires_grad=True), torch.tensor([1.0, 2.0])
    p = dist.Normal(loc, scale).to_event(1)
    ours = sf.natural_gradient(p, sf.draw(p, lambda x: x.sum(-1), 5))
    assert {name: value.shape for name, value in ours.items()} == {"loc": (2,), "scale": (2,)}
    assert torch.equal(
        sf.fisher_information(p).dense(), sf.fisher_information(Independent(Normal(loc, scale), 1)).dense()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_case
def test_on_a_gpu(case):
    there = case.make(**{name: value.cuda() for name, value in case.parameters.items()})
    fisher, gradient = sf.fisher_information(there), gradient_of(case)
    assert torch.allclose(fisher.dense().cpu(), sf.fisher_information(case.p).dense(), rtol=1e-9, atol=1e-12)
    for damping in (0.0, 0.1):
        ours = fisher.solve({name: value.cuda() for name, value in gradient.items()}, damping=damping)
        truth = sf.fisher_information(case.p).solve(gradient, damping=damping)
        assert all(torch.allclose(ours[name].cpu(), truth[name], rtol=1e-8, atol=1e-10) for name in truth)


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


def test_nothing_requires_grad():
    loc = torch.zeros(2, requires_grad=True)
    fisher = sf.fisher_information(Normal(loc, loc.exp()))
    assert not any(value.requires_grad for value in fisher.parameters.values())
    assert not fisher.dense().requires_grad
    assert not any(value.requires_grad for value in fisher.solve({"loc": loc, "scale": loc}).values())


def test_the_parameters_a_distribution_was_made_with_survive_what_is_asked_of_it():
    p = Bernoulli(probs=torch.tensor([0.2, 0.7]))
    _ = p.logits, p.sample()
    assert list(sf.fisher_information(p).parameters) == ["probs"]
    p = Categorical(logits=torch.tensor([0.2, 0.7]))
    _ = p.probs, p.sample()
    assert list(sf.fisher_information(p).parameters) == ["logits"]
    for name in ("probs", "logits"):
        for p in (Geometric(**{name: torch.tensor([0.2, 0.7])}), NegativeBinomial(3.0, **{name: torch.tensor(0.2)})):
            _ = p.probs, p.logits, p.sample()
            assert list(sf.fisher_information(p).parameters) == [name]


def test_a_count_that_requires_grad_is_refused():
    count = torch.tensor(3.5, requires_grad=True)
    for name in ("probs", "logits"):
        p = NegativeBinomial(count, **{name: torch.tensor(0.3)})
        refused(lambda p=p: sf.fisher_information(p), "total_count", "Detach", "params=")
        ours = sf.fisher_information(NegativeBinomial(count.detach(), **{name: torch.tensor(0.3)}))
        assert ours.rebuild(**ours.parameters).total_count == 3.5


@pytest.mark.parametrize(
    "name", ["LogNormal", "Laplace", "Geometric logits", "Geometric probs", "NegativeBinomial logits",
             "NegativeBinomial probs", "Dirichlet"],
)  # fmt: skip
def test_a_natural_gradient_is_the_closed_form_times_the_gradient(name):
    case = next(case for case in CASES if case.name == name)
    p = case.make(**{
        key: torch.stack([value, 1.1 * value]).requires_grad_() for key, value in case.parameters.items()
    })  # fmt: skip
    draws = sf.draw(p, lambda x: x.reshape(*x.shape[:2], -1).sin().sum(-1), 6)
    fisher = sf.fisher_information(p)
    leaves = {name: value.clone().requires_grad_() for name, value in fisher.parameters.items()}
    objective = (draws.fx.squeeze(-1) * fisher.rebuild(**leaves).log_prob(draws.x)).mean(0).sum()
    gradient = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
    ours = sf.natural_gradient(p, draws)
    for index in range(2):
        own = torch.cat([gradient[name][index].flatten() for name in leaves])
        truth = torch.linalg.solve(fisher.dense()[index], own)
        found = torch.cat([ours[name][index].flatten() for name in leaves])
        assert torch.allclose(found, truth, rtol=1e-9, atol=1e-12)


def test_a_dirichlet_without_spread_is_singular():
    """One category has no score, and 1e17 draws' worth of concentration leave none to rounding."""
    for concentration in (torch.tensor([1.7]), torch.tensor([1e17, 2e17])):
        fisher = sf.fisher_information(Dirichlet(concentration))
        refused(lambda f=fisher, c=concentration: f.solve({"concentration": c}), "singular", "damping")
    one = sf.fisher_information(Dirichlet(torch.tensor([1.7])))
    assert torch.allclose(one.solve({"concentration": torch.ones(1)}, damping=0.5)["concentration"], torch.tensor(2.0))
    with pytest.raises(sf.ScorefnError, match="not finite"):
        sf.fisher_information(Dirichlet(torch.tensor([1e-200, 1.0]))).solve({"concentration": torch.ones(2)})


# ------------------------------------------------------------------------------------------------ natural gradients


def exact_draws(p, f, support: Tensor) -> sf.Draws:
    """All points of a finite support, weighted so that means over draws are expectations."""
    log_prob = p.log_prob(support)
    behaviour = torch.full_like(log_prob, -np.log(len(support)))
    return sf.Draws(
        support, log_prob.unsqueeze(-1), f(support).unsqueeze(-1), behaviour_log_prob=behaviour.unsqueeze(-1)
    )


def test_of_a_normal_it_is_the_step_of_snes():
    strategy = SNES(torch.randn(5), sigma0=torch.rand(5) + 0.5, seed=0)
    x = strategy.ask()
    f = (x - 1).square().sum(-1)
    natural = sf.natural_gradient(strategy.distribution, strategy.scored(x, f))
    location, log_scale = strategy.location.detach().clone(), strategy.log_scale.detach().clone()
    sigma = log_scale.exp()
    z, u = (x - location) / sigma, strategy.scored(x, f).fx[:, 0] / len(x)
    assert (natural["loc"] - sigma * (u @ z)).abs().max() < 1e-12
    assert (natural["scale"] / sigma - (u @ (z.square() - 1)) / 2).abs().max() < 1e-12
    strategy.tell(x, f)
    assert (strategy.location - location - natural["loc"]).abs().max() < 1e-12
    rate = (3 + np.log(5)) / (5 * np.sqrt(5))
    assert (strategy.log_scale - log_scale - rate * natural["scale"] / sigma).abs().max() < 1e-12


def test_of_a_bernoulli_it_is_the_step_of_pbil():
    """In the mean parameter: sum_k w_k (x_k - p)."""
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    draws = sf.draw(p, lambda x: (x.sum(-1) - 2).square(), 12)
    probs, w = logits.detach().sigmoid(), draws.fx[:, 0] / 12
    step = (w[:, None] * (draws.x - probs)).sum(0)
    in_logits = sf.natural_gradient(p, draws)["logits"]
    assert (in_logits * probs * (1 - probs) - step).abs().max() < 1e-13
    mean = Independent(Bernoulli(probs=probs.clone().requires_grad_()), 1)
    in_probs = sf.natural_gradient(mean, replace(draws, log_prob=mean.log_prob(draws.x).unsqueeze(-1)))["probs"]
    assert (in_probs - step).abs().max() < 1e-13


@pytest.mark.parametrize("family", [Bernoulli, partial(Binomial, 5), Categorical, OneHotCategorical])
def test_logits_and_probs_change_the_distribution_alike(family):
    """To first order: the derivative of log_prob along the natural gradient is one function of x."""
    logits = torch.tensor([0.4, -1.0, 0.3])
    probs = logits.softmax(-1) if family in (Categorical, OneHotCategorical) else logits.sigmoid()
    x = family(logits=logits).sample((20,))
    fx = torch.randn(20)
    changes = []
    for name, value in (("logits", logits), ("probs", probs)):
        leaf = value.clone().requires_grad_()
        p = family(**{name: leaf})
        draws = sf.Draws(x, p.log_prob(x).reshape(20, -1).sum(-1, keepdim=True), fx.unsqueeze(-1))
        direction = sf.natural_gradient(p, draws)[name]
        change = torch.autograd.functional.jvp(lambda v, name=name: family(**{name: v}).log_prob(x), value, direction)
        changes.append(change[1])
    assert changes[0].abs().max() > 0.1
    assert (changes[0] - changes[1]).abs().max() < 1e-11


def test_diagonal_normals_agree_with_multivariate_ones_where_both_can_go():
    loc, scale = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])
    x, fx = torch.randn(9, 2), torch.randn(9)
    parts = []
    for p in (Independent(Normal(loc, scale), 1), MultivariateNormal(loc, scale_tril=scale.diag_embed())):
        with torch.no_grad():
            draws = sf.Draws(x, p.log_prob(x).unsqueeze(-1), fx.unsqueeze(-1))
        parts.append(sf.natural_gradient(p, draws))
    assert torch.allclose(parts[0]["loc"], parts[1]["loc"], atol=1e-13)
    assert torch.allclose(parts[0]["scale"], parts[1]["scale_tril"].diagonal(), atol=1e-13)


def test_it_is_the_regression_on_the_sufficient_statistics():
    """Exactly: Cov[T]^-1 Cov[T, f], by weighted least squares on all points with an intercept."""
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    support = coordinates(2, 2, 2).double()
    draws = exact_draws(p, lambda x: (x.sum(-1) - 1.7).pow(3) + x[:, 0] * x[:, 2], support)
    root = p.log_prob(support).detach().mul(0.5).exp()
    design = torch.cat([support, torch.ones(8, 1)], 1)
    coefficients = torch.linalg.lstsq(root[:, None] * design, root[:, None] * draws.fx).solution[:3, 0]
    closed = sf.natural_gradient(p, draws)["logits"]
    assert (closed - coefficients).abs().max() < 1e-12
    for solver in (None, sf.DenseSolve(), sf.ConjugateGradients(tolerance=1e-13)):
        (estimated,) = sf.natural_gradient(p, draws, params=logits, solver=solver)
        assert (estimated - coefficients).abs().max() < 1e-11
    (damped,) = sf.natural_gradient(p, draws, params=logits, solver=sf.Woodbury(), damping=0.3)
    assert (damped - sf.natural_gradient(p, draws, damping=0.3)["logits"]).abs().max() < 1e-12


def test_of_a_sample_it_is_the_regression_on_the_scores():
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    p = Independent(Bernoulli(logits=logits), 1)
    draws = sf.draw(p, lambda x: (x.sum(-1) - 1.7).pow(3), 50)
    scores = draws.x - logits.detach().sigmoid()
    (ours,) = sf.natural_gradient(p, draws, params=[logits], baseline=sf.Constant(0.4))
    assert (ours - torch.linalg.lstsq(scores, draws.fx - 0.4).solution[:, 0]).abs().max() < 1e-12


def test_the_problems_of_a_batch_do_not_see_each_other():
    logits = torch.randn(4, requires_grad=True)
    p = Bernoulli(logits=logits)
    draws = sf.draw(p, lambda x: (x - 0.45).square(), 30)
    loo = sf.LeaveOneOut()
    ours = sf.natural_gradient(p, draws, baseline=loo)["logits"]
    for b in range(4):
        single = Bernoulli(logits=logits[b])
        alone = sf.Draws(draws.x[:, b], draws.log_prob[:, b], draws.fx[:, b])
        assert torch.allclose(sf.natural_gradient(single, alone, baseline=loo)["logits"], ours[b], atol=1e-13)
    (estimated,) = sf.natural_gradient(p, draws, params=logits, baseline=loo)
    weight = logits.detach().sigmoid() * (-logits.detach()).sigmoid()
    empirical = (draws.x - logits.detach().sigmoid()).square().mean(0)
    assert torch.allclose(estimated * empirical, ours * weight, atol=1e-13)


def test_a_joint_decision_over_the_batch():
    logits = torch.randn(3, requires_grad=True)
    p = Bernoulli(logits=logits)
    draws = sf.draw(p, lambda x: (x.sum(-1) - 1).square(), 30)
    joint = sf.natural_gradient(Independent(p, 1), draws)["logits"]
    assert torch.equal(sf.natural_gradient(p, draws)["logits"], joint)


def test_baseline_and_credit_are_those_of_the_surrogate():
    loc = torch.zeros(2, requires_grad=True)
    p = Independent(Normal(loc, torch.ones(2)), 1)
    draws = sf.draw(p, lambda x: x.square().sum(-1) + 3, 10)
    for baseline in (None, sf.LeaveOneOut(), sf.Constant(2.0)):
        (gradient,) = torch.autograd.grad(sf.surrogate(draws, baseline=baseline).mean(), loc, retain_graph=True)
        assert torch.allclose(sf.natural_gradient(p, draws, baseline=baseline)["loc"], gradient, atol=1e-14)
    moving = sf.MovingAverage(0.9)
    before = dict(vars(moving))
    sf.natural_gradient(p, draws, baseline=moving)
    assert vars(moving) == before


def test_it_works_without_grad_mode_and_leaves_the_graph_alone():
    loc = torch.zeros(2, requires_grad=True)
    p = Independent(Normal(loc, torch.ones(2)), 1)
    with torch.no_grad():
        blind = sf.draw(p, lambda x: x.square().sum(-1), 10)
        ours = sf.natural_gradient(p, blind)
    assert set(ours) == {"loc", "scale"}
    draws = sf.draw(p, lambda x: x.square().sum(-1), 10)
    for _ in range(2):
        (natural,) = sf.natural_gradient(p, draws, params=loc)
        assert natural.shape == loc.shape
        assert not natural.requires_grad
    sf.surrogate(draws).mean().backward()
    assert loc.grad is not None


# ---------------------------------------------------------------------------------------------- estimated information


def network(dtype=torch.float64, draws=12, width=6):
    """A measure whose logits a network computes from a context, draws of it, and the network's parameters."""
    module = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)
    p = Categorical(logits=module(torch.randn(3, dtype=dtype)))
    return p, sf.draw(p, lambda x: (x - 1.3).square().to(dtype), draws), tuple(module.parameters())


def dense_truth(draws, params, damping, baseline=None) -> Tensor:
    """Row by row, and a general solve."""
    flat = [torch.autograd.grad(row, params, retain_graph=True) for row in draws.log_prob.sum(-1).flatten()]
    S = torch.stack([torch.cat([part.flatten() for part in row]) for row in flat])
    parts = torch.autograd.grad(sf.surrogate(draws, baseline=baseline).mean(0).sum(), params, retain_graph=True)
    F = S.mT @ S / len(draws) + damping * torch.eye(S.shape[1], dtype=S.dtype)
    return torch.linalg.solve(F, torch.cat([part.flatten() for part in parts]))


def flat(parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


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


class Walk:
    """A structured measure: up to three coins, the next one thrown where the last one fell on heads."""

    def __init__(self, logits):
        self.logits = logits

    def draws(self, f, num_samples, *, coupling=None):
        p = Bernoulli(logits=self.logits)
        x = p.sample((num_samples,))
        mask = torch.cat([torch.ones(num_samples, 1), x[:, :-1].cumprod(-1)], -1).bool()
        log_prob = torch.where(mask, p.log_prob(x), torch.nan)
        return sf.Draws(x, log_prob, torch.where(mask, f(x), 0.0), credit=sf.RewardToGo(), mask=mask)


@pytest.mark.parametrize("solver", [None, sf.ConjugateGradients(tolerance=1e-13)])
def test_the_score_of_a_structured_draw_is_the_sum_over_its_decisions(solver):
    logits = torch.tensor([1.0, 0.5, 0.2], requires_grad=True)
    walk = Walk(logits)
    draws = sf.draw(walk, lambda x: x + 1, 40)
    loo = sf.LeaveOneOut()
    (ours,) = sf.natural_gradient(walk, draws, params=logits, baseline=loo, solver=solver)
    S = torch.where(draws.mask, draws.x - logits.detach().sigmoid(), 0.0)
    (gradient,) = torch.autograd.grad(sf.surrogate(draws, baseline=loo).mean(), logits)
    assert torch.allclose(ours, torch.linalg.solve(S.mT @ S / 40, gradient), atol=1e-11)


def test_the_weight_of_a_structured_draw_is_the_product_over_its_decisions():
    logits = torch.tensor([1.0, 0.5, 0.2], requires_grad=True)
    behaviour = torch.tensor([0.0, 0.9, -0.3])
    draws = sf.draw(Walk(logits), lambda x: x + 1, 40)
    there = torch.where(draws.mask, Bernoulli(logits=behaviour).log_prob(draws.x), torch.nan)
    draws = replace(draws, behaviour_log_prob=there)
    (ours,) = sf.natural_gradient(Walk(logits), draws, params=logits)
    S = torch.where(draws.mask, draws.x - logits.detach().sigmoid(), 0.0)
    weight = (draws.log_prob.detach() - draws.behaviour_log_prob).sum(-1).exp()
    (gradient,) = torch.autograd.grad(sf.surrogate(draws).mean(), logits)
    assert torch.allclose(ours, torch.linalg.solve(S.mT @ (weight[:, None] * S) / 40, gradient), atol=1e-11)


def test_off_policy_draws_enter_with_their_weights():
    logits = torch.tensor([0.4, -1.0, 0.3], requires_grad=True)
    p = OneHotCategorical(logits=logits)
    draws = exact_draws(p, lambda x: x @ torch.tensor([1.0, -2.0, 5.0]), torch.eye(3))
    closed = sf.natural_gradient(p, draws, damping=1e-3)["logits"]
    (estimated,) = sf.natural_gradient(p, draws, params=logits, damping=1e-3)
    assert (closed - estimated).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(call, *patterns, error=sf.ScorefnError):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error
    assert text.endswith(".")
    for pattern in patterns:
        assert pattern in text, text


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


def test_an_unregistered_family():
    p = HalfCauchy(torch.ones(2, requires_grad=True))
    for call in (
        lambda: sf.fisher_information(p),
        lambda: sf.fisher_information(Independent(p, 1)),
        lambda: sf.natural_gradient(p, sf.draw(p, lambda x: x, 5)),
    ):
        refused(call, "HalfCauchy", "register_fisher", "params=", "Woodbury()")
    walk = Walk(torch.zeros(3, requires_grad=True))
    refused(lambda: sf.natural_gradient(walk, sf.draw(walk, lambda x: x, 5)), "Walk", "params=")


def test_the_registry_is_open():
    @sf.register_fisher(Gumbel)
    def gumbel(p):
        matrix = p.scale.square().reciprocal()[..., None, None]
        return sf.FisherMatrix(
            parameters={"loc": p.loc}, batch_shape=p.batch_shape, rebuild=partial(Gumbel, scale=p.scale), matrix=matrix
        )

    assert callable(gumbel)
    p = Gumbel(torch.zeros(2, requires_grad=True), torch.tensor([1.0, 2.0]))
    draws = sf.draw(p, lambda x: x, 5)
    (gradient,) = torch.autograd.grad(sf.surrogate(draws).mean(0).sum(), p.loc)
    assert torch.allclose(sf.natural_gradient(p, draws)["loc"], gradient * torch.tensor([1.0, 4.0]))
    refused(lambda: sf.register_fisher(p), "class", "register_fisher")
    refused(
        lambda: sf.FisherMatrix(parameters={"loc": p.loc}, batch_shape=p.batch_shape, rebuild=Gumbel, matrix=p.scale),
        "(2,)", "(2, 1, 1)", error=sf.ShapeError,
    )  # fmt: skip


def test_a_subclass_with_other_parameters():
    class StandardScale(Normal):
        def __init__(self, loc):
            super().__init__(loc, 1.0)

    p = StandardScale(torch.zeros(2, requires_grad=True))
    refused(lambda: sf.natural_gradient(p, sf.draw(p, lambda x: x, 5)), "StandardScale", "register_fisher")


def test_draws_of_another_measure():
    loc = torch.zeros(3, requires_grad=True)
    p = Normal(loc, 1.0)
    draws = sf.draw(p, lambda x: x, 5)
    for params in (None, loc):
        natural = partial(sf.natural_gradient, draws=draws, params=params)
        refused(lambda natural=natural: natural(Normal(loc[:2], 1.0)), "cannot score", "Normal")
        refused(lambda natural=natural: natural(Normal(loc.expand(2, 5, 3), 1.0)), "(2, 5, 3)", error=sf.ShapeError)
        refused(lambda natural=natural: natural(Normal(loc + 1, 1.0)), "other log-probabilities")
        refused(lambda natural=natural: natural(Independent(p, 1)), "do not belong", error=sf.ShapeError)
    standard = sf.draw(Normal(torch.zeros((), requires_grad=True), 1.0), lambda x: x, 3)
    refused(lambda: sf.natural_gradient(p, standard), "(3,)", "batch shape", error=sf.ShapeError)  # N is no batch
    structured = sf.draw(Walk(loc), lambda x: x, 5)
    refused(lambda: sf.natural_gradient(Bernoulli(logits=loc), structured), "(5, 3)", error=sf.ShapeError)


def test_params_outside_the_graph():
    p, draws, params = network()
    other = torch.zeros(2, requires_grad=True)
    refused(lambda: sf.natural_gradient(p, draws, params=[*params, other]), "params[4]", "(2,)", "not in the graph")
    refused(lambda: sf.natural_gradient(p, draws, params=[torch.zeros(2)]), "require grad")
    refused(lambda: sf.natural_gradient(p, draws, params=[]), "at least one")
    with torch.no_grad():
        blind = sf.draw(p, lambda x: x, 5)
    refused(lambda: sf.natural_gradient(p, blind, params=params), "no scores")


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf"), True, "auto"])
def test_a_damping_that_is_none(damping):
    p = Normal(torch.zeros(2, requires_grad=True), 1.0)
    draws = sf.draw(p, lambda x: x, 5)
    refused(lambda: sf.natural_gradient(p, draws, damping=damping), "damping must be", repr(damping))
    one = {"loc": torch.ones(2), "scale": torch.ones(2)}
    refused(lambda: sf.fisher_information(p).solve(one, damping=damping), "damping must be")


def test_other_refusals():
    loc = torch.zeros(2, requires_grad=True)
    p = Normal(loc, 1.0)
    draws = sf.draw(p, lambda x: x, 5)
    refused(lambda: sf.natural_gradient(p, draws, solver=sf.Woodbury()), "params is None")
    refused(lambda: sf.natural_gradient(p, draws, params=loc, solver="woodbury"), "no solver", "DenseSolve()")
    pathwise = sf.draw(p, lambda x: x * loc, 5)
    refused(lambda: sf.natural_gradient(p, pathwise), "requires grad", "params=")
    fisher = sf.fisher_information(p)
    refused(lambda: fisher.solve({"loc": loc}), "['loc', 'scale']", "['loc']")
    refused(lambda: fisher.solve(loc), "Tensor")
    refused(lambda: fisher.solve({"loc": loc, "scale": torch.ones(1)}), "(1,)", "(2,)", error=sf.ShapeError)
    refused(lambda: sf.ConjugateGradients(tolerance=0.0), "tolerance")
    refused(lambda: sf.ConjugateGradients(max_iterations=0), "max_iterations")
    far = replace(draws, behaviour_log_prob=draws.log_prob.detach() - 1000)
    refused(
        lambda: sf.natural_gradient(p, far, params=loc), "overflow", error=sf.NonFiniteError,
    )  # fmt: skip


@pytest.mark.parametrize("family", [Bernoulli, Categorical, OneHotCategorical])
def test_a_probability_of_0_is_refused_whatever_the_damping(family):
    p = family(probs=torch.tensor([0.0, 0.5, 0.5]))
    fisher = sf.fisher_information(p)
    for call in (lambda: fisher.solve(fisher.parameters), lambda: fisher.solve(fisher.parameters, 1e-3), fisher.dense):
        with pytest.raises(sf.ScorefnError, match="boundary.*no damping repairs this"):
            call()


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


def test_a_subclass_with_another_density_does_not_inherit_a_closed_form():
    class Truncated(Normal):
        def log_prob(self, x):
            return torch.where(x > self.loc, super().log_prob(x) + np.log(2), -torch.inf)

    class Renamed(Truncated):
        pass

    class Counted(Normal):
        calls = 0

    for cls in (Truncated, Renamed):
        refused(
            lambda cls=cls: sf.fisher_information(cls(0.0, 1.0)),
            cls.__name__, "Normal", "Truncated overrides log_prob", "register_fisher",
        )  # fmt: skip
    assert sf.fisher_information(Counted(0.0, 1.0)).dense().tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert sf.fisher_information(Independent(Counted(torch.zeros(2), 1.0), 1)).dense().shape == (4, 4)


PYRO = {
    "Bernoulli": lambda d: d.Bernoulli(torch.tensor(0.3)),
    "Beta": lambda d: d.Beta(torch.tensor(2.0), 3.0),
    "Binomial": lambda d: d.Binomial(3, torch.tensor(0.3)),
    "Categorical": lambda d: d.Categorical(torch.tensor([0.3, 0.7])),
    "Cauchy": lambda d: d.Cauchy(torch.tensor(0.0), 1.0),
    "Chi2": lambda d: d.Chi2(torch.tensor(2.0)),
    "Dirichlet": lambda d: d.Dirichlet(torch.tensor([2.0, 3.0])),
    "Exponential": lambda d: d.Exponential(torch.tensor(2.0)),
    "Gamma": lambda d: d.Gamma(torch.tensor(2.0), 3.0),
    "Geometric": lambda d: d.Geometric(torch.tensor(0.3)),
    "HalfCauchy": lambda d: d.HalfCauchy(torch.tensor(1.0)),
    "HalfNormal": lambda d: d.HalfNormal(torch.tensor(1.0)),
    "Independent": lambda d: d.Independent(d.Normal(torch.zeros(2), 1.0), 1),
    "Laplace": lambda d: d.Laplace(torch.tensor(0.0), 1.0),
    "LogNormal": lambda d: d.LogNormal(torch.tensor(0.0), 1.0),
    "LowRankMultivariateNormal": lambda d: d.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    "MixtureSameFamily": lambda d: d.MixtureSameFamily(
        d.Categorical(torch.tensor([0.3, 0.7])), d.Normal(torch.zeros(2), 1.0)
    ),
    "MultivariateNormal": lambda d: d.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "NegativeBinomial": lambda d: d.NegativeBinomial(torch.tensor(3.0), torch.tensor(0.3)),
    "Normal": lambda d: d.Normal(torch.tensor(0.0), 1.0),
    "OneHotCategorical": lambda d: d.OneHotCategorical(torch.tensor([0.3, 0.7])),
    "OneHotCategoricalStraightThrough": lambda d: d.OneHotCategoricalStraightThrough(torch.tensor([0.3, 0.7])),
    "Poisson": lambda d: d.Poisson(torch.tensor(2.0)),
    "Uniform": lambda d: d.Uniform(torch.tensor(0.0), 1.0),
}


@pytest.mark.parametrize("name", PYRO)
def test_each_family_of_pyro_is_served_as_that_of_torch(name):
    """Some of Pyro's classes override sample or log_prob, for speed or for masks; none of these is another family."""
    pyro_distributions = pytest.importorskip("pyro.distributions")
    ours, theirs = PYRO[name](pyro_distributions), PYRO[name](torch.distributions)
    for question in (
        lambda p: sf.fisher_information(p).dense(),
        lambda p: sf.quantile(p, torch.full((5, *uniform_shape(p)), 0.3, dtype=torch.float64)),
        lambda p: sufficient_statistics(p, p.sample((2,)).fill_(1))[1],
    ):
        try:
            answer = question(theirs)
        except sf.ScorefnError:  # not served, whoever made it
            continue
        assert torch.equal(question(ours), answer)
