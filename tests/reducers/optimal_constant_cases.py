"""What the tests of optimal constants and regressions share."""

import pytest
import torch

import scorefn as sf
from tests.oracles.settings import LAYOUTS

DECISIONS = [layout for layout in LAYOUTS if len(LAYOUTS[layout].blocks) > 1]


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state_features(draws):
    """What is known before each decision, as numbers; the absent places hold NaN."""
    state = draws.context.double()
    phi = torch.stack([state, state.sin()], -1)
    return phi if draws.mask is None else torch.where(draws.mask.unsqueeze(-1), phi, torch.nan)


READERS = {
    "OptimalConstant()": sf.OptimalConstant,
    "OptimalConstant(shared=True)": lambda: sf.OptimalConstant(shared=True),
    "RegressionBaseline": lambda: sf.RegressionBaseline(state_features),
    "RegressionBaseline, ridge=1e-5": lambda: sf.RegressionBaseline(state_features, ridge=1e-5),
}


# ------------------------------------------------------------------------------------------------ the best constant


def scored(log_prob, fx, **fields):
    return sf.Draws(torch.zeros(len(fx)), log_prob, fx, **fields)


# ------------------------------------------------------------------------------------------------ regression


def rows(seed=0, n=9, k=2, width=3):
    """Draws with features; the signal is fx, decision by decision."""
    phi, fx = normals(seed, n, k, width), normals(seed + 1, n, k)
    credit = sf.Influence(torch.eye(k, dtype=torch.bool))
    return sf.Draws(torch.zeros(n), normals(seed + 2, n, k).requires_grad_(), fx, credit, context=phi)


# ------------------------------------------------------------------------------------------------ refusals


def refused(baseline, draws, match, kind=sf.ScorefnError):
    before = vars(baseline).copy()
    with pytest.raises(kind, match=match):
        sf.surrogate(draws, baseline=baseline)
    assert vars(baseline) == before
