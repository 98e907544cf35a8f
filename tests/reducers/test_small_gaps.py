"""Cross-fitting and the reducers that learn: exact values at the borders of what they are given."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf
from scorefn.reducers import cross_fitting, optimal_constant
from tests.oracles.tolerances import near


def doubles(value):
    return torch.tensor(value, dtype=torch.float64)


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ cross-fitting


def labelled(n, **labels):
    """n draws of one decision, of which only the labels are read."""
    return sf.Draws(torch.zeros(n), normals(0, n, 1).requires_grad_(), normals(1, n, 1), **labels)


def fit(features, target, weight, draws, ridge=1e-12, across_groups=False):
    return cross_fitting.cross_fit(features, target, weight, draws, ridge=ridge, across_groups=across_groups)


def test_others_are_those_of_the_own_group_unless_told_otherwise():
    v = doubles([[1.0], [2.0], [4.0], [8.0]])
    draws = labelled(4, group=torch.tensor([0, 1, 0, 1]))
    assert cross_fitting.others(v, draws).flatten().tolist() == [4.0, 8.0, 1.0, 2.0]
    assert cross_fitting.others(v, draws, across_groups=True).flatten().tolist() == [14.0, 13.0, 11.0, 7.0]


def test_a_draw_without_others_learns_nothing():
    draws = labelled(6, group=torch.tensor([0, 1, 1, 1, 1, 1]))
    level, slope = fit(normals(2, 6, 1, 2), normals(3, 6, 1), torch.ones(6, 1).double(), draws)
    assert level[0] == 0
    assert slope[0].tolist() == [0.0, 0.0]
    assert (slope[1:] != 0).all()


def test_what_absent_rows_hold_is_not_read():
    features, target, draws = normals(2, 6, 2, 1), normals(3, 6, 2), labelled(6)
    weight = torch.ones(6, 2, dtype=torch.float64)
    weight[::2, 1] = 0.0
    clean = fit(features, target, weight, draws)
    features[::2, 1], target[::2, 1] = torch.nan, torch.inf
    for ours, theirs in zip(fit(features, target, weight, draws), clean, strict=True):
        assert torch.equal(ours, theirs)


def test_a_constant_feature_gets_0_and_leaves_the_others_their_slope():
    features = torch.stack([normals(2, 6, 1), torch.full((6, 1), 0.1).double()], -1)
    level, slope = fit(features, 5 - 3 * features[..., 0], torch.ones(6, 1).double(), labelled(6))
    assert near(slope, doubles([-3.0, 0.0]).expand(6, 2))
    assert slope[:, 1].tolist() == [0.0] * 6
    assert near(level, doubles(5.0).expand(6))


def test_a_problem_whose_squares_overflow_does_not_spoil_another():
    features, target = normals(2, 6, 2, 1, 2), normals(3, 6, 2, 1)
    weight, draws = torch.ones(6, 2, 1, dtype=torch.float64), labelled(6)
    level, slope = fit(features * doubles([1e200, 1.0]).reshape(2, 1, 1), target, weight, draws)
    alone = fit(features[:, 1], target[:, 1], weight[:, 1], draws)
    assert not slope[:, 0].any()
    assert near(slope[:, 1], alone[1])
    assert near(level[:, 1], alone[0])


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_units_do_not_decide_whether_a_feature_varies(unit):
    features, target = normals(2, 6, 1, 1), normals(3, 6, 1)
    weight, draws = torch.ones(6, 1, dtype=torch.float64), labelled(6)
    (level, slope), (same, scaled) = (fit(features * u, target, weight, draws) for u in (1.0, unit))
    assert near(scaled * unit, slope)
    assert near(same, level)


# ------------------------------------------------------------------------------------------------ the best constant


def coins(seed, *shape, decided=True):
    """Draws of several coins, each value influenced by its own coin; without scores unless decided."""
    logits = normals(seed, *shape[1:]).requires_grad_()
    x = (normals(seed + 1, *shape) > 0).double()
    log_prob = Bernoulli(logits=logits).log_prob(x) * float(decided)
    return sf.Draws(x, log_prob, normals(seed + 2, *shape), sf.Influence(torch.eye(shape[-1], dtype=torch.bool)))


@pytest.mark.parametrize("batch", [(), (1,), (5,)])
def test_without_scores_each_decision_has_its_own_mean_of_the_others(batch):
    draws = coins(0, 3, *batch, 2, decided=False)
    plain = sf.LeaveOneOut()(draws.signal(), draws)
    assert torch.equal(sf.OptimalConstant()(draws.signal(), draws), plain)
    assert torch.equal(sf.OptimalConstant(shared=True)(draws.signal(), draws), plain.mean(-1, keepdim=True))


@pytest.mark.parametrize("problems", [1, 2])
@pytest.mark.parametrize("credit", [None, sf.Total()])
def test_a_batch_of_problems_has_the_constants_of_each_alone(problems, credit, monkeypatch):
    monkeypatch.setattr(optimal_constant, "_signs", lambda parameters: [torch.ones_like(p) for p in parameters])
    draws = coins(3, 6, problems, 2)
    draws = draws if credit is None else replace(draws, credit=credit)
    together = sf.OptimalConstant()(draws.signal(), draws)
    for b in range(problems):
        alone = replace(draws, x=draws.x[:, b], log_prob=draws.log_prob[:, b], fx=draws.fx[:, b])
        assert near(together[:, b], sf.OptimalConstant()(alone.signal(), alone))


def test_a_graph_of_2_to_the_60_paths_is_walked_once():
    theta = torch.zeros((), requires_grad=True)
    log_prob = theta
    for _ in range(60):
        log_prob = log_prob + log_prob
    found = optimal_constant.leaves(log_prob)
    assert len(found) == 1
    assert found[0] is theta


class Blind(torch.autograd.Function):
    """The first of two tensors, with no gradient at all for the second."""

    @staticmethod
    def forward(ctx, x, y):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_a_leaf_without_gradient_has_no_part_in_the_scores(monkeypatch):
    monkeypatch.setattr(optimal_constant, "_signs", lambda parameters: [torch.ones_like(p) for p in parameters])
    logits, idle = normals(7, 2).requires_grad_(), torch.zeros(3, requires_grad=True)
    x, fx = (normals(8, 5, 2) > 0).double(), normals(9, 5, 1)
    plain, blind = (sf.Draws(x, Bernoulli(logits=v).log_prob(x), fx) for v in (logits, Blind.apply(logits, idle)))
    assert len(optimal_constant.leaves(blind.log_prob)) == 2
    assert torch.equal(sf.OptimalConstant()(blind.signal(), blind), sf.OptimalConstant()(plain.signal(), plain))


def test_a_feature_that_is_not_finite_is_named_before_anything_is_fitted():
    draws = coins(0, 4, 2)
    with pytest.raises(sf.NonFiniteError, match="A feature of RegressionBaseline is nan"):
        sf.RegressionBaseline(lambda d: torch.full((4, 2, 1), torch.nan))(draws.signal(), draws)


# ------------------------------------------------------------------------------------------------ learned coefficients


def steps(*shape, scale=1.0, **fields):
    """Episodes of rewards, charged by the reward-to-go."""
    log_prob = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    return sf.Draws(torch.zeros(shape[0]), log_prob, scale * normals(4, *shape), credit=sf.RewardToGo(), **fields)


def test_the_coefficient_is_minus_covariance_over_variance_and_0_without_variance():
    adaptive, signal = sf.AdaptiveRaoBlackwell(), torch.ones(4, 3).double()
    adaptive.covariance, adaptive.variance = doubles([3.0, -3.0, 1.0]), doubles([2.0, 0.5, 0.0])
    assert adaptive.coefficient(signal).tolist() == [-1.5, 6.0, 0.0]
    assert adaptive.unbiased is True


@pytest.mark.parametrize("batch", [(), (2,), (4,)])
def test_shorter_episodes_read_the_first_coefficients(batch):
    adaptive, long = sf.AdaptiveRaoBlackwell(), steps(5, *batch, 4)
    adaptive.update(long.signal(), long)
    c = adaptive.coefficient(long.signal())
    for decisions in (1, 2, 3, 4):
        assert torch.equal(adaptive.coefficient(long.signal()[..., :decisions]), c[..., :decisions])


def test_where_no_decision_is_valid_the_averages_stay():
    adaptive, draws = sf.AdaptiveRaoBlackwell(0.5), steps(5, 3)
    adaptive.update(draws.signal(), draws)
    before = adaptive.covariance[2].clone(), adaptive.variance[2].clone()
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[:, 2] = False
    other = replace(draws, fx=draws.fx.flip(0), mask=mask)
    adaptive.update(other.signal(), other)
    assert before[1] > 0
    assert (adaptive.covariance[2], adaptive.variance[2]) == before


@pytest.mark.parametrize("power", [-60, 60])
def test_units_of_the_values_do_not_move_the_coefficient(power):
    found = []
    for scale in (1.0, 2.0**power):
        adaptive, draws = sf.AdaptiveRaoBlackwell(), steps(5, 3, scale=scale)
        adaptive.update(draws.signal(), draws)
        found.append(adaptive.coefficient(draws.signal()))
    assert (found[0][1:] != 0).all()
    assert torch.equal(*found)


def test_the_rounding_of_a_sum_of_many_values_is_not_learned_from():
    """It grows with the sum of their sizes, not with that of their squares."""
    log_prob = torch.zeros(8, 1, requires_grad=True)
    fx = torch.rand(8, 20_000, generator=torch.Generator().manual_seed(0))
    draws = sf.Draws(torch.zeros(8), log_prob, fx, credit=sf.Influence(torch.ones(1, 20_000, dtype=torch.bool)))
    eps = torch.finfo(fx.dtype).eps
    assert (fx.sum(-1, keepdim=True) - draws.signal()).abs().max() > 16 * eps * fx.norm(dim=-1).max()
    adaptive = sf.AdaptiveRaoBlackwell()
    adaptive.update(draws.signal(), draws)
    assert adaptive.coefficient(draws.signal()).tolist() == [0.0]


def test_values_with_a_gradient_leave_none_in_what_is_learned():
    adaptive, draws = sf.AdaptiveRaoBlackwell(), steps(5, 3)
    draws = replace(draws, fx=draws.fx.requires_grad_())
    adaptive.update(draws.signal(), draws)
    assert not adaptive.covariance.requires_grad
    assert not adaptive.variance.requires_grad
    assert not adaptive(draws.signal(), draws).requires_grad


def test_decisions_that_are_weighed_leave_out_the_same_values():
    class Doubled(sf.Influence):
        def decision_weight(self, v):
            return v.new_full((), 2.0)

    influence = torch.tensor([[True, True, False], [False, True, False]])
    draws = sf.Draws(torch.zeros(5), normals(5, 5, 2).requires_grad_(), normals(6, 5, 3), credit=Doubled(influence))
    adaptive = sf.AdaptiveRaoBlackwell()
    adaptive.covariance, adaptive.variance = -torch.ones(2).double(), torch.ones(2).double()
    rest = torch.stack([draws.fx[:, 2], draws.fx[:, 0] + draws.fx[:, 2]], -1)
    expected = sf.LeaveOneOut()(draws.signal() + rest, draws) - rest
    assert near(adaptive(draws.signal(), draws), expected)


# ------------------------------------------------------------------------------------------------ control variates


def coin(N=5):
    p = Bernoulli(logits=torch.zeros((), dtype=torch.float64, requires_grad=True))
    return p, sf.draw(p, lambda x: x + 1, N)


@pytest.mark.parametrize("shape", [(5, 2, 2), (5, 0)])
def test_h_has_at_most_one_axis_of_functions_and_at_least_one_function(shape):
    _, draws = coin()
    with pytest.raises(sf.ShapeError, match=r"^h returned shape"):
        sf.LinearControlVariate(lambda x: x.new_ones(shape), [0.0] * shape[-1])(draws)


def test_a_value_alone_needs_no_gradient_of_the_expectation():
    logits = torch.zeros((), dtype=torch.float64, requires_grad=True)
    p = Bernoulli(logits=logits)
    cv = sf.LinearControlVariate(lambda x: x, lambda: logits.sigmoid(), coefficient=1.0)
    with torch.no_grad():
        assert near(sf.expectation(p, lambda x: x + 1, 5, control_variate=cv), doubles(1.5))


def test_a_coefficient_is_taken_without_its_graph():
    p, draws = coin()
    theta = doubles(0.5).requires_grad_()
    cv = sf.LinearControlVariate(lambda x: x, lambda: p.mean, coefficient=2 * theta)
    assert not cv.coefficient.requires_grad
    assert torch.equal(copy.deepcopy(cv)(draws).fx, cv(draws).fx)


def test_delta_method_of_a_line_whose_slope_is_a_parameter():
    """Its slope has a gradient, though none in x."""
    m, psi = normals(1, 3).requires_grad_(), normals(2, 3).requires_grad_()
    p = Independent(Normal(m, 1.0), 1)
    f = lambda x: (psi * x).sum(-1)  # noqa: E731
    fx = sf.DeltaMethod(p, f, coefficient=1.0)(sf.draw(p, f, 4)).fx
    assert near(fx.detach(), (psi * m).sum().detach().expand(4, 1))


@pytest.mark.parametrize("batch", [(3, 1), (1, 3), (1,)])
def test_delta_method_in_batches_of_one(batch):
    m = normals(1, *batch, 2).requires_grad_()
    p = Independent(Normal(m, 1.0), 1)
    f = lambda x: x.sin().prod(-1)  # noqa: E731
    draws = sf.draw(p, f, 6)
    flat = Independent(Normal(m.reshape(-1, 2), 1.0), 1)
    same = sf.Draws(draws.x.reshape(6, -1, 2), draws.log_prob.reshape(6, -1, 1), draws.fx.reshape(6, -1, 1))
    fx = sf.DeltaMethod(p, f)(draws).fx
    assert fx.shape == (6, *batch, 1)
    assert near(sf.DeltaMethod(flat, f)(same).fx, fx.reshape(6, -1, 1))


def test_two_past_draws_more_than_statistics_are_enough():
    """Of each problem, and for the capacity as well."""
    p = Bernoulli(logits=torch.zeros(7, dtype=torch.float64, requires_grad=True))
    q = Normal(torch.zeros((), dtype=torch.float64, requires_grad=True), 1.0)
    for measure, fitted, needed in ((p, (7, 1), 3), (q, (2,), 4)):
        cv = sf.NaturalControlVariate(measure, capacity=needed)
        cv.update(sf.draw(measure, lambda x: 3 * x + 1, needed - 1))
        with pytest.raises(sf.ScorefnError, match=r"fewer past draws than F \+ 2"):
            cv.fit()
        cv.update(sf.draw(measure, lambda x: 3 * x + 1, 1))
        assert cv.fit()[0].shape == fitted
    with pytest.raises(sf.ScorefnError, match="capacity = 3 past draws, but 2 statistics take 4"):
        sf.NaturalControlVariate(q, capacity=3).update(sf.draw(q, lambda x: x, 2))


def test_a_constant_f_has_an_r_squared_of_0():
    p, _ = coin()
    cv = sf.NaturalControlVariate(p)
    cv.update(sf.draw(p, torch.ones_like, 8))
    beta, r_squared = cv.fit()
    assert beta.tolist() == [0.0]
    assert r_squared == 0
