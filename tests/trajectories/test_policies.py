"""The fast path samples the distribution that is scored."""

import torch
from torch import nn
from torch.distributions import Categorical

from scorefn.trajectories import CategoricalPolicy


class Logits(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, observations):
        return self.logits.expand(*observations.shape[:-1], -1)


def test_act_samples_the_distribution_that_forward_returns():
    """A million draws: a frequency off by 0.005 is ten standard errors, so false alarms are below 1e-6."""
    policy = CategoricalPolicy(Logits(0.3, -1.2, 5.0, 4.1, -torch.inf))
    observations = torch.zeros(1_000_000, 1)
    frequency = torch.bincount(policy.act(observations), minlength=5) / 1_000_000
    probability = policy(observations[0]).probs
    assert (frequency - probability).abs().max() < 0.005
    assert frequency[-1] == 0  # an action that is ruled out is never taken


def test_act_neither_tracks_gradients_nor_changes_anything():
    policy = CategoricalPolicy(nn.Linear(2, 3))
    before = [parameter.clone() for parameter in policy.parameters()]
    action = policy.act(torch.zeros(4, 2))
    assert action.shape == (4,)
    assert action.dtype == torch.int64
    assert not action.requires_grad
    assert all(map(torch.equal, before, policy.parameters()))


def test_one_action_only():
    assert CategoricalPolicy(Logits(2.0)).act(torch.zeros(3, 1)).tolist() == [0, 0, 0]


def test_forward_is_the_categorical_of_the_logits():
    policy = CategoricalPolicy(nn.Linear(2, 3))
    x = torch.randn(4, 5, 2)
    distribution = policy(x)
    assert isinstance(distribution, Categorical)
    assert distribution.batch_shape == (4, 5)
    assert torch.allclose(distribution.logits, policy.network(x).log_softmax(-1))
