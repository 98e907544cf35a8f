"""What a trained policy is worth on fresh episodes: its returns, its result, its curve and a film of an episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

import scorefn as sf
from applications.gallery.film import write_film
from applications.rl.settings import Settings
from applications.rl.training import Training, make_env


class Greedy(nn.Module):
    """The most probable action of a policy."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        if hasattr(policy, "executed"):
            self.executed = policy.executed

    def forward(self, observations: Tensor) -> torch.distributions.Distribution:
        """The policy's own distribution."""
        distribution: torch.distributions.Distribution = self.policy(observations)
        return distribution

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """Its mode."""
        return self(observations).mode


def evaluate(policy: nn.Module, settings: Settings, episodes: int, *, seed: int) -> Tensor:
    """Returns ``[episodes]`` of fresh episodes; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        env = make_env(settings, min(episodes, 20))
        return sf.trajectories.rollout(env, policy, episodes).rewards.sum(-1)


def result(training: Training, episodes: int) -> dict[str, Any]:
    """What ``result.json`` holds: sampled and greedy evaluation on fresh episodes included."""
    settings, seed = training.settings, 1_000_000 + training.seed
    sampled = evaluate(training.policy, settings, episodes, seed=seed)
    greedy = evaluate(Greedy(training.policy), settings, episodes, seed=seed + 500_000)
    return {
        "env": settings.env,
        "method": settings.method,
        "seed": training.seed,
        "env_steps": training.env_steps,
        "cpu_seconds": round(training.cpu_seconds, 3),
        "wall_seconds": round(training.wall_seconds, 3),
        "processes": training.ranks.size,
        "eval_sampled_mean": sampled.mean().item(),
        "eval_sampled_std": sampled.std().item(),
        "eval_greedy_mean": greedy.mean().item(),
        "episodes_evaluated": episodes,
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
        "settings": settings.state(),
    }


def draw_curve(training: Training, path: Path) -> None:
    """Mean return of the last episodes against environment steps, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training.curve, strict=True)) if training.curve else None
    axes.set_xlabel("environment steps")
    axes.set_ylabel("mean return of the last 100 episodes")
    axes.set_title(f"{training.settings.env}, {training.settings.method}, seed {training.seed}")
    figure.savefig(path, dpi=120)


def record(training: Training, path: Path, *, frames: int = 600, every: int = 3) -> None:
    """One greedy episode as a GIF of half the size, in real time for environments of 50 steps a second.

    Args:
        training: whose policy plays.
        path: ends in ``.gif``.
        frames: steps of the episode, at most.
        every: steps from one picture to the next.
    """
    from PIL import Image

    env = gymnasium.make(training.settings.env, render_mode="rgb_array")
    policy = Greedy(training.policy)
    observation, _ = env.reset(seed=training.seed)
    pictures, step, done = [], 0, False
    while not done and step < frames:
        if step % every == 0:
            pictures.append(Image.fromarray(env.render()).reduce(2))
        seen = torch.as_tensor(observation, dtype=torch.float32).unsqueeze(0)
        action = policy.act(seen)
        action = policy.executed(action) if hasattr(policy, "executed") else action
        observation, _, terminated, truncated, _ = env.step(action[0].numpy())
        step, done = step + 1, terminated or truncated
    env.close()
    write_film(path, pictures, seconds=every / 50)
