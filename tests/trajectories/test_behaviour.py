"""What was sampled is what is scored: policies that act otherwise than they are scored are refused, at little cost."""

import numpy as np
import pytest
import torch
from torch import nn

import scorefn as sf
from scorefn.trajectories import CategoricalPolicy, SegmentDistribution, TrajectoryDistribution, rewards
from scorefn.trajectories.interaction import Interaction, Recorded
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
    for wanted in ([6, 6, 6], [6], [6]):  # steps 0, 1, 2; then the first one
        built.clear()
        sf.draw(p, rewards, 6)
        assert built == wanted
    p = SegmentDistribution(corridors(6, poison=False), policy, 20)
    counts = []
    for _ in range(9):
        built.clear()
        sf.draw(p, rewards, 6)
        counts.append(len(built))
    assert counts == [6, 0, 0, 0, 1, 0, 0, 0, 1]  # steps 0, 1, 2, 4, 8, 16; then one step in 64 or more


@pytest.mark.parametrize("mode", MODES)
def test_the_behaviour_is_that_of_the_distribution_at_each_kept_step(mode):
    torch.manual_seed(0)
    policy = CategoricalPolicy(network())
    interaction = Interaction(corridors(4, mode, poison=False), policy)
    interaction.begin()
    record, behaviour = interaction.run(20, behaviour=Recorded.POWERS)
    assert [step for step, _ in behaviour] == [0, 1, 2, 4, 8, 16]
    for step, log_prob in behaviour:
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
