"""Fisher information is the covariance of the score."""

import pickle

import numpy as np
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Gamma,
    Geometric,
    Independent,
    NegativeBinomial,
    Normal,
    kl_divergence,
)

import scorefn as sf
from tests.fisher.cases import CASES, each_case, gradient_of, moments, packed, refused, unpacked

pytestmark = pytest.mark.usefixtures("float64")


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


def test_a_dirichlet_without_spread_is_singular():
    """One category has no score, and 1e17 draws' worth of concentration leave none to rounding."""
    for concentration in (torch.tensor([1.7]), torch.tensor([1e17, 2e17])):
        fisher = sf.fisher_information(Dirichlet(concentration))
        refused(lambda f=fisher, c=concentration: f.solve({"concentration": c}), "singular", "damping")
    one = sf.fisher_information(Dirichlet(torch.tensor([1.7])))
    assert torch.allclose(one.solve({"concentration": torch.ones(1)}, damping=0.5)["concentration"], torch.tensor(2.0))
    with pytest.raises(sf.ScorefnError, match="not finite"):
        sf.fisher_information(Dirichlet(torch.tensor([1e-200, 1.0]))).solve({"concentration": torch.ones(2)})
