"""Law 1: the expected gradient over all tuples of draws is the exact one.

A new reducer joins by one row of CREDITS or BASELINES in `tests/oracles`.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

import scorefn as sf
from tests.oracles.baselines import BASELINES, Lookup
from tests.oracles.expectations import ENTRIES, deviation
from tests.oracles.settings import CREDITS, LAYOUTS, setting, settings
from tests.oracles.tolerances import EXACT, VISIBLE, near
from tests.oracles.toys import TOYS

FROM_OTHERS = (sf.LeaveOneOut, sf.OptimalConstant, sf.RegressionBaseline)  # they read the other blocks
FRONT = [
    "N=1",
    "N=2",
    "N=2 B=(2, 3)",
    "one block",
    "antithetic",
    "ragged groups",
]  # `expectation` adds a choice and a mean


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
