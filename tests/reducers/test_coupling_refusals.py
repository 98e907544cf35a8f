"""Which families, subclasses and sizes a coupling refuses."""

import pytest
import torch
from torch import distributions as td
from torch.quasirandom import SobolEngine

import scorefn as sf
from scorefn.reducers import couplings
from tests.oracles.tolerances import near
from tests.reducers.coupled_families import t


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


def test_a_coupling_of_uniforms_must_say_how_they_are_made():
    with pytest.raises(TypeError, match="uniforms"):
        couplings._Blocks()


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
