"""The contract battery: every reducer, in every setting it claims to serve, against the enumerated truth.

A new reducer joins by one row of CREDITS, BASELINES, COUPLINGS or FAMILIES in `tests/oracles.py`.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

import scorefn as sf
from tests.oracles import (
    BASELINES,
    COUPLED_ENTRIES,
    COUPLINGS,
    CREDITS,
    ENTRIES,
    EXACT,
    FAMILIES,
    LAYOUTS,
    PLAIN_ENTRIES,
    TOYS,
    VISIBLE,
    Lookup,
    Prepared,
    check_adjoint,
    check_constant_cancels,
    check_coupling,
    check_identity,
    check_microbatches,
    check_orders,
    check_orthogonal,
    check_plain,
    check_recurrence,
    check_twin,
    check_value,
    dense_reward_to_go,
    derivative_tensors,
    deviation,
    gauss_hermite,
    near,
    setting,
    settings,
    values,
)

FROM_OTHERS = (sf.LeaveOneOut, sf.OptimalConstant, sf.RegressionBaseline)  # they read the other blocks

FRONT = [
    "N=1",
    "N=2",
    "N=2 B=(2, 3)",
    "one block",
    "antithetic",
    "ragged groups",
]  # `expectation` adds a choice and a mean


def failures(checks):
    """Run every check; one message for all that fail, so that a red row shows its whole pattern."""
    messages = []
    for check, *arguments in checks:
        try:
            check(*arguments)
        except AssertionError as error:
            messages.append(str(error))
    assert not messages, f"{len(messages)} combinations fail:\n" + "\n".join(messages[:20])


# ------------------------------------------------------------------------------------- law 1: the exact certificate


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_probabilities_of_all_tuples_sum_to_one(toy, layout):
    for given in settings([toy], [layout]):
        total = given.weight.sum(0)
        assert near(total, torch.ones_like(total)), str(given)
        assert (given.weight >= 0).all()


@pytest.mark.parametrize("credit", ["own", *CREDITS])
@pytest.mark.parametrize(("entry", "baseline"), [*product(ENTRIES, BASELINES), ("expectation", "auto")])
def test_expected_gradient(entry, credit, baseline):
    """Unbiased where that is declared, to 1e-10; visibly biased where that is; refused where it means nothing."""
    worst, messages = 0.0, []
    toys = [name for name, toy in TOYS.items() if credit != "own" or toy.native != "Total()"]
    for given in settings(toys, FRONT if entry == "expectation" else None):
        row = CREDITS[given.toy.native if credit == "own" else credit]
        if not row.applies(given.toy):
            continue
        chosen = row.make(given)
        reader = "auto" if baseline == "auto" else BASELINES[baseline](given, chosen)
        alone = len(given.layout.blocks) < 2 and isinstance(reader, FROM_OTHERS)
        if alone or (entry == "dice" and not chosen.unbiased):
            with pytest.raises(sf.ScorefnError, match=r"needs two blocks|weighs decisions"):
                ENTRIES[entry](given.draws, chosen, reader)
            continue
        try:
            gap = deviation(given, credit, reader, entry)
        except AssertionError as error:
            messages.append(str(error))
            continue
        worst = max(worst, gap)
        if chosen.unbiased and getattr(reader, "unbiased", True) and not gap < EXACT:
            messages.append(f"the gradient is off by {gap:.3g} on {given}")
    assert not messages, f"{entry}, {credit}, {baseline}: {len(messages)} settings fail:\n" + "\n".join(messages[:20])
    declared_biased = credit != "own" and not CREDITS[credit].make(setting("chain", "N=2")).unbiased
    if declared_biased and entry != "dice":
        assert worst > VISIBLE, f"{entry}, {credit}, {baseline}: declared biased, yet the bias is at most {worst:.3g}"


def test_leave_one_out_of_copies_is_biased_where_their_block_is_not_told():
    """The settings with blocks can see what they are for."""
    for layout in ("copies", "ragged copies", "antithetic"):
        given = setting("chain", layout)
        draws = replace(given.draws, block=None)
        loss = (given.weight * sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean(0)).sum()
        gradient = torch.autograd.grad(loss, given.parameters, retain_graph=True)
        gap = max(float((g - t).abs().max()) for g, t in zip(gradient, given.true_gradient(1.0), strict=True))
        assert gap > VISIBLE, layout


@pytest.mark.parametrize("credit", [name for name in CREDITS if name != "Total()"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_single_decision_refuses_a_credit(entry, credit):
    draws = setting("single", "N=2").draws
    chosen = CREDITS[credit].make(setting("chain", "N=2"))
    with pytest.raises(sf.ShapeError, match="one decision"):
        ENTRIES[entry](draws, chosen, None)


def test_a_value_function_that_sees_the_decision_is_biased():
    """Legal features end before the decision; a battery that cannot see illegal ones proves nothing."""
    given = setting("chain", "N=2")
    cheat = sf.ValueFunction(Lookup(), features=lambda draws: torch.stack([draws.x, draws.x], -1))
    assert deviation(given, "RewardToGo(1)", cheat, "surrogate") > VISIBLE


def test_singletons_are_counted_and_have_baseline_zero():
    given = setting("chain", "singleton groups")
    baseline = sf.LeaveOneOut()
    assert baseline.singletons(given.draws) == 2
    assert not baseline(given.draws.signal(), given.draws).any()
    given = setting("chain", "groups of blocks")
    assert baseline.singletons(given.draws) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("toy", TOYS)
def test_leave_one_out_against_the_loop(toy, layout):
    """The mean over valid draws of the same group, outside the own block."""
    given = setting(toy, layout, True)
    draws = given.draws
    if len(given.layout.blocks) < 2:
        return
    label = range(len(draws)) if draws.block is None else draws.block.tolist()
    group = given.layout.groups
    for name, row in CREDITS.items():
        if not row.applies(given.toy):
            continue
        signal = draws.signal(row.make(given) if given.toy.K > 1 else None)
        valid = torch.ones_like(signal)
        if draws.mask is not None and draws.mask.shape == signal.shape:
            valid = draws.mask.to(signal)
        ours = sf.LeaveOneOut()(signal, draws)
        for i in range(len(draws)):
            others = [j for j in range(len(draws)) if group[j] == group[i] and label[j] != label[i]]
            count = valid[others].sum(0)
            mean = (valid[others] * signal[others]).sum(0) / count.clamp(min=1.0)
            assert near(ours[i], mean), f"draw {i}, {name}, {given}"


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("baseline", ["None", "Constant([K])", "LeaveOneOut()"])
def test_tuples_as_problems_are_the_tuples_one_by_one(toy, baseline):
    """What lets the battery enumerate along a problem axis: problems do not meet."""
    given = setting(toy, "N=2", True)
    draws = given.draws
    reader = BASELINES[baseline](given, draws.credit)
    together = sf.surrogate(draws, baseline=reader)
    for t in range(given.choice.shape[1]):
        credit = draws.credit
        if isinstance(credit, sf.RewardToGo) and credit.done is not None:
            credit = replace(credit, done=credit.done[:, t])
        alone = sf.Draws(
            x=draws.x[:, t],
            log_prob=draws.log_prob[:, t],
            fx=draws.fx[:, t],
            credit=credit,
            behaviour_log_prob=draws.behaviour_log_prob[:, t],
            mask=None if draws.mask is None else draws.mask[:, t],
        )
        one = sf.surrogate(alone, baseline=reader)
        assert near(one, together[:, t])
        pairs = [
            torch.autograd.grad(value.mean(), given.parameters, retain_graph=True) for value in (one, together[:, t])
        ]
        assert all(near(mine, theirs) for mine, theirs in zip(*pairs, strict=True))


# -------------------------------------------------------------------------- law 1, plain distributions and quadrature

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


# ------------------------------------------------------------------------------------------------- laws 2, 3 and 9


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("entry", ["surrogate", "dice"])
def test_the_value_is_the_weighted_f(entry, credit):
    if entry == "dice" and not CREDITS[credit].make(setting("chain", "N=2")).unbiased:
        return  # refused, as test_expected_gradient shows
    failures(
        (check_value, given, credit, baseline, entry)
        for given in settings(TOYS, ["N=2 B=(2, 3)", "groups", "copies"])
        if CREDITS[credit].applies(given.toy)
        for baseline in BASELINES
    )


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("credit", ["Total()", "Influence", "RewardToGo(1)", "RewardToGo(.9)"])
def test_dice_to_third_order(credit, baseline):
    reads_others = baseline in ("LeaveOneOut()", "OptimalConstant()", "RegressionBaseline")
    layouts = ["N=2"] if reads_others else ["N=1", "N=2"]
    failures((check_orders, given, credit, baseline) for given in settings(["coins"], layouts))


@pytest.mark.parametrize("baseline", ["None", "LeaveOneOut()"])
@pytest.mark.parametrize(
    ("toy", "credit"),
    [("single", "Total()"), ("fork", "Influence"), ("ended", "RewardToGo(.9)"), ("episodes", "RewardToGo(1)")],
)
def test_dice_to_second_order_elsewhere(toy, credit, baseline):
    failures((check_orders, given, credit, baseline, 2) for given in settings([toy], ["N=2"]))


def test_dice_in_blocks_to_second_order():
    failures(
        (check_orders, given, credit, "LeaveOneOut()", 2)
        for given in settings(["coins"], ["copies", "antithetic"])
        for credit in ("Total()", "RewardToGo(1)")
    )


@pytest.mark.parametrize("credit", ["Total()", "Influence", "RewardToGo(1)", "RewardToGo(.9)"])
def test_a_constant_cancels_at_every_order(credit):
    check_constant_cancels(credit)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_microbatches(dtype, tolerance):
    check_microbatches(dtype, tolerance)


def test_a_moving_average_is_read_before_it_is_updated():
    """Three steps against the formula, on draws whose values grow."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    average, mean = sf.MovingAverage(0.8), 0.0
    for step in range(3):
        fx = torch.full((4, 1), 1.0 + step, dtype=torch.float64)
        log_prob = theta.log_softmax(-1)[torch.tensor([0, 1, 0, 0])].unsqueeze(-1)
        draws = sf.Draws(x=fx, log_prob=log_prob, fx=fx)
        expected = mean / (1 - 0.8**step) if step else 0.0
        read = average(draws.signal(), draws)
        assert near(read, torch.full_like(read, expected))
        sf.expectation(Prepared(draws), None, 4, baseline=average)
        mean = 0.8 * mean + 0.2 * (1.0 + step)
    with torch.no_grad():
        before = average(draws.signal(), draws)
        sf.expectation(Prepared(draws), None, 4, baseline=average)
        assert torch.equal(before, average(draws.signal(), draws))


# ------------------------------------------------------------------------------------------------------------- law 6


def poisson(rate):
    x = torch.arange(60, dtype=torch.float64)
    return x, torch.distributions.Poisson(rate.detach()).log_prob(x).exp()


D = torch.distributions
SCORES = {  # parameter, distribution, points and weights, Fisher information
    "Bernoulli": (
        [0.4], lambda eta: D.Bernoulli(logits=eta[0]),
        lambda eta: (torch.tensor([0.0, 1.0]).double(), torch.stack([1 - eta[0].sigmoid(), eta[0].sigmoid()])),
        lambda eta: (eta.sigmoid() * (1 - eta.sigmoid())).diag(),
    ),
    "Categorical": (
        [0.4, -0.3, 1.0], lambda logits: D.Categorical(logits=logits),
        lambda logits: (torch.arange(3), logits.softmax(-1)),
        lambda logits: logits.softmax(-1).diag() - torch.outer(logits.softmax(-1), logits.softmax(-1)),
    ),
    "OneHotCategorical": (
        [0.4, -0.3, 1.0], lambda logits: D.OneHotCategorical(logits=logits),
        lambda logits: (torch.eye(3).double(), logits.softmax(-1)),
        lambda logits: logits.softmax(-1).diag() - torch.outer(logits.softmax(-1), logits.softmax(-1)),
    ),
    "Binomial": (
        [0.4], lambda eta: D.Binomial(5, logits=eta[0]),
        lambda eta: (torch.arange(6).double(), D.Binomial(5, logits=eta[0]).log_prob(torch.arange(6).double()).exp()),
        lambda eta: (5 * eta.sigmoid() * (1 - eta.sigmoid())).diag(),
    ),
    "Poisson": ([1.7], lambda rate: D.Poisson(rate[0]), lambda rate: poisson(rate[0]), lambda rate: (1 / rate).diag()),
    "Normal": (
        [0.7, 1.3], lambda t: D.Normal(t[0], t[1]),
        lambda t: (t[0] + t[1] * gauss_hermite(10)[0], gauss_hermite(10)[1]),
        lambda t: torch.stack([1 / t[1] ** 2, 2 / t[1] ** 2]).diag(),
    ),
    "LogNormal": (
        [0.7, 1.3], lambda t: D.LogNormal(t[0], t[1]),
        lambda t: ((t[0] + t[1] * gauss_hermite(10)[0]).exp(), gauss_hermite(10)[1]),
        lambda t: torch.stack([1 / t[1] ** 2, 2 / t[1] ** 2]).diag(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_scores_have_mean_zero_and_covariance_fisher(name):
    """The first and second derivative of `dice` of a constant vanish: E[s] = 0, E[s s^T] = -E[Hessian log p]."""
    start, build, points, fisher = SCORES[name]
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    x, weight = points(theta.detach())
    p = build(theta)
    p.sample = lambda shape: x
    ones = sf.draw(p, lambda x: torch.ones(len(weight), dtype=torch.float64), len(weight))
    mean, second = derivative_tensors((weight * sf.dice(ones)).sum(), (theta,), 2)
    assert mean.abs().max() < EXACT
    assert second.abs().max() < EXACT
    scores = torch.stack(
        [torch.autograd.grad(each, theta, retain_graph=True)[0] for each in sf.surrogate(ones).unbind()]
    )
    covariance = (weight[:, None, None] * scores[:, :, None] * scores[:, None, :]).sum(0)
    assert near(covariance, fisher(theta.detach()))


# ------------------------------------------------------------------------------------------------------------- law 4


SEED = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 9)
LEAD = st.sampled_from([(1,), (3,), (2, 2), (2, 1, 3)])


@st.composite
def episodes(draw_):
    lead, T = draw_(LEAD), draw_(SIZES)
    flags = draw_(st.lists(st.booleans(), min_size=0, max_size=40)) or [False]
    done = torch.tensor([flags[i % len(flags)] for i in range(torch.Size(lead).numel() * T)]).reshape(*lead, T)
    return done, draw_(SEED)


@st.composite
def matrices(draw_):
    K, J = draw_(SIZES), draw_(SIZES)
    flags = draw_(st.lists(st.booleans(), min_size=K * J, max_size=K * J))
    return torch.tensor(flags).reshape(K, J), draw_(LEAD), draw_(SEED)


@hypothesis_given(LEAD, SIZES, SIZES, SEED)
def test_total_is_all_ones(lead, K, J, seed):
    v, u = values((*lead, J), seed), values((*lead, K), seed + 1)
    check_adjoint(sf.Total(), v, u)
    check_twin(sf.Total(), torch.ones(K, J, dtype=torch.bool), v, u)
    assert sf.Total().influence(v).shape == (*lead, 1)


@hypothesis_given(matrices())
def test_influence_is_its_matrix(case):
    mask, lead, seed = case
    v, u = values((*lead, mask.shape[1]), seed), values((*lead, mask.shape[0]), seed + 1)
    check_adjoint(sf.Influence(mask), v, u)
    check_twin(sf.Influence(mask), mask, v, u)
    containing = torch.zeros_like(u)
    for k in range(len(mask)):
        for i in range(len(mask)):
            contains = bool((mask[i] | ~mask[k]).all())
            strictly = contains and not torch.equal(mask[i], mask[k])
            if strictly or (contains and i < k):
                containing[..., k] += u[..., i]
    assert near(sf.Influence(mask).predecessors(u), containing)


@hypothesis_given(episodes(), st.sampled_from([1.0, 0.9, 0.5]), st.booleans())
def test_reward_to_go_is_its_matrix(case, discount, visitation):
    done, seed = case
    v, u = values(done.shape, seed), values(done.shape, seed + 1)
    credit = sf.RewardToGo(discount, visitation, done)
    check_adjoint(credit, v, u)
    ages = torch.zeros_like(v)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in done.shape[:-1]]).reshape(-1, done.ndim - 1):
        row = tuple(index.tolist())
        check_twin(sf.RewardToGo(discount, visitation, done[row]), dense_reward_to_go(done[row]), v[row], u[row])
        for name, argument in (("influence", v), ("influence_adjoint", u), ("predecessors", u)):
            alone = getattr(sf.RewardToGo(discount, visitation, done[row]), name)(argument[row])
            assert near(getattr(credit, name)(argument)[row], alone)
        for t in range(1, done.shape[-1]):
            ages[(*row, t)] = 0.0 if done[(*row, t - 1)] else ages[(*row, t - 1)] + 1
    check_identity(credit, v, ages, discount, visitation)


@hypothesis_given(LEAD, SIZES, SEED, st.sampled_from([1.0, 0.9, 0.5]), st.booleans())
def test_reward_to_go_of_one_episode(lead, T, seed, discount, visitation):
    v, u = values((*lead, T), seed), values((*lead, T), seed + 1)
    credit = sf.RewardToGo(discount, visitation)
    check_adjoint(credit, v, u)
    check_twin(credit, torch.ones(T, T, dtype=torch.bool).triu(), v, u)
    check_identity(credit, v, torch.arange(T).to(v).expand_as(v), discount, visitation)


@pytest.mark.parametrize("visitation", [True, False])
def test_reward_to_go_keeps_the_precision_of_the_values(visitation):
    """In float64 a discount of .9 is .9, not its neighbour in float32; with `done` as without."""
    v = values((2, 7), 0)
    done = torch.zeros_like(v, dtype=torch.bool)
    plain, cut = sf.RewardToGo(0.9, visitation)(v), sf.RewardToGo(0.9, visitation, done)(v)
    assert near(plain, cut), (plain - cut).abs().max()


DECAYS = st.sampled_from(["float", "one", "scalar", "full", "thin"])


@hypothesis_given(st.integers(1, 13), st.booleans(), st.integers(-2, 1), SEED, DECAYS)
def test_linear_recurrence_is_the_loop(T, reverse, dim, seed, kind):
    shape = [2, 3]
    shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, T)
    full = values(shape, seed + 1)
    full[full.abs() < 0.3] = 0.0  # ends of episodes
    decay = {
        "float": 0.7,
        "one": 1.0,
        "scalar": torch.tensor(0.7, dtype=torch.float64),
        "full": full,
        "thin": full.movedim(dim, 0)[:, :1, :1].movedim(0, dim),
    }[kind]
    check_recurrence(values(shape, seed), decay, reverse, dim)


@pytest.mark.parametrize("reverse", [True, False])
def test_linear_recurrence_passes_gradcheck(reverse):
    x, decay = values((5, 2), 0).requires_grad_(), values((5, 2), 1).requires_grad_()

    def run(x, decay):
        return sf.linear_recurrence(x, decay, reverse=reverse, dim=0)

    assert torch.autograd.gradcheck(run, (x, decay))
    assert torch.autograd.gradgradcheck(run, (x, decay))
