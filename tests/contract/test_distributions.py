"""Law 1 for plain distributions, by quadrature, and for couplings, cell by cell of uniforms.

A new family or coupling joins by one row of FAMILIES or COUPLINGS in `tests/oracles`.
"""

from itertools import product

import pytest

import scorefn as sf
from tests.contract.failures import failures
from tests.oracles.couplings import COUPLED_ENTRIES, COUPLINGS, check_coupling, check_orthogonal
from tests.oracles.families import FAMILIES
from tests.oracles.plain import PLAIN_ENTRIES, check_plain
from tests.oracles.quadrature import gauss_hermite

PLAIN_BASELINES = {
    "None": lambda: None,
    "Constant(.7)": lambda: sf.Constant(0.7),
    "LeaveOneOut()": sf.LeaveOneOut,
    "MovingAverage, new": sf.MovingAverage,
}


def test_the_quadrature_is_exact_for_polynomials():
    nodes, weights = gauss_hermite(10)
    moments = [float((weights * nodes**k).sum()) for k in range(9)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15, 0, 105], abs=1e-11)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("entry", "baseline"), [*product(PLAIN_ENTRIES, PLAIN_BASELINES), ("expectation", "auto")])
def test_plain_distributions(entry, baseline, name):
    family = FAMILIES[name]
    made = PLAIN_BASELINES.get(baseline, lambda: "auto")
    smallest = 2 if baseline == "LeaveOneOut()" else 1
    failures((check_plain, family, N, made(), entry) for N in range(smallest, family.most + 1))


# ---------------------------------------------------------------------- law 1, couplings, cell by cell of uniforms

COUPLED = [*product(COUPLED_ENTRIES, PLAIN_BASELINES), ("expectation", "auto")]


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize(("entry", "baseline"), COUPLED)
def test_coupled_draws(entry, baseline, name):
    """Over all outcomes of the coupling's own randomness, with the blocks that the coupling itself declares."""
    row, made = COUPLINGS[name], PLAIN_BASELINES.get(baseline, lambda: "auto")
    assert row.make().unbiased
    smallest = 2 * row.size if baseline == "LeaveOneOut()" else row.size
    failures((check_coupling, name, family, N, made(), entry) for family, N in row.served if smallest <= N)


@pytest.mark.parametrize("family", ["Independent(Normal)", "MultivariateNormal"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("entry", "baseline"), COUPLED)
def test_orthogonal_draws(entry, baseline, mirrored, family):
    """All angles and lengths of one or two blocks of two directions in the plane."""
    made = PLAIN_BASELINES.get(baseline, lambda: "auto")
    counts = [2] if baseline == "LeaveOneOut()" else [1, 2]
    failures((check_orthogonal, sf.OrthogonalGaussian(2, mirrored), family, count, made(), entry) for count in counts)
