"""`dice` over trajectories: value and first three derivatives, with baselines that help at each of these orders.

Exactly, on decision processes whose episodes can all be written down; by sampling on one whose episodes cannot, against
the derivatives of the value that backward induction finds. The policies are nonlinear in a few parameters that all
states share, so that no derivative of a log-probability vanishes.
"""

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import pytest
import torch
from torch import nn

import scorefn as sf
from applications.rl.tabular_mdp import Episodes, TabularMDP
from tests.oracles.higher_orders import derivative_tensors
from tests.oracles.toys import coordinates
from tests.trajectories.corridor import SEQUENCES, Scripted, corridors, expected_return

pytestmark = pytest.mark.usefixtures("float64")

ORDERS = (0, 1, 2, 3)
EXACT = 1e-10  # relative to the largest entry of each order
THETA = torch.tensor([0.4, -0.7, 0.9], dtype=torch.float64)
OTHER = torch.tensor([-0.1, 0.2, 0.5], dtype=torch.float64)
"""Of the behaviour policy, where there is one."""


def logits(theta, mdp):
    """`[*batch, D] -> [*batch, S, A]`."""
    generator = torch.Generator().manual_seed(9)
    states, actions, _ = mdp.reward.shape
    features = torch.randn(states, actions, theta.shape[-1], generator=generator, dtype=torch.float64)
    return 2 * torch.sin(torch.einsum("saz,...z->...sa", features, theta))


def log_policy(theta, mdp, episodes):
    """`[*batch, T]`; theta is `[D]`, or has one row for each problem."""
    return log_chosen(logits(theta, mdp), episodes)


def log_chosen(table, episodes):
    """Log-probabilities `[*batch, T]` of the actions, from logits `[S, A]` or `[problems, S, A]`."""
    if table.ndim == 2:
        return table.log_softmax(-1)[episodes.states, episodes.actions]
    chosen = episodes.states * table.shape[-1] + episodes.actions
    return table.log_softmax(-1).flatten(-2).expand(*chosen.shape[:-1], -1).gather(-1, chosen)


def values(policy, mdp, discount, entropy=0.0):
    """V_t(s) by backward induction, `[T, S]`, differentiable; each step pays `entropy` for the policy's entropy too."""
    reward = (mdp.payment * mdp.reward).sum(-1) - entropy * policy.log()
    rows = [torch.zeros_like(mdp.start)]
    for _ in range(mdp.horizon):
        rows.insert(0, (policy * (reward + discount * (mdp.transition @ rows[0]))).sum(-1))
    return torch.stack(rows[:-1])


def expected(theta, mdp, discount, entropy=0.0):
    return mdp.start @ values(logits(theta, mdp).softmax(-1), mdp, discount, entropy)[0]


def derivatives(value, theta):
    """The value and its derivatives to the third order."""
    return [value.detach().reshape(1), *derivative_tensors(value, (theta,), 3)]


def assert_same(found, exact):
    for order, mine, true in zip(ORDERS, found, exact, strict=True):
        assert true.abs().max() > 1e-2, f"the derivative of order {order} vanishes: nothing is tested"
        gap = float((mine - true).abs().max() / true.abs().max())
        assert gap < EXACT, f"order {order} is off by {gap:.3g} of its largest entry"


# -------------------------------------------------------------------------------------------- every trajectory, exactly


TINY = TabularMDP.random(1, states=2, actions=2, payments=1, horizon=3)
PAID = TabularMDP.random(2, states=2, actions=3, payments=2, horizon=2)
"""Its rewards are random too."""


class Clock(nn.Module):
    """A value for each step and state, discounted to the start: what reward-to-go is compared with."""

    def __init__(self, table, discount):
        super().__init__()
        age = torch.arange(len(table))
        self.register_buffer("table", discount ** age.unsqueeze(-1) * table)

    def forward(self, states):
        return self.table[torch.arange(states.shape[-1]), states]


class TotalClock(Clock):
    """The same for the whole return, of which nothing is known but the first state."""

    def forward(self, states):
        return self.table[0, states[..., :1]].expand(states.shape)


class Problem(NamedTuple):
    """Draws `[N, tuples, T]`: every N-tuple of episodes is a problem of its own, of known probability."""

    draws: sf.Draws
    weight: torch.Tensor  # [tuples]
    exact: list[torch.Tensor]


def problem(theta, mdp, N, discount, behaviour=False, total=False, entropy=0.0):
    episodes = mdp.enumerate()
    sampled = log_policy(OTHER if behaviour else THETA, mdp, episodes)
    probability = (mdp.log_dynamics(episodes) + sampled.sum(-1)).exp()
    chosen = coordinates(*[len(probability)] * N).T  # [N, tuples]
    log_prob = log_policy(theta, mdp, episodes)
    fx = episodes.rewards if entropy == 0.0 else episodes.rewards - entropy * log_prob
    if total:
        fx = (discount ** torch.arange(mdp.horizon) * fx).sum(-1, keepdim=True)
    draws = sf.Draws(
        Episodes(*(leaf[chosen] for leaf in episodes)),
        log_prob[chosen],
        fx[chosen],
        credit=sf.Total() if total else sf.RewardToGo(discount),
        behaviour_log_prob=sampled[chosen] if behaviour else None,
        context=episodes.states[chosen],
    )
    exact = derivatives(expected(theta, mdp, discount, entropy), theta)
    return Problem(draws, probability[chosen].prod(0), exact)


def found_by_dice(given, baseline, theta):
    return derivatives(given.weight @ sf.dice(given.draws, baseline=baseline).mean(0), theta)


def seen_before(baseline, draws):
    """After two updates with a few other episodes, the same ones in each problem."""
    for seed in range(2):
        some = torch.randint(draws.log_prob.shape[1], (6,), generator=torch.Generator().manual_seed(seed))
        problems = draws.log_prob.shape[1]

        def past(leaf, some=some, problems=problems):
            return leaf.detach()[0, some].unsqueeze(1).expand(-1, problems, -1)

        seen = sf.Draws(
            None,
            past(draws.log_prob).requires_grad_(),
            past(draws.fx),
            credit=draws.credit,
            context=past(draws.context),
        )
        baseline.update(seen.signal(), seen)
    return baseline


def true_value(mdp, discount, total=False):
    module = TotalClock if total else Clock
    return sf.ValueFunction(module(values(logits(THETA, mdp).softmax(-1), mdp, discount), discount))


OF_ONE = {
    "none": lambda mdp, discount, total, draws: None,
    "a number": lambda mdp, discount, total, draws: sf.Constant(1.7),
    "one of each step": lambda mdp, discount, total, draws: sf.Constant(torch.arange(mdp.horizon) - 0.4),
    "value of state and step": lambda mdp, discount, total, draws: true_value(mdp, discount, total),
    "moving average": lambda mdp, discount, total, draws: seen_before(sf.MovingAverage(), draws),
}
OF_OTHERS = {
    "leave-one-out": lambda draws: sf.LeaveOneOut(),
    "optimal constant": lambda draws: sf.OptimalConstant(),
    "past values, learned": lambda draws: seen_before(sf.AdaptiveRaoBlackwell(0.5), draws),
    "regression on states": lambda _: sf.RegressionBaseline(lambda draws: draws.context.unsqueeze(-1).to(draws.fx)),
}


@pytest.mark.parametrize("behaviour", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("total", [False, True], ids=["reward-to-go", "total"])
@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("name", OF_ONE)
@pytest.mark.parametrize("mdp", [TINY, PAID], ids=["three steps", "random rewards"])
def test_every_derivative_is_exact(mdp, name, discount, total, behaviour):
    theta = THETA.clone().requires_grad_()
    given = problem(theta, mdp, 1, discount, behaviour, total)
    assert abs(float(given.weight.sum()) - 1) < 1e-12
    assert_same(found_by_dice(given, OF_ONE[name](mdp, discount, total, given.draws), theta), given.exact)


@pytest.mark.parametrize("behaviour", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("total", [False, True], ids=["reward-to-go", "total"])
@pytest.mark.parametrize("name", OF_OTHERS)
def test_and_with_baselines_that_read_the_other_draw(name, total, behaviour):
    """All 4096 pairs of episodes."""
    theta = THETA.clone().requires_grad_()
    given = problem(theta, TINY, 2, 0.7, behaviour, total)
    assert abs(float(given.weight.sum()) - 1) < 1e-12
    assert_same(found_by_dice(given, OF_OTHERS[name](given.draws), theta), given.exact)


@pytest.mark.parametrize("behaviour", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("name", ["none", "leave-one-out"])
def test_a_reward_that_depends_on_the_policy_itself(name, behaviour):
    """An entropy bonus, `-alpha log policy(a | s)`: pathwise and score terms meet at every order."""
    theta = THETA.clone().requires_grad_()
    given = problem(theta, PAID, 1 if name == "none" else 2, 0.7, behaviour, entropy=0.8)
    assert_same(found_by_dice(given, None if name == "none" else sf.LeaveOneOut(), theta), given.exact)


@pytest.mark.parametrize("baseline", [None, sf.Constant(1.3), "value"], ids=["none", "a number", "value"])
def test_episodes_of_an_environment_that_end_early(baseline):
    """`TrajectoryDistribution` itself, its actions dictated by all scripts."""
    policy = Scripted(SEQUENCES)
    tau = sf.trajectories.TrajectoryDistribution(corridors(len(SEQUENCES)), policy)
    draws = sf.draw(tau, sf.trajectories.rewards, len(SEQUENCES))
    if baseline == "value":
        module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        baseline = sf.ValueFunction(module)
    # an episode of t steps was dictated by 2^(4 - t) scripts
    probability = draws.log_prob.detach().sum(-1).exp() / 2.0 ** (~draws.mask).sum(-1)
    assert abs(float(probability.sum()) - 1) < 1e-12
    assert len(draws.mask.sum(-1).unique()) > 1
    network = policy.network

    def table(position, time):
        return network(torch.tensor([position, time], dtype=torch.float64))

    own = network[0].bias  # three numbers are enough
    found = derivatives(probability @ sf.dice(draws, baseline=baseline), own)
    assert_same(found, derivatives(expected_return(table), own))


class OwnDrawToo(sf.LeaveOneOut):
    """The mistake: an average that contains the draw it is subtracted from."""

    def __call__(self, signal, draws):
        return signal.mean(0, keepdim=True).expand(signal.shape)


def test_what_would_be_wrong_is_seen():
    theta = THETA.clone().requires_grad_()
    given = problem(theta, TINY, 2, 0.7)
    own = found_by_dice(given, OwnDrawToo(), theta)
    once = derivatives(given.weight @ sf.surrogate(given.draws).mean(0), theta)
    for order, true in enumerate(given.exact):
        biased = float((own[order] - true).abs().max() / true.abs().max())
        assert (biased > 0.1) == (order > 0)
        biased = float((once[order] - true).abs().max() / true.abs().max())
        assert (biased > 0.1) == (order > 1)


# ------------------------------------------------------------------------------------------- exact variances, per order


class FirstOrderOnly(sf.RewardToGo):
    """The baseline as it was published with DiCE, `b_k (1 - box(log_prob_k))`: box(pred_k) is left out."""

    def predecessors(self, log_prob):
        return torch.zeros_like(log_prob)


def per_problem(estimate, theta):
    """Derivatives of each problem's estimate `[P]` in its own parameters `[P, D]`: `[P]`, `[P, D]`, ..."""
    found, level = [estimate.detach()], estimate.unsqueeze(-1)
    for order in range(1, len(ORDERS)):
        rows = [torch.autograd.grad(column.sum(), theta, create_graph=True)[0] for column in level.unbind(-1)]
        level = torch.cat(rows, -1)
        found.append(level.detach().reshape(len(theta), *[theta.shape[1]] * order))
    return found


@cache
def variances(name):
    """Of one draw's estimate, exactly, at each order: the variance of every entry of the derivative, summed.

    For leave-one-out twice that of the mean of two draws; of many draws, it subtracts the mean signal of each step.
    """
    N, discount, mdp = 2 if name == "leave-one-out" else 1, 0.9, TINY
    episodes = mdp.enumerate()
    probability = (mdp.log_dynamics(episodes) + log_policy(THETA, mdp, episodes).sum(-1)).exp()
    chosen = coordinates(*[len(probability)] * N).T
    theta = THETA.expand(chosen.shape[1], -1).clone().requires_grad_()
    drawn = Episodes(*(leaf[chosen] for leaf in episodes))
    credit = FirstOrderOnly(discount) if name == "value, first order only" else sf.RewardToGo(discount)
    draws = sf.Draws(drawn, log_policy(theta, mdp, drawn), drawn.rewards, credit=credit, context=drawn.states)
    weight = probability[chosen].prod(0)
    baselines = {
        "none": None,
        "leave-one-out": sf.LeaveOneOut(),
        "leave-one-out, of many": sf.Constant(torch.einsum("p,npk->k", weight, draws.signal())),
    }
    baseline = baselines.get(name, true_value(mdp, discount))
    found = per_problem(sf.dice(draws, baseline=baseline).mean(0), theta)
    one = THETA.clone().requires_grad_()
    sums = []
    for mine, true in zip(found, derivatives(expected(one, mdp, discount), one), strict=True):
        mean = torch.tensordot(weight, mine, 1)
        assert float((mean - true).abs().max() / true.abs().max()) < EXACT  # each of them is unbiased
        sums.append(N * float(torch.tensordot(weight, (mine - mean).square(), 1).sum()))
    return sums


BASELINES = ("leave-one-out", "leave-one-out, of many", "value, first order only", "value of state and step")


def test_how_much_variance_each_baseline_takes_away_at_each_order():
    """Exactly: all episodes, or all pairs of them. In units of the variance without a baseline."""
    plain = variances("none")
    share = {name: [mine / none for mine, none in zip(variances(name), plain, strict=True)] for name in BASELINES}
    assert all(abs(row[0] - 1) < 1e-12 for row in share.values())  # the value is the sample's own
    measured = {  # orders 1, 2 and 3
        "leave-one-out": (1.2873, 1.9090, 1.9332),  # two draws are too few for it, and more so at higher orders
        "leave-one-out, of many": (0.6503, 1.0379, 1.1772),  # one number a step knows nothing of the state
        "value, first order only": (0.2490, 0.7697, 0.8498),
        "value of state and step": (0.2490, 0.3499, 0.2648),
    }
    for name, shares in measured.items():
        assert share[name][1:] == pytest.approx(shares, abs=1e-4)


# ------------------------------------------------------------------------------- five states, four actions, by sampling


LARGE = TabularMDP.random(6, states=5, actions=4, payments=1, horizon=4)
"""Some 10^5 episodes of probability, rewards known, so that chance is the policy's and the dynamics' alone."""
DISCOUNT, FALSE_ALARM, GROUP = 0.9, 1e-6, 8


def along(table, direction):
    """The value and its three derivatives along a direction, by differentiating backward induction."""
    t = torch.zeros((), requires_grad=True)
    level = LARGE.start @ values((table + t * direction).softmax(-1), LARGE, DISCOUNT)[0]
    found = [level.item()]
    for _ in ORDERS[1:]:
        (level,) = torch.autograd.grad(level, t, create_graph=True)
        found.append(level.item())
    return torch.tensor(found)


@cache
def policy_and_directions():
    """Random logits, and of 300 random unit directions the two along which the three derivatives are all large."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    directions = torch.randn(300, 5, 4, generator=generator, dtype=torch.float64)
    directions = directions / directions.flatten(1).norm(dim=1)[:, None, None]
    smallest = torch.stack([along(table, u)[1:].abs().min() for u in directions])
    return table, directions[smallest.topk(2).indices]


def sampled_derivatives(table, direction, baseline, groups):
    """`[3, groups]`, each the mean of a group's draws, which share leave-one-out; groups are independent."""
    episodes = LARGE.sample(table.softmax(-1), GROUP * groups)
    episodes = Episodes(*(leaf.reshape(GROUP, groups, -1) for leaf in episodes))
    t = torch.zeros(groups, requires_grad=True)  # one for each group, so that one pass differentiates them all
    log_prob = log_chosen(table + t[:, None, None] * direction, episodes)
    draws = sf.Draws(episodes, log_prob, episodes.rewards, credit=sf.RewardToGo(DISCOUNT), context=episodes.states)
    level, found = sf.dice(draws, baseline=baseline).mean(0), []
    for _ in ORDERS[1:]:
        (level,) = torch.autograd.grad(level.sum(), t, create_graph=True)
        found.append(level.detach())
    return torch.stack(found)


def check_by_sampling(which, name, rounds, limits, seen):
    """Each derivative deviates by less than its limit, at the confidence of the false-alarm rate; all as shares of it.

    ``seen``: the biases that would be called biases with probability 0.999.
    """
    table, directions = policy_and_directions()
    exact = along(table, directions[which])[1:]
    value = sf.ValueFunction(Clock(values(table.softmax(-1), LARGE, DISCOUNT), DISCOUNT))
    baseline = {"none": None, "leave-one-out": sf.LeaveOneOut(), "value": value}[name]
    means = torch.cat([sampled_derivatives(table, directions[which], baseline, 25_000) for _ in range(rounds)], -1)
    deviation = (means.mean(-1) - exact).abs() / exact.abs()
    error = means.std(-1) / means.shape[-1] ** 0.5 / exact.abs()
    critical = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * len(exact)))
    skewness = ((means - means.mean(-1, keepdim=True)) / means.std(-1, keepdim=True)).pow(3).mean(-1)
    assert means.shape[-1] > 1000 * float(skewness.square().max())  # or the mean would not be normal
    sees = (critical + NormalDist().inv_cdf(0.999)) * error
    assert bool((sees < torch.tensor(seen)).all()), f"sees {sees.tolist()}"
    assert bool((deviation < critical * error).all()), f"{(deviation / error).tolist()} standard errors"
    assert bool((deviation + critical * error < torch.tensor(limits)).all())


@pytest.mark.parametrize(("which", "name"), [(0, "leave-one-out"), (1, "value"), (1, "none")])
def test_the_first_three_derivatives_by_sampling(which, name):
    """10^6 draws: biases of 1.5 %, 4.5 % and 2.5 % in the first three orders would be found with probability 0.999."""
    check_by_sampling(which, name, rounds=5, limits=(0.02, 0.05, 0.03), seen=(0.016, 0.045, 0.026))


@pytest.mark.slow
def test_one_percent_would_be_seen_at_every_order():
    """1.8 10^7 draws."""
    check_by_sampling(0, "leave-one-out", rounds=90, limits=(0.01, 0.01, 0.01), seen=(0.01, 0.01, 0.01))
