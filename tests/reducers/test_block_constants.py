"""A constant for each block of parameters: exact whatever the constants, and worth c^2 E[s^2] / N each."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf
from tests.oracles import (
    CREDITS,
    ENTRIES,
    EXACT,
    LAYOUTS,
    TOYS,
    VISIBLE,
    Prepared,
    coordinates,
    gauss_hermite,
    near,
    setting,
    settings,
    values,
)

APPLICABLE = [(toy, name) for toy in TOYS for name, row in CREDITS.items() if row.applies(TOYS[toy])]
FRONT = ["N=1", "N=2 B=(2, 3)", "antithetic", "ragged groups"]


def doubles(value, *, leaf=False):
    return torch.tensor(value, dtype=torch.float64, requires_grad=leaf)


def learned(given, width):
    """Constants that have nothing to do with the draws they will meet; the last parameter enters f only."""
    blocks = given.parameters[:-1]
    constants = sf.BlockConstants(blocks)
    batch = given.draws.log_prob.shape[1:-1]
    c = 3.0 * values((len(blocks), *[1] * len(batch), width), 22)
    constants.product = c.expand(len(blocks), *batch, width).clone()
    constants.square = torch.ones_like(constants.product)
    return constants


def expected_gradient(given, credit, baseline, entry, constants):
    if entry == "expectation":
        measure, count = Prepared(given.draws), len(given.draws)
        estimate = sf.expectation(measure, None, count, credit=credit, baseline=baseline, control_variate=constants)
    else:
        estimate = ENTRIES[entry](constants(given.draws), credit, baseline)
    expected = (given.weight * estimate).sum()
    return torch.autograd.grad(expected, given.parameters, retain_graph=True, materialize_grads=True)


def gap(given, name, baseline, entry, constants):
    row = CREDITS[name]
    found = expected_gradient(given, row.make(given), baseline, entry, constants)
    truth = given.true_gradient(row.discount)
    return max(
        float((ours - true).abs().nan_to_num(nan=torch.inf).max()) for ours, true in zip(found, truth, strict=True)
    )


# ------------------------------------------------------------------------------------------------ unbiasedness


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("toy", "name"), APPLICABLE)
def test_the_expected_gradient_is_exact(toy, name, entry):
    """Every tuple of draws, with masks, groups, blocks and problems, at arbitrary constants, per decision or not."""
    if not CREDITS[name].make(setting(toy, "N=2")).unbiased:
        return
    largest = 0.0
    for given in settings([toy], LAYOUTS if entry == "surrogate" else FRONT):
        if given.off_policy and toy != "single":
            with pytest.raises(sf.ScorefnError, match="off-policy draws of several decisions"):
                learned(given, 1)(given.draws)
            continue
        for width in {1, given.toy.K}:
            for baseline in (None, sf.LeaveOneOut())[: 1 + (given.draws.num_blocks > 1)]:
                constants = learned(given, width)
                before = constants.product
                largest = max(largest, gap(given, name, baseline, entry, constants))
                assert (constants.product is before) == (entry != "expectation")
    assert largest < EXACT


@pytest.mark.parametrize("baseline", [sf.Constant(0.7), sf.OptimalConstant(), sf.MovingAverage()], ids=repr)
@pytest.mark.parametrize(("toy", "name"), [("single", "Total()"), ("fork", "Influence"), ("ended", "RewardToGo(.9)")])
def test_the_expected_gradient_is_exact_beside_other_baselines(toy, name, baseline):
    for given in settings([toy], ["N=2", "N=3"]):
        if toy == "single" or not given.off_policy:
            constants = learned(given, given.toy.K)
            assert gap(given, name, copy.deepcopy(baseline), "expectation", constants) < EXACT


class Hasty(sf.BlockConstants):
    """Mutation: updated before it is read, so that the constants look at the draws they are applied to."""

    def __call__(self, draws):
        self.product = self.square = None
        self.update(draws)
        return super().__call__(draws)


@pytest.mark.parametrize(("toy", "name"), [("single", "Total()"), ("chain", "RewardToGo(1)"), ("fork", "Influence")])
def test_constants_that_look_at_their_own_draws_are_biased(toy, name):
    torch.manual_seed(0)
    given = setting(toy, "N=3")
    hasty = Hasty(given.parameters[:-1])
    assert gap(given, name, sf.LeaveOneOut(), "surrogate", hasty) > VISIBLE


def test_expectation_reads_before_it_updates():
    """The gradient of the second step is the one of the constants that the first one left."""
    loc = doubles([0.5, -0.3], leaf=True)
    p = Independent(Normal(loc, 1.0), 1)
    first, second = (sf.draw(p, lambda x: x.square().sum(-1), 6) for _ in range(2))
    constants = sf.BlockConstants([loc])
    constants.update(first)
    wanted = sf.surrogate(constants(second), baseline=sf.LeaveOneOut()).mean()
    found = sf.expectation(Prepared(second), None, 6, control_variate=copy.copy(constants))
    for one, other in zip(*[torch.autograd.grad(e, loc, retain_graph=True) for e in (wanted, found)], strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ what it does


def two_blocks(n=7):
    generator = torch.Generator().manual_seed(3)
    loc, log_scale = doubles(0.4, leaf=True), doubles(-0.2, leaf=True)
    p = Normal(loc, log_scale.exp())
    x = 0.4 + torch.randn(n, generator=generator, dtype=torch.float64)
    fx = x.pow(3).unsqueeze(-1)
    constants = sf.BlockConstants([loc, log_scale])
    constants.product, constants.square = doubles([[1.5], [-0.5]]), doubles([[2.0], [1.0]])
    return constants, sf.Draws(x, p.log_prob(x).unsqueeze(-1), fx)


def scores(constants, draws):
    """Of each draw, one after the other, in each block; parameters are numbers: `[G, N, K]`."""
    leaf = [block[0] for block in constants.blocks]
    rows = [
        torch.stack(torch.autograd.grad(one, leaf, retain_graph=True, materialize_grads=True))
        for one in draws.log_prob.flatten()
    ]
    return torch.stack(rows, -1).reshape(len(leaf), *draws.log_prob.shape)


def test_each_draw_gives_each_block_minus_its_constant_times_its_score():
    constants, draws = two_blocks()
    plain, corrected = sf.surrogate(draws), sf.surrogate(constants(draws))
    assert torch.equal(plain, corrected)
    leaf = [block[0] for block in constants.blocks]
    s = scores(constants, draws).squeeze(-1)
    for i in range(len(draws)):
        before, after = (torch.stack(torch.autograd.grad(v[i], leaf, retain_graph=True)) for v in (plain, corrected))
        assert near(after, before - doubles([0.75, -0.5]) * s[:, i])


@pytest.mark.parametrize("credit", [sf.Total(), sf.RewardToGo(0.5), sf.Influence(torch.ones(2, 2, dtype=torch.bool))])
def test_each_decision_is_corrected_once_however_many_values_there_are(credit):
    theta, phi = doubles(0.3, leaf=True), doubles(-0.5, leaf=True)
    x = doubles([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    log_prob = Bernoulli(logits=torch.stack([theta + phi, theta * phi])).log_prob(x)
    draws = sf.Draws(x, log_prob, values((3, 2), 5), credit=credit)
    constants = sf.BlockConstants([theta, phi])
    constants.product, constants.square = doubles([[2.0, -1.0], [0.5, 3.0]]), torch.ones(2, 2, dtype=torch.float64)
    before, after = (
        torch.stack(torch.autograd.grad(sf.surrogate(d).sum(), [theta, phi], retain_graph=True))
        for d in (draws, constants(draws))
    )
    assert near(after, before - (constants.product.unsqueeze(1) * scores(constants, draws)).sum((1, 2)))


def test_one_block_does_not_see_the_constant_of_another():
    constants, draws = two_blocks()
    gradients = []
    for c in (-0.5, 8.0):
        constants.product = doubles([[1.5], [c]])
        leaf = [block[0] for block in constants.blocks]
        gradients.append(torch.autograd.grad(sf.surrogate(constants(draws)).mean(), leaf, retain_graph=True))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert (gradients[0][1] - gradients[1][1]).abs() > VISIBLE


def test_what_stands_outside_the_blocks_and_the_gradient_of_f_are_left_alone():
    loc, scale, psi = doubles(0.4, leaf=True), doubles(1.2, leaf=True), doubles(0.7, leaf=True)
    constants = sf.BlockConstants([[loc]])
    constants.product, constants.square = doubles([[2.0]]), doubles([[1.0]])
    draws = sf.draw(Normal(loc, scale), lambda x: psi * x.square(), 5)
    found = [
        torch.autograd.grad(sf.surrogate(d).mean(), [loc, scale, psi], retain_graph=True)
        for d in (draws, constants(draws))
    ]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
    assert not torch.equal(found[0][0], found[1][0])


def test_the_graph_of_log_prob_is_used_before_it_is_freed():
    """Without retain_graph, by backward, and through modules with several tensors in a block."""
    torch.manual_seed(0)
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    x = torch.randn(6, 3)
    constants = sf.BlockConstants([body.parameters(), head.parameters()])
    for _ in range(3):
        p = Independent(Bernoulli(logits=head(body(x).tanh())), 2)
        sf.expectation(p, lambda z: z.sum((-1, -2)).square(), 8, control_variate=constants).backward()
    assert constants.coefficient.shape == (2, 1)
    assert all(q.grad.isfinite().all() for q in (*body.parameters(), *head.parameters()))


# ------------------------------------------------------------------------------------------------ what it learns


def by_the_formula(batches, constants, decay):
    product = square = 0.0
    for draws in batches:
        signal, s = draws.signal(), scores(constants, draws)
        centred = signal - sf.LeaveOneOut()(signal, draws)
        charged, effect = centred * s, s
        if signal.shape[-1] == 1:
            charged, effect = charged.sum(-1, keepdim=True), effect.sum(-1, keepdim=True)
        product = decay * product + (1 - decay) * (charged * effect).mean(1)
        square = decay * square + (1 - decay) * effect.square().mean(1)
    return product / square


@pytest.mark.parametrize(
    "credit", [sf.Total(), sf.RewardToGo(0.9), sf.Influence(torch.eye(2, dtype=torch.bool))], ids=repr
)
def test_the_constants_against_the_formula(credit):
    """Three batches of two decisions that share a parameter, scores one by one, decaying sums."""
    shared, own = doubles(0.3, leaf=True), doubles(-0.5, leaf=True)
    constants, batches = sf.BlockConstants([shared, own], decay=0.6), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(2, (6, 2), generator=generator).double()
        logits = torch.stack([shared, shared.sin() + own * x[:, 0].mean()])
        fx = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        batches.append(sf.Draws(x, Bernoulli(logits=logits).log_prob(x), fx, credit=credit))
        constants.update(batches[-1])
    wanted = by_the_formula(batches, constants, 0.6)
    found = constants.coefficient
    used = wanted.isfinite()  # the first decision does not know the second parameter
    assert used.sum() == (2 if isinstance(credit, sf.Total) else 3)
    assert near(found[used], wanted[used])
    assert (found[~used] == 0).all()


def test_off_policy_it_is_the_constant_of_least_second_moment():
    """`w (f - b)` is corrected by `c w s`, so the weight enters the average as its square."""
    constants, draws = two_blocks(5)
    sampled = Normal(doubles(0.1), doubles(1.3)).log_prob(draws.x).unsqueeze(-1)
    draws = sf.Draws(draws.x, draws.log_prob, draws.fx, behaviour_log_prob=sampled)
    fresh = sf.BlockConstants(constants.blocks, decay=0.0)
    fresh.update(draws)
    s, w = scores(constants, draws), (draws.log_prob.detach() - sampled).exp()
    residual = draws.signal() - w * sf.LeaveOneOut()(draws.signal(), draws)
    assert near(fresh.coefficient, (residual * w * s.square()).sum(1) / (w * s).square().sum(1))


def test_a_single_draw_is_not_centred():
    constants, draws = two_blocks(1)
    fresh = sf.BlockConstants(constants.blocks)
    fresh.update(draws)
    assert near(fresh.coefficient, draws.fx.expand(2, 1))


def test_it_finds_the_two_constants_of_a_normal():
    """`x^2` about 1: 2 sigma^2 for the location, 4 sigma^2 for the log of the scale; the draws are its quantiles."""
    loc, log_scale = doubles(1.0, leaf=True), doubles(-0.3, leaf=True)
    p = Normal(loc, log_scale.exp())
    x = p.icdf((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000).detach()
    constants = sf.BlockConstants([loc, log_scale])
    constants.update(sf.Draws(x, p.log_prob(x).unsqueeze(-1), x.square().unsqueeze(-1)))
    best = doubles(-0.6).exp() * doubles([2.0, 4.0])
    assert near(constants.coefficient.squeeze(-1), best, 5e-3)


def exact_variance(f, N, c):
    """Of the gradient in location and log-scale at N(1, 1), by quadrature over all N-tuples: N times it."""
    nodes, weights = gauss_hermite(8)
    tuples = coordinates(*[8] * N).T
    weight = weights[tuples].prod(0)
    loc, log_scale = (torch.full(weight.shape, v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.0))
    draws = sf.Draws(
        1 + nodes[tuples],
        Normal(loc, log_scale.exp()).log_prob(1 + nodes[tuples]).unsqueeze(-1),
        f(1 + nodes[tuples]).unsqueeze(-1),
    )
    constants = sf.BlockConstants([loc, log_scale])
    constants.square = torch.ones(2, len(weight), 1, dtype=torch.float64)
    constants.product = doubles(c)[:, None, None].expand_as(constants.square)
    estimate = sf.surrogate(constants(draws), baseline=sf.LeaveOneOut()).mean(0).sum()
    gradient = torch.stack(torch.autograd.grad(estimate, [loc, log_scale]))
    return N * (weight * (gradient - (weight * gradient).sum(-1, keepdim=True)).square()).sum(-1)


@pytest.mark.parametrize("N", [2, 3])
def test_what_the_constants_save_to_the_last_digit(N):
    """18 to 14 and 96 to 64 beside what leave-one-out itself adds, which is of the order 1 / N."""
    added = doubles([10.0, 16.0]) / (N - 1)
    assert near(exact_variance(torch.square, N, [0.0, 0.0]), doubles([18.0, 96.0]) + added, 1e-9)
    assert near(exact_variance(torch.square, N, [2.0, 4.0]), doubles([14.0, 64.0]) + added, 1e-9)
    # One constant for both, which is the best one for the sum, leaves more in each.
    assert near(exact_variance(torch.square, N, [10 / 3] * 2), doubles([14 + 16 / 9, 64 + 8 / 9]) + added, 1e-9)


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_the_constants_are_optimal(shift):
    best, moved = (exact_variance(torch.square, 2, [2.0 + d, 4.0 + d]) for d in (0.0, shift))
    assert near(moved - best, shift**2 * doubles([1.0, 2.0]), 1e-9)


def test_where_it_saves_nothing():
    """A linear f: values and squared scores are uncorrelated, so that the best constants are 0."""
    plain = exact_variance(lambda x: x, 2, [0.0, 0.0])
    for shift in (-0.5, 0.5):
        assert near(exact_variance(lambda x: x, 2, [shift] * 2) - plain, shift**2 * doubles([1.0, 2.0]), 1e-9)
    logit = doubles(0.0, leaf=True)  # a fair coin: all scores have the same square
    constants = sf.BlockConstants([logit])
    for x in ([0.0, 1.0, 1.0], [0.0, 0.0, 1.0]):
        p = Bernoulli(logits=logit)
        constants.update(sf.Draws(doubles(x), p.log_prob(doubles(x)).unsqueeze(-1), doubles(x).unsqueeze(-1)))
    assert constants.coefficient.abs().max() < 1e-15


# ------------------------------------------------------------------------------------------------ state


def test_before_the_first_update_the_draws_pass():
    constants, draws = two_blocks()
    fresh = sf.BlockConstants(constants.blocks)
    assert fresh(draws) is draws
    with pytest.raises(sf.ScorefnError, match="learned nothing yet"):
        _ = fresh.coefficient


def test_nothing_is_learned_without_gradients():
    loc = doubles(0.5, leaf=True)
    constants = sf.BlockConstants([loc])
    with torch.no_grad():
        sf.expectation(Normal(loc, 1.0), torch.square, 4, control_variate=constants)
        assert constants.product is None
        constants.update(sf.draw(Normal(loc, 1.0), torch.square, 4))
        assert constants.product is None
    draws = sf.draw(Normal(loc, 1.0), torch.square, 4)
    with torch.no_grad():
        constants.update(draws)
    assert constants.product is None
    constants.update(draws)
    assert constants.product is not None


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_the_state_goes_with_the_parameters(again):
    constants, draws = two_blocks()
    constants.update(draws)
    parameters = [block[0] for block in constants.blocks]
    (loc, log_scale), other = again((parameters, constants))
    assert other.blocks[0][0] is loc
    assert torch.equal(other.coefficient, constants.coefficient)
    p = Normal(loc, log_scale.exp())
    twin = sf.Draws(draws.x, p.log_prob(draws.x).unsqueeze(-1), draws.fx)
    found = torch.autograd.grad(sf.surrogate(other(twin)).mean(), [loc, log_scale])
    wanted = torch.autograd.grad(sf.surrogate(constants(draws)).mean(), parameters)
    assert torch.equal(torch.stack(found), torch.stack(wanted))


def test_longer_and_shorter_episodes():
    theta = doubles(0.1, leaf=True)
    constants = sf.BlockConstants([theta], 0.5)
    for steps in (3, 5, 2):
        x = torch.randint(2, (4, steps)).double()
        log_prob = Bernoulli(logits=theta).log_prob(x)
        draws = sf.Draws(x, log_prob, torch.randn(4, steps).double(), credit=sf.RewardToGo())
        constants.update(draws)
        torch.autograd.grad(sf.surrogate(constants(draws)).mean(), theta)
    assert constants.coefficient.shape == (1, 5)


def test_absent_decisions_teach_nothing():
    theta = doubles(0.1, leaf=True)
    x = doubles([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    log_prob = Bernoulli(logits=theta).log_prob(x)
    mask = torch.tensor([[True, False]] * 3)
    fx = doubles([[1.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    constants = sf.BlockConstants([theta], 0.5)
    constants.update(sf.Draws(x, log_prob, fx, credit=sf.RewardToGo()))
    before = constants.coefficient
    constants.update(sf.Draws(x, log_prob, fx, credit=sf.RewardToGo(), mask=mask))
    assert near(constants.coefficient[0, 1], before[0, 1])


# ------------------------------------------------------------------------------------------------ refusals


def test_blocks_that_are_refused():
    a, b = doubles(1.0, leaf=True), doubles([1.0, 2.0], leaf=True)
    for blocks, message in (
        ([], "no blocks"),
        (a, "list of blocks"),
        (3, "list of blocks"),
        ([a, []], "Block 1 is empty"),
        ([[a], [b, a]], r"in block 0 and again in block 1"),
        ([a.exp()], "computed from others"),
        ([a.detach()], "without grad"),
        ([[a, 3.0]], "contains a float"),
        ([2.0], "contains a float"),
    ):
        with pytest.raises(sf.ScorefnError, match=message):
            sf.BlockConstants(blocks)
    with pytest.raises(sf.ScorefnError, match=r"decay must lie in \[0, 1\), but it is 1"):
        sf.BlockConstants([a], 1.0)
    assert repr(sf.BlockConstants([a, [b]])) == "BlockConstants(<2 blocks of [1, 2] numbers>, 0.95)"


def test_a_block_that_log_prob_does_not_depend_on():
    """Refused at the first call, before anything is updated."""
    loc, psi = doubles(0.5, leaf=True), doubles(0.5, leaf=True)
    average = sf.MovingAverage()
    constants = sf.BlockConstants([loc, psi])
    with pytest.raises(sf.ScorefnError, match="does not depend on block 1"):
        sf.expectation(Normal(loc, 1.0), lambda x: psi * x, 4, control_variate=constants, baseline=average)
    assert average.mean is None
    assert constants.product is None
    both = sf.BlockConstants([[loc, psi]])  # one of the two is enough
    sf.expectation(Normal(loc, 1.0), lambda x: psi * x, 4, control_variate=both).backward()


def test_what_cannot_be_differentiated_or_traced():
    constants, draws = two_blocks()
    loss = sf.surrogate(constants(draws)).mean()
    with pytest.raises(sf.ScorefnError, match="first derivative only"):
        torch.autograd.grad(loss, constants.blocks[0], create_graph=True)
    sf.surrogate(constants(draws)).mean().backward()
    with pytest.raises(sf.ScorefnError, match="a backward pass has freed its graph"):
        constants.update(draws)
    for call in (constants, constants.update):
        with pytest.raises(sf.ScorefnError, match="keeps a state"):
            torch.func.grad(lambda t: (call(draws), t.sum())[1])(torch.zeros(2))  # noqa: B023


def test_another_batch_shape_is_refused():
    constants, _ = two_blocks()
    loc = constants.blocks[0][0]
    other = sf.draw(Normal(loc.expand(3), constants.blocks[1][0].exp()), torch.square, 4)
    for call in (constants, constants.update):
        with pytest.raises(sf.ShapeError, match=r"batch shape \(\) but meets \(3,\)"):
            call(other)


def test_a_score_that_is_not_finite_updates_nothing():
    constants, _ = two_blocks()
    before = constants.product.clone()
    loc, log_scale = (block[0] for block in constants.blocks)
    x = doubles([0.4, 1.0])
    log_prob = (-(x - loc).abs().sqrt() - log_scale).unsqueeze(-1)  # a score without a bound at the mode
    with pytest.raises(sf.NonFiniteError, match="nothing was"):
        constants.update(sf.Draws(x, log_prob, doubles([[1.0], [2.0]])))
    assert torch.equal(constants.product, before)
