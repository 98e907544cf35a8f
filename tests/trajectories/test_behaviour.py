"""What was sampled is what is scored: policies that act otherwise than they are scored are refused, at little cost."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from torch import nn

import scorefn as sf
from scorefn.trajectories import (
    CategoricalPolicy,
    GaussianPolicy,
    RecurrentPolicy,
    SegmentDistribution,
    TrajectoryDistribution,
    rewards,
)
from scorefn.trajectories.behaviour import Behaviour, Recorded
from scorefn.trajectories.interaction import Interaction
from tests.trajectories.corridor import MODES, corridors, network


def with_layer(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 20), layer, nn.Linear(20, 2)).double()


class Sampled(nn.Module):
    """Any network of logits, without ``act``: the distribution itself is sampled."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, observations):
        return torch.distributions.Categorical(logits=self.logits(observations))


class RunningMean(nn.Module):
    """Subtracts a mean that moves with every call: the mistake."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(20, dtype=torch.float64))

    def forward(self, x):
        y = x - self.mean
        with torch.no_grad():
            self.mean.add_(0.1 * (x.mean(0) - self.mean))
        return y


class Drifting(Sampled):
    """Right for so many steps, then its logits move, for good or for a step."""

    def __init__(self, at, forgets):
        super().__init__(network())
        self.at, self.forgets, self.calls = at, forgets, 0

    def forward(self, observations):
        drifted = self.calls >= self.at and not (self.forgets and torch.is_grad_enabled())
        self.calls += 1
        return torch.distributions.Categorical(logits=self.logits(observations) * (3.0 if drifted else 1.0))


POLICIES = {
    "dropout": lambda: CategoricalPolicy(with_layer(nn.Dropout(0.5))),
    "sampled dropout": lambda: Sampled(with_layer(nn.Dropout(0.5))),
    "batch normalisation": lambda: CategoricalPolicy(with_layer(nn.BatchNorm1d(20))),
    "sampled batch normalisation": lambda: Sampled(with_layer(nn.BatchNorm1d(20))),
    "running statistics": lambda: Sampled(with_layer(RunningMean())),
    "running statistics, acting": lambda: CategoricalPolicy(with_layer(RunningMean())),
    "changed in step 1": lambda: Drifting(1, forgets=False),
    "changed in step 1, and back": lambda: Drifting(1, forgets=True),
    "changed in step 2, and back": lambda: Drifting(2, forgets=True),
}


def distributions(policy, mode):
    return [
        TrajectoryDistribution(corridors(6, mode, poison=False), policy),
        SegmentDistribution(corridors(6, mode, poison=False), policy, 12),
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_is_scored_otherwise_than_it_acted_is_refused(name, mode):
    for k in range(2):
        torch.manual_seed(0)
        policy = POLICIES[name]()
        p = distributions(policy, mode)[k]
        baseline = sf.MovingAverage()
        with pytest.raises(sf.ScorefnError, match=r"stream \d in step \d+ .* when it acted and .* policy.eval\(\).*"):
            sf.expectation(p, rewards, 6, baseline=baseline)
        assert baseline.mean is None
        assert all(parameter.grad is None for parameter in policy.parameters())


def draw_until_looked_at(p):
    for _ in range(8):
        sf.draw(p, rewards, 6)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(20), nn.LayerNorm(20)])
def test_evaluation_mode_is_accepted_and_training_mode_later_on_is_not(layer):
    for p in distributions(CategoricalPolicy(with_layer(layer)).eval(), MODES[0]):
        p.policy.eval()
        for _ in range(8):
            sf.expectation(p, rewards, 6).backward()
        if not isinstance(layer, nn.LayerNorm):
            p.policy.train()
            with pytest.raises(sf.ScorefnError, match="when it acted"):
                draw_until_looked_at(p)


def test_the_distribution_is_built_while_acting_on_first_use_and_then_hardly_ever():
    torch.manual_seed(0)
    policy = CategoricalPolicy(network())
    built = []

    def count(module, inputs, output):
        if not torch.is_grad_enabled():
            built.append(len(inputs[0]))

    policy.register_forward_hook(count)
    p = TrajectoryDistribution(corridors(6), policy)
    for wanted in ([6, 6, 6, 6], [6], [6]):  # all four steps; then the first one
        built.clear()
        sf.draw(p, rewards, 6)
        assert built == wanted
    p = SegmentDistribution(corridors(6, poison=False), policy, 20)
    counts = []
    for _ in range(9):
        built.clear()
        sf.draw(p, rewards, 6)
        counts.append(len(built))
    assert counts == [18, 0, 0, 0, 1, 0, 0, 0, 1]  # steps 0 to 15, 16, 18; then one step in 64 or more


@pytest.mark.parametrize("mode", MODES)
def test_the_behaviour_is_that_of_the_distribution_at_each_kept_step(mode):
    torch.manual_seed(0)
    policy = CategoricalPolicy(network())
    interaction = Interaction(corridors(4, mode, poison=False), policy)
    interaction.begin()
    record, behaviour = interaction.run(40, behaviour=Recorded.MANY)
    assert [step for step, *_ in behaviour] == [*range(16), 16, 18, 20, 22, 24, 27, 30, 33, 37]
    for step, log_prob, *_ in behaviour:
        wanted = policy(record.observations[:, step]).log_prob(record.actions[:, step])
        present = record.mask[:, step]
        assert torch.allclose(log_prob[present], wanted[present])


def test_rounds_are_compared_each_with_its_own_rows():
    torch.manual_seed(0)
    policy = CategoricalPolicy(network())
    p = TrajectoryDistribution(corridors(4), policy)
    for count in (11, 4, 1, 9):
        draws = sf.draw(p, rewards, count)
        assert len(draws) == count
        assert np.isclose(
            draws.log_prob[-1, 0].item(), policy(draws.x.observations[-1, 0]).log_prob(draws.x.actions[-1, 0]).item()
        )


# ------------------------------------------------------------------------------------- small mismatches, and rounding


class Numbers(gymnasium.Env):
    """Normal observations, as of a robot."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (17,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=17).astype(np.float32), {}

    def step(self, action):
        return self.np_random.normal(size=17).astype(np.float32), 0.0, False, False, {}


def numbers(count):
    return SyncVectorEnv([Numbers] * count)


class Moving(nn.Module):
    """A running mean that moves a little with every step of acting."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.register_buffer("mean", torch.zeros(17))

    def forward(self, x):
        if not torch.is_grad_enabled():
            self.mean += self.rate * (x.mean(0) - self.mean)
        return x - self.mean


class Neighbours(nn.Module):
    """Looks a little at the mean of whoever else is asked."""

    def forward(self, x):
        return x - 1e-3 * x.mean(0)


def tanh_network(width, first=None):
    torch.manual_seed(0)
    layers = [nn.Linear(17, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 6)]
    return nn.Sequential(*([] if first is None else [first]), *layers)


SMALL = {
    "a mean that moves by 1e-3": lambda: Moving(1e-3),
    "a mean that moves by 1e-4": lambda: Moving(1e-4),
    "a look at the others": Neighbours,
    "little dropout": lambda: nn.Dropout(1e-3),
}


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_a_small_mismatch_of_many_dimensional_actions_is_refused(name, segments):
    policy = GaussianPolicy(tanh_network(64, SMALL[name]()), torch.zeros(6))
    env = numbers(8)
    p = SegmentDistribution(env, policy, 60) if segments else TrajectoryDistribution(env, policy, max_steps=60)
    with pytest.raises(sf.ScorefnError, match="when it acted"):
        sf.draw(p, rewards, 8)


ROUNDED = {
    "float32": (torch.float32, tanh_network),
    "bfloat16": (torch.bfloat16, tanh_network),
    "float64": (torch.float64, tanh_network),
}


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("log_scale", [0.0, -2.0, -6.0])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_never_taken_for_a_mismatch(name, log_scale, memory):
    """Small scales multiply it: 100 units in the last place of the log-probability and more."""
    dtype, make = ROUNDED[name]
    policy = GaussianPolicy(nn.Linear(32, 6) if memory else make(256), torch.full((6,), log_scale))
    if memory:
        policy = RecurrentPolicy(nn.GRUCell(17, 32), policy)
    for p in policy.parameters():
        p.data.mul_(1.0 if p.ndim == 1 else 2.0)
    for count in (1, 8):
        distribution = SegmentDistribution(numbers(count), policy.to(dtype), 70)
        for _ in range(3):
            sf.draw(distribution, rewards, count)


def test_beyond_a_few_units_the_policy_is_asked_again_and_only_then():
    original = Behaviour.again
    for log_scale, some in ((0.0, False), (-6.0, True)):
        policy = GaussianPolicy(tanh_network(256), torch.full((6,), log_scale))
        for p in policy.mean.parameters():
            p.data.mul_(2.0)
        p = SegmentDistribution(numbers(8), policy, 70)
        asked = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Behaviour, "again", lambda *a, asked=asked: asked.append(1) or original(*a))
            sf.draw(p, rewards, 8)
        assert bool(asked) == some
