"""Spike and slab: which covariates matter? Ten bits by score functions, beside the posterior of all 1024 models.

Linear regression on scikit-learn's diabetes data (442 patients, 10 covariates; Efron, Hastie, Johnstone & Tibshirani
2004), covariates and response standardised. The coefficient of a covariate is zero (the spike) or normal (the slab)::

    z_i ~ Bernoulli(1/2);    1/sigma^2 ~ Gamma(1, 1);    beta_i | z, sigma ~ Normal(0, z_i (sigma/2)^2)
    y | beta, sigma ~ Normal(X beta, sigma^2)

Coefficients and sigma integrate out; the ten indicators z are the latents. Each is drawn given the earlier ones, its
logit linear in the products of at most `order` of them: order 0 is the mean field, 1 an autoregressive guide, and 2
adds pairs. Serum measurements stand in for one another, so their indicators are far from independent. Run it with::

    python -m applications.vi.spike_and_slab --seed 0

Ctrl-C ends the present fit after its step; what was fitted is still compared and written. The pieces (``Regression``,
``Indicators``, ``fit``, ``best``, ``compare``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.correction import Corrected, corrected
from applications.vi.fitting import Progress, ascend, draw_ways, show, watched

FAMILIES = {0: "independent", 1: "autoregressive", 2: "autoregressive, with pairs"}


@dataclass(frozen=True)
class Regression:
    """The model, with everything but the indicators integrated out.

    Args:
        X: ``[n, p]``, covariates.
        y: ``[n]``, response.
        names: of the p covariates.
        slab: variance of a coefficient that is not zero, in units of sigma^2.
        shape: of the Gamma prior of 1/sigma^2.
        rate: likewise.

    Raises:
        ValueError: shapes that disagree, or a slab, shape or rate that is not positive.
    """

    X: Tensor
    y: Tensor
    names: tuple[str, ...]
    slab: float = 0.25
    shape: float = 1.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.X.ndim != 2 or self.y.shape != self.X.shape[:1] or len(self.names) != self.X.shape[1]:
            raise ValueError(
                f"X has shape {tuple(self.X.shape)}, y {tuple(self.y.shape)}, and there are {len(self.names)} names, "
                "so rows and columns do not match: give X as [n, p], y as [n] and p names."
            )
        if not min(self.slab, self.shape, self.rate) > 0:
            raise ValueError(
                f"slab, shape and rate are {self.slab}, {self.shape} and {self.rate}, but a prior is proper only if "
                "all three are above 0."
            )

    def log_joint(self, z: Tensor) -> Tensor:
        """log p(y, z), with all constants: the response of a model is multivariate Student-t.

        With X_z the covariates that are in, v the slab, a and b shape and rate of the Gamma prior::

            log p(y | z) = log Gamma(a + n/2) - log Gamma(a) + a log b - n/2 log(2 pi) - 1/2 log |I + v X_z' X_z|
                           - (a + n/2) log(b + (y'y - y' X_z (X_z' X_z + I/v)^-1 X_z' y)/2)

        Source: O'Hagan & Forster (2004), "Bayesian inference", section 11.3 (normal-inverse-gamma).

        Args:
            z: ``[*batch, p]``, zeros and ones.

        Returns:
            ``[*batch]``.
        """
        n, p = self.X.shape
        # A covariate that is left out has a row of the identity: its factors of determinant and solution are 1 and 0.
        inside = self.slab * (self.X.T @ self.X) * z[..., :, None] * z[..., None, :]
        root = torch.linalg.cholesky(inside + torch.eye(p, dtype=z.dtype))
        target = (z * (self.X.T @ self.y)).unsqueeze(-1)
        explained = self.slab * torch.linalg.solve_triangular(root, target, upper=False).square().sum((-2, -1))
        rate = self.rate + (self.y @ self.y - explained) / 2
        constant = math.lgamma(self.shape + n / 2) - math.lgamma(self.shape) + self.shape * math.log(self.rate)
        log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant -= n / 2 * math.log(2 * math.pi) + p * math.log(2)  # the last: p(z)
        value: Tensor = constant - log_root - (self.shape + n / 2) * rate.log()
        return value


def load() -> Regression:
    """The diabetes data that scikit-learn carries (BSD-3-Clause), standardised, in float64."""
    data = load_diabetes(scaled=False)
    X, y = torch.tensor(data.data).double(), torch.tensor(data.target).double()
    X = (X - X.mean(0)) / X.std(0, correction=0)
    return Regression(X, (y - y.mean()) / y.std(correction=0), tuple(data.feature_names))


def states(p: int) -> Tensor:
    """All models, ``[2^p, p]``."""
    return torch.tensor(list(product((0.0, 1.0), repeat=p)), dtype=torch.float64)


class Indicators(nn.Module):
    """A distribution of p bits, each given the earlier ones; it starts as p fair coins.

    ``logit q(z_i = 1 | z_<i) = sum_S w_iS prod_{j in S} z_j``, over the sets S of at most ``order`` indicators before
    i, the empty set among them.

    Args:
        p: how many.
        order: of the products; 0: independent bits.
    """

    def __init__(self, p: int, order: int) -> None:
        super().__init__()
        self.order = order
        sets = [s for size in range(order + 1) for s in combinations(range(p), size)]
        padded = [[*s, *[p] * (order - len(s))] for s in sets]  # place p holds a one
        self.sets = torch.tensor(padded, dtype=torch.long).reshape(len(sets), order)
        before = [[all(j < i for j in s) for s in sets] for i in range(p)]
        self.before = torch.tensor(before, dtype=torch.float64)
        self.weights = nn.Parameter(torch.zeros(p, len(sets), dtype=torch.float64))

    def logits(self, z: Tensor) -> Tensor:
        """``[*batch, p]``; that of i depends on the z before i only."""
        products = torch.cat([z, torch.ones_like(z[..., :1])], -1)[..., self.sets].prod(-1)
        return products @ (self.weights * self.before).T

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z), ``[*batch]``."""
        logits = self.logits(z)
        return (z * logits - nn.functional.softplus(logits)).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """``[*sample_shape, p]``, one indicator after the other."""
        p = len(self.weights)
        z = torch.zeros(*sample_shape, p, dtype=torch.float64)
        if self.order == 0:
            return torch.bernoulli(self.logits(z).sigmoid())
        for i in range(p):
            z[..., i] = torch.bernoulli(self.logits(z)[..., i].sigmoid())
        return z


@dataclass(frozen=True)
class Exact:
    """The posterior, by enumeration.

    Attributes:
        log_joint: ``[2^p]``, of ``states``.
        log_evidence: of the data.
        inclusion: ``[p]``, P(z_i = 1 | y).
    """

    log_joint: Tensor
    log_evidence: float
    inclusion: Tensor

    def bound(self, guide: Indicators) -> Tensor:
        """The ELBO of a guide, exact and differentiable."""
        log_q = guide.log_prob(states(len(self.inclusion)))
        return (log_q.exp() * (self.log_joint - log_q)).sum()


def exact(regression: Regression) -> Exact:
    """All models at once."""
    z = states(len(regression.names))
    log_joint = regression.log_joint(z)
    return Exact(log_joint, log_joint.logsumexp(0).item(), log_joint.softmax(0) @ z)


@torch.no_grad()
def inclusion(guide: Indicators) -> Tensor:
    """q(z_i = 1), ``[p]``, exactly."""
    z = states(len(guide.weights))
    return guide.log_prob(z).exp() @ z


@dataclass(frozen=True)
class Fit:
    """A guide and the way to it; the gaps are those to the log evidence."""

    guide: Indicators
    curve: list[Progress]


def fit(
    regression: Regression,
    answers: Exact,
    order: int,
    seed: int = 0,
    steps: int = 5000,
    progress: Callable[[Progress], None] | None = None,
    *,
    particles: int = 64,
    learning_rate: float = 0.1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Fit a guide by the score function: ``elbo``, leave-one-out, Adam whose learning rate decays to a hundredth.

    The model is a black box here: it is asked for log p(y, z) of the draws, nothing else. ``answers`` judges the fit.

    Args:
        regression: the model.
        answers: of it, for the reports.
        order: of the guide.
        seed: of the draws.
        steps: of the optimiser.
        progress: called 60 times on the way.
        particles: N.
        learning_rate: at the start.
        should_stop: asked after every step.
    """
    torch.manual_seed(seed)
    guide = Indicators(len(regression.names), order)
    optimiser = torch.optim.Adam(guide.parameters(), learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.01 ** (1 / steps))

    def step() -> None:
        optimiser.zero_grad()
        (-sf.posteriors.elbo(regression.log_joint, guide, particles)).backward()
        optimiser.step()
        schedule.step()

    curve = watched(
        step,
        steps,
        lambda: answers.bound(guide),
        answers.log_evidence,
        progress,
        others=lambda: {"worst marginal off by": (inclusion(guide) - answers.inclusion).abs().max().item()},
        should_stop=should_stop,
    )
    return Fit(guide, curve)


def best(answers: Exact, order: int) -> Indicators:
    """The guide that the exact gradient leads to, from the same fair coins, by L-BFGS."""
    guide = Indicators(len(answers.inclusion), order)
    ascend(guide.parameters(), lambda: answers.bound(guide))
    return guide


@dataclass(frozen=True)
class Comparison:
    """A fitted guide beside the exact posterior and beside the guide of the exact gradient.

    Attributes:
        family: in words.
        bound: ELBO, exact.
        best_bound: that of the guide of the exact gradient.
        log_evidence: exact.
        inclusion: q(z_i = 1).
        total_variation: of each marginal, from the posterior.
        best_total_variation: likewise, of the guide of the exact gradient: what the family can represent.
        from_best: of each marginal, between the two guides.
        corrected: what importance sampling makes of it.
        seconds: CPU, of the fit's steps.
    """

    family: str
    bound: float
    best_bound: float
    log_evidence: float
    inclusion: list[float]
    total_variation: list[float]
    best_total_variation: list[float]
    from_best: list[float]
    corrected: Corrected
    seconds: float

    def __str__(self) -> str:
        """In three lines."""
        represented = [
            own for own, best in zip(self.total_variation, self.best_total_variation, strict=True) if best <= 0.02
        ]
        return (
            f"{self.family}: {self.best_bound - self.bound:.4f} nats below the best of the family, which is "
            f"{self.log_evidence - self.best_bound:.4f} below the evidence\n  total variation at most "
            f"{max(represented, default=math.nan):.4f} on the {len(represented)} marginals that the family can "
            f"represent to .02, {max(self.total_variation):.4f} on all, {max(self.from_best):.4f} from the best guide\n"
            f"  {self.corrected}"
        )


@torch.no_grad()
def compare(regression: Regression, answers: Exact, fitted: Fit, num_draws: int = 4000) -> Comparison:
    """Judge a fit, with ``num_draws`` draws for what is estimated; the rest is exact."""
    guide = fitted.guide
    with torch.enable_grad():
        reference = best(answers, guide.order)
    z = guide.sample((num_draws,))
    own, theirs = inclusion(guide), inclusion(reference)
    return Comparison(
        FAMILIES.get(guide.order, f"products of {guide.order}"),
        answers.bound(guide).item(),
        answers.bound(reference).item(),
        answers.log_evidence,
        own.tolist(),
        (own - answers.inclusion).abs().tolist(),
        (theirs - answers.inclusion).abs().tolist(),
        (own - theirs).abs().tolist(),
        corrected(regression.log_joint(z) - guide.log_prob(z)),
        fitted.curve[-1].seconds,
    )


def plot(regression: Regression, answers: Exact, fits: Sequence[Fit], rows: Sequence[Comparison], path: Path) -> None:
    """Marginals beside the exact ones, and the way of the bound."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places, width = range(len(regression.names)), 0.8 / (len(fits) + 1)
    left.bar(places, answers.inclusion.tolist(), width, label="exact", color="black")
    for number, row in enumerate(rows):
        colour, shifted = f"C{number}", [i + (number + 1) * width for i in places]
        left.bar(shifted, row.inclusion, width, label=row.family, color=colour)
        right.axhline(row.log_evidence - row.best_bound, linestyle=":", color=colour)
    draw_ways(right, {row.family: fitted.curve for row, fitted in zip(rows, fits, strict=True)})
    left.set_xticks([i + width * len(fits) / 2 for i in places], regression.names)
    left.set_ylabel("probability that the covariate is in")
    right.set_ylabel("log evidence - bound, nats (dotted: exact gradient)")
    left.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Fit the families in turn, then compare with what is exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=5000)
    parser.add_argument("--particles", type=at_least(2), default=64, help="leave-one-out takes two or more")
    parser.add_argument("--orders", type=int, nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("runs/spike_and_slab"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    regression = load()
    answers, fits = exact(regression), list[Fit]()
    with Interruption() as interrupted:
        for order in dict.fromkeys(options.orders):
            print(FAMILIES[order], flush=True)
            fits.append(
                fit(
                    regression,
                    answers,
                    order,
                    options.seed,
                    options.steps,
                    show,
                    particles=options.particles,
                    should_stop=interrupted,
                )
            )
            if interrupted():
                break
    rows = [compare(regression, answers, fitted) for fitted in fits]
    print(f"\nlog evidence {answers.log_evidence:.6f}; exact inclusion probabilities:")
    print("  ".join(f"{name} {p:.3f}" for name, p in zip(regression.names, answers.inclusion.tolist(), strict=True)))
    for row in rows:
        print(f"\n{row}")
    record: dict[str, Any] = {
        "complete": not interrupted(),
        "names": regression.names,
        "log_evidence": answers.log_evidence,
        "inclusion": answers.inclusion.tolist(),
        "families": [asdict(row) for row in rows],
        "curves": [[asdict(point) for point in fitted.curve] for fitted in fits],
    }
    write_result(options.out, vars(options), record)
    plot(regression, answers, fits, rows, options.out / "spike_and_slab.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
