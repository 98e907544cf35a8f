"""A value function as baseline: ``python -m applications.rl.4_value_function``.

As ``3_leave_one_out``, but what a network expects to be earned from the observation on is subtracted. It is fitted
after it was read, to what was earned.
"""

import time

import gymnasium
import torch
from torch import nn

import scorefn as sf

EPISODES = 64  # of each update
UPDATES = 60
VALUE_STEPS = 10  # after each update


def main(seed: int = 0, updates: int = UPDATES) -> list[float]:
    """Train; the mean return of each batch."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    env = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="vector_entry_point")
    policy = sf.trajectories.CategoricalPolicy(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    value = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    baseline = sf.ValueFunction(value, optimizer=torch.optim.Adam(value.parameters(), lr=0.05))
    episodes = sf.trajectories.TrajectoryDistribution(env, policy)
    returns = []
    for update in range(updates):
        draws = sf.draw(episodes, sf.trajectories.rewards, EPISODES)
        surrogate = sf.surrogate(draws, baseline=baseline).mean()
        optimizer.zero_grad()
        (-surrogate).backward()
        optimizer.step()
        for _ in range(VALUE_STEPS):
            baseline.update(draws.signal(), draws)
        returns.append(draws.x.rewards.sum(-1).mean().item())
        if update % 5 == 4:
            print(f"update {update + 1:3d}: mean return {returns[-1]:5.1f}", flush=True)
    return returns


if __name__ == "__main__":
    start = time.process_time()
    main()
    print(f"{time.process_time() - start:.1f} CPU seconds")
