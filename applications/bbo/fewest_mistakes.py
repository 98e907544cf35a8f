"""Train a classifier on the number of mistakes itself, a loss without any gradient, in twenty dimensions.

Breast-cancer diagnosis (scikit-learn's copy of the Wisconsin data: 569 patients, here 20 of the 30 measurements). A
patient is called malignant where ``w . z > 1/2``, z the standardised measurements. The count of wrong calls is
piecewise constant in w, so its derivative is zero wherever there is one. Logistic regression therefore minimises a
smooth substitute; SNES needs ranks only and minimises the count.

    python -m applications.bbo.fewest_mistakes --seed 0
    python -m applications.bbo.fewest_mistakes --seed 0 --resume     # after Ctrl-C

Printed at each line: evaluations so far; mistakes of the mean of the search distribution among the training patients;
the widest and the narrowest standard deviation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

import scorefn as sf
from applications.checkpoint import read_checkpoint, write_checkpoint

TRAINING = 400
MEASUREMENTS = [*range(10), *range(20, 30)]  # means and worst values; the standard errors are left out
STATE = Path("fewest_mistakes.pt")

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Problem:
    """Patients split by a seed; ``training`` and ``held_out`` count the mistakes of weights ``[N, 20]``."""

    z: torch.Tensor
    malignant: torch.Tensor

    @classmethod
    def of_seed(cls, seed: int) -> Problem:
        data = load_breast_cancer()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
        z = torch.tensor(data.data[:, MEASUREMENTS])[order]
        z = (z - z[:TRAINING].mean(0)) / z[:TRAINING].std(0)
        return cls(z, torch.tensor(data.target == 0)[order])

    def training(self, w: torch.Tensor) -> torch.Tensor:
        return _mistakes(w, self.z[:TRAINING], self.malignant[:TRAINING])

    def held_out(self, w: torch.Tensor) -> torch.Tensor:
        return _mistakes(w, self.z[TRAINING:], self.malignant[TRAINING:])

    def logistic_regression(self) -> tuple[int, int]:
        """Mistakes of logistic regression (with an intercept): training, held out."""
        z, malignant = self.z.numpy(), self.malignant.numpy()
        wrong = LogisticRegression(max_iter=1000).fit(z[:TRAINING], malignant[:TRAINING]).predict(z) != malignant
        return int(wrong[:TRAINING].sum()), int(wrong[TRAINING:].sum())


def _mistakes(w: torch.Tensor, z: torch.Tensor, malignant: torch.Tensor) -> torch.Tensor:
    return ((w @ z.T > 0.5) != malignant).sum(-1)


def new_strategy(seed: int) -> sf.search.SNES:
    """Settings for a count.

    Twice the default number of points, since equal counts rank equally. A best count that stays the same for a while is
    no reason to end (tolfunhist, tolflatfitness); one count everywhere, for long, is (tolfun).
    """
    options = {"ftarget": 0.0, "tolfunhist": 0.0, "tolflatfitness": 20.0}
    return sf.search.SNES(torch.zeros(len(MEASUREMENTS)), 1.0, popsize=24, seed=seed, **options)


def run(seed: int = 0, progress: Progress | None = None, strategy: sf.search.SNES | None = None) -> dict[str, Any]:
    """Search until no generation finds fewer mistakes.

    Args:
        seed: of the split and of the search.
        progress: called after each generation with the evaluations so far and the mistakes of the mean.
        strategy: a search to go on with; None: a new one.

    Returns:
        mistakes and held_out (of the mean), patients, held_out_patients, logistic_mistakes and logistic_held_out,
        evaluations, curve (pairs of evaluations and mistakes), weights ``[20]``, stop, seconds.
    """
    begin = time.perf_counter()
    problem = Problem.of_seed(seed)
    strategy = new_strategy(seed) if strategy is None else strategy
    curve: list[tuple[int, int]] = []
    while not strategy.stop:
        w = strategy.ask()
        strategy.tell(w, problem.training(w))
        result = strategy.result
        curve.append((result.evaluations, int(problem.training(result.mean))))
        if progress is not None:
            progress(*curve[-1])
    result = strategy.result
    logistic_mistakes, logistic_held_out = problem.logistic_regression()
    return {
        "mistakes": int(problem.training(result.mean)),
        "held_out": int(problem.held_out(result.mean)),
        "patients": TRAINING,
        "held_out_patients": len(problem.z) - TRAINING,
        "logistic_mistakes": logistic_mistakes,
        "logistic_held_out": logistic_held_out,
        "evaluations": result.evaluations,
        "curve": curve,
        "weights": result.mean.tolist(),
        "stop": result.stop,
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help=f"go on from {STATE}, which Ctrl-C leaves behind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed, strategy = arguments.seed, new_strategy(arguments.seed)
    if arguments.resume:

        def build(saved: dict[str, Any]) -> int:
            strategy.load_state_dict(saved["search"])
            return int(saved["seed"])

        try:
            seed = read_checkpoint(STATE, ["seed", "search"], build)
        except sf.ScorefnError as error:
            parser.error(str(error))

    done = strategy.state_dict()

    def report(evaluations: int, mistakes: float) -> None:
        nonlocal done
        done = strategy.state_dict()
        if strategy.result.iterations % 10 == 0:
            sigma = strategy.result.sigma
            print(
                f"{evaluations:6d} evaluations {mistakes:4.0f} mistakes   sigma {sigma.max():.2e} ... {sigma.min():.2e}"
            )

    before = strategy.result.evaluations
    try:
        result = run(seed, report, strategy)
    except KeyboardInterrupt:
        write_checkpoint(STATE, {"seed": seed, "search": done})
        print(f"\nStopped; saved in {STATE}. Go on with --resume.")
        return
    gained = result["evaluations"] - before
    print(
        f"\n{gained} evaluations in {result['seconds']:.1f} s, ended by {', '.join(result['stop'])}. Wrong diagnoses:"
    )
    print(f"                       of {result['patients']} for training   of {result['held_out_patients']} held out")
    print(f"  SNES on the count    {result['mistakes']:13d}   {result['held_out']:18d}")
    print(f"  logistic regression  {result['logistic_mistakes']:13d}   {result['logistic_held_out']:18d}")


if __name__ == "__main__":
    main()
