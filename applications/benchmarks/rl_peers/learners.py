"""REINFORCE with scorefn and by hand, and the settings of the trainings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import scorefn as sf
from applications.benchmarks.rl_peers.watch import HIDDEN, STREAMS, Watch, native, race, tanh_network
from applications.rl.cartpole import Config
from applications.rl.settings import Settings
from applications.rl.training import Training

FIRST_SEED = 300  # the settings of FEWEST_STEPS were searched with smaller ones
TOLERANCE = 1e-4  # of the hand-written gradient against scorefn's, relative, float32
FASTEST = {"hidden": (Config.hidden,), "learning_rate": Config.learning_rate}
FEWEST_STEPS = Settings(
    "CartPole-v1",
    "gae",
    total_steps=100_000,
    num_envs=8,
    steps=64,
    vectorization="vector_entry_point",
    hidden=(32,),
    learning_rate=0.03,
    decay_to=1.0,
    value_learning_rate=0.03,
    value_steps=20,
    discount=0.99,
    lambda_=0.95,
    normalize_observations=False,
    standardize_advantages=False,
    reward_scale=0.05,
    checkpoint_every=1_000_000,  # the streams never start anew
)


class Ours:
    """REINFORCE with reward-to-go and leave-one-out, as a user of scorefn writes it.

    ``steps`` None: each stream to the end of its episode; otherwise segments of so many rows of streams that go on.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = HIDDEN,
        learning_rate: float = 0.01,
        num_envs: int = STREAMS,
        steps: int | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.policy = sf.trajectories.CategoricalPolicy(tanh_network(hidden))
        self.parameters = list(self.policy.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        env = native(num_envs)
        self.measure = (
            sf.trajectories.TrajectoryDistribution(env, self.policy)
            if steps is None
            else sf.trajectories.SegmentDistribution(env, self.policy, steps)
        )

    def act(self, observations: Tensor) -> Tensor:
        drawn: Tensor = self.policy.act(observations)
        return drawn

    def update(self) -> int:
        """One step of Adam; the environment steps it took."""
        draws = sf.draw(self.measure, sf.trajectories.rewards, self.num_envs)
        surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean()
        self.optimizer.zero_grad()
        (-surrogate).backward()
        self.optimizer.step()
        return int(draws.x.mask.sum())


class ByHand:
    """The same algorithm with nothing but torch and NumPy, drawing the same random numbers in the same order."""

    def __init__(
        self,
        hidden: tuple[int, ...] = HIDDEN,
        learning_rate: float = 0.01,
        num_envs: int = STREAMS,
        steps: int | None = None,
    ) -> None:
        self.num_envs, self.steps = num_envs, steps
        self.network = tanh_network(hidden)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        self.env = native(num_envs)
        self.observation: Any = None
        self.present: Any = None

    def act(self, observations: Tensor) -> Tensor:
        return race(self.network(observations))

    @torch.no_grad()
    def rollout(self) -> tuple[Any, ...]:
        """Lists of rows: observations, actions, rewards, which streams take a step, which end an episode by it."""
        whole = self.steps is None
        if whole or self.observation is None:
            self.observation, _ = self.env.reset(seed=int(torch.randint(2**31 - self.num_envs, ())))
            self.present = np.ones(self.num_envs, bool)
        observation, present = self.observation, self.present
        rows: tuple[list[Any], ...] = ([], [], [], [], [])
        observations, actions, rewards, masks, dones = rows
        while present.any() if whole else len(actions) < self.steps:  # type: ignore[operator]
            seen = torch.from_numpy(observation)
            action = race(self.network(seen))
            observation, reward, terminated, truncated, _ = self.env.step(action.numpy())
            done = terminated | truncated
            observations.append(seen)
            actions.append(action)
            rewards.append(reward)
            masks.append(present)
            dones.append(done)
            present = present & ~done if whole else ~(present & done)  # the row after an end is used up by the reset
        self.observation, self.present = observation, present
        return rows

    def update(self) -> int:
        """One step of Adam; the environment steps it took."""
        observations, actions, rewards, masks, dones = self.rollout()
        mask = np.stack(masks)
        reward, going = np.stack(rewards) * mask, (~np.stack(dones)).astype(np.float64)
        to_go, running = np.empty_like(reward), np.zeros(self.num_envs)
        for t in reversed(range(len(reward))):
            running = reward[t] + going[t] * running
            to_go[t] = running * mask[t]
        others = (to_go.sum(1, keepdims=True) - to_go) / np.maximum(mask.sum(1, keepdims=True) - 1, 1)
        present = torch.from_numpy(mask)
        advantage = torch.from_numpy(to_go - others)[present].float()
        logits = self.network(torch.stack(observations)[present])
        chosen = torch.stack(actions)[present]
        log_prob = torch.log_softmax(logits, -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        loss = -(advantage * log_prob).sum() / self.num_envs
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return len(chosen)


def gradient_difference(seed: int, updates: int = 1, **options: Any) -> float:
    """Largest relative difference of the gradients in the last of ``updates`` updates, ours against by hand.

    Raises:
        AssertionError: they did not take the same environment steps.
    """
    gradients, taken = [], []
    for kind in (Ours, ByHand):
        torch.manual_seed(seed)
        learner = kind(**options)
        taken.append([learner.update() for _ in range(updates)])
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters]))  # type: ignore[union-attr]
    assert taken[0] == taken[1], f"scorefn took {taken[0]} environment steps, the hand-written loop {taken[1]}"
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


def train_scorefn(watch: Watch, seed: int, **options: Any) -> None:
    _train(Ours, watch, seed, options)


def train_by_hand(watch: Watch, seed: int, **options: Any) -> None:
    _train(ByHand, watch, seed, options)


def _train(kind: type[Ours] | type[ByHand], watch: Watch, seed: int, options: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    learner, env_steps = kind(**options), 0
    watch.start()
    while True:
        env_steps += learner.update()
        if watch.after(env_steps, learner.act):
            return


def train_few_steps(watch: Watch, seed: int) -> None:
    """The training program of ``applications/rl``."""
    training = Training(FEWEST_STEPS, seed)
    watch.start()
    while True:
        training.update()
        if watch.after(training.env_steps, training.policy.act):  # type: ignore[arg-type]
            return
