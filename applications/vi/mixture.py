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
its families, ``load``, and ``latent_fit``, ``latent_posterior``, ``latent_gradients``) are meant to be imported.
"""

from __future__ import annotations

import json
import math
import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from applications.vi.latent_command import run
from applications.vi.latent_states import Part, Program

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
    return run(argv, __doc__, FAMILIES, load(), name="mixture", nodes=7, steps=STEPS, particles=PARTICLES, rates=RATES)


if __name__ == "__main__":
    sys.exit(main())
