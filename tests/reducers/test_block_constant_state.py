"""The state of constants for blocks, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from tests.oracles.tolerances import near
from tests.reducers.block_constant_cases import two_blocks
from tests.reducers.doubles import doubles


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
