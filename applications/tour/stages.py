"""The five stages of the tour, and what was found on the way."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from applications.bbo import fewest_mistakes
from applications.rl import cartpole, tabular_mdp
from applications.tour.checks import GradientCheck, bernoulli_check, posterior_check, search_check, trajectory_check
from applications.vi import belief_net_bounds, belief_net_training

Report = Callable[[float, str], None]  # share done, what to say


@dataclass
class Tour:
    """What was found on the way."""

    seed: int
    derivation: tabular_mdp.Derivation
    run: cartpole.Run
    confirmation: Tensor
    fit: belief_net_training.Training
    posterior: belief_net_bounds.Comparison
    mistakes: dict[str, Any]
    checks: list[GradientCheck]
    seconds: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """What should agree and does not."""
        found = []
        if self.derivation.largest_difference > 1e-10:
            found.append(f"the five gradients differ by {self.derivation.largest_difference:.1e}")
        if not self.confirmation.mean() >= self.run.config.threshold:
            found.append(f"CartPole returned {self.confirmation.mean():.1f}, not {self.run.config.threshold:g}")
        found += [
            f"{check.problem}: {check.largest_z:.1f} standard errors off" for check in self.checks if not check.agrees
        ]
        return found

    def as_json(self) -> dict[str, Any]:
        """Every number, as plain data."""
        run = self.run
        return {
            "seed": self.seed,
            "versions": {name: version(name) for name in ("scorefn", "torch", "gymnasium", "pyro-ppl")}
            | {"python": platform.python_version()},
            "derivation": {
                "largest_difference": self.derivation.largest_difference,
                "value": self.derivation.value,
                "gradients": {name: g.tolist() for name, g in self.derivation.gradients.items()},
            },
            "cartpole": {
                "updates": run.updates,
                "env_steps": run.env_steps,
                "training_cpu_seconds": run.train_seconds,
                "returns": run.returns,
                "confirmed_mean": self.confirmation.mean().item(),
                "confirmed_episodes": len(self.confirmation),
            },
            "digits": asdict(self.posterior)
            | {"gap": self.posterior.gap, "curve": [[point.step, point.bound] for point in self.fit.curve]},
            "black_box": self.mistakes,
            "gradients": [asdict(check) for check in self.checks],
            "seconds": self.seconds,
            "failures": self.failures,
        }


def take(seed: int, quick: bool, stage: Callable[[str], Any]) -> Tour:
    """Walk through all five parts; ``stage(title)`` is a context manager that gives a ``Report``."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(title: str) -> Iterator[Report]:
        start = time.perf_counter()
        with stage(title) as report:
            yield report
        seconds[title] = time.perf_counter() - start

    torch.manual_seed(seed)
    with timed("1  one policy gradient, five ways"):
        derivation = tabular_mdp.derivation(seed)
    with timed("2  CartPole-v1") as report:
        goal = cartpole.Config().stop_at
        run = cartpole.train(
            seed, progress=lambda r: report(r.returns[-1] / goal, f"{r.env_steps:,} steps, return {r.returns[-1]:.0f}")
        )
        confirmation = cartpole.confirm(run)
    with timed("3  digits in Pyro") as report:
        steps = 300 if quick else 1500
        fit = belief_net_training.fit(
            seed, steps, lambda p: report(p.step / p.steps, f"bound {p.bound:.2f} nat per image")
        )
        posterior = belief_net_bounds.compare(fit.net, fit.test)
    with timed("4  a black box in 20 dimensions") as report:
        mistakes = fewest_mistakes.run(seed, lambda n, wrong: report(min(0.99, n / 4000), f"{wrong:.0f} mistakes"))
    with timed("5  gradients, exact and estimated") as report:
        repeats = 200 if quick else 1000
        checks = []
        for done, check in enumerate(
            (
                lambda: bernoulli_check(repeats),
                lambda: trajectory_check(seed, repeats),
                lambda: posterior_check(fit, repeats // 2),
                lambda: search_check(repeats),
            )
        ):
            checks.append(check())
            report((done + 1) / 4, checks[-1].problem)
    return Tour(seed, derivation, run, confirmation, fit, posterior, mistakes, checks, seconds)
