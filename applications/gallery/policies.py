"""Policies at work: the pole of CartPole, the arrows of the gridworld, the orders of the shop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import scorefn as sf
from applications.gallery.film import film
from applications.rl import cartpole, inventory
from applications.rl.exact_gridworld import MOVES, Gridworld

# ------------------------------------------------------------------------------------------------------------ CartPole


def episodes(seed: int = 0, snapshots: tuple[int, ...] = (0, 8), max_updates: int = 200) -> dict[str, Tensor]:
    """States ``[T, 4]`` of one sampled episode after some updates, and after the last one: the same first state."""
    kept = dict[str, torch.nn.Module]()
    config = cartpole.Config(max_updates=max_updates)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if 0 in snapshots:
            kept["untrained"] = cartpole.new_run(seed, config).policy

    def note(run: cartpole.Run) -> None:
        if run.updates in snapshots:
            kept[f"{run.updates} updates"] = copy.deepcopy(run.policy)

    run = cartpole.train(seed, config, progress=note)
    kept[f"{run.updates} updates, the end"] = run.policy
    found = {}
    for name, policy in kept.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            tau = sf.trajectories.rollout(cartpole.make_env(1), policy, 1)
        found[name] = tau.observations[0][tau.mask[0]]
    return found


class Cart:
    """A cart with its pole on a track."""

    def __init__(self, axes: Axes, name: str, states: Tensor) -> None:
        self._axes, self._name, self._states = axes, name, states
        axes.axhline(0, color="0.7", lw=1)
        self._cart = Rectangle((0, 0), 0.6, 0.3, color="0.25")
        axes.add_patch(self._cart)
        (self._pole,) = axes.plot([], [], color="C1", lw=4, solid_capstyle="round")
        axes.set(xlim=(-2.4, 2.4), ylim=(-0.5, 1.9), xticks=[], yticks=[], aspect="equal")

    def show(self, step: int) -> None:
        """The state at a step, or the last one before the episode was over."""
        last = len(self._states) - 1
        place, _, angle, _ = self._states[min(step, last)].double().tolist()
        lean = torch.tensor(angle)
        self._cart.set_xy((place - 0.3, 0))
        self._pole.set_data([place, place + 1.4 * float(lean.sin())], [0.3, 0.3 + 1.4 * float(lean.cos())])
        over = step > last and last + 1 < 500
        self._pole.set_color("0.7" if over else "C1")
        said = f"lost after {last + 1} steps" if over else f"step {min(step, last) + 1}"
        self._axes.set_title(f"{self._name}\n{said}", fontsize=9)


def draw_cartpole(
    out: Path, seed: int = 0, *, snapshots: tuple[int, ...] = (0, 8), max_updates: int = 200, every: int = 5
) -> Path:
    """``cartpole.gif``: one sampled episode of the policy at three stages of its training.

    Args:
        out: folder.
        seed: of the training.
        snapshots: updates after which an episode is shown, besides the last.
        max_updates: of the training.
        every: steps from one picture to the next.
    """
    shown = episodes(seed, snapshots, max_updates)
    figure = Figure(figsize=(2.4 * len(shown), 1.9), dpi=90, layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    carts = [Cart(axes, name, states) for axes, (name, states) in zip(panels, shown.items(), strict=True)]
    longest = max(len(states) for states in shown.values())

    def show(i: int) -> None:
        for cart in carts:
            cart.show(every * i)

    return film(out / "cartpole.gif", figure, show, (longest - 1) // every + 1, seconds=0.08)


# ----------------------------------------------------------------------------------------------------------- gridworld


WORLD = Gridworld()


class Step(NamedTuple):
    """The policy after an update, and its exact expected return."""

    policy: Tensor  # [S, A], probabilities
    value: float


def best_value(world: Gridworld, discount: float) -> float:
    """The largest expected return there is, by backward induction over policies that know the time."""
    probability, reward = world.dynamics
    value = torch.zeros(len(world.cells), dtype=torch.float64)
    for _ in range(world.horizon):
        value = (probability * (reward + discount * value)).sum(-1).amax(-1)
    return float(value[world.start])


def learn(world: Gridworld, updates: int, *, discount: float = 0.9, episodes: int = 16, seed: int = 0) -> list[Step]:
    """Ascend from the uniform policy by sampled trajectories: reward-to-go, leave-one-out, steps of 2."""
    tau, log_dynamics = world.enumerate()
    state = tau.observations % len(world.cells)
    returns = (discount ** torch.arange(world.horizon, dtype=torch.float64) * tau.rewards).sum(-1)
    logits = torch.zeros(len(world.cells), len(MOVES), dtype=torch.float64, requires_grad=True)
    generator, steps = torch.Generator().manual_seed(seed), list[Step]()
    for update in range(updates + 1):
        log_policy = logits.log_softmax(-1)[state, tau.actions]
        probability = (log_dynamics + log_policy.detach().sum(-1)).exp()
        steps.append(Step(logits.detach().softmax(-1), float(probability @ returns)))
        if update == updates:
            break
        drawn = torch.multinomial(probability, episodes, replacement=True, generator=generator)
        draws = sf.Draws(drawn, log_policy[drawn], tau.rewards[drawn], credit=sf.RewardToGo(discount))
        (gradient,) = torch.autograd.grad(sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean(), logits)
        with torch.no_grad():
            logits += 2 * gradient
    return steps


def draw_gridworld(out: Path, updates: int = 120, world: Gridworld = WORLD, every: int = 3) -> Path:
    """``gridworld_policy.gif``: how probable each move is, while the policy learns from 16 episodes an update."""
    steps, best = learn(world, updates), best_value(world, 0.9)
    figure = Figure(figsize=(6.6, 3.2), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, line in enumerate(world.rows):
        for j, mark in enumerate(line):
            colour = {"G": "#b7e4c7", "P": "#f4b6b6", "#": "0.4"}.get(mark, "white")
            left.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, edgecolor="0.8"))
            word = {"S": "start", "G": "goal +1", "P": "pit -1"}.get(mark, "")
            left.text(j - 0.46, i - 0.4, word, fontsize=7, va="center")
    size = (len(world.rows[0]), len(world.rows))
    left.set(xlim=(-0.5, size[0] - 0.5), ylim=(size[1] - 0.5, -0.5), xticks=[], yticks=[], aspect="equal")
    row = [i for i, _ in world.cells for _ in MOVES]
    column = [j for _, j in world.cells for _ in MOVES]
    down, right_ward = torch.tensor(MOVES, dtype=torch.float64).T.repeat(1, len(world.cells))
    arrows = left.quiver(
        column, row, right_ward, down, angles="xy", scale_units="xy", scale=1, width=0.012, color="C0", minlength=0
    )
    (curve,) = right.plot([], [], color="C0")
    right.axhline(best, color="0.4", ls="--", lw=1)
    right.text(0, best, " best there is, knowing the time", va="bottom", fontsize=8)
    lowest = min(step.value for step in steps)
    right.set(xlim=(0, updates), ylim=(min(lowest, 0) - 0.05, best + 0.1), xlabel="update", ylabel="expected return")

    def show(i: int) -> None:
        now = min(every * i, updates)
        reach = 0.46 * steps[now].policy.flatten()
        arrows.set_UVC((reach * right_ward).numpy(), (reach * down).numpy())
        curve.set_data(range(now + 1), [step.value for step in steps[: now + 1]])
        left.set_title(f"update {now}, expected return {steps[now].value:.4f}", fontsize=9)

    return film(out / "gridworld_policy.gif", figure, show, -(-updates // every) + 1)


# ------------------------------------------------------------------------------------------------------------ the shop


SHOP = inventory.Shop()


def draw_inventory(out: Path, updates: int = 2000, shop: inventory.Shop = SHOP) -> Path:
    """``inventory.png``: what the shelf is filled up to, learned and optimal; the exact profit on the way."""
    run = inventory.train(shop, updates=updates)
    _, best = shop.optimum()
    learned = run.policy.table().detach()
    stock = torch.arange(shop.capacity + 1)
    days = [("first day", 0), ("last day", shop.horizon - 1)]
    figure = Figure(figsize=(9.6, 3.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(days) + 1)
    for axes, (name, day) in zip(panels, days, strict=False):
        up_to = stock + (learned[day].exp() * stock).sum(-1)  # the mean over the orders of the policy
        axes.plot(stock, stock, color="0.85", lw=1)
        axes.step(stock, stock + best[day], where="mid", color="black", label="optimum, by dynamic programming")
        axes.plot(stock, up_to, "o", color="C0", ms=4, label="learned, mean of the orders")
        axes.set(title=name, xlabel="stock in the morning", ylabel="filled up to", ylim=(-0.5, shop.capacity + 0.5))
    panels[0].legend(fontsize=7, loc="lower right")
    panels[-1].plot([min(25 * i, updates) for i in range(len(run.curve))], run.curve, color="C0")
    panels[-1].axhline(run.optimum, color="black", ls="--", lw=1)
    panels[-1].set(title=f"{100 * run.share:.2f} % of the optimum", xlabel="update", ylabel="exact expected profit")
    figure.savefig(out / "inventory.png")
    return out / "inventory.png"
