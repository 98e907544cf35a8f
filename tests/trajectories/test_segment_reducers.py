"""The reducers on segments in which episodes end and begin: the exact expectation over all pairs of segments.

An action that ends its episode decides how many later values fit into the segment, though none is charged to it.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import scorefn as sf
from tests.oracles.tolerances import near
from tests.oracles.toys import coordinates

T = 4
LOGITS = torch.tensor([0.3, -0.5, 0.2, 0.1], dtype=torch.float64)  # of the action that ends the episode, at each age


def segments(logits, filler):
    """Every segment of T rows: what happens by rows of (age, action, value, end), None where a reset takes the row."""
    found = []

    def extend(rows, age, lost):
        if len(rows) == T:
            found.append(rows)
        elif lost:
            extend([*rows, None], 0, False)
        else:
            for action in (0, 1):
                value = 0.3 + age**2 if action else 2.0 * (age + 1)
                row = (age, action, value, bool(action))
                extend([*rows, row], 0 if action else age + 1, filler and bool(action))

    extend([], 0, False)

    def table(read, absent):
        return [[absent if row is None else read(row) for row in rows] for rows in found]

    age, action = (torch.tensor(table(lambda row, k=k: row[k], 0)) for k in (0, 1))
    mask = torch.tensor(table(lambda row: True, False))
    one = logits[age]
    log_prob = torch.nn.functional.logsigmoid(torch.where(action == 1, one, -one)).where(mask, 0.0)
    fx = torch.tensor(table(lambda row: row[2], 0.0), dtype=torch.float64)
    done = torch.tensor(table(lambda row: row[3], True))
    row = torch.arange(T).expand_as(age)
    return log_prob, fx, done, mask, torch.stack([age, row], -1).double()


@cache
def pairs(count):
    return coordinates(count, count).T  # [2, P^2]


def tuples(logits, filler, credit, behaviour=None):
    """All pairs of segments as problems `[2, P^2, T]`, and the probability of each pair."""
    log_prob, fx, done, mask, context = segments(logits, filler)
    chosen = pairs(len(fx))
    sampled = log_prob.detach() if behaviour is None else segments(behaviour, filler)[0]
    draws = sf.Draws(
        None,
        log_prob[chosen],
        fx[chosen],
        credit=replace(credit, done=done[chosen]),
        behaviour_log_prob=None if behaviour is None else sampled[chosen],
        mask=mask[chosen],
        context=context[chosen],
    )
    return draws, sampled.sum(-1).exp()[chosen].prod(0)


def value_function(rate=None):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return sf.ValueFunction(module, optimizer=None if rate is None else torch.optim.SGD(module.parameters(), lr=rate))


def learned(baseline, draws):
    """After two updates with other segments, the same for every pair."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        some = torch.randint(draws.log_prob.shape[1], (8,), generator=generator)
        problems = draws.log_prob.shape[1]

        def past(leaf, some=some, problems=problems):
            return leaf[0, some].unsqueeze(1).expand(-1, problems, *leaf.shape[2:])

        seen = sf.Draws(
            None,
            past(draws.log_prob.detach()).requires_grad_(),
            past(draws.fx),
            credit=replace(draws.credit, done=past(draws.credit.done)),
            mask=past(draws.mask),
            context=past(draws.context),
        )
        baseline.update(seen.signal(), seen)
    return baseline


BASELINES = {
    "leave-one-out": lambda draws: sf.LeaveOneOut(),
    "optimal constant": lambda draws: sf.OptimalConstant(),
    "shared optimal constant": lambda draws: sf.OptimalConstant(shared=True),
    "regression on observations": lambda draws: sf.RegressionBaseline(),
    "moving average, learned": lambda draws: learned(sf.MovingAverage(), draws),
    "past values, learned": lambda draws: learned(sf.AdaptiveRaoBlackwell(0.5), draws),
    "value function, learned": lambda draws: learned(value_function(0.1), draws),
}
CREDITS = {
    "undiscounted": sf.RewardToGo(),
    "discounted": sf.RewardToGo(0.6),
    "usual update": sf.RewardToGo(0.6, visitation_discount=False),
}


def gradient(estimate, weight, logits):
    return torch.autograd.grad((weight * estimate.mean(0)).sum(), logits, create_graph=True)[0]


@pytest.mark.parametrize("filler", [False, True], ids=["no fillers", "fillers"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", BASELINES)
def test_every_reducer_keeps_the_expectation_on_segments(name, credit, off_policy, filler):
    logits = LOGITS.clone().requires_grad_()
    draws, weight = tuples(logits, filler, CREDITS[credit], LOGITS.flip(0) if off_policy else None)
    assert abs(float(weight.sum()) - 1) < 1e-12
    assert bool(draws.mask.all()) != filler
    plain = gradient(sf.surrogate(draws), weight, logits)
    reduced = gradient(sf.surrogate(draws, baseline=BASELINES[name](draws)), weight, logits)
    assert plain.abs().max() > 0.1
    assert float((reduced - plain).detach().abs().max()) < 1e-10


@pytest.mark.parametrize("filler", [False, True], ids=["no fillers", "fillers"])
@pytest.mark.parametrize("name", ["leave-one-out", "past values, learned"])
def test_also_at_second_order(name, filler):
    logits = LOGITS.clone().requires_grad_()
    draws, weight = tuples(logits, filler, sf.RewardToGo(0.6))

    def hessian(baseline):
        first = gradient(sf.dice(draws, baseline=baseline), weight, logits)
        return torch.stack([torch.autograd.grad(g, logits, retain_graph=True)[0] for g in first])

    assert near(hessian(BASELINES[name](draws)), hessian(None))


@pytest.mark.parametrize("filler", [False, True], ids=["no fillers", "fillers"])
def test_the_control_is_made_of_what_came_before_of_all_episodes(filler):
    draws, _ = tuples(LOGITS.clone().requires_grad_(), filler, sf.RewardToGo())
    for t in range(T):
        assert near(draws.uninfluenced[..., t], draws.fx[..., :t].sum(-1))
    baseline = BASELINES["past values, learned"](draws)
    assert baseline.coefficient(draws.signal())[..., 2:].abs().min() > 1e-3


def test_the_own_value_has_no_part_in_the_control_to_the_bit():
    fx = torch.tensor([[0.1, 1e8, 0.3, 0.7], [0.1, -1e8, 0.3, 0.7]])
    done = torch.tensor([[False, True, False, False]]).expand(2, -1)
    draws = sf.Draws(None, torch.zeros(2, 4, requires_grad=True), fx, credit=sf.RewardToGo(done=done))
    assert torch.equal(draws.uninfluenced[0, :2], draws.uninfluenced[1, :2])


class NotCharged(sf.RewardToGo):
    """All that is not charged, later episodes included: the mistake."""

    def uninfluenced(self, v):
        return v.sum(-1, keepdim=True) - self.influence(v)


def test_later_episodes_in_the_control_are_biased():
    logits = LOGITS.clone().requires_grad_()
    draws, weight = tuples(logits, False, NotCharged())
    plain = gradient(sf.surrogate(draws), weight, logits)
    wrong = gradient(sf.surrogate(draws, baseline=BASELINES["past values, learned"](draws)), weight, logits)
    assert float((wrong - plain).detach().abs().max()) > 0.1
