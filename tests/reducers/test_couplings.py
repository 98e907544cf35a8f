"""Couplings: each draw alone follows p, and what each of them promises of the draws together."""

import dataclasses
from itertools import product

import pytest
import torch
from torch import distributions as td
from torch.quasirandom import SobolEngine

import scorefn as sf
from scorefn.reducers import couplings
from scorefn.reducers.quantiles import from_normal
from tests.oracles.couplings import COUPLINGS, Dice, Given, cells_between
from tests.oracles.families import FAMILIES
from tests.oracles.tolerances import VISIBLE, near
from tests.oracles.toys import coordinates
from tests.reducers.coupled_families import CHAIN, COUPLED, EVERY, TRIL, UNIFORMS


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
