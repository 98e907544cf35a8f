"""Mixture: a thousand sampled allocations and five globals, beside the posterior by quadrature.

posteriordb's ``low_dim_gauss_mix``, with the allocations that its Stan program sums out left in::

    mu ~ Normal(0, 2), ordered;  sigma ~ half-Normal(0, 2);  theta ~ Beta(5, 5)
    z_i ~ Bernoulli(1 - theta);  y_i ~ Normal(mu[z_i], sigma[z_i]),  i = 1..1000

The guide is q(x) q(z | x), x the globals without their constraints, q(x) Gaussian with a full covariance and pathwise.
The allocations are sampled and their gradient is by the score function. Three families:

* ``exact``: P(z_i | x, y_i), by Bayes' rule from the sampled globals. Nothing is left to learn, and nothing is noisy.
* ``learnt``: the log odds are a quadratic in y_i, whose three coefficients are linear in x: 18 numbers, all learnt.
* ``free``: a probability for each z_i, independent of the globals: mean field between x and z.

Run it with::

    python -m applications.vi.mixture --seed 0

Ctrl-C ends the present fit after its step; what was fitted is still compared and written. The pieces (``Mixture`` and
its families, ``load``, and ``fit``, ``posterior``, ``compare`` of ``latent_states``) are meant to be imported.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from abc import abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from applications.arguments import at_least
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.fitting import show
from applications.vi.latent_states import Fit, Part, Program, compare, fit, plot, posterior, report, show_rows

DATA = Path(__file__).parent / "data" / "mixture.json"
PARTICLES, STEPS = 32, 1500
RATES = {"globals": 0.02, "coefficients": 0.3, "slopes": 0.3, "odds": 0.3}


def load() -> tuple[Tensor, dict[str, dict[str, float]]]:
    """y ``[1000]``, float64, and posteriordb's reference: mean and sd by global."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    return torch.tensor(found["y"], dtype=torch.float64), found["reference"]


class Mixture(Program):
    """The model; x is (mu_1, log(mu_2 - mu_1), log sigma_1, log sigma_2, logit theta). State 1: of the second part.

    Args:
        y: ``[N]``, float64.
        pathwise: see ``Program``.

    Raises:
        ValueError: y is not a finite vector.
    """

    depth = 1
    labels = ("mu[1]", "mu[2]", "sigma[1]", "sigma[2]", "theta")

    def __init__(self, y: Tensor, *, pathwise: bool = True) -> None:
        if y.ndim != 1 or not len(y) or not bool(torch.isfinite(y).all()):
            raise ValueError(f"y has shape {tuple(y.shape)}, but data are a finite vector [N], N >= 1: mend it.")
        super().__init__(pathwise=pathwise)
        self.y = y

    def start(self) -> Tensor:
        """Means -1 and 1, both scales 1, equal parts."""
        return torch.tensor([-1.0, math.log(2.0), 0.0, 0.0, 0.0], dtype=torch.float64)

    def parts(self, x: Tensor) -> dict[str, Part]:
        """Gap and scales by exp, theta by the logistic function."""
        low, log_gap, logit = x[..., 0], x[..., 1], x[..., 4]
        mu = torch.stack([low, low + log_gap.exp()], -1)
        return {
            "mu": Part(mu, log_gap),
            "sigma": Part(x[..., 2:4].exp(), x[..., 2:4].sum(-1)),
            "theta": Part(logit.sigmoid(), logsigmoid(logit) + logsigmoid(-logit)),
        }

    def values(self, x: Tensor) -> Tensor:
        """As ``labels`` says."""
        parts = self.parts(x)
        return torch.cat([parts["mu"].value, parts["sigma"].value, parts["theta"].value.unsqueeze(-1)], -1)

    @staticmethod
    def priors() -> dict[str, Any]:
        """Of each global; the guide keeps mu in order."""
        two = torch.full((2,), 2.0, dtype=torch.float64)
        return {
            "mu": dist.Normal(torch.zeros_like(two), two).to_event(1),
            "sigma": dist.HalfNormal(two).to_event(1),
            "theta": dist.Beta(2.5 * two[0], 2.5 * two[0]),
        }

    def model(self) -> None:
        """Allocations in the plate of their data."""
        mu, sigma, theta = (pyro.sample(name, prior) for name, prior in self.priors().items())
        with pyro.plate("data", len(self.y), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(1 - theta))
            second = z > 0
            loc = torch.where(second, mu[..., 1], mu[..., 0])
            scale = torch.where(second, sigma[..., 1], sigma[..., 0])
            pyro.sample("y", dist.Normal(loc, scale), obs=self.y)

    def sample_states(self, x: Tensor, infer: dict[str, Any]) -> None:
        """All at once."""
        with pyro.plate("data", len(self.y), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.logits(x)), infer=infer)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Log odds of q(z_i = 1 | x), ``[*batch, N]`` for x ``[*batch, 1, 5]``."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(z_i, y_i | x) for z_i = 0 and 1, shapes as ``logits``."""
        square = [
            ((self.y - mu) / sigma).square() + 2 * sigma.log() + math.log(2 * math.pi)
            for mu, sigma in zip(
                self.parts(x)["mu"].value.unbind(-1), self.parts(x)["sigma"].value.unbind(-1), strict=True
            )
        ]
        logit = x[..., 4]
        return logsigmoid(logit) - square[0] / 2, logsigmoid(-logit) - square[1] / 2

    def log_prior(self, x: Tensor) -> Tensor:
        """log p(x), ``[M]``."""
        priors = self.priors()
        found: Tensor = sum(
            priors[name].log_prob(part.value) + part.log_jacobian for name, part in self.parts(x).items()
        )
        return found

    def log_joint(self, x: Tensor) -> Tensor:
        return self.log_prior(x) + torch.logaddexp(*self.both(x.unsqueeze(-2))).sum(-1)

    def states(self, x: Tensor) -> Tensor:
        first, second = self.both(x.unsqueeze(-2))
        return (second - first).sigmoid()

    def guide_states(self, x: Tensor) -> Tensor:
        return self.logits(x.unsqueeze(-2)).sigmoid().expand(len(x), -1)

    def expected(self, x: Tensor) -> Tensor:
        logits, (first, second) = self.logits(x.unsqueeze(-2)), self.both(x.unsqueeze(-2))
        q = logits.sigmoid()
        sums = q * (second - logsigmoid(logits)) + (1 - q) * (first - logsigmoid(-logits))
        return self.log_prior(x) + sums.sum(-1)


class Exact(Mixture):
    """P(z_i | x, y_i)."""

    name = "exact"

    def logits(self, x: Tensor) -> Tensor:
        """Bayes' rule."""
        first, second = self.both(x)
        return second - first


class Learnt(Mixture):
    """A quadratic in y_i whose coefficients are linear in x."""

    name = "learnt"

    def __init__(self, y: Tensor, *, pathwise: bool = True) -> None:
        super().__init__(y, pathwise=pathwise)
        self.standard = (y - y.mean()) / y.std()
        self.coefficients = nn.Parameter(y.new_zeros(3))
        self.slopes = nn.Parameter(y.new_zeros(5, 3))

    def logits(self, x: Tensor) -> Tensor:
        """Of x in whitened coordinates, so that each slope is of the order of its effect."""
        c = self.coefficients + self.globals.white(x) @ self.slopes
        return c[..., 0] + c[..., 1] * self.standard + c[..., 2] * self.standard.square()


class Free(Mixture):
    """N log odds."""

    name = "free"

    def __init__(self, y: Tensor, *, pathwise: bool = True) -> None:
        super().__init__(y, pathwise=pathwise)
        self.odds = nn.Parameter(torch.zeros_like(y))

    def logits(self, x: Tensor) -> Tensor:
        """Whatever x is."""
        return self.odds.expand(*x.shape[:-2], -1)


FAMILIES: dict[str, type[Mixture]] = {family.name: family for family in (Exact, Learnt, Free)}


def main(argv: list[str] | None = None) -> int:
    """Fit the families in turn, then compare with what is exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=STEPS)
    parser.add_argument("--particles", type=at_least(2), default=PARTICLES, help="leave-one-out takes two or more")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--score", action="store_true", help="the globals by the score function too")
    parser.add_argument("--repeats", type=at_least(0), default=0, help="gradients for the variance of each estimator")
    parser.add_argument("--out", type=Path, default=Path("runs/mixture"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    (y, reference), fits = load(), list[Fit]()
    exact = posterior(Exact(y), 7)
    with Interruption() as interrupted:
        for name in dict.fromkeys(options.families):
            print(name)
            program = FAMILIES[name](y, pathwise=not options.score)
            settings: dict[str, Any] = {"particles": options.particles, "should_stop": interrupted}
            fits.append(fit(program, exact, options.seed, options.steps, show, rates=RATES, **settings))
            if interrupted():
                break
    print(f"\nlog evidence {exact.log_evidence:.6f}, of ordered means")
    rows = [fitted.summary() for fitted in fits]
    print(*map(report, rows), sep="\n")
    found = []
    if options.repeats and not interrupted():
        found = compare(fits[-1].program, options.repeats, options.particles)
        print(f"\ngradients at the fitted guide, {fits[-1].program.name}\n{show_rows(found)}")
    record: dict[str, Any] = {
        "complete": not interrupted(),
        "log_evidence": exact.log_evidence,
        "means": dict(zip(Mixture.labels, exact.means.tolist(), strict=True)),
        "sds": dict(zip(Mixture.labels, exact.sds.tolist(), strict=True)),
        "states": exact.states.tolist(),
        "reference": reference,
        "families": rows,
        "compare": [asdict(row) for row in found],
        "curves": [[asdict(point) for point in fitted.curve] for fitted in fits],
    }
    write_result(options.out, vars(options), record)
    plot(fits, options.out / "mixture.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
