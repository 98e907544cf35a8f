"""Draws of trajectories: exact expected gradients through a real environment, shapes, values, refusals."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.trajectories import CategoricalPolicy, TrajectoryDistribution, rewards
from tests.trajectories.corridor import (
    HORIZON,
    MODES,
    SEQUENCES,
    Scripted,
    corridors,
    episode,
    expected_return,
    network,
)
from tests.trajectories.test_rollouts import FITTING, Family, Still


def gradient(value, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()), retain_graph=True)])


def every_episode(mode=MODES[0], f=rewards):
    """Draws of all 16 action sequences, the probability of each, and the policy."""
    policy = Scripted(SEQUENCES)
    draws = sf.draw(TrajectoryDistribution(corridors(16, mode), policy), f, 16)
    unplayed = HORIZON - draws.mask.sum(-1)  # several sequences share an episode that ends early: equal parts of it
    return draws, draws.log_prob.detach().sum(-1).exp() * 0.5**unplayed, policy


def truth(policy):
    def logits(position, time):
        return policy.network(torch.tensor([position, time], dtype=torch.float64))

    return expected_return(logits)


def returns(trajectories):
    return trajectories.rewards.sum(-1)


ESTIMATES = {
    "own credit": (rewards, {}),
    "total credit": (rewards, {"credit": sf.Total()}),
    "whole return": (returns, {}),
    "constant baseline": (rewards, {"baseline": sf.Constant(1.7)}),
    "influence": (rewards, {"credit": sf.Influence(torch.ones(4, 4, dtype=torch.bool).triu())}),
}


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("mode", MODES)
def test_the_expected_gradient_is_exact(mode, name):
    f, parts = ESTIMATES[name]
    draws, probability, policy = every_episode(mode, f)
    assert abs(probability.sum().item() - 1) < 1e-12
    estimate = sf.surrogate(draws, **parts)
    exact = truth(policy)
    assert abs((probability @ estimate - exact).item()) < 1e-12
    assert (gradient(probability @ estimate, policy) - gradient(exact, policy)).abs().max() < 1e-12


def test_leave_one_out_is_exact_over_every_pair():
    draws, probability, policy = every_episode()
    total = 0.0
    for i in range(16):
        for j in range(16):
            pair = draws[torch.tensor([i, j])]
            total = total + probability[i] * probability[j] * sf.surrogate(pair, baseline=sf.LeaveOneOut()).mean()
    assert (gradient(total, policy) - gradient(truth(policy), policy)).abs().max() < 1e-12


def test_the_usual_discounting_is_another_gradient():
    draws, probability, policy = every_episode()

    kept = gradient(probability @ sf.surrogate(draws, credit=sf.RewardToGo(0.5)), policy)
    usual = gradient(probability @ sf.surrogate(draws, credit=sf.RewardToGo(0.5, visitation_discount=False)), policy)
    discounted = draws.fx @ 0.5 ** torch.arange(4, dtype=torch.float64)
    differentiable = probability * (draws.log_prob - draws.log_prob.detach()).sum(-1).exp()
    exact = gradient(differentiable @ discounted, policy)
    assert (kept - exact).abs().max() < 1e-12
    assert (usual - exact).abs().max() > 1e-2


def test_every_autoreset_mode_gives_the_same_draws():
    first, *others = [every_episode(mode)[0] for mode in MODES]
    for other in others:
        assert torch.equal(first.log_prob, other.log_prob)
        assert torch.equal(first.fx, other.fx)
        assert torch.equal(first.mask, other.mask)
        assert torch.equal(first.context, other.context)


def test_each_draw_equals_the_loop_by_hand():
    draws, _, policy = every_episode()
    for i, actions in enumerate(SEQUENCES.tolist()):
        rows, _, _ = episode(actions)
        by_hand = 0.0
        for t, (position, time, action, _) in enumerate(rows):
            logits = policy.network(torch.tensor([position, time], dtype=torch.float64))
            by_hand = by_hand + logits.log_softmax(-1)[action] * sum(reward for *_, reward in rows[t:])
        estimate = sf.surrogate(draws)[i]
        assert estimate.item() == draws.x.rewards[i].sum().item()
        assert (gradient(estimate, policy) - gradient(by_hand, policy)).abs().max() < 1e-12


def test_fields_of_the_draws():
    draws, _, _ = every_episode()
    assert draws.log_prob.shape == draws.fx.shape == draws.mask.shape == (16, 4)
    assert isinstance(draws.credit, sf.RewardToGo)
    assert draws.credit.discount == 1
    assert draws.context is draws.x.observations
    assert not draws.log_prob[~draws.mask].any()
    whole, _, _ = every_episode(f=returns)
    assert whole.fx.shape == (16, 1)
    assert isinstance(whole.credit, sf.Total)


def test_values_of_absent_steps_count_as_zero_even_where_they_are_nan():
    def cost(trajectories):
        return torch.where(trajectories.mask, trajectories.rewards, torch.nan)

    draws, probability, policy = every_episode(f=cost)
    assert (gradient(probability @ sf.surrogate(draws), policy) - gradient(truth(policy), policy)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "f",
    [
        lambda tau: tau.rewards.sum(),
        lambda tau: tau.rewards.T,
        lambda tau: tau.rewards.unsqueeze(-1),
        lambda tau: tau.rewards.sum(-1, keepdim=True),
        lambda tau: tau.rewards[:, :2],
    ],
)
def test_values_of_any_other_shape_are_refused(f):
    with pytest.raises(
        sf.ShapeError, match=r"f returned shape .* \[N, T\] = \(16, 4\): .* per step, \(16, 4\), or .*\(16,\)"
    ):
        every_episode(f=f)


def test_the_policy_is_scored_once_on_present_steps_only():
    policy = CategoricalPolicy(network())
    rows = []

    def count(module, inputs, output):
        if torch.is_grad_enabled():
            rows.append(len(inputs[0]))

    policy.register_forward_hook(count)
    draws = sf.draw(TrajectoryDistribution(corridors(4), policy), rewards, 20)
    assert rows == [int(draws.mask.sum())]


def test_a_value_function_reads_the_observations():
    module = nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    baseline = sf.ValueFunction(module, optimizer=optimizer)
    policy = CategoricalPolicy(network())
    before = module.weight.detach().clone()
    value = sf.expectation(TrajectoryDistribution(corridors(8), policy), rewards, 8, baseline=baseline)
    value.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert not torch.equal(before, module.weight)


# --------------------------------------------------------------------------------------------------------- refusals


class NoDistribution(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, observations):
        return self.network(observations)


class Pairs(CategoricalPolicy):
    def act(self, observations):
        return super().act(observations).unsqueeze(-1)


class Columns(torch.distributions.Categorical):
    def log_prob(self, value):
        return super().log_prob(value).unsqueeze(-1)


class Paying(gymnasium.Wrapper):
    """Pays the same in every step, or what the environment pays."""

    def __init__(self, env, bad):
        super().__init__(env)
        self.bad = bad

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        return observation, self.bad if self.bad is not None else reward, *rest


def paying(*bads):
    return gymnasium.vector.SyncVectorEnv([lambda bad=bad: Paying(corridors(1).envs[0], bad) for bad in bads])


def still(space):
    return gymnasium.vector.SyncVectorEnv([lambda: Still(space)] * 4)


def family(name, outputs=None):
    _, make, fitting = FITTING[name]
    return Family(outputs or fitting, make)


def categorical(inputs, outputs):
    return CategoricalPolicy(nn.Linear(inputs, outputs))


BOX, TWO = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32), gymnasium.spaces.Discrete(2)
REFUSALS = {
    "no environment": (
        lambda: (object(), CategoricalPolicy(network())),
        sf.ScorefnError,
        r"object is neither a gymnasium.vector.VectorEnv nor a gymnasium.Env.*parallel streams.*make_vec",
    ),
    "not a module": (
        lambda: (corridors(2), lambda observations: None),
        sf.ScorefnError,
        r"function is not a torch.nn.Module: a policy is a module.*CategoricalPolicy\(network\)",
    ),
    "no distribution": (
        lambda: (corridors(2), NoDistribution()),
        sf.ScorefnError,
        r"NoDistribution returned Tensor.*sampled and scored.*wrap a network of logits in CategoricalPolicy",
    ),
    "too many categories": (
        lambda: (corridors(2), CategoricalPolicy(nn.Linear(2, 3).double())),
        sf.ScorefnError,
        r"among 3 actions, but the action space is Discrete\(2\): let its network return 2 logits",
    ),
    "too few categories": (
        lambda: (still(gymnasium.spaces.Discrete(3)), categorical(3, 2)),
        sf.ScorefnError,
        r"among 2 actions, but the action space is Discrete\(3\): let its network return 3 logits",
    ),
    "categories of several actions": (
        lambda: (still(gymnasium.spaces.MultiDiscrete([3, 2])), family("multidiscrete")),
        sf.ScorefnError,
        r"among 3 actions, but the action space is MultiDiscrete\(\[3 2\]\): let its network return 2 or 3 logits",
    ),
    "density over choices": (
        lambda: (still(TWO), Family(1, lambda out: torch.distributions.Normal(out.squeeze(-1), 1.0))),
        sf.ScorefnError,
        r"Normal, which is continuous, but the action space is Discrete\(2\): use Categorical",
    ),
    "choices over a box": (
        lambda: (still(gymnasium.spaces.Box(0.0, 1.0, (), np.float32)), categorical(3, 2)),
        sf.ScorefnError,
        r"Categorical, which is discrete, but the action space is Box.*: use a density such as Normal",
    ),
    "event dimensions not declared": (
        lambda: (still(BOX), Family(2, lambda out: torch.distributions.Normal(out, 1.0))),
        sf.ShapeError,
        r"batch shape \(4, 2\) and event shape \(\), but 4 streams .* need batch shape \(4,\) and event shape \(2,\)"
        r".*Independent\(distribution, 1\)",
    ),
    "another number of action dimensions": (
        lambda: (still(BOX), family("normal", 3)),
        sf.ShapeError,
        r"event shape \(3,\), but 4 streams .* event shape \(2,\)",
    ),
    "actions beyond the space": (
        lambda: (still(TWO), Family(1, lambda out: torch.distributions.Poisson(out.squeeze(-1) * 0 + 50.0))),
        sf.ScorefnError,
        r"returned Poisson, whose values go from 0 to inf, but the action space is Discrete\(2\): .*executed",
    ),
    "actions that do not start at 0": (
        lambda: (still(gymnasium.spaces.Discrete(2, start=1)), categorical(3, 2)),
        sf.ScorefnError,
        r"Discrete\(2, start=1\) does not start at 0.*TransformAction",
    ),
    "a space of several arrays": (
        lambda: (still(gymnasium.spaces.Dict(a=TWO, b=TWO)), categorical(3, 2)),
        sf.ScorefnError,
        r"The action space is Dict\(.*one array.*flatten it",
    ),
    "another shape of actions": (
        lambda: (corridors(2), Pairs(network())),
        sf.ShapeError,
        r"acted with shape \(2, 1\), but 2 streams with actions from Discrete\(2\) need \(2,\): return one action",
    ),
    "another shape of log-probabilities": (
        lambda: (still(TWO), Family(2, lambda out: Columns(logits=out))),
        sf.ShapeError,
        r"log_prob of 4 actions has shape \(4, 1\), but \(4,\) is needed, one number per action: .*squeeze\(-1\)",
    ),
    "reward that is no number": (
        lambda: (paying(None, np.nan, None, np.inf), CategoricalPolicy(network())),
        sf.NonFiniteError,
        r"The reward of stream 1 in step 0 is nan: .* nothing of this record was kept",
    ),
    "dropout": (
        lambda: (
            corridors(4),
            CategoricalPolicy(nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 2)).double()),
        ),
        sf.ScorefnError,
        r"stream \d in step 0 the log-probability .* when it acted and .* when it was scored.*Dropout .*eval\(\)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_belong_together_is_refused_and_nothing_is_changed(name):
    make, error, message = REFUSALS[name]
    env, policy = make()
    baseline = sf.MovingAverage()
    parameters = list(policy.parameters()) if isinstance(policy, nn.Module) else [torch.zeros(1, requires_grad=True)]
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    with pytest.raises(error, match=message):
        sf.expectation(TrajectoryDistribution(env, policy), rewards, 4, baseline=baseline)
    assert baseline.mean is None
    assert all(map(torch.equal, before, parameters))
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in parameters)
    assert all(map(torch.equal, moments, [value for state in optimizer.state.values() for value in state.values()]))


def test_a_coupling_is_refused():
    class Pairs:
        unbiased = True

        def __repr__(self):
            return "Pairs()"

        def sample(self, p, num_samples):
            raise AssertionError("nothing is to be sampled")

    with pytest.raises(sf.ScorefnError, match=r"coupling=Pairs\(\).*own random numbers.*leave coupling out"):
        sf.draw(TrajectoryDistribution(corridors(2), CategoricalPolicy(network())), rewards, 2, coupling=Pairs())


def test_dropout_is_fine_where_it_is_switched_off():
    env, policy = REFUSALS["dropout"][0]()
    sf.expectation(TrajectoryDistribution(env, policy.eval()), rewards, 4).backward()


def test_an_error_inside_the_policy_names_the_shape_it_was_called_with():
    with pytest.raises(RuntimeError) as caught:
        sf.draw(TrajectoryDistribution(corridors(2), CategoricalPolicy(nn.Linear(3, 2).double())), rewards, 2)
    assert "observations of shape (2, 2)" in caught.value.__notes__[0]


def test_a_policy_whose_support_moves_is_refused():
    """Actions uniform on (-h, h): their score misses the boundary, whatever the environment does."""

    class Uniform(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.Parameter(torch.tensor(1.5))

        def forward(self, observations):
            edge = self.h.expand(len(observations), 1)
            return torch.distributions.Independent(torch.distributions.Uniform(-edge, edge), 1)

    env = gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
    tau = sf.trajectories.TrajectoryDistribution(env, Uniform(), max_steps=3)
    with pytest.raises(sf.SupportError, match="moves with a parameter"):
        sf.draw(tau, sf.trajectories.rewards, 2)


def test_independent_episodes_may_be_asked_for():
    env = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")
    tau = sf.trajectories.TrajectoryDistribution(env, sf.trajectories.CategoricalPolicy(nn.Linear(4, 2)))
    assert len(sf.draw(tau, sf.trajectories.rewards, 2, coupling=sf.Independent())) == 2
