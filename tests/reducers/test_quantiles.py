"""Quantiles: from uniforms to draws of each family."""

from itertools import product

import pytest
import torch
from torch import distributions as td

import scorefn as sf
from scorefn.reducers.quantiles import device_of, uniform_shape
from tests.oracles.tolerances import near
from tests.reducers.coupled_families import CONTINUOUS, DISCRETE, EVERY, TRIL, VECTORS, doubled, t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_draws_look_like_those_of_sample_and_none_is_infinite(name, dtype):
    p = EVERY[name] if dtype == torch.float32 else doubled(EVERY[name])
    like = p.sample((5,))
    ends = torch.tensor([0.0, 1e-30, 0.3, 1.0 - 1e-16, 1.0], dtype=torch.float64)
    for u in (ends, ends.float()):
        x = sf.quantile(p, u.reshape(-1, *[1] * len(uniform_shape(p))).expand(5, *uniform_shape(p)))
        assert x.shape == like.shape
        assert x.dtype == like.dtype
        assert x.isfinite().all()
        if name not in (
            "Kumaraswamy",
            "ContinuousBernoulli",
        ):  # torch's own formulas round to the ends, in `sample` too
            assert p.log_prob(x).isfinite().all(), "a draw where the density is 0"


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_quantiles_invert_the_distribution_function(name):
    p = doubled(CONTINUOUS[name])
    u = torch.linspace(1e-6, 1 - 1e-6, 301, dtype=torch.float64)
    u = u.reshape(-1, *[1] * len(p.batch_shape)).expand(-1, *p.batch_shape)
    x = sf.quantile(p, u)
    decreasing = name in ("chain", "Kumaraswamy")  # their transforms turn the line around
    assert near(p.cdf(x), 1 - u if decreasing else u, 1e-9)
    assert ((x.diff(dim=0) < 0) if decreasing else (x.diff(dim=0) > 0)).all()


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_quantiles_take_each_outcome_on_a_cell_of_its_probability(name):
    """In float64, and the outcomes increase with u."""
    p, top = doubled(DISCRETE[name][0]), DISCRETE[name][1]
    k = torch.arange(top)
    k = k if isinstance(p, td.Categorical) else k.double()
    table = td.Binomial(p.total_count, p.probs, validate_args=False) if isinstance(p, td.Binomial) else p
    for index in product(*[range(size) for size in p.batch_shape]):
        one = k.reshape(-1, *[1] * len(p.batch_shape)).expand(-1, *p.batch_shape)
        valid = one <= p.total_count if isinstance(p, td.Binomial) else one >= 0
        mass = torch.where(valid, table.log_prob(one).exp(), 0.0)[(slice(None), *index)]
        assert mass.sum() > 1 - 1e-4
        upper = mass.cumsum(0)
        cells = [j for j in range(top) if mass[j] > 1e-9]
        low = torch.stack([upper[j] - mass[j] for j in cells])
        inside = torch.cat([low + share * mass[cells] for share in (1e-4, 0.5, 1 - 1e-4)])
        u = inside.reshape(-1, *[1] * len(p.batch_shape)).expand(-1, *p.batch_shape)
        x = sf.quantile(p, u)[(slice(None), *index)]
        assert torch.equal(x.long(), torch.tensor(cells).repeat(3)), f"{name} {index}"


def test_vectors_are_pushed_through_their_factor():
    u = torch.rand(7, 2, 3, dtype=torch.float64)
    z = sf.quantile(td.Normal(torch.zeros(2, 3).double(), 1.0), u)
    assert near(sf.quantile(doubled(VECTORS["MultivariateNormal"]), u), z @ TRIL.double().T, 1e-9)
    low_rank = doubled(VECTORS["LowRankMultivariateNormal"])
    tril = (sf.quantile(low_rank, u[:, 0]) - 1).T @ torch.linalg.pinv(z[:, 0].T)
    assert near(tril @ tril.T, low_rank.covariance_matrix, 1e-9)


def test_a_mixture_takes_its_component_by_the_first_uniform():
    weights, loc = t(0.2, 0.5, 0.3).double(), t(-100.0, 0.0, 100.0).double()
    p = td.MixtureSameFamily(td.Categorical(probs=weights), td.Normal(loc, 1.0))
    u = torch.tensor([[0.1, 0.3], [0.19, 0.5], [0.21, 0.9], [0.69, 0.3], [0.71, 0.3], [0.99, 0.1]]).double()
    component = torch.tensor([0, 0, 1, 1, 2, 2])
    assert near(sf.quantile(p, u), loc[component] + sf.quantile(td.Normal(torch.tensor(0.0).double(), 1.0), u[:, 1]))


def test_a_mixture_of_vectors_keeps_its_axes():
    batch, K, D = 2, 3, 4
    loc = torch.arange(batch * K * D).reshape(batch, K, D).double() * 100
    p = td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(batch, K).double()), td.Independent(td.Normal(loc, 1.0), 1)
    )
    u = torch.rand(50, batch, 1 + D, dtype=torch.float64)
    x = sf.quantile(p, u)
    component = (u[..., 0] * K).long()
    for b in range(batch):
        z = sf.quantile(td.Normal(torch.zeros(D).double(), 1.0), u[:, b, 1:])
        assert near(x[:, b], loc[b, component[:, b]] + z)


def test_a_transform_with_a_cache_keeps_the_gradient_of_its_inverse():
    loc = torch.tensor(0.3, requires_grad=True)
    p = td.TransformedDistribution(td.Normal(0.0, 1.0), [td.AffineTransform(loc, 2.0, cache_size=1)])
    for coupling in (sf.Antithetic(), sf.OrthogonalGaussian()):
        x, _ = coupling.sample(p, 4)
        assert near(torch.autograd.grad(p.log_prob(x).sum(), loc)[0], ((x - 0.3) / 4).sum().detach(), 1e-6)


def test_draws_carry_no_gradient_and_the_distribution_keeps_its_own():
    """What is computed once for the draws is not kept without its gradient."""
    logits = torch.tensor([0.3, -1.0], requires_grad=True)
    p = td.Bernoulli(logits=logits)
    x = sf.quantile(p, torch.rand(4, 2))
    assert not x.requires_grad
    assert p.probs.requires_grad


def test_a_family_is_registered():
    class Triangular(td.Distribution):
        arg_constraints, support = {}, td.constraints.unit_interval

        def __init__(self, tip):
            self.tip = tip
            super().__init__(tip.shape, validate_args=False)

    class Child(Triangular):
        pass

    @sf.register_quantile(Triangular)
    def triangular(p, u):
        return p.tip * (u.sqrt() + 0)

    p = Child(t(1.0, 2.0))
    x, block = sf.Antithetic().sample(p, 4)
    assert x.shape == (4, 2)
    assert x.dtype == torch.float32
    assert block.tolist() == [0, 0, 1, 1]

    class ByEvent(Triangular):
        pass

    sf.register_quantile(ByEvent, lambda p: torch.Size((*p.batch_shape, 3)))(lambda p, u: u.sum(-1))
    assert sf.quantile(ByEvent(t(1.0, 2.0)), torch.rand(5, 2, 3)).shape == (5, 2)


@pytest.mark.parametrize(
    "p", [td.Gamma(1.0, 1.0), td.Dirichlet(torch.ones(3)), td.Chi2(3.0), object()], ids=lambda p: type(p).__name__
)
def test_other_families_are_refused_with_what_is_served(p):
    name = type(p).__name__
    with pytest.raises(
        sf.ScorefnError, match=rf"(?s)No quantile is known for {name}.*Bernoulli.*Normal.*register_quantile"
    ):
        sf.Antithetic().sample(p, 4)


def test_uniforms_of_another_shape_are_refused():
    with pytest.raises(sf.ShapeError, match=r"shape \(2,\), but u is \(7, 1\)"):
        sf.quantile(td.Normal(torch.zeros(2), 1.0), torch.rand(7, 1))
    with pytest.raises(sf.ShapeError, match=r"shape \(2,\), but u is \(7, 2, 4\)"):
        sf.quantile(VECTORS["OneHotCategorical"], torch.rand(7, 2, 4))


def test_a_uniform_at_a_border_gives_the_outcome_above():
    """An outcome is taken where its distribution function exceeds u; those of probability 0 never are."""
    u = t(0.25, 0.5, 0.75).double()
    assert sf.quantile(td.Categorical(probs=t(0.25, 0.25, 0.5)), u).tolist() == [1, 2, 2]
    assert sf.quantile(td.Categorical(probs=t(0.5, 0.0, 0.5)), u).tolist() == [0, 2, 2]
    assert sf.quantile(td.Bernoulli(t(0.5)), u.unsqueeze(-1)).flatten().tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniforms_of_0_and_1_are_moved_inside_by_half_a_unit(dtype):
    class Echo(td.Distribution):
        arg_constraints = {}

    sf.register_quantile(Echo)(lambda p, u: u)
    half = torch.finfo(dtype).eps / 2
    inside = sf.quantile(Echo(), torch.tensor([0.0, 0.3, 1.0], dtype=dtype))
    assert torch.equal(inside, torch.tensor([half, 0.3, 1 - half], dtype=dtype))
    assert 0 < inside[2] < 1


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_a_normal_of_two_precisions_is_drawn_as_sample_draws_it(dtypes):
    p = td.Normal(torch.zeros(2, dtype=dtypes[0]), torch.ones(2, dtype=dtypes[1]))
    assert sf.quantile(p, torch.rand(3, 2)).dtype == p.sample().dtype == dtypes[0]


def test_the_device_is_that_of_the_first_tensor_inside():
    far = torch.device("meta")
    p = td.Normal(torch.zeros(2, device=far), torch.ones(2, device=far), validate_args=False)
    for made in (p, td.Independent(p, 1, validate_args=False)):
        assert device_of(made) == far
    assert device_of(td.Normal(torch.zeros(2), 1.0)) == torch.device("cpu")
    assert device_of(td.Distribution(validate_args=False)) is None
