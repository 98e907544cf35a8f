"""Latent options: a policy that has to remember one thing, and keeps it in its first decision.

A walker reads a hint at the start: which of K doors hides the prize, each equally likely. Then comes a corridor of L
cells that all look the same, and a hall with the doors: what it sees tells the corridor from the hall, no more. It
decides for an option when it reads the hint, and acts by the option and by what it sees::

    option ~ Categorical(choice[hint]);    action_t ~ Categorical(act[option, sight_t])

Actions are to walk and to open one of the doors: 1 for the right one, 0 for another, either ends the episode; a step
of any other kind is worth 0, but opening the wall of the corridor costs .1. After L + 3 steps it is over. The best
value is min(K, options) / K; with one option there is no memory, and it is 1 / K.

The value is a sum over the options and a recursion over the steps, exact. As a graph an option is one site and each
action another. An update has 24 episodes for each hint, drawn in these ways:

* ``scored``: 24 options, each followed once; leave-one-out.
* ``nested``: 6 options, each followed 4 times, the first actions compared with each other.
* ``enumerated``: every option (``sf.Enumerate``), followed 24 / options times.
* ``set``: 12 sets of two different options (``sf.UnorderedSet``), each followed once.
* ``exact``: no draws, the gradient of the exact value.

Run it with::

    python -m applications.graphs.latent_options --seed 0

Ctrl-C ends the present way after its update; what was learned is still written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line, timed_steps
from applications.results import write_result

EPISODES = 24
WAYS = ("scored", "nested", "enumerated", "set", "exact")
WALL = -0.1
REPEATS = 200  # of the estimates whose noise is measured


@dataclass(frozen=True)
class Walk:
    """The problem.

    Args:
        doors: K; action 0 walks, action k opens door k - 1.
        cells: L, of the corridor.
        spare: steps beyond those that are needed.
    """

    doors: int = 4
    cells: int = 2
    spare: int = 2

    @property
    def horizon(self) -> int:
        """Steps at most."""
        return self.cells + 1 + self.spare

    def optimum(self, options: int) -> float:
        """Of all policies with so many options."""
        return min(self.doors, options) / self.doors

    def step(self, place: Tensor, action: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and next place; place L is the hall, and in place L + 1 the episode is over."""
        corridor, hall, opens = place < self.cells, place == self.cells, action > 0
        reward = (hall & (action == hint + 1)).to(torch.get_default_dtype()) + WALL * (corridor & opens)
        return reward, place + ((corridor & ~opens) | (hall & opens))


class Policy(nn.Module):
    """A table.

    Args:
        walk: the problem.
        options: how many.
    """

    def __init__(self, walk: Walk, options: int) -> None:
        super().__init__()
        self.walk = walk
        self.choice = nn.Parameter(0.1 * torch.randn(walk.doors, options))
        self.act = nn.Parameter(0.1 * torch.randn(options, 2, walk.doors + 1))  # in the corridor, in the hall

    def program(
        self, g: sf.StochasticGraph, *, estimator: Any = None, followed: int | None = None, baseline: Any = "graph"
    ) -> None:
        """An episode for each hint, written into an open graph; what it costs is the reward, with a minus.

        Args:
            g: open.
            estimator: of the option.
            followed: how often each option is.
            baseline: of the option, where it is scored.
        """
        hint = torch.arange(self.walk.doors)
        option = g.sample("option", Categorical(logits=self.choice), estimator=estimator, baseline=baseline)
        place = torch.zeros((), dtype=torch.long)  # of all episodes
        for t in range(self.walk.horizon):
            sight = (place >= self.walk.cells).long()
            p = Categorical(logits=self.act[option, sight])
            action = g.sample(f"action[{t}]", p, num_samples=followed if t == 0 else None)
            if t == 0 and followed is not None:
                option = option.unsqueeze(-2)  # [N, (options,) 1, hints]
            reward, place = self.walk.step(place, action, hint)
            g.cost(f"reward[{t}]", -reward)

    def exact_value(self) -> Tensor:
        """Of each hint, ``[hints]``, differentiable."""
        doors, cells = self.walk.doors, self.walk.cells
        act = self.act.softmax(-1)  # [options, sights, actions]
        corridor, hall = act[:, 0], act[:, 1]
        after = torch.zeros(cells + 1, doors, len(act))  # of each place, with no step left
        for _ in range(self.walk.horizon):
            there = hall[:, 1:].T + hall[:, 0] * after[cells]
            wall = 1 - corridor[:, 0]
            along = corridor[:, 0] * after[1:] + wall * (WALL + after[:-1])
            after = torch.cat([along, there.unsqueeze(0)])
        return (self.choice.softmax(-1) * after[0]).sum(-1)


def way(name: str, options: int) -> tuple[int, dict[str, Any]]:
    """Draws of the graph, and how its program is to be written."""
    if name == "nested":
        return EPISODES // 4, {"followed": 4}
    if name == "enumerated":
        return max(1, EPISODES // options), {"estimator": sf.Enumerate(batch_ndim=1)}
    if name == "set":
        return EPISODES // 2, {"estimator": sf.UnorderedSet(2, batch_ndim=1)}
    return EPISODES, {}


@dataclass(frozen=True)
class Point:
    """Where a policy stands: its exact value, on average over the hints, and CPU seconds."""

    update: int
    value: float
    seconds: float


def learn(
    name: str,
    walk: Walk,
    options: int,
    seed: int = 0,
    updates: int = 1000,
    progress: Callable[[Point], None] | None = None,
    *,
    learning_rate: float = 0.03,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Policy, list[Point]]:
    """Climb by Adam.

    Args:
        name: one of ``WAYS``.
        walk: the problem.
        options: how many.
        seed: of start and episodes; the start is the same for all ways.
        updates: of the policy.
        progress: called some 60 times on the way.
        learning_rate: constant.
        should_stop: asked after every update.
    """
    torch.manual_seed(seed)
    policy = Policy(walk, options)
    optimiser = torch.optim.Adam(policy.parameters(), learning_rate)
    draws, written = way(name, options)
    graph = sf.StochasticGraph(draws, audit_every=1000)  # the program is the same at every step

    def update() -> None:
        optimiser.zero_grad()
        if name == "exact":
            loss = -policy.exact_value().mean()
        else:
            with graph:
                policy.program(graph, **written)
            loss = graph.surrogate().mean()
        loss.backward()
        optimiser.step()

    curve = list[Point]()
    for mark in timed_steps(update, updates, should_stop=should_stop):
        with torch.no_grad():
            curve.append(Point(mark.step, policy.exact_value().mean().item(), mark.seconds))
        if progress is not None:
            progress(curve[-1])
    return policy, curve


def noise(name: str, policy: Policy, repeats: int) -> dict[str, float]:
    """Mean squared distance of an estimate from the exact gradient, in the logits of the options and of the actions."""
    parameters = [policy.choice, policy.act]
    exact = torch.autograd.grad(-policy.exact_value().mean(), parameters)
    draws, written = way(name, policy.choice.shape[1])
    graph, error = sf.StochasticGraph(draws, audit_every=1000), torch.zeros(2)
    for _ in range(repeats):
        with graph:
            policy.program(graph, **written)
        found = torch.autograd.grad(graph.surrogate().mean(), parameters)
        error += torch.stack([(mine - true).square().sum() for mine, true in zip(found, exact, strict=True)])
    return dict(zip(("option", "action"), (error / repeats).tolist(), strict=True))


def plot(curves: dict[str, list[Point]], optimum: float, path: Path) -> None:
    """Exact values along the way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(optimum, color="grey", linewidth=0.5)
    for name, curve in curves.items():
        axis.plot([point.update for point in curve], [point.value for point in curve], label=name)
    axis.set(xlabel="update", ylabel="exact value (grey: the optimum)")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Learn in each way, beside the optimum; then measure the noise of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--updates", type=at_least(1), default=1000)
    parser.add_argument("--doors", type=at_least(2), default=4)
    parser.add_argument("--options", type=at_least(2), default=4, help="a set of two takes two or more")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, default=Path("runs/latent_options"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    walk = Walk(options.doors)
    optimum, curves, noises = walk.optimum(options.options), dict[str, list[Point]](), dict[str, dict[str, float]]()
    with Interruption() as interrupted:
        for name in dict.fromkeys(options.ways):

            def show(point: Point, name: str = name) -> None:
                show_line(
                    f"{name:10} update {point.update:5d} of {options.updates}   exact value {point.value:.4f}, optimum "
                    f"{optimum:.4f}   {point.seconds:5.1f} s CPU",
                    last=point.update == options.updates or interrupted(),
                )

            _, curves[name] = learn(
                name, walk, options.options, options.seed, options.updates, show, should_stop=interrupted
            )
            if interrupted():
                break
        policy, _ = learn("exact", walk, options.options, options.seed, min(100, options.updates))
        for name in curves:
            if name != "exact" and not interrupted():
                noises[name] = noise(name, policy, REPEATS)
    for name, found in noises.items():
        print(f"{name:10} noise in the option {found['option']:.2e}, in the actions {found['action']:.2e}")
    record = {
        "complete": not interrupted(),
        "optimum": optimum,
        "ways": {name: asdict(curve[-1]) for name, curve in curves.items()},
        "noise": noises,
        "curves": {name: [asdict(point) for point in curve] for name, curve in curves.items()},
    }
    write_result(options.out, vars(options), record)
    plot(curves, optimum, options.out / "latent_options.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
