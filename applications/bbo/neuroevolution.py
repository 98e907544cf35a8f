"""Neuroevolution: PGPE and OpenAI-ES train the parameters of a policy from whole returns, without backpropagation.

A policy is a vector of parameters: a linear map, or a tanh network with ``--hidden`` units, from observations to the
logits of actions (the largest is taken) or to actions (clipped to their bounds). Every member of the population plays
one episode in an environment of its own; all start from the same state, so that their returns differ by what the
policies do; and all of them act in one batched product per step. Two tasks:

* ``cartpole``: CartPole-v1, solved when the mean policy has a mean return of 475 or more over 100 fresh episodes.
* ``cheetah``: HalfCheetah-v5 (MuJoCo), observations centred and scaled, a fixed number of generations.

Run it with::

    python -m applications.bbo.neuroevolution --task cheetah --method pgpe --seed 0

Ctrl-C ends after the present generation and leaves ``checkpoint.pt`` in ``--out``; ``--resume`` goes on from it, bit
for bit. The pieces (``Perceptrons``, ``Arena``, ``Training``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

import scorefn as sf
from applications.arguments import at_least
from applications.checkpoint import read_checkpoint, write_checkpoint
from applications.progress import Interruption, show_line, timed_steps
from applications.results import write_result
from scorefn.search import PGPE, OpenAIES, Strategy

_FRESH = 2**30  # seeds of evaluations start here, those of training below


@dataclass(frozen=True)
class Task:
    """An environment and what a run of it takes.

    Attributes:
        env: Gymnasium's name.
        popsize: members, each with an environment.
        generations: at most.
        sigma: of the search distribution at first.
        max_speed: of ClipUp, for PGPE.
        learning_rate: of Adam, for OpenAI-ES.
        target: a mean return at which training ends; None: never.
        normalise: whether observations are centred and scaled by all that were seen.
    """

    env: str
    popsize: int
    generations: int
    sigma: float
    max_speed: float
    learning_rate: float
    target: float | None
    normalise: bool


TASKS = {
    "cartpole": Task("CartPole-v1", 32, 100, 0.5, 0.5, 0.2, 475.0, False),
    "cheetah": Task("HalfCheetah-v5", 40, 90, 0.05, 0.1, 0.05, None, True),
}


class Perceptrons:
    """N tanh networks of one form, their parameters the rows of a matrix; layer by layer, biases after weights.

    Args:
        sizes: of the layers, inputs first; two of them are a linear map.

    Raises:
        sf.ScorefnError: fewer than two sizes, or one below 1.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise sf.ScorefnError(
                f"sizes are {list(sizes)}, but a network has inputs and outputs, one or more of each."
            )
        self.sizes = list(sizes)

    @property
    def dimension(self) -> int:
        """How many parameters one network has."""
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in zip(self.sizes, self.sizes[1:], strict=False))

    def __call__(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Outputs ``[N, out]`` of N networks, parameters ``[N, P]``, each of its own input ``[N, in]``."""
        if parameters.shape[-1] != self.dimension:
            raise sf.ShapeError(
                f"parameters have shape {tuple(parameters.shape)}, but networks of sizes {self.sizes} have "
                f"{self.dimension} parameters each: give [N, {self.dimension}]."
            )
        begin, value = 0, x.unsqueeze(-1)
        for number, (fan_in, fan_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            middle, end = begin + fan_in * fan_out, begin + (fan_in + 1) * fan_out
            weights = parameters[:, begin:middle].unflatten(-1, (fan_out, fan_in))
            value = torch.baddbmm(parameters[:, middle:end].unsqueeze(-1), weights, value.tanh() if number else value)
            begin = end
        return value.squeeze(-1)


class Played(NamedTuple):
    """One episode of every member.

    Attributes:
        returns: ``[N]``.
        steps: of all episodes together.
        observations: ``[steps, obs]``, what was acted upon.
    """

    returns: Tensor
    steps: int
    observations: Tensor


class Arena:
    """N environments of one kind, one for each member of a population.

    Args:
        name: of the environment.
        members: N.
        hidden: units of the hidden layers.

    Raises:
        sf.ScorefnError: observations or actions that are no vectors.
    """

    def __init__(self, name: str, members: int, hidden: Sequence[int] = ()) -> None:
        self.envs = gymnasium.make_vec(name, num_envs=members, vectorization_mode="sync")
        self.members = members
        seen, done = self.envs.single_observation_space, self.envs.single_action_space
        if not isinstance(seen, gymnasium.spaces.Box) or len(seen.shape) != 1:
            raise sf.ScorefnError(f"{name} observes {seen}, but these policies take one vector: flatten it first.")
        if isinstance(done, gymnasium.spaces.Discrete):
            outputs, self._act = int(done.n), self._largest
        elif isinstance(done, gymnasium.spaces.Box) and len(done.shape) == 1:
            outputs, self._act = done.shape[0], self._clipped
            self._bounds = done.low, done.high
        else:
            raise sf.ScorefnError(f"{name} is acted on by {done}, but these policies choose one of n, or a vector.")
        self.observations = seen.shape[0]
        self.networks = Perceptrons([self.observations, *hidden, outputs])

    def play(self, parameters: Tensor, normalise: Callable[[Tensor], Tensor], seeds: Sequence[int]) -> Played:
        """One episode of every member, to its end.

        Args:
            parameters: ``[N, P]``.
            normalise: ``[N, obs] -> [N, obs]``.
            seeds: N, of the first states and of all chance in the environments.
        """
        parameters = parameters.float()
        seen, _ = self.envs.reset(seed=list(seeds))
        alive = np.ones(self.members, dtype=bool)
        returns, visited, steps = np.zeros(self.members), [], 0
        while alive.any():
            observations = torch.as_tensor(np.asarray(seen, dtype=np.float32))
            visited.append(observations[torch.from_numpy(alive)])
            steps += int(alive.sum())
            action = self._act(self.networks(parameters, normalise(observations)).numpy())
            seen, rewards, terminated, truncated, _ = self.envs.step(action)
            returns[alive] += rewards[alive]
            alive = alive & ~(terminated | truncated)
        return Played(torch.from_numpy(returns), steps, torch.cat(visited))

    def _largest(self, outputs: np.ndarray) -> np.ndarray:
        return outputs.argmax(-1)

    def _clipped(self, outputs: np.ndarray) -> np.ndarray:
        return np.clip(outputs, *self._bounds)


@dataclass
class Curve:
    """What happened in each generation, ``[generations]``."""

    mean: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


class Training:
    """A population that learns.

    Args:
        task: what it learns.
        method: "pgpe" or "openai-es".
        seed: of the search and of the environments.
        hidden: units of the hidden layers.
    """

    def __init__(self, task: Task, method: str, seed: int, hidden: Sequence[int] = ()) -> None:
        self.task, self.method, self.seed, self.hidden = task, method, seed, list(hidden)
        self.arena = Arena(task.env, task.popsize, hidden)
        self.strategy = METHODS[method](torch.zeros(self.arena.networks.dimension), task, seed)
        self.normalisation = sf.trajectories.ObservationNormalization(self.arena.observations, clip=5.0)
        self.curve = Curve()
        self.seconds = 0.0
        self.solved = False

    def step(self) -> None:
        """One generation; statistics of observations stand still within it."""
        generation = len(self.curve.mean)
        x = self.strategy.ask()
        start = (self.seed * 1_000_003 + generation) % _FRESH
        played = self.arena.play(x, self.normalisation, [start] * len(x))
        self.strategy.tell(x, -played.returns)
        if self.task.normalise:
            self.normalisation.update(played.observations)
        self.curve.mean.append(played.returns.mean().item())
        self.curve.best.append(played.returns.max().item())
        self.curve.steps.append(played.steps)
        if self.task.target is not None and self.curve.mean[-1] >= 0.9 * self.task.target:
            self.solved = self.evaluated(100, _FRESH + 1000 * generation).mean().item() >= self.task.target

    def evaluated(self, episodes: int, seed: int) -> Tensor:
        """Returns ``[episodes]`` of the mean policy in fresh episodes."""
        arena = Arena(self.task.env, episodes, self.hidden)
        mean = self.strategy.mean.expand(episodes, -1)
        return arena.play(mean, self.normalisation, range(seed, seed + episodes)).returns

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "settings": self.settings(),
            "strategy": self.strategy.state_dict(),
            "normalisation": self.normalisation.state_dict(),
            "curve": asdict(self.curve),
            "seconds": self.seconds,
            "solved": self.solved,
        }

    def settings(self) -> dict[str, Any]:
        """What must not change when a run goes on; its length may."""
        task = {name: value for name, value in asdict(self.task).items() if name != "generations"}
        return {**task, "method": self.method, "seed": self.seed, "hidden": self.hidden}

    def load(self, state: dict[str, Any]) -> Training:
        """Go on from a state.

        Raises:
            sf.ScorefnError: it belongs to other settings.
        """
        own, asked = state["settings"], self.settings()
        if own != asked:
            differs = {name: (own.get(name), asked[name]) for name in asked if own.get(name) != asked[name]}
            raise sf.ScorefnError(
                f"The checkpoint differs from what is asked for in (its own, asked for) {differs}: resume it with its "
                "settings, or begin in another folder."
            )
        self.strategy.load_state_dict(state["strategy"])
        self.normalisation.load_state_dict(state["normalisation"])
        self.curve = Curve(**state["curve"])
        self.seconds, self.solved = state["seconds"], state["solved"]
        return self


def _pgpe(x0: Tensor, task: Task, seed: int) -> Strategy:
    return PGPE(x0, task.sigma, popsize=task.popsize, max_speed=task.max_speed, seed=seed, **_LIMITS)


def _openai_es(x0: Tensor, task: Task, seed: int) -> Strategy:
    rate = task.learning_rate
    return OpenAIES(x0, task.sigma, popsize=task.popsize, learning_rate=rate, seed=seed, **_LIMITS)


METHODS: dict[str, Callable[[Tensor, Task, int], Strategy]] = {"pgpe": _pgpe, "openai-es": _openai_es}
_LIMITS = {"tolfun": 0, "tolfunhist": 0, "tolflatfitness": float("inf"), "maxiter": float("inf")}


def train(
    training: Training,
    progress: Callable[[str, bool], None] = lambda text, last: None,
    *,
    checkpoint: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Generations until the task's target or their number is reached, or until it should stop.

    Args:
        training: goes on from where it is.
        progress: called on the way with a line and whether it is the last.
        checkpoint: written at every mark, and at the end.
        should_stop: asked after every generation.
    """
    before, left = training.seconds, training.task.generations - len(training.curve.mean)
    if training.solved or left < 1:
        return
    for mark in timed_steps(training.step, left, should_stop=lambda: training.solved or should_stop()):
        training.seconds = before + mark.seconds
        if checkpoint is not None:
            write_checkpoint(checkpoint, training.state())
        done, curve = len(training.curve.mean), training.curve
        last = done == training.task.generations or training.solved or should_stop()
        progress(
            f"generation {done:4d} of {training.task.generations}: mean return {curve.mean[-1]:8.1f}, best "
            f"{curve.best[-1]:8.1f}, {sum(curve.steps):,} steps, {training.seconds:.0f} CPU s",
            last,
        )


def plot(training: Training, path: Path) -> None:
    """Returns against the steps of the environment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.cumsum(training.curve.steps)
    axes.plot(steps, training.curve.mean, label="mean of the population")
    axes.plot(steps, training.curve.best, alpha=0.5, label="its best")
    axes.set_xlabel("steps of the environment")
    axes.set_ylabel("return")
    axes.set_title(f"{training.task.env}, {training.method}, seed {training.seed}")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Train, then judge the mean policy on fresh episodes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=list(TASKS), default="cartpole")
    parser.add_argument("--method", choices=list(METHODS), default="pgpe")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--generations", type=at_least(1), help="at most; default: the task's")
    parser.add_argument("--popsize", type=at_least(4), help="an even number; default: the task's")
    parser.add_argument(
        "--hidden", type=at_least(1), nargs="*", default=[], help="units of hidden layers; none: linear"
    )
    parser.add_argument("--episodes", type=at_least(1), default=100, help="of the evaluation at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/neuroevolution"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = TASKS[options.task]
    changes = {name: getattr(options, name) for name in ("generations", "popsize") if getattr(options, name)}
    checkpoint = options.out / "checkpoint.pt"
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
        if checkpoint.exists() and not options.resume:
            raise sf.ScorefnError(
                f"{checkpoint} belongs to an earlier run, which a new one would overwrite: add --resume to go on with "
                "it, or give another --out."
            )
        training = Training(Task(**{**asdict(task), **changes}), options.method, options.seed, options.hidden)
        if options.resume:
            names = ["settings", "strategy", "normalisation", "curve", "seconds", "solved"]
            training = read_checkpoint(checkpoint, names, training.load)
    except (sf.ScorefnError, OSError) as error:
        parser.error(str(error))
    with Interruption() as interrupted:
        train(training, lambda text, last: show_line(text, last=last), checkpoint=checkpoint, should_stop=interrupted)
    returns = training.evaluated(options.episodes, _FRESH * 3 // 2)
    print(
        f"{training.task.env}, {options.method}: mean return of the mean policy over {options.episodes} fresh episodes "
        f"{returns.mean():.1f} (lowest {returns.min():.1f}); {sum(training.curve.steps):,} steps, "
        f"{training.seconds:.0f} CPU s"
    )
    record = {
        "complete": not interrupted(),
        "solved": training.solved,
        "parameters": training.arena.networks.dimension,
        "return": returns.mean().item(),
        "returns": returns.tolist(),
        "steps": sum(training.curve.steps),
        "seconds": training.seconds,
        "curve": asdict(training.curve),
    }
    write_result(options.out, vars(options), record)
    plot(training, options.out / "neuroevolution.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
