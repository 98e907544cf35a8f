"""Stable-Baselines3: its rollout buffer's advantages, as its own collection loop feeds it."""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer

from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://stable-baselines3.readthedocs.io/en/master/modules/base.html"

peer = Peer("sb3", packages=("stable-baselines3", "torch", "numpy"), seed_all=torch.manual_seed)


def buffer_of(rewards: np.ndarray) -> np.ndarray:
    space = gymnasium.spaces.Box(0, 1, (1,))
    buffer = RolloutBuffer(
        4, space, gymnasium.spaces.Discrete(2), gae_lambda=sequential.LAMBDA, gamma=sequential.GAMMA, n_envs=1
    )
    start = np.array([True])
    for t in range(4):
        value, zero = torch.tensor([[sequential.VALUE[t]]]), torch.zeros(1)
        buffer.add(np.zeros((1, 1)), np.zeros((1, 1)), rewards[t : t + 1], start, value, zero)
        start = np.array([bool(sequential.TERMINATED[t] or sequential.TRUNCATED[t])])
    buffer.compute_returns_and_advantage(torch.tensor([sequential.NEXT_VALUE[3]]), start)
    return buffer.advantages[:, 0].astype(np.float64)


@peer.row(
    "advantages",
    "RolloutBuffer",
    link=DOCS,
    reading="the cut step's reward gets gamma V(cut state) first, as collect_rollouts does for TimeLimit.truncated",
)
def collected(problem: Problem) -> Answer:
    rewards = sequential.REWARD + sequential.GAMMA * sequential.NEXT_VALUE * sequential.TRUNCATED
    return Answer(one=lambda: buffer_of(rewards), exact=True)


@peer.row(
    "advantages",
    "RolloutBuffer",
    link=DOCS,
    reading="used alone",
    choice="the buffer knows one kind of end; its collection loop adds the cut state's value, "
    "and the buffer alone does not",
)
def alone(problem: Problem) -> Answer:
    return Answer(one=lambda: buffer_of(sequential.REWARD), exact=True)


peer.lacks(tuple(name for name in PROBLEMS if name != "advantages"), "whole algorithms: nothing smaller is documented")

if __name__ == "__main__":
    peer.main()
