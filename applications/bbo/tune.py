"""Tune a model whose settings are numbers, whole numbers and choices at once: a product of three search distributions.

Gradient boosting (scikit-learn's ``GradientBoostingRegressor``) on its diabetes data: 442 patients, of which 300 train,
by a split that each seed makes anew. Minimised is the root-mean-square error in three-fold cross-validation, over::

    learning_rate .01 ... .5 (by its logarithm), subsample .4 ... 1        numbers: CSANES in a box
    n_estimators 10, 20, ..., 120; max_depth 1 ... 6; min_samples_leaf 1 ... 40    whole numbers: IntegerSearch
    loss, max_features                                                     choices: CategoricalSearch

``ProductSearch`` ranks the three parts together. Beside it, with equally many evaluations: uniform draws from the same
space, the tree-structured Parzen estimator of Optuna (left out where it is not installed: `pip install optuna`), and
scikit-learn's default settings. The other 142 patients tell what the settings are worth.

Run it with::

    python -m applications.bbo.tune --seeds 5

A configuration that was evaluated before costs nothing, but counts. Ctrl-C ends after the present evaluation; what was
done is still compared and written. The pieces (``Settings``, ``Objective``, ``Trials``, the tuners) are meant to be
imported and copied.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import KFold, cross_val_score

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line
from applications.results import write_result

TRAINING = 300
POPSIZE = 8

RATES = {"learning_rate": (math.log10(0.01), math.log10(0.5)), "subsample": (0.4, 1.0)}
SIZES = {"n_estimators": (1, 12), "max_depth": (1, 6), "min_samples_leaf": (1, 40)}
KINDS: dict[str, tuple[Any, ...]] = {
    "loss": ("squared_error", "absolute_error", "huber"),
    "max_features": (None, "sqrt", 0.6),
}
TREES = 10  # one step of n_estimators


@dataclass(frozen=True)
class Settings:
    """What is tuned, as ``GradientBoostingRegressor`` names it; the defaults are its own."""

    learning_rate: float = 0.1
    subsample: float = 1.0
    n_estimators: int = 100
    max_depth: int = 3
    min_samples_leaf: int = 1
    loss: str = "squared_error"
    max_features: Any = None

    @classmethod
    def of(cls, rates: Sequence[float], sizes: Sequence[float], kinds: Sequence[int]) -> Settings:
        """Of a point of the three spaces; the learning rate by its logarithm, trees by tens, choices by their number.

        Raises:
            ValueError: it lies outside.
        """
        numbers = zip((*rates, *sizes), (*RATES.values(), *SIZES.values()), strict=True)
        choices = zip(kinds, KINDS.values(), strict=True)
        inside = all(low <= value <= high for value, (low, high) in numbers)
        if not inside or not all(0 <= kind < len(names) for kind, names in choices):
            raise ValueError(f"The point {(*rates, *sizes, *kinds)} lies outside of {RATES}, {SIZES} or {KINDS}.")
        trees, depth, leaf = (int(size) for size in sizes)
        loss, features = (names[int(kind)] for kind, names in zip(kinds, KINDS.values(), strict=True))
        return cls(10.0 ** rates[0], rates[1], TREES * trees, depth, leaf, loss, features)


class Objective:
    """The error of settings on the patients of one split.

    Args:
        seed: of the split, and of the folds.
    """

    def __init__(self, seed: int) -> None:
        x, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(y))
        self._x, self._y = x[order], y[order]
        self._folds = KFold(3, shuffle=True, random_state=seed)

    def __call__(self, settings: Settings) -> float:
        """Root-mean-square error in cross-validation, the mean over the folds."""
        scores = cross_val_score(
            _model(settings),
            self._x[:TRAINING],
            self._y[:TRAINING],
            cv=self._folds,
            scoring="neg_root_mean_squared_error",
        )
        return -float(scores.mean())

    def held_out(self, settings: Settings) -> float:
        """Root-mean-square error on the other patients, of a model trained on all 300."""
        model = _model(settings).fit(self._x[:TRAINING], self._y[:TRAINING])
        return float(np.sqrt(np.square(model.predict(self._x[TRAINING:]) - self._y[TRAINING:]).mean()))


def _model(settings: Settings) -> GradientBoostingRegressor:
    return GradientBoostingRegressor(**asdict(settings), random_state=0)


class Trials:
    """Evaluates settings, counts, and knows the best; what was evaluated before is remembered.

    Args:
        objective: error of settings.
        known: errors so far, which several tuners may share.
        should_stop: asked before each evaluation.
    """

    class Stopped(Exception):
        """The user asked for an end."""

    def __init__(
        self,
        objective: Callable[[Settings], float],
        known: dict[Settings, float],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.errors: list[float] = []
        self.best: Settings | None = None
        self._objective, self._known, self._should_stop = objective, known, should_stop

    def __call__(self, settings: Settings) -> float:
        if self._should_stop():
            raise self.Stopped
        if settings not in self._known:
            self._known[settings] = self._objective(settings)
        error = self._known[settings]
        if not self.errors or error < min(self.errors):
            self.best = settings
        self.errors.append(error)
        return error


Tuner: TypeAlias = Callable[[Trials, int, int], None]
"""Evaluates so many settings, by a seed."""


def product_search(trials: Trials, evaluations: int, seed: int) -> None:
    """``ProductSearch``; the last evaluation is that of the settings it recommends.

    It evaluates whole generations and that last point: 8 k + 1 settings, the most that are paid for.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(list(RATES.values()), dtype=torch.float64).T
    box = sf.search.SmoothBounds(low, high)
    lower, upper = torch.tensor(list(SIZES.values())).T
    common = {"popsize": POPSIZE, "seed": generator}
    strategy = sf.search.ProductSearch(
        {
            "rates": sf.search.CSANES((low + high) / 2, (high - low) / 3, **common),
            "sizes": sf.search.IntegerSearch(lower, upper, **common),
            "kinds": sf.search.CategoricalSearch([len(names) for names in KINDS.values()], **common),
        }
    )

    def error(point: Mapping[str, torch.Tensor]) -> float:
        rates = box.inside(point["rates"].unsqueeze(0)).squeeze(0)
        return trials(Settings.of(rates.tolist(), point["sizes"].tolist(), point["kinds"].tolist()))

    sf.search.run(strategy, error, maxfevals=evaluations)


def random_search(trials: Trials, evaluations: int, seed: int) -> None:
    """Uniform draws."""
    generator = np.random.default_rng(seed)
    for _ in range(evaluations):
        rates = [generator.uniform(low, high) for low, high in RATES.values()]
        sizes = [int(generator.integers(low, high + 1)) for low, high in SIZES.values()]
        trials(Settings.of(rates, sizes, [int(generator.integers(len(names))) for names in KINDS.values()]))


def optuna_search(trials: Trials, evaluations: int, seed: int) -> None:
    """Optuna's tree-structured Parzen estimator, with its defaults."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def error(trial: Any) -> float:
        rates = [trial.suggest_float(name, low, high) for name, (low, high) in RATES.items()]
        sizes = [trial.suggest_int(name, low, high) for name, (low, high) in SIZES.items()]
        kinds = [trial.suggest_categorical(name, range(len(names))) for name, names in KINDS.items()]
        return trials(Settings.of(rates, sizes, kinds))

    optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)).optimize(error, n_trials=evaluations)


TUNERS: dict[str, Tuner] = {"scorefn": product_search, "optuna": optuna_search, "random": random_search}


@dataclass(frozen=True)
class Tuned:
    """What one tuner found on one split.

    Attributes:
        errors: in cross-validation, one for each evaluation.
        held_out: error of the best settings on the other patients.
        default_error: of scikit-learn's defaults in cross-validation.
        default_held_out: and on the other patients.
        seconds: on the CPU, without those for settings that were known.
    """

    tuner: str
    seed: int
    errors: list[float]
    settings: Settings
    held_out: float
    default_error: float
    default_held_out: float
    seconds: float

    @property
    def best(self) -> NDArray[np.float64]:
        """The lowest error so far, after each evaluation."""
        return np.minimum.accumulate(self.errors)

    def best_after(self, evaluations: int) -> float:
        """The lowest error of so many evaluations, or of all, where there were fewer."""
        return float(self.best[:evaluations][-1])


def tune(
    tuners: Sequence[str],
    seeds: int,
    evaluations: int,
    *,
    first_seed: int = 0,
    report: Callable[[Tuned], None] = lambda found: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Tuned]:
    """Every tuner on every split, split by split; an interrupted search is left out."""
    done: list[Tuned] = []
    for seed in range(first_seed, first_seed + seeds):
        objective, known, default = Objective(seed), dict[Settings, float](), Settings()
        before, outside = objective(default), objective.held_out(default)
        for name in tuners:
            trials, begin = Trials(objective, known, should_stop), time.process_time()
            try:
                TUNERS[name](trials, evaluations, seed)
            except Trials.Stopped:
                return done
            seconds = time.process_time() - begin
            assert trials.best is not None
            held_out = objective.held_out(trials.best)
            done.append(Tuned(name, seed, trials.errors, trials.best, held_out, before, outside, seconds))
            report(done[-1])
    return done


def table(done: Sequence[Tuned], at: Sequence[int]) -> list[dict[str, Any]]:
    """Mean errors of each tuner: after so many evaluations, on the other patients; and of the defaults."""
    rows = []
    for name in dict.fromkeys(found.tuner for found in done):
        own = [found for found in done if found.tuner == name]
        rows.append(
            {
                "tuner": name,
                "runs": len(own),
                "cross_validation": {str(n): float(np.mean([found.best_after(n) for found in own])) for n in at},
                "held_out": float(np.mean([found.held_out for found in own])),
                "default": float(np.mean([found.default_error for found in own])),
                "default_held_out": float(np.mean([found.default_held_out for found in own])),
                "seconds": float(np.mean([found.seconds for found in own])),
            }
        )
    return rows


def plot(done: Sequence[Tuned], path: Path) -> None:
    """The lowest error so far, over evaluations, minus that of the defaults: every run, and the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for number, name in enumerate(dict.fromkeys(found.tuner for found in done)):
        ways = [found.best - found.default_error for found in done if found.tuner == name]
        at = np.arange(1, min(len(way) for way in ways) + 1)
        ways = [way[: len(at)] for way in ways]
        panel.plot(at, np.transpose(ways), color=f"C{number}", alpha=0.2, linewidth=0.8)
        panel.plot(at, np.mean(ways, 0), color=f"C{number}", label=name)
    panel.axhline(0, color="black", linewidth=0.6, label="default settings")
    panel.set(xlabel="evaluations", ylabel="error less that of the defaults", ylim=(None, 6))
    panel.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Compare the tuners over several splits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=5, help="how many splits")
    parser.add_argument("--first-seed", type=at_least(0), default=0)
    parser.add_argument("--evaluations", type=at_least(POPSIZE + 1), default=81, help="of each tuner on each split")
    parser.add_argument("--tuners", nargs="+", choices=list(TUNERS), help="default: all that are installed")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    installed = find_spec("optuna") is not None
    names = list(dict.fromkeys(options.tuners or TUNERS))
    if not installed and "optuna" in names:
        if options.tuners:
            parser.error("the tuner optuna is not installed: run `pip install optuna`, or leave it out of --tuners")
        print("Optuna is not installed and left out; `pip install optuna` brings it in.")
        names.remove("optuna")
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    total = options.seeds * len(names)
    count = 0

    def report(found: Tuned) -> None:
        nonlocal count
        count += 1
        errors = f"{found.best[-1]:.2f} in cross-validation (defaults {found.default_error:.2f})"
        text = f"{count:3d} of {total}  {found.tuner} split {found.seed}: {errors}, {found.held_out:.2f} held out"
        show_line(text.ljust(100), last=count == total)

    with Interruption() as interrupted:
        done = tune(
            names,
            options.seeds,
            options.evaluations,
            first_seed=options.first_seed,
            report=report,
            should_stop=interrupted,
        )
    at = sorted({max(1, options.evaluations // 4), max(1, options.evaluations // 2), options.evaluations})
    rows = table(done, at)
    print(f"\n{'':10s}" + "".join(f"{f'after {n}':>10s}" for n in at) + f"{'held out':>10s}{'CPU s':>8s}")
    for row in rows:
        errors = "".join(f"{row['cross_validation'][str(n)]:10.3f}" for n in at)
        print(f"{row['tuner']:10s}{errors}{row['held_out']:10.3f}{row['seconds']:8.1f}")
    if rows:
        print(f"{'default':10s}{rows[0]['default']:{10 * len(at)}.3f}{rows[0]['default_held_out']:10.3f}")
    record = {"complete": len(done) == total, "table": rows, "runs": [asdict(found) for found in done]}
    write_result(options.out, vars(options), record)
    if done:
        plot(done, options.out / "tune.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
