"""Constants for blocks of parameters leave the expected gradient as it is."""

import copy

import pytest
import torch
from torch.distributions import Independent, Normal

import scorefn as sf
from tests.oracles.expectations import ENTRIES, Prepared
from tests.oracles.settings import CREDITS, LAYOUTS, setting, settings
from tests.oracles.tolerances import EXACT, VISIBLE
from tests.oracles.toys import TOYS, values
from tests.reducers.doubles import doubles

APPLICABLE = [(toy, name) for toy in TOYS for name, row in CREDITS.items() if row.applies(TOYS[toy])]
FRONT = ["N=1", "N=2 B=(2, 3)", "antithetic", "ragged groups"]


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
