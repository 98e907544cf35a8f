"""Regression on features of the state."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from tests.oracles.tolerances import near
from tests.reducers.doubles import doubles
from tests.reducers.optimal_constant_cases import normals, refused, rows


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 3.0])
@pytest.mark.parametrize("block", [None, (0, 1, 1, 2, 0, 3, 4, 5, 4)])
@pytest.mark.parametrize("off_policy", [False, True])
def test_regression_against_the_loop(ridge, block, off_policy):
    """Each draw against weighted least squares on the others, with the penalty as rows of data."""
    draws = rows()
    mask = normals(9, 9, 2) > -0.8
    fields = {"mask": mask, "block": None if block is None else torch.tensor(block)}
    if off_policy:
        fields["behaviour_log_prob"] = draws.log_prob.detach() + 0.3 * normals(8, 9, 2)
    draws = replace(draws, **fields)
    signal = draws.signal()
    ours = sf.RegressionBaseline(ridge=ridge)(signal, draws)
    weight = mask.double()
    if off_policy:
        weight = weight * (draws.log_prob.detach() - draws.behaviour_log_prob).exp()  # no decision precedes another
    for i in range(9):
        keep = [j for j in range(9) if (j != i if block is None else block[j] != block[i])]
        w, phi, y = weight[keep].flatten(), draws.context[keep].flatten(0, 1), signal[keep].flatten()
        mean = (w.square().unsqueeze(-1) * phi).sum(0) / w.square().sum()
        spread = (w.unsqueeze(-1) * (phi - mean)).square().sum(0)
        design = torch.cat([w.unsqueeze(-1), w.unsqueeze(-1) * phi], -1)
        penalty = torch.cat([torch.zeros(3, 1).double(), (ridge * spread).sqrt().diag()], -1)
        full = torch.cat([design, penalty])
        a = torch.linalg.lstsq(full, torch.cat([y * (w > 0), torch.zeros(3).double()]).unsqueeze(-1)).solution
        truth = a[0] + draws.context[i] @ a[1:, 0]
        assert near(ours[i][mask[i]], truth[mask[i]], 1e-9), i


def test_regression_finds_a_linear_signal():
    draws = rows(n=12)
    fx = 5 + draws.context @ doubles([1.0, -2.0, 0.5])
    draws = replace(draws, fx=fx)
    assert near(sf.RegressionBaseline(ridge=1e-12)(draws.signal(), draws), fx, 1e-9)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 1e6])
def test_features_that_do_not_vary_give_leave_one_out(constant):
    draws = replace(rows(k=1), context=torch.full((9, 1, 2), constant, dtype=torch.float64))
    b = sf.RegressionBaseline()(draws.signal(), draws)
    assert near(b, sf.LeaveOneOut()(draws.signal(), draws))


def test_the_units_of_a_feature_do_not_matter():
    draws = rows()
    b = sf.RegressionBaseline()(draws.signal(), draws)
    other = replace(draws, context=draws.context * doubles([1e-4, 1e3, 1.0]) + doubles([0.0, 1e3, -5.0]))
    assert near(sf.RegressionBaseline()(draws.signal(), other), b, 1e-6)


def test_regression_learns_from_all_groups_and_keeps_problems_apart():
    draws = rows(k=1)
    grouped = replace(draws, group=torch.arange(9))
    both = [sf.RegressionBaseline()(d.signal(), d) for d in (draws, grouped)]
    assert torch.equal(*both)
    two = sf.Draws(
        torch.zeros(9, 2),
        normals(5, 9, 2, 1).requires_grad_(),
        torch.stack([draws.fx, normals(6, 9, 1)], 1),
        context=torch.stack([draws.context, normals(7, 9, 1, 3)], 1),
    )
    assert near(sf.RegressionBaseline()(two.signal(), two)[:, 0], both[0])


def test_a_value_that_depends_on_the_state_is_explained():
    """Contexts differ, and f mostly follows them: leave-one-out pays for that, the regression does not."""
    context = normals(3, 200, 1, 1)
    theta = doubles(0.2).requires_grad_()
    x = torch.bernoulli(torch.full((200, 1), 0.5), generator=torch.Generator().manual_seed(1)).double()
    draws = sf.Draws(x, Bernoulli(logits=theta).log_prob(x), x + 10 * context.squeeze(-1), context=context)
    left = {b: (draws.signal() - b(draws.signal(), draws)).var() for b in (sf.LeaveOneOut(), sf.RegressionBaseline())}
    one, regression = left.values()
    assert regression < 0.01 * one


def test_features_are_asked_for_and_checked():
    draws = replace(rows(), context=None)
    refused(sf.RegressionBaseline(), draws, "no features")
    refused(sf.RegressionBaseline(lambda d: torch.ones(9, 2)), draws, r"\(9, 2, 'F'\)", sf.ShapeError)
    refused(sf.RegressionBaseline(lambda d: [1.0]), draws, "a list", sf.ShapeError)
    refused(sf.RegressionBaseline(lambda d: torch.ones(9, 1, 2)), draws, r"\(9, 1, 2\)", sf.ShapeError)
    refused(sf.RegressionBaseline(lambda d: torch.full((9, 2, 1), torch.nan)), draws, "nan", sf.NonFiniteError)
    for ridge in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(sf.ScorefnError, match="ridge"):
            sf.RegressionBaseline(ridge=ridge)
