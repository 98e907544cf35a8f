"""CartPole-v1 beside the hand-written loop, Stable-Baselines3, Tianshou and TorchRL.

    python -m applications.benchmarks.rl_peers [--peers all|none|sb3,tianshou,torchrl] [--seeds 5] [--quick] [--out DIR]

Two questions, in one run on one thread: how many environment steps a second of CPU time learns from, and what it takes
until the sampled policy is good. Each library lives in a process of its own, because importing TorchRL turns argument
validation off for everybody; the processes work one at a time and take turns, and what is measured is the time of the
process that works. The hand-written loop shares scorefn's process, and its gradient is compared with scorefn's first.

A peer is imported only where it is asked for. None is a dependency: install them into an environment of their own,

    python -m venv peers && peers/bin/pip install torch stable-baselines3 tianshou torchrl gymnasium

and run this with that environment's Python, scorefn's checkout being the working directory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import scorefn as sf
from applications.rl.cartpole import Config
from applications.rl.settings import Settings
from applications.rl.train import Training

PACKAGES = {"sb3": "stable-baselines3", "tianshou": "tianshou", "torchrl": "torchrl"}
MODULES = {"sb3": "stable_baselines3", "tianshou": "tianshou", "torchrl": "torchrl"}
STREAMS, HIDDEN = 64, (64, 64)  # of the throughput runs
THRESHOLD, EPISODES = 475.0, 100
FIRST_SEED = 300  # the settings of FEWEST_STEPS were searched with smaller ones
EVERY = 1000  # environment steps at least, between two evaluations
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

Act = Callable[[Tensor], Tensor]  # observations [N, 4] -> sampled actions [N], without gradient


def native(num_envs: int) -> Any:
    """All streams in one NumPy program."""
    return gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")


def tanh_network(hidden: tuple[int, ...], outputs: int = 2) -> nn.Sequential:
    """With torch's own initial weights."""
    sizes = (4, *hidden)
    layers = [part for i, j in itertools.pairwise(sizes) for part in (nn.Linear(i, j), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def race(logits: Tensor) -> Tensor:
    """A draw from the softmax of the last dimension: whose exponential clock rings first."""
    return logits.sub(torch.empty_like(logits).exponential_().log_()).argmax(-1)


def evaluate(act: Act, episodes: int, seed: int) -> float:
    """Mean return of whole sampled episodes; torch's generator is left as it was."""
    env = native(episodes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        observation, _ = env.reset(seed=seed)
        going, total = np.ones(episodes, bool), 0.0
        while going.any():
            observation, reward, terminated, truncated, _ = env.step(act(torch.from_numpy(observation)).numpy())
            total += float(reward[going].sum())
            going &= ~(terminated | truncated)
    return total / episodes


class Watch:
    """The clocks of one training: they stand still while the policy is judged.

    Training calls ``after`` once an update, with the environment steps so far and the policy, and stops where that says
    so: after ``max_steps``, after ``max_updates``, or when the policy is good. A policy is looked at whenever ``EVERY``
    steps have passed, and is good where 100 sampled episodes average 475 and 100 further ones confirm it.
    """

    def __init__(
        self, *, seed: int = 0, judged: bool = False, max_steps: int | None = None, max_updates: int | None = None
    ) -> None:
        self.seed, self.judged, self.max_steps, self.max_updates = seed, judged, max_steps, max_updates
        self.cpu = self.wall = 0.0
        self.env_steps = self.updates = self.looks = self._last = 0
        self.solved = False
        self.confirmed: float | None = None  # mean of the further episodes

    def start(self) -> Watch:
        """From here on, time is the training's."""
        self._started = time.process_time(), time.perf_counter()
        return self

    def after(self, env_steps: int, act: Act) -> bool:
        """Whether to stop."""
        self.cpu += time.process_time() - self._started[0]
        self.wall += time.perf_counter() - self._started[1]
        self.env_steps, self.updates = env_steps, self.updates + 1
        if self.judged and env_steps - self._last >= EVERY:
            self._last = env_steps
            self.solved = self._good(act)
        self.start()
        return (
            self.solved
            or (self.max_steps is not None and env_steps >= self.max_steps)
            or (self.max_updates is not None and self.updates >= self.max_updates)
        )

    def _good(self, act: Act) -> bool:
        self.looks += 1
        seed = 1_000_000 * (self.seed + 1) + self.looks
        if evaluate(act, EPISODES, seed) < THRESHOLD:
            return False
        self.confirmed = evaluate(act, EPISODES, seed + 500_000)
        return self.confirmed >= THRESHOLD

    def result(self) -> dict[str, Any]:
        """Plain numbers."""
        names = ("env_steps", "updates", "cpu", "wall", "looks", "solved", "confirmed")
        return {name: getattr(self, name) for name in names}


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


def train_sb3(watch: Watch, seed: int, algorithm: str, num_envs: int = 8) -> None:
    """A2C or PPO with the hyperparameters of RL Baselines3 Zoo for CartPole-v1, and its way to make environments."""
    from stable_baselines3 import A2C, PPO  # type: ignore[import-not-found]
    from stable_baselines3.common.callbacks import BaseCallback  # type: ignore[import-not-found]
    from stable_baselines3.common.env_util import make_vec_env  # type: ignore[import-not-found]

    env = make_vec_env("CartPole-v1", n_envs=num_envs, seed=seed)
    common: dict[str, Any] = {"ent_coef": 0.0, "seed": seed, "device": "cpu"}
    if algorithm == "A2C":
        model, total = A2C("MlpPolicy", env, **common), 500_000
    else:
        model, total = (
            PPO(
                "MlpPolicy",
                env,
                n_steps=32,
                batch_size=256,
                n_epochs=20,
                gamma=0.98,
                gae_lambda=0.8,
                learning_rate=lambda left: 1e-3 * left,
                clip_range=lambda left: 0.2 * left,
                **common,
            ),
            100_000,
        )

    class Looks(BaseCallback):  # type: ignore[misc]
        """The last update is complete when the next rollout begins."""

        stopped = False

        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                act = lambda seen: model.policy.get_distribution(seen).sample()  # noqa: E731
                self.stopped = watch.after(self.num_timesteps, act)

        def _on_step(self) -> bool:
            return not self.stopped

    watch.start()
    model.learn(total, callback=Looks())


def train_tianshou(
    watch: Watch, seed: int, num_envs: int = 8, activation: type[nn.Module] = nn.ReLU, room: int = 20_000
) -> None:
    """Reinforce with the settings of Tianshou's own CartPole example; as many episodes an update as environments."""
    from tianshou.algorithm import Reinforce  # type: ignore[import-not-found]
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy  # type: ignore[import-not-found]
    from tianshou.algorithm.optim import AdamOptimizerFactory  # type: ignore[import-not-found]
    from tianshou.data import Collector, VectorReplayBuffer  # type: ignore[import-not-found]
    from tianshou.env import DummyVectorEnv  # type: ignore[import-not-found]
    from tianshou.utils.net.common import Net  # type: ignore[import-not-found]
    from tianshou.utils.torch_utils import policy_within_training_step  # type: ignore[import-not-found]

    np.random.seed(seed)
    torch.manual_seed(seed)
    envs = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(num_envs)])
    envs.seed(seed)
    network = Net(state_shape=(4,), action_shape=2, hidden_sizes=(64, 64), activation=activation)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, 2**0.5)
            nn.init.zeros_(module.bias)
    space = gymnasium.spaces.Discrete(2)
    policy = DiscreteActorPolicy(actor=network, action_space=space)
    optimizer = AdamOptimizerFactory(lr=1e-3)
    algorithm = Reinforce(policy=policy, gamma=0.95, return_standardization=True, optim=optimizer)
    collector = Collector(policy, envs, VectorReplayBuffer(room, num_envs))
    watch.start()
    collector.reset()
    env_steps = 0
    while True:
        with policy_within_training_step(policy):
            env_steps += collector.collect(n_episode=num_envs).n_collected_steps
            algorithm.update(collector.buffer, batch_size=64, repeat=2)
            collector.reset_buffer(keep_statistics=True)
        if watch.after(env_steps, lambda seen: race(network(seen)[0])):
            return


def train_torchrl(watch: Watch, seed: int, num_envs: int = STREAMS, steps: int = 64) -> None:
    """ReinforceLoss with a critic and GAE on segments, one step of Adam each."""
    from tensordict.nn import TensorDictModule  # type: ignore[import-not-found]
    from torchrl.collectors import Collector  # type: ignore[import-not-found]
    from torchrl.envs import GymWrapper  # type: ignore[import-not-found]
    from torchrl.modules import ProbabilisticActor, ValueOperator  # type: ignore[import-not-found]
    from torchrl.objectives import ReinforceLoss  # type: ignore[import-not-found]
    from torchrl.objectives.value import GAE  # type: ignore[import-not-found]

    torch.manual_seed(seed)
    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
    # a vector environment in one wrapper: five times as fast as SerialEnv of 64 wrappers
    vector = gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="sync", vector_kwargs=mode)
    env = GymWrapper(vector, categorical_action_encoding=True)
    env.set_seed(seed)
    network = tanh_network(HIDDEN)
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(tanh_network(HIDDEN, 1), in_keys=["observation"])
    advantage, loss = GAE(gamma=0.99, lmbda=0.95, value_network=critic), ReinforceLoss(actor, critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    env_steps = 0
    watch.start()
    for data in Collector(env, actor, frames_per_batch=num_envs * steps, total_frames=-1):
        with torch.no_grad():
            advantage(data)
        losses = loss(data)
        optimizer.zero_grad()
        (losses["loss_actor"] + losses["loss_value"]).backward()
        optimizer.step()
        env_steps += data.numel()
        if watch.after(env_steps, lambda seen: race(network(seen))):
            return


@dataclass(frozen=True)
class Contestant:
    """One row of a table: who trains what, and for how long."""

    name: str
    package: str  # "scorefn" or a key of PACKAGES
    train: Callable[..., None]
    options: dict[str, Any]
    limits: dict[str, Any]


def throughput_contestants(quick: bool) -> list[Contestant]:
    """Everybody on 64 streams, and SB3 on the 8 of the zoo too."""
    few, some, steps = (2, 2, 2000) if quick else (20, 30, 40_000)
    options: dict[str, Any]
    rows = []
    for how, options, updates in (("whole episodes", {}, few), ("segments of 128 steps", {"steps": 128}, some)):
        limits = {"max_updates": updates}
        rows.append(Contestant(f"scorefn, {how}", "scorefn", train_scorefn, options, limits))
        rows.append(Contestant(f"hand-written loop, {how}", "scorefn", train_by_hand, options, limits))
    limits = {"max_steps": steps}
    for algorithm in ("A2C", "PPO"):
        for streams in (8, STREAMS):
            options = {"algorithm": algorithm, "num_envs": streams}
            rows.append(Contestant(f"SB3 {algorithm}, zoo, {streams} streams", "sb3", train_sb3, options, limits))
    options = {"num_envs": STREAMS, "activation": nn.Tanh, "room": STREAMS * 1000}
    rows.append(Contestant("Tianshou Reinforce", "tianshou", train_tianshou, options, limits))
    rows.append(Contestant("TorchRL ReinforceLoss + GAE", "torchrl", train_torchrl, {}, limits))
    return rows


def threshold_contestants(quick: bool) -> list[Contestant]:
    """Everybody with settings that are meant for the task; the limit is the end of the recipe or of patience."""
    cap = (lambda steps: {"max_steps": 2000}) if quick else (lambda steps: {"max_steps": steps})
    return [
        Contestant("scorefn, fastest: 64 whole episodes", "scorefn", train_scorefn, FASTEST, cap(600_000)),
        Contestant("scorefn, fewest steps: gae, 8 x 64", "scorefn", train_few_steps, {}, cap(100_000)),
        Contestant("SB3 PPO, zoo", "sb3", train_sb3, {"algorithm": "PPO"}, cap(100_000)),
        Contestant("SB3 A2C, zoo", "sb3", train_sb3, {"algorithm": "A2C"}, cap(500_000)),
        Contestant("Tianshou Reinforce, its example", "tianshou", train_tianshou, {}, cap(200_000)),
    ]


def measured(contestant: Contestant, seed: int, judged: bool) -> dict[str, Any]:
    """One training in this process."""
    watch = Watch(seed=seed, judged=judged, **contestant.limits)
    contestant.train(watch, seed, **contestant.options)
    return watch.result()


class Room:
    """A process for one library, which trains when asked to; scorefn's own is this one."""

    def __init__(self, package: str) -> None:
        self.package = package
        if package != "scorefn":
            context = multiprocessing.get_context("spawn")
            self._here, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(there,), daemon=True)
            self._process.start()

    def measured(self, contestant: Contestant, seed: int, judged: bool) -> dict[str, Any]:
        """One training in that process.

        Raises:
            RuntimeError: the library failed there; its traceback is the message.
        """
        if self.package == "scorefn":
            return measured(contestant, seed, judged)
        self._here.send((contestant, seed, judged))
        answer = self._here.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{contestant.name} failed:\n{answer}")
        result: dict[str, Any] = answer
        return result

    def close(self) -> None:
        """End the process."""
        if self.package != "scorefn":
            self._here.send(None)
            self._process.join()


def _serve(connection: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while (order := connection.recv()) is not None:
        try:
            connection.send(measured(*order))
        except Exception:
            connection.send(traceback.format_exc())


Results = dict[str, list[dict[str, Any]]]  # one per seed


def run(peers: list[str], seeds: int, quick: bool) -> dict[str, Results]:
    """Both tables: every contestant once a seed, in turn, after a short training that warms it up."""
    asked = ["scorefn", *peers]
    tables = {
        "throughput": [c for c in throughput_contestants(quick) if c.package in asked],
        "threshold": [c for c in threshold_contestants(quick) if c.package in asked],
    }
    rooms = {package: Room(package) for package in asked}
    results: dict[str, Results] = {name: {c.name: [] for c in rows} for name, rows in tables.items()}
    try:
        for name, rows in tables.items():
            for contestant in rows if name == "throughput" else []:
                rooms[contestant.package].measured(replace(contestant, limits={"max_steps": 1}), 1000, False)
            for seed in range(FIRST_SEED, FIRST_SEED + seeds):
                for contestant in rows:
                    result = rooms[contestant.package].measured(contestant, seed, name == "threshold")
                    results[name][contestant.name].append(result)
                    print(f"{name}, seed {seed}: {contestant.name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    finally:
        for room in rooms.values():
            room.close()
    return results


def check_installed(peers: list[str]) -> None:
    """Leave with a message that says what to install."""
    missing = [PACKAGES[peer] for peer in peers if find_spec(MODULES[peer]) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)} cannot be found by {sys.executable}: install into an environment of its own "
            f"(python -m venv peers && peers/bin/pip install torch {' '.join(missing)} gymnasium) and use its Python, "
            "or leave the peer out with --peers."
        )


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def rates(rows: list[dict[str, Any]], clock: str = "cpu") -> list[float]:
    """Environment steps per second."""
    return [row["env_steps"] / row[clock] for row in rows]


def throughput_table(results: Results) -> list[str]:
    """Who learns from how many steps a second."""
    reference = results.get("SB3 A2C, zoo, 8 streams")
    lines = [
        "| who | env steps per CPU s | per s of wall time | env steps / updates | x hand-written | x A2C, 8 streams |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in results.items():
        own, by_hand = rates(rows), results.get(name.replace("scorefn,", "hand-written loop,"), [])
        beside = f"{median(a / b for a, b in zip(own, rates(by_hand), strict=True)):.2f}" if by_hand else ""
        against = f"{median(a / b for a, b in zip(own, rates(reference), strict=True)):.1f}" if reference else ""
        done = f"{median(r['env_steps'] for r in rows):,.0f} / {median(r['updates'] for r in rows):,.0f}"
        lines.append(
            f"| {name} | {spread(own, ',.0f')} | {median(rates(rows, 'wall')):,.0f} | {done} | "
            f"{beside if name.startswith('scorefn') else ''} | {against} |"
        )
    return lines


def threshold_table(results: Results) -> list[str]:
    """Medians over all seeds, where one that did not arrive counts as infinity."""
    lines = [
        "| who | arrived | env steps | training CPU s | wall s | confirmed by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in results.items():
        solved = [r for r in rows if r["solved"]]
        cells = []
        for key, form in (("env_steps", ",.0f"), ("cpu", ".2f"), ("wall", ".2f")):
            values = [r[key] if r["solved"] else float("inf") for r in rows]
            cells.append(spread(values, form).replace("inf", "–") if solved else "–")
        lowest = f"{min(r['confirmed'] for r in solved):.1f}" if solved else "–"
        lines.append(f"| {name} | {len(solved)} of {len(rows)} | {' | '.join(cells)} | {lowest} |")
    return lines


def goals(results: dict[str, Results]) -> list[str]:
    """What was to be reached, what was, and what falls short."""
    rows = ["| goal | reached | |", "|---|---:|---|"]

    def add(goal: str, value: float, met: bool, form: str) -> None:
        rows.append(f"| {goal} | {value:{form}} | {'met' if met else '**falls short**'} |")

    work, time_to = results["throughput"], results["threshold"]
    ours = [name for name in work if name.startswith("scorefn")]
    for name in ours:
        by_hand = work[name.replace("scorefn", "hand-written loop")]
        ratio = median(a / b for a, b in zip(rates(work[name]), rates(by_hand), strict=True))
        add(f"throughput, {name.split(', ')[1]}: at least 0.8 x the hand-written loop", ratio, ratio >= 0.8, ".2f")
    for peer in ("SB3 A2C, zoo, 8 streams", f"SB3 A2C, zoo, {STREAMS} streams"):
        for name in ours if peer in work else []:
            ratio = median(a / b for a, b in zip(rates(work[name]), rates(work[peer]), strict=True))
            goal = f"throughput, {name.split(', ')[1]}: at least 20 x {peer}"
            add(goal, ratio, ratio >= 20.0, ".1f")
    for name, rows_of in time_to.items():
        if name.startswith("scorefn"):
            key, most, unit = ("cpu", 1.2, "CPU s") if "fastest" in name else ("env_steps", 25_000, "env steps")
            value = median(r[key] if r["solved"] else float("inf") for r in rows_of)
            form = ".2f" if key == "cpu" else ",.0f"
            add(f"time to threshold, {name[9:]}: median at most {most:,} {unit}", value, value <= most, form)
            arrived = sum(r["solved"] for r in rows_of)
            add(f"the same: all {len(rows_of)} seeds", arrived, arrived == len(rows_of), "d")
    return rows


def settings_lines(settings: Settings) -> str:
    """What differs from the defaults, and what defines the method all the same, as a block of Markdown."""
    own, usual = asdict(settings), asdict(Settings("", "", 0))
    said = {name for name in own if own[name] != usual[name]} - {"env", "total_steps"} | {
        "num_envs",
        "discount",
        "lambda_",
    }
    parts = [f"{name}={value!r}" for name, value in own.items() if name in said]
    return textwrap.fill(", ".join(parts), 110, subsequent_indent="    ")


def page(results: dict[str, Results], difference: dict[str, float], peers: list[str], options: Any) -> str:
    """The whole page."""
    versions = ", ".join([f"{PACKAGES[peer]} {version(PACKAGES[peer])}" for peer in peers]) or "no peers"
    seeds = len(next(iter(results["threshold"].values())))
    worst = max(difference.values())
    return f"""# CartPole-v1 beside other libraries

Measured {options.date} with scorefn {sf.__version__}, Python {platform.python_version()}, torch {torch.__version__},
gymnasium {gymnasium.__version__}, NumPy {np.__version__}; {versions}.
{platform.machine()} machine with {os.cpu_count()} shared cores that were busy with other work, one torch thread, seeds
{FIRST_SEED} to {FIRST_SEED + seeds - 1}.

    {_command(peers, options)}

Each library has a process of its own; within each seed they take turns, one at a time. CPU seconds are those of the
process that works. Medians over the seeds, ranges in brackets. Ratios are medians of the ratios within a seed.

## What is reached, and what falls short

{_joined(goals(results))}

## Learned throughput

Environment steps a second: rollouts, scores, gradients and updates. Two hidden layers of 64 tanh units, and
{STREAMS} streams unless the row says otherwise.

scorefn and the hand-written loop do REINFORCE with reward-to-go and leave-one-out on the native vector environment, one
step of Adam (0.01) a batch: from the first update on either every stream to the end of its episode, where most streams
wait for the longest, or segments of streams that go on. They draw the same random numbers from the same generators,
and the gradient of the first update is the same to a relative {worst:.0e} in float32; later updates drift apart by
rounding.

The peers use their own environments. Stable-Baselines3: `make_vec_env` and the hyperparameters of RL Baselines3 Zoo,
where A2C updates after 5 steps of each stream and PPO passes 20 times over 32 of each. Tianshou: `DummyVectorEnv`, as
many episodes an update as streams, 2 passes in minibatches of 64. TorchRL: a `GymWrapper` around Gymnasium's
synchronous vector environment, five times as fast here as its `SerialEnv`; segments of 64 steps, GAE, a critic. None of
them drives the native vector environment, so a part of the factor is the environment's; another part is that they
update more often or fit a critic as well. The last column is relative to A2C on the 8 streams of the zoo; on
{STREAMS} streams A2C is several times as fast, and the goals above are stated against both.

{_joined(throughput_table(results["throughput"]))}

## Time to the threshold

A policy is looked at whenever {EVERY:,} environment steps have passed (64 whole episodes are more than that): 100
episodes with *sampled* actions. Where they average {THRESHOLD:g} or more, 100 further ones must confirm it, or training
goes on. Neither time nor steps of looking are counted. *Confirmed by* is the lowest mean of the further 100 among the
seeds that arrived; in a range a dash is a seed that did not, and it counts as infinity in the median.

{_joined(threshold_table(results["threshold"]))}

Fastest: the loop of `applications/rl/cartpole.py`, 64 episodes an update, one hidden layer of {Config.hidden}, Adam
with {Config.learning_rate}, looked at as everybody is. Fewest steps: the program `applications/rl/train.py` with

    {settings_lines(FEWEST_STEPS)}

These were found by a random search (15 combinations for `gae` and 6 for `ppo_clip` on seeds 0 to 4; the best few of
`gae` and their neighbours on seeds 100 to 111 and 200 to 211); none of those seeds is used here. The peers' settings
are those that their projects publish. Limits: the zoo's 100,000 steps for PPO and 500,000 for A2C, where their
schedules end; 200,000 for Tianshou with the settings of its CartPole example; 600,000 and 100,000 for scorefn's two.
"""


def _joined(lines: list[str]) -> str:
    return "\n".join(lines)


def _command(peers: list[str], options: Any) -> str:
    names = "all" if len(peers) == len(PACKAGES) else ",".join(peers) or "none"
    return f"OMP_NUM_THREADS=1 python -m applications.benchmarks.rl_peers --peers {names} --seeds {options.seeds}"


def peers_asked(text: str) -> list[str]:
    """The keys of PACKAGES that are meant.

    Raises:
        SystemExit: a name that is none of them.
    """
    if text in ("all", "none"):
        return list(PACKAGES) if text == "all" else []
    names = text.split(",")
    if unknown := [name for name in names if name not in PACKAGES]:
        raise SystemExit(f"--peers {text}: {unknown[0]!r} is not one of all, none, {', '.join(PACKAGES)}.")
    return names


def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", default="all", help="all, none, or some of sb3,tianshou,torchrl")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="whether everything runs; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="write rl_peers.md and rl_peers.json, to this folder")
    parser.add_argument("--page", type=Path, help="write the page to this Markdown file")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    peers = peers_asked(options.peers)
    check_installed(peers)
    torch.set_num_threads(1)
    difference = {name: gradient_difference(0, steps=steps) for name, steps in (("whole", None), ("segments", 128))}
    if max(difference.values()) > TOLERANCE:
        raise SystemExit(
            f"The hand-written gradient is not scorefn's, relative differences {difference}: no comparison."
        )
    results = run(peers, 1 if options.quick else options.seeds, options.quick)
    text = page(results, difference, peers, options)
    print(text)
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "rl_peers.md").write_text(text, encoding="utf-8")
        (options.out / "rl_peers.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
