"""An environment in which nothing happens, in any spaces, and policies for it."""

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import nn

from scorefn.trajectories import GaussianPolicy

PLAIN = spaces.Box(-1.0, 1.0, (2,), np.float32)


class Still(gymnasium.Env):
    """Nothing happens for three steps, in any spaces."""

    def __init__(self, action_space, observation_space=PLAIN, value=1):
        self.action_space, self.observation_space, self.value = action_space, observation_space, value

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.full(self.observation_space.shape, self.value, self.observation_space.dtype), {}

    def step(self, action):
        self.time += 1
        self.seen = action
        observation = np.full(self.observation_space.shape, self.value, self.observation_space.dtype)
        return observation, 1.0, self.time == 3, False, {}


def still(action_space, observation_space=PLAIN, value=1, count=3):
    return SyncVectorEnv([lambda: Still(action_space, observation_space, value)] * count)


class Family(nn.Module):
    """A policy of any distribution, made from one output of a network."""

    def __init__(self, make):
        super().__init__()
        self.make, self.network = make, nn.Linear(2, 1)

    def forward(self, observations):
        return self.make(self.network(observations.float()).squeeze(-1))


class Rounding(GaussianPolicy):
    def executed(self, actions):
        return actions.round().clamp(0, 10).long()
