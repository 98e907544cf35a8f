"""Constants for blocks of parameters: what they do, and what they learn."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf
from tests.oracles.quadrature import gauss_hermite
from tests.oracles.tolerances import VISIBLE, near
from tests.oracles.toys import coordinates, values
from tests.reducers.block_constant_cases import scores, two_blocks
from tests.reducers.doubles import doubles


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
