"""Clipped ratios (PPO): ``python -m applications.rl.6_ppo_clip``.

As ``5_gae``, but several steps are taken on each batch: actions are weighed by how much more likely they have become
since they were drawn, and those that have moved far enough teach nothing more.
"""

import time
from dataclasses import replace

import gymnasium
import torch
from torch import nn

import scorefn as sf

EPISODES = 64  # of each update
UPDATES = 60
POLICY_STEPS = 5  # on each batch
VALUE_STEPS = 10  # after each update
DISCOUNT, LAMBDA = 0.99, 0.95


def score(policy: nn.Module, draws: sf.Draws) -> torch.Tensor:
    """Log-probability of the actions under the policy as it is now, ``[N, T]``."""
    return policy(draws.x.observations).log_prob(draws.x.actions)


def main(seed: int = 0, updates: int = UPDATES) -> list[float]:
    """Train; the mean return of each batch."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    env = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="vector_entry_point")
    policy = sf.trajectories.CategoricalPolicy(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    value = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    critic = sf.ValueFunction(value, optimizer=torch.optim.Adam(value.parameters(), lr=0.05))
    errors = sf.trajectories.TemporalDifference(value, DISCOUNT)
    credit = sf.RewardToGo(DISCOUNT * LAMBDA, visitation_discount=False)
    episodes = sf.trajectories.TrajectoryDistribution(env, policy)
    returns = []
    for update in range(updates):
        draws = sf.draw(episodes, errors, EPISODES).bound(credit)
        for _ in range(POLICY_STEPS):
            scored = replace(draws, log_prob=score(policy, draws), behaviour_log_prob=draws.log_prob.detach())
            surrogate = sf.trajectories.ratio_surrogate(scored, draws.signal(), transform=sf.trajectories.Clipped(0.2))
            optimizer.zero_grad()
            (-surrogate.mean()).backward()
            optimizer.step()
        target = draws.signal() + critic(draws.signal(), draws)
        for _ in range(VALUE_STEPS):
            critic.update(target, draws)
        returns.append(draws.x.rewards.sum(-1).mean().item())
        if update % 5 == 4:
            print(f"update {update + 1:3d}: mean return {returns[-1]:5.1f}", flush=True)
    return returns


if __name__ == "__main__":
    start = time.process_time()
    main()
    print(f"{time.process_time() - start:.1f} CPU seconds")
