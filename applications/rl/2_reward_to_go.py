"""Reward-to-go: ``python -m applications.rl.2_reward_to_go``.

As ``1_reinforce``, but no action is charged with what was earned before it: f has one value for each step.
"""

import time

import gymnasium
import torch
from torch import nn

import scorefn as sf

EPISODES = 64  # of each update
UPDATES = 60


def main(seed: int = 0, updates: int = UPDATES) -> list[float]:
    """Train; the mean return of each batch."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    env = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="vector_entry_point")
    policy = sf.trajectories.CategoricalPolicy(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    episodes = sf.trajectories.TrajectoryDistribution(env, policy)
    returns = []
    for update in range(updates):
        draws = sf.draw(episodes, sf.trajectories.rewards, EPISODES)
        surrogate = sf.surrogate(draws).mean()
        optimizer.zero_grad()
        (-surrogate).backward()
        optimizer.step()
        returns.append(draws.x.rewards.sum(-1).mean().item())
        if update % 5 == 4:
            print(f"update {update + 1:3d}: mean return {returns[-1]:5.1f}", flush=True)
    return returns


if __name__ == "__main__":
    start = time.process_time()
    main()
    print(f"{time.process_time() - start:.1f} CPU seconds")
