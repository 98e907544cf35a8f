"""Two learners who learn to cooperate: ``python -m applications.rl.opponent_shaping --seed 0``.

The prisoner's dilemma, again and again: both cooperate (-1 each), both defect (-2 each), or one defects (0) and the
other pays (-3). A player remembers the last round and cooperates with a probability for each of what can have happened
(5 logits: nothing yet, CC, CD, DC, DD, its own move first); the value is the mean payoff of a step, discounted.

Learners who follow the gradient of their own value end in mutual defection, near -2. One who sees that the other learns
(LOLA: Foerster, Chen, Al-Shedivat, Whiteson, Abbeel & Mordatch 2018, "Learning with opponent-learning awareness") asks
what its policy is worth after the other's next step, and differentiates through that step::

    grad_1 V_1(p_1, p_2 + rate grad_2 V_2(p_1, p_2))

which needs the mixed second derivative of a value that is only sampled: ``scorefn.dice`` has it (Foerster et al. 2018,
"DiCE: the infinitely differentiable Monte Carlo estimator"), with baselines that lower the variance of that too. Both
kinds of learner run on sampled matches and, beside that, on the exact value, which is a linear system of four states.

Ctrl-C ends the present learner after its update; what was learned is still judged and written. The pieces (``Game``,
``Matches``, ``Sampled``, ``gradient``, ``learn``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line, timed_steps
from applications.results import write_result
from applications.rl.repeated_game import STATES, Game, Matches

Value = Callable[[Tensor, int], Tensor]
"""What a pair of policies ``[2, 5]`` is worth to player 0 or 1: a differentiable scalar, exact or estimated."""


@dataclass(frozen=True)
class Sampled:
    """The value as an estimate from ``matches`` fresh matches, right at every order of differentiation."""

    game: Game
    matches: int = 64
    rounds: int = 100
    baseline: Any = None  # any of scorefn's that needs no features but the context

    def __call__(self, policies: Tensor, player: int) -> Tensor:
        """What the draws were worth; its derivatives are estimates too."""
        measure, reward = Matches(self.game, policies, self.rounds), self.game.rewards(player)
        draws = sf.draw(measure, lambda played: reward[played.outcomes], self.matches)
        return sf.dice(draws, baseline=self.baseline).mean(0)


BASELINES: dict[str, Any] = {
    "none": None,
    "leave-one-out": sf.LeaveOneOut(),
    "state values": sf.RegressionBaseline(),
}


def gradient(value: Value, policies: Tensor, player: int, inner_rate: float, inner_steps: int = 1) -> Tensor:
    """Of a player's value in its own logits ``[5]``, after the other's next steps; no steps: a naive learner's.

    The other's steps are differentiated through. With an estimated value each step's draws are new ones, and an
    estimate of the whole has a bias of the order of ``inner_rate^2`` times the variance of a step: the value is not
    linear in the policy that the step leads to.

    Args:
        value: exact or estimated.
        policies: ``[2, 5]``.
        player: 0 or 1.
        inner_rate: of the other's steps.
        inner_steps: how many.
    """
    own, other = (policies[i].detach().clone().requires_grad_() for i in (player, 1 - player))

    def pair() -> Tensor:
        return torch.stack([own, other] if player == 0 else [other, own])

    for _ in range(inner_steps):
        (step,) = torch.autograd.grad(value(pair(), 1 - player), other, create_graph=True)
        other = other + inner_rate * step
    return torch.autograd.grad(value(pair(), player), own)[0]


@dataclass(frozen=True)
class Point:
    """Where two learners stand.

    Attributes:
        update: the last one taken.
        values: exact, of both players.
        seconds: of CPU, spent in the updates alone.
    """

    update: int
    values: list[float]
    seconds: float


@dataclass(frozen=True)
class Learned:
    """Two policies and the way to them."""

    policies: Tensor
    curve: list[Point]


def learn(
    game: Game,
    value: Value,
    start: Tensor,
    updates: int,
    *,
    inner_steps: int,
    rate: float,
    inner_rate: float,
    progress: Callable[[Point], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Learned:
    """Let two learners of the same kind climb at the same time, by plain gradient steps.

    Args:
        game: judges them, exactly.
        value: what they see of it.
        start: ``[2, 5]``.
        updates: of both.
        inner_steps: how many steps of the other each looks ahead; 0: naive learners.
        rate: of their own steps.
        inner_rate: that they believe of the other.
        progress: called some 60 times on the way.
        should_stop: asked after every update.
    """
    policies = start.clone()

    def step() -> None:
        policies.add_(torch.stack([gradient(value, policies, i, inner_rate, inner_steps) for i in (0, 1)]), alpha=rate)

    def point(update: int, seconds: float) -> Point:
        return Point(update, [game.value(policies, i).item() for i in (0, 1)], seconds)

    curve = [point(0, 0.0)]
    for mark in timed_steps(step, updates, should_stop=should_stop):
        curve.append(point(*mark))
        if progress is not None:
            progress(curve[-1])
    return Learned(policies, curve)


def beginners(seed: int) -> Tensor:
    """Two random policies ``[2, 5]``, undecided; torch's global generator starts from the seed too."""
    torch.manual_seed(seed)
    return 0.5 * torch.randn(2, len(STATES), dtype=torch.float64)


class Noise(NamedTuple):
    """Error of one estimate, root mean square, as a share of what is estimated."""

    gradient: float  # grad_1 V_1
    mixed: float  # grad_1 grad_2 V_2
    ahead: float  # of a learner who looks ahead


def derivatives(value: Value, policies: Tensor, inner_rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """What ``Noise`` is about: ``[5]``, ``[5, 5]`` and ``[5]``."""
    own, other = (row.detach().clone().requires_grad_() for row in policies)
    (theirs,) = torch.autograd.grad(value(torch.stack([own, other]), 1), other, create_graph=True)
    mixed = torch.stack([torch.autograd.grad(g, own, retain_graph=True)[0] for g in theirs])
    return gradient(value, policies, 0, 0.0, 0), mixed, gradient(value, policies, 0, inner_rate)


def noise(game: Game, value: Value, policies: Tensor, inner_rate: float, repeats: int) -> Noise:
    """Measured against the exact derivatives."""
    exact = derivatives(game.value, policies, inner_rate)
    error = torch.zeros(len(exact), dtype=torch.float64)
    for _ in range(repeats):
        found = derivatives(value, policies, inner_rate)
        error += torch.stack([(mine - true).square().sum() for mine, true in zip(found, exact, strict=True)])
    return Noise(*((e / repeats).sqrt().item() / true.norm().item() for e, true in zip(error, exact, strict=True)))


@dataclass(frozen=True)
class Row:
    """What became of two learners.

    Attributes:
        learner: in words.
        values: of both, exact, per round; -1 is cooperation, -2 defection.
        cooperation: ``[2][5]``, probability in each state, in each player's own view.
        seconds: CPU, of the updates.
    """

    learner: str
    values: list[float]
    cooperation: list[list[float]]
    seconds: float

    def __str__(self) -> str:
        """In three lines."""
        players = "\n".join(
            f"  player {i}: " + "  ".join(f"{state} {p:.2f}" for state, p in zip(STATES, row, strict=True))
            for i, row in enumerate(self.cooperation, 1)
        )
        mean = sum(self.values) / 2
        return f"{self.learner}: {mean:.3f} a round ({self.values[0]:.3f}, {self.values[1]:.3f})\n{players}"


def judge(learner: str, learned: Learned) -> Row:
    """The last point, and how often each player cooperates."""
    last = learned.curve[-1]
    return Row(learner, last.values, learned.policies.sigmoid().tolist(), last.seconds)


def plot(curves: dict[str, list[Point]], rows: list[Row], path: Path) -> None:
    """The exact values along the way, and what the players do in the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        points, colour = curves[row.learner], f"C{number}"
        for player, style in enumerate(("-", ":")):
            label = row.learner if player == 0 else None
            values = [point.values[player] for point in points]
            left.plot([point.update for point in points], values, style, color=colour, label=label)
        mean = [sum(both) / 2 for both in zip(*row.cooperation, strict=True)]
        right.bar([i + number * width for i in range(len(STATES))], mean, width, color=colour)
    left.axhline(-1, color="grey", linewidth=0.5)
    left.axhline(-2, color="grey", linewidth=0.5)
    left.set(xlabel="update", ylabel="exact value a round (dotted: second player)")
    left.legend(fontsize="small")
    right.set_xticks([i + width * (len(rows) - 1) / 2 for i in range(len(STATES))], STATES)
    right.set(ylabel="probability of cooperating, mean of both", xlabel="last round, own move first")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Naive learners and such that look ahead, on the exact value and on sampled matches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--updates", type=at_least(1), default=200)
    parser.add_argument("--matches", type=at_least(2), default=64, help="of an estimate; baselines take two or more")
    parser.add_argument("--rounds", type=at_least(1), default=100, help="of a sampled match, which is then cut off")
    parser.add_argument("--repeats", type=at_least(1), default=100, help="of the estimates whose noise is measured")
    parser.add_argument("--baselines", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--out", type=Path, default=Path("runs/opponent_shaping"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    game, rate, inner_rate = Game(), 2.5, 7.5
    estimates = {
        name: Sampled(game, options.matches, options.rounds, BASELINES[name])
        for name in dict.fromkeys(options.baselines)
    }
    best = "leave-one-out" if "leave-one-out" in estimates else next(iter(estimates))
    learners: dict[str, tuple[Value, int]] = {
        "naive, exact": (game.value, 0),
        f"naive, sampled, {best}": (estimates[best], 0),
        "looks ahead, exact": (game.value, 1),
        **{f"looks ahead, sampled, {name}": (estimate, 1) for name, estimate in estimates.items()},
    }
    curves, rows, noises = dict[str, list[Point]](), list[Row](), dict[str, Noise]()
    with Interruption() as interrupted:
        for learner, (value, inner_steps) in learners.items():
            print(learner, flush=True)

            def show(point: Point) -> None:
                first, second = point.values
                show_line(
                    f"update {point.update:4d} of {options.updates}   values a round {first:.3f} {second:.3f}   "
                    f"{point.seconds:5.1f} s CPU",
                    last=point.update == options.updates or interrupted(),
                )

            start = beginners(options.seed)
            learned = learn(
                game,
                value,
                start,
                options.updates,
                inner_steps=inner_steps,
                rate=rate,
                inner_rate=inner_rate,
                progress=show,
                should_stop=interrupted,
            )
            curves[learner] = learned.curve
            rows.append(judge(learner, learned))
            if interrupted():
                break
        for name, estimate in estimates.items():
            if interrupted():
                break
            start = beginners(options.seed)
            noises[name] = noise(game, estimate, start, inner_rate, options.repeats)
    for row in rows:
        print(f"\n{row}")
    print("\nnoise of one estimate at the start, as a share: gradient, mixed second derivative, looking ahead")
    for name, found in noises.items():
        print(f"  {name:15} " + "  ".join(f"{share:8.3f}" for share in found))
    record: dict[str, Any] = {
        "complete": not interrupted(),
        "states": STATES,
        "learners": [asdict(row) for row in rows],
        "noise": {name: found._asdict() for name, found in noises.items()},
        "curves": {learner: [asdict(point) for point in curve] for learner, curve in curves.items()},
    }
    write_result(options.out, vars(options), record)
    plot(curves, rows, options.out / "opponent_shaping.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
