"""Couplings: each draw follows p exactly, blocks are what they claim, and what does not fit is refused.

That the gradient keeps its expectation is proved in `tests/test_contract.py`, over all outcomes of each coupling.
"""

import dataclasses
from itertools import product

import pytest
import torch
from torch import distributions as td
from torch.quasirandom import SobolEngine

import scorefn as sf
from scorefn.reducers import couplings
from scorefn.reducers.quantiles import device_of, from_normal, uniform_shape
from tests.oracles import COUPLINGS, FAMILIES, VISIBLE, Dice, Given, cells_between, coordinates, gauss_hermite, near

COUPLED = {
    "Antithetic()": sf.Antithetic(),
    "Stratified()": sf.Stratified(),
    "Stratified(4)": sf.Stratified(4),
    "Systematic()": sf.Systematic(),
    "Sobol()": sf.Sobol(),
    "Sobol(4)": sf.Sobol(4),
    "OrthogonalGaussian()": sf.OrthogonalGaussian(),
    "OrthogonalGaussian(mirrored=True)": sf.OrthogonalGaussian(mirrored=True),
}
UNIFORMS = {name: coupling for name, coupling in COUPLED.items() if hasattr(coupling, "uniforms")}


def t(*values):
    return torch.tensor(values)


CHAIN = [td.AffineTransform(1.0, -2.0), td.ExpTransform(), td.AffineTransform(3.0, 0.5)]
TRIL = torch.tensor([[0.8, 0.0, 0.0], [0.3, 1.1, 0.0], [-0.4, 0.2, 0.6]])
CONTINUOUS = {
    "Normal": td.Normal(t(0.5, -2.0), t(0.1, 3.0)),
    "LogNormal": td.LogNormal(t(0.5), t(0.7)),
    "Uniform": td.Uniform(t(-1.0, 10.0), t(2.0, 11.0)),
    "Laplace": td.Laplace(0.5, 2.0),
    "Cauchy": td.Cauchy(0.5, t(2.0, 0.1)),
    "Exponential": td.Exponential(t(0.3, 7.0)),
    "Gumbel": td.Gumbel(0.5, 2.0),
    "logistic": td.TransformedDistribution(
        td.Uniform(t(0.0), t(1.0)), [td.SigmoidTransform().inv, td.AffineTransform(0.5, 2.0)]
    ),
    "chain": td.TransformedDistribution(td.Normal(t(0.2, 0.4), 0.5), CHAIN),
    "HalfNormal": td.HalfNormal(t(2.0)),
    "HalfCauchy": td.HalfCauchy(t(2.0)),
    "Weibull": td.Weibull(t(2.0), t(1.5)),
    "Pareto": td.Pareto(t(2.0), t(3.0)),
    "Kumaraswamy": td.Kumaraswamy(t(2.0), t(3.0)),
    "ContinuousBernoulli": td.ContinuousBernoulli(t(0.2)),
}
DISCRETE = {
    "Bernoulli": (td.Bernoulli(logits=t(0.5, -3.0)), 2),
    "Categorical": (td.Categorical(logits=torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))), 5),
    "Categorical, impossible outcomes": (td.Categorical(probs=t(0.0, 0.3, 0.0, 0.7, 0.0)), 5),
    "Geometric": (td.Geometric(t(0.3, 0.9)), 30),
    "Geometric, certain": (td.Geometric(t(1.0)), 2),
    "Binomial": (td.Binomial(t(3.0, 40.0), t(0.3, 0.9)), 41),
    "Poisson": (td.Poisson(t(0.2, 3.7, 40.0)), 90),
    "Poisson, rate 0": (td.Poisson(t(0.0)), 2),
}
VECTORS = {
    "OneHotCategorical": td.OneHotCategorical(logits=torch.randn(2, 4, generator=torch.Generator().manual_seed(0))),
    "Independent(Normal)": td.Independent(td.Normal(torch.zeros(2, 3), 1.0), 1),
    "Independent(Bernoulli)": td.Independent(td.Bernoulli(logits=torch.zeros(2, 3)), 2),
    "Independent(OneHotCategorical)": td.Independent(td.OneHotCategorical(logits=torch.zeros(2, 3)), 1),
    "MultivariateNormal": td.MultivariateNormal(torch.zeros(2, 3), scale_tril=TRIL),
    "LowRankMultivariateNormal": td.LowRankMultivariateNormal(torch.ones(3), TRIL[:, :2], t(0.1, 0.2, 0.3)),
    "LogisticNormal": td.LogisticNormal(torch.zeros(2, 3), torch.ones(3)),
    "Mixture of Normals": td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(2, 3)), td.Normal(torch.zeros(2, 3), 1.0)
    ),
    "Mixture of vectors": td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(3)), td.Independent(td.Normal(torch.zeros(3, 4), 1.0), 1)
    ),
}
EVERY = {**CONTINUOUS, **{name: p for name, (p, _) in DISCRETE.items()}, **VECTORS}


def doubled(p):
    """The same distribution in float64."""
    if isinstance(p, td.Independent):
        return td.Independent(doubled(p.base_dist), p.reinterpreted_batch_ndims)
    if isinstance(p, td.MixtureSameFamily):
        return td.MixtureSameFamily(doubled(p.mixture_distribution), doubled(p.component_distribution))
    if type(p) is td.TransformedDistribution:
        return td.TransformedDistribution(doubled(p.base_dist), p.transforms)
    names = set(p.arg_constraints) - {"probs"} if "logits" in p.arg_constraints else set(p.arg_constraints)
    names -= {"covariance_matrix", "precision_matrix"}
    arguments = {name: getattr(p, name) for name in names}
    return type(p)(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})


# --------------------------------------------------------------------------------------------------------- quantiles


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


# -------------------------------------------------------------------------------------------------- every coupling


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("coupling", UNIFORMS)
def test_every_family_meets_every_coupling(coupling, name):
    x, block = COUPLED[coupling].sample(EVERY[name], 8)
    assert x.shape == EVERY[name].sample((8,)).shape
    assert not x.requires_grad
    assert block.shape == (8,)
    assert len(block.unique()) >= 2
    assert (torch.bincount(block) == 8 // len(block.unique())).all()


@pytest.mark.parametrize("name", COUPLED)
def test_draws_follow_from_one_seed(name):
    p = td.Independent(td.Normal(torch.zeros(3), 1.0), 1)
    torch.manual_seed(5)
    one, _ = COUPLED[name].sample(p, 16)
    after = torch.rand(())
    torch.manual_seed(5)
    two, _ = COUPLED[name].sample(p, 16)
    assert torch.equal(one, two)
    assert torch.equal(after, torch.rand(()))
    assert not torch.equal(one, COUPLED[name].sample(p, 16)[0])


@pytest.mark.parametrize("name", COUPLINGS)
def test_each_draw_alone_is_uniform(name):
    """Over all outcomes, every draw lies in every cell with exactly its volume; so each follows p exactly."""
    row = COUPLINGS[name]
    steps = torch.tensor([0.15, 0.4, 0.7, 0.85], dtype=torch.float64)
    anti = isinstance(row.make(), sf.Antithetic)
    N = 4 if name.endswith("()") and not anti else row.size
    breaks = steps if anti else (row.size * steps).frac()
    u, _, weight = Dice(cells_between(torch.cat([breaks, 1 - breaks]))).uniforms(row.make(), N, ())
    for step in steps:
        below = (weight * (u < step)).sum(-1)
        assert near(below, step.expand(N)), f"P(u < {step}) = {below}"


@pytest.mark.parametrize("name", ["Stratified(2)", "Systematic(2)", "Sobol(2)", "Sobol(4)", "Antithetic()"])
def test_coordinates_of_one_draw_are_independent(name):
    """Over all outcomes of one block in two coordinates, each corner of the square is met with its area."""
    row = COUPLINGS[name]
    steps = torch.tensor([0.4], dtype=torch.float64)
    breaks = steps if row.size == 2 and name == "Antithetic()" else (row.size * steps).frac()
    cells = cells_between(torch.cat([breaks, 1 - breaks]) if name == "Antithetic()" else breaks)
    u, _, weight = Dice(cells).uniforms(row.make(), row.size, (2,))
    corner = (weight * (u < 0.4).all(-1)).sum(-1)
    assert near(corner, torch.full_like(corner, 0.16))


@pytest.mark.parametrize("name", COUPLINGS)
def test_leave_one_out_within_a_block_is_biased(name):
    """What the blocks are for: with every draw taken for its own block, the bias is plain to see."""
    row, family = COUPLINGS[name], FAMILIES["Bernoulli"]
    parameters = family.parameters()
    N = 4 if name.endswith("()") else row.size
    u, block, weight = Dice(row.cells(family)).uniforms(row.make(), N, ())
    p = family.build(*parameters).expand((len(weight),))
    draws = sf.draw(p, lambda x: family.f(x, *parameters), N, coupling=Given(u, torch.arange(N)))
    ours = (weight * sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean(0)).sum()
    truth = family.truth(*parameters)
    gaps = [
        float((mine - true).abs())
        for mine, true in zip(
            torch.autograd.grad(ours, parameters), torch.autograd.grad(truth, parameters), strict=True
        )
    ]
    assert len(block.unique()) == N // row.size
    assert max(gaps) > VISIBLE


def test_one_block_has_no_leave_one_out():
    p = td.Normal(torch.zeros((), requires_grad=True), 1.0)
    with pytest.raises(sf.ScorefnError, match="needs two blocks"):
        sf.expectation(p, torch.square, 8, coupling=sf.Sobol(8), baseline=sf.LeaveOneOut())
    assert sf.expectation(p, torch.square, 8, coupling=sf.Sobol(8)).requires_grad  # "auto" takes none


# ---------------------------------------------------------------------------------------------- each for itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_antithetic_draws_of_a_symmetric_family_are_mirror_images(dtype):
    loc = torch.tensor([0.5, -2.0], dtype=dtype)
    tril = torch.tensor([[0.3, 0.0], [0.1, 3.0]], dtype=dtype)
    for p in (td.Normal(loc, 3.0), td.Laplace(loc, 3.0), td.MultivariateNormal(loc, scale_tril=tril)):
        x, block = sf.Antithetic().sample(p, 1000)
        pairs = x.reshape(500, 2, 2)
        assert block.tolist() == torch.arange(500).repeat_interleave(2).tolist()
        assert near(pairs.sum(1), (2 * loc).expand(500, 2), 64 * torch.finfo(dtype).eps * 10)
        assert not near(pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize("coupling", [sf.Stratified(8), sf.Systematic(8), sf.Sobol(8)], ids=str)
def test_every_cell_of_each_coordinate_holds_one_draw(coupling):
    u, block = coupling.uniforms(24, torch.Size((3, 5)))
    assert u.dtype == torch.float64
    for b in range(3):
        cells = (u[block == b] * 8).long().sort(0).values
        assert torch.equal(cells, torch.arange(8).reshape(8, 1, 1).expand(8, 3, 5))


def test_systematic_draws_share_their_place_and_stratified_ones_do_not():
    place = (sf.Systematic(8).uniforms(8, torch.Size((3,)))[0] * 8).frac()
    assert near(place, place[:1].expand_as(place))
    assert len(place[0].unique()) == 3
    assert len((sf.Stratified(8).uniforms(8, torch.Size(()))[0] * 8).frac().unique()) == 8


@pytest.mark.parametrize("coupling", [sf.Stratified(64), sf.Systematic(64)], ids=str)
def test_coordinates_are_permuted_apart(coupling):
    cells = (coupling.uniforms(64, torch.Size((3,)))[0] * 64).long()
    assert len({tuple(column.tolist()) for column in cells.T}) == 3


def test_sobol_points_are_a_net():
    """In two coordinates, every box of volume 1/16 with sides in powers of two holds one of 16 points."""
    u, block = sf.Sobol(16).uniforms(160, torch.Size((2,)))
    for b, (i, j) in product(range(10), [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]):
        x, y = u[block == b].T
        boxes = (x * 2**i).long() * 2**j + (y * 2**j).long()
        assert torch.equal(boxes.sort().values, torch.arange(16))


def test_sobol_shifts_each_block_anew():
    first = (sf.Sobol(16).uniforms(16 * 200, torch.Size(()))[0][::16] * 16).long()
    assert len(first.unique()) == 16


def test_sobol_points_are_torchs_under_the_scramble():
    """Without scramble, the first points of torch's sequence; with it, their digits change, not the sequence."""
    points = couplings._sobol(7, 32)
    assert torch.equal(points / 32.0, SobolEngine(7).draw(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(couplings, "_integers", lambda low, high, shape, device: torch.full(shape, low))
        u, _ = sf.Sobol(32).uniforms(32, torch.Size((7,)))
    assert torch.equal((u * 32).long(), points)


def test_the_scramble_of_two_points_of_a_block():
    """Over all scrambles, two points that first differ in digit r lie apart there and are free beyond (Owen, 1997).

    This pairwise law is all that a variance depends on; so the shortened scramble costs none.
    """
    u, _, weight = Dice(cells_between(torch.zeros(0, dtype=torch.float64))).uniforms(sf.Sobol(8), 8, ())
    cell = (u * 8).long()
    plain = couplings._sobol(1, 8).flatten()
    for i, j in [(0, 1), (0, 3), (2, 5), (6, 7)]:
        depth = 3 - int(plain[i] ^ plain[j]).bit_length()  # digits in common
        joint = torch.zeros(8, 8, dtype=torch.float64).index_put_((cell[i], cell[j]), weight, accumulate=True)
        a, b = coordinates(8, 8).T
        common = torch.tensor([3 - int(v).bit_length() for v in (a ^ b)])
        expected = torch.where(common == depth, 1.0, 0.0).double().reshape(8, 8)
        assert near(joint, expected / expected.sum())


def test_orthogonal_directions_are_orthogonal_and_lengths_are_their_own():
    for p, shape in [
        (td.Normal(torch.zeros(3, 4).double(), 1.0), (12,)),
        (td.Independent(td.Normal(torch.zeros(3, 4).double(), 1.0), 2), (12,)),
        (td.Independent(td.Normal(torch.zeros(3, 4).double(), 1.0), 1), (3, 4)),
    ]:
        x, block = sf.OrthogonalGaussian(4).sample(p, 8)
        assert block.tolist() == [0] * 4 + [1] * 4
        z = x.reshape(2, 4, -1, shape[-1]).transpose(1, 2)
        gram = z @ z.mT
        assert near(gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), torch.zeros(()).double(), 1e-12)
        lengths = gram.diagonal(dim1=-2, dim2=-1)
        assert len(lengths.flatten().unique()) == lengths.numel()


def test_mirrored_orthogonal_draws():
    loc = torch.tensor([0.5, -2.0, 1.0]).double()
    p = td.MultivariateNormal(loc, scale_tril=TRIL.double())
    x, block = sf.OrthogonalGaussian(mirrored=True).sample(p, 12)
    assert block.tolist() == [0] * 6 + [1] * 6
    z = torch.linalg.solve_triangular(TRIL.double(), (x - loc).T, upper=False).T.reshape(2, 2, 3, 3)
    assert near(z.sum(1), torch.zeros(()).double())
    gram = z[:, 0] @ z[:, 0].mT
    assert near(gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), torch.zeros(()).double())


def test_orthogonal_draws_push_through_transforms():
    p = td.TransformedDistribution(td.Normal(torch.zeros(3), 1.0), CHAIN)
    x, _ = sf.OrthogonalGaussian().sample(p, 6)
    assert x.shape == (6, 3)
    z = torch.randn(6, 3)
    assert near(from_normal(p, z), 3 + (1 - 2 * z).exp() / 2, 1e-6)
    assert sf.OrthogonalGaussian().sample(td.Normal(0.0, torch.tensor(1.0)), 5)[1].tolist() == [0, 1, 2, 3, 4]


def test_default_blocks():
    """The largest that leave two; nothing is chosen where a size is given."""
    p = td.Independent(td.Normal(torch.zeros(4), 1.0), 1)
    cases = [
        (sf.Stratified(), 256, 128), (sf.Stratified(), 9, 3), (sf.Stratified(256), 256, 256), (sf.Systematic(), 10, 5),
        (sf.Sobol(), 256, 128), (sf.Sobol(), 96, 32), (sf.Sobol(), 4, 2), (sf.Antithetic(), 6, 2),
        (sf.OrthogonalGaussian(), 256, 4), (sf.OrthogonalGaussian(), 9, 3), (sf.OrthogonalGaussian(), 6, 3),
        (sf.OrthogonalGaussian(mirrored=True), 256, 8), (sf.OrthogonalGaussian(2), 10, 2),
        (sf.OrthogonalGaussian(1), 3, 1),
    ]  # fmt: skip
    for coupling, N, size in cases:
        _, block = coupling.sample(p, N)
        assert torch.bincount(block).tolist() == [size] * (N // size), f"{coupling}, {N}"


@pytest.mark.parametrize(
    ("coupling", "N", "message"),
    [
        (sf.Antithetic(), 5, r"blocks of 2, .* num_samples is 5: .* Use 4 or 6"),
        (sf.Antithetic(), 1, r"Use 2 or 4"),
        (sf.Stratified(4), 10, r"blocks of 4, .* Use 8 or 12"),
        (sf.Stratified(), 7, r"cannot split 7 draws"),
        (sf.Stratified(), 2, r"cannot split 2 draws"),
        (sf.Systematic(), 1, r"cannot split 1 draws"),
        (sf.Stratified(0), 4, r"a draw at least, but Stratified was given 0"),
        (sf.Sobol(), 9, r"cannot split 9 draws"),
        (sf.Sobol(6), 12, r"powers of two, but points = 6: use 4 or 8"),
        (sf.Sobol(8), 12, r"blocks of 8"),
        (sf.OrthogonalGaussian(), 7, r"cannot split 7 draws"),
        (sf.OrthogonalGaussian(4), 8, r"4 directions cannot be orthogonal in 3 dimension"),
        (sf.OrthogonalGaussian(2, mirrored=True), 6, r"blocks of 4"),
        (sf.OrthogonalGaussian(mirrored=True), 9, r"blocks of 2, .* Use 8 or 10"),
    ],
    ids=str,
)
def test_numbers_of_draws_that_do_not_fit_are_refused(coupling, N, message):
    p = td.Independent(td.Normal(torch.zeros(3), 1.0), 1)
    with pytest.raises(sf.ScorefnError, match=message):
        coupling.sample(p, N)


def test_more_coordinates_than_sobol_has_are_refused():
    p = td.Normal(torch.zeros(SobolEngine.MAXDIM + 1), 1.0)
    with pytest.raises(sf.ScorefnError, match=r"21202 coordinates, but Sobol sequences are tabulated up to 21201"):
        sf.Sobol().sample(p, 4)


def test_orthogonal_draws_of_another_family_are_refused():
    with pytest.raises(sf.ScorefnError, match=r"Laplace is not made from a Gaussian.*Sobol"):
        sf.OrthogonalGaussian().sample(td.Laplace(torch.zeros(3), 1.0), 4)


# -------------------------------------------------------------------------------------- what cannot be enumerated


def gaussian(D, log_scale=-0.2):
    mean, log_scale = torch.full((D,), 0.4, dtype=torch.float64), torch.full((D,), log_scale, dtype=torch.float64)
    mean.requires_grad_(), log_scale.requires_grad_()
    return (mean, log_scale), lambda: td.Independent(td.Normal(mean, log_scale.exp()), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUPLED if not name.endswith("(4)")])
def test_the_gradient_in_four_coordinates(name):
    """Sampled: false alarm 1e-6, every bias below 1 % of the largest coordinate, and it passes on equivalence only."""
    parameters, p = gaussian(4, -1.5)
    nodes, weights = gauss_hermite(40)

    def f(x):
        return (x.square() + x.exp()).sum(-1) + 0.5 * x[..., 0] * x[..., 1]

    def truth():
        mean, log_scale = parameters
        x = mean + log_scale.exp() * nodes.unsqueeze(-1)
        return (weights.unsqueeze(-1) * (x.square() + x.exp())).sum() + 0.5 * mean[0] * mean[1]

    def estimate():
        return sf.expectation(p(), f, 1024, coupling=COUPLED[name])

    exact = torch.autograd.grad(truth(), parameters)
    report = sf.diagnostics.check_unbiased(estimate, exact, parameters, repeats=6000, bias=0.01, false_alarm=1e-6)
    assert report, report


def variance(p, f, parameters, coupling, repeats=300):
    gradients = []
    for _ in range(repeats):
        loss = sf.expectation(p(), f, 256, coupling=coupling, baseline=sf.LeaveOneOut())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return float(torch.stack(gradients).var(0).sum())


def test_sobol_halves_the_variance_at_256_draws():
    """A ratio of about 3.5 on a smooth f in ten dimensions; its estimate from 300 repeats is within 15 % or so."""
    parameters, p = gaussian(10)
    slopes = 0.6 * torch.randn(10, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def f(x):
        return torch.nn.functional.softplus(x @ slopes).sum(-1) + x.square().sum(-1) / 8

    ratio = variance(p, f, parameters, sf.Independent()) / variance(p, f, parameters, sf.Sobol())
    assert ratio > 2, ratio


@pytest.mark.parametrize("make", [lambda m: td.StudentT(4.0, m, 0.7), lambda m: td.VonMises(m, 2.0)])
def test_symmetric_families_without_a_quantile_are_mirrored(make):
    location = torch.tensor([2.5, -0.4, 0.0], dtype=torch.float64, requires_grad=True)
    p = td.Independent(make(location), 1)
    x, block = sf.Antithetic().sample(p, 8)
    assert x.shape == (8, 3)
    assert block.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(p.log_prob(x[::2]), p.log_prob(x[1::2]))
    away = x - location.detach()
    torch.testing.assert_close(away[::2].sin(), -away[1::2].sin())
    sf.expectation(p, lambda x: x.sin().sum(-1), 8, coupling=sf.Antithetic()).backward()
    assert location.grad.isfinite().all()
    with pytest.raises(sf.ScorefnError, match="Antithetic"):
        sf.Antithetic().sample(p, 7)


# ------------------------------------------------------------------------------------------------------ at the borders


def test_mirror_images_are_exact_and_angles_stay_on_the_circle():
    loc = torch.tensor([2.5, -0.4], dtype=torch.float64)
    x, _ = sf.Antithetic().sample(td.StudentT(2.0, loc, 30.0), 100)
    assert torch.equal(x[1::2], 2 * loc - x[::2])
    assert x.abs().max() > torch.pi
    angle, _ = sf.Antithetic().sample(td.VonMises(loc, 0.5), 100)
    assert (-torch.pi <= angle).all()
    assert (angle < torch.pi).all()


@pytest.mark.parametrize("name", COUPLED)
def test_couplings_are_values(name):
    coupling = COUPLED[name]
    other = dataclasses.replace(coupling)
    assert other == coupling
    assert {coupling: 1}[other] == 1
    assert coupling.unbiased is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        coupling.unbiased = False


def test_a_coupling_of_uniforms_must_say_how_they_are_made():
    with pytest.raises(TypeError, match="uniforms"):
        couplings._Blocks()


def test_mirrored_directions_leave_two_blocks():
    p = td.Independent(td.Normal(torch.zeros(4), 1.0), 1)
    _, block = sf.OrthogonalGaussian(mirrored=True).sample(p, 8)
    assert block.tolist() == [0] * 4 + [1] * 4


def test_sobol_blocks_of_one_point_and_draws_of_no_coordinate_or_of_all_that_are_tabulated():
    u, block = sf.Sobol(1).uniforms(3, torch.Size(()))
    assert block.tolist() == [0, 1, 2]
    assert len(u.unique()) == 3
    for size in (0, SobolEngine.MAXDIM):
        u, block = sf.Sobol(2).uniforms(4, torch.Size((size,)))
        assert u.shape == (4, size)
        assert block.tolist() == [0, 0, 1, 1]


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


# -------------------------------------------------------------------------------------------------- subclasses


class Truncated(td.Normal):
    """The upper half of a normal, whose quantile is its own."""

    def icdf(self, u):
        return super().icdf((1 + u) / 2)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.icdf(torch.rand(self._extended_shape(sample_shape)))

    def log_prob(self, x):
        return super().log_prob(x) + torch.log(t(2.0))


class Folded(td.Normal):
    """The same without a quantile."""

    def sample(self, sample_shape=()):
        return self.loc + (super().sample(sample_shape) - self.loc).abs()


class Renamed(td.Normal):
    """A normal."""


class Resampled(Truncated):
    """Its parent's quantile is not its own."""

    def rsample(self, sample_shape=()):
        return -super().rsample(sample_shape)


class FoldedStudent(td.StudentT):
    """No mirror image."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).abs()


@pytest.mark.parametrize("coupling", [sf.Sobol(), sf.Antithetic(), sf.Stratified()], ids=repr)
def test_a_subclass_that_samples_otherwise_is_not_drawn_as_its_parent(coupling):
    p = Truncated(t(1.0, 2.0), 3.0)
    x, _ = coupling.sample(td.Independent(p, 1), 64)
    assert (x > p.loc).all()
    assert near(x.mean(0), p.loc + 3 * (2 / torch.pi) ** 0.5, 1.2)
    for cls in (Folded, Resampled):
        with pytest.raises(sf.ScorefnError, match=rf"{cls.__name__}.*Normal.*overrides r?sample.*register_quantile"):
            coupling.sample(cls(0.0, 1.0), 64)
    torch.manual_seed(0)
    x, _ = coupling.sample(Renamed(0.0, 1.0), 8)
    torch.manual_seed(0)
    assert torch.equal(x, coupling.sample(td.Normal(0.0, 1.0), 8)[0])


def test_orthogonal_directions_are_those_of_gaussians_only():
    for cls in (Truncated, Folded):
        for p in (cls(torch.zeros(2), 1.0), td.Independent(cls(torch.zeros(2), 1.0), 1)):
            with pytest.raises(sf.ScorefnError, match=f"{cls.__name__} overrides .*register_quantile"):
                sf.OrthogonalGaussian().sample(p, 8)
    assert sf.OrthogonalGaussian().sample(td.Independent(Renamed(torch.zeros(2), 1.0), 1), 8)[0].shape == (8, 2)


def test_a_subclass_without_symmetry_is_not_mirrored():
    with pytest.raises(sf.ScorefnError, match="No quantile is known for FoldedStudent"):
        sf.Antithetic().sample(FoldedStudent(3.0), 8)


def test_a_registered_subclass_is_served_whatever_it_overrides():
    class Own(Folded):
        pass

    @sf.register_quantile(Own)
    def own(p, u):
        return p.loc + p.scale * (u.erfinv() * 2**0.5).to(p.loc)

    assert (sf.Sobol().sample(Own(0.0, 1.0), 8)[0] > 0).all()


@pytest.mark.parametrize(
    "coupling", [sf.Stratified(2.0), sf.Sobol("4"), sf.Systematic(True), sf.OrthogonalGaussian(1.5)], ids=repr
)
def test_sizes_that_are_no_counts_are_refused(coupling):
    p = td.Independent(td.Normal(torch.zeros(3), 1.0), 1)
    with pytest.raises(sf.ScorefnError, match=f"{type(coupling).__name__} was given .*integer of at least 1"):
        coupling.sample(p, 8)
