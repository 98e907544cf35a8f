"""Hidden Markov model: a hundred sampled states, beside the posterior by quadrature.

posteriordb's ``hmm_example``, with the states that its Stan program sums out left in::

    mu ~ Normal((3, 10), 1), 0 < mu_1 < mu_2;  the rows of the transition matrix uniform on the simplex
    z_1 ~ fair coin;  z_t ~ row z_{t-1};  y_t ~ Normal(mu[z_t], 1),  t = 1..100

(The Stan program gives both first states weight 1 instead of 1/2, which adds log 2 to the evidence and nothing else.)
The guide is q(x) q(z_1 | x) q(z_2 | z_1, x) ..., x the globals without their constraints, q(x) Gaussian with a full
covariance and pathwise. The states are sampled one after the other, and their gradient is by the score function: each
is charged with what comes after it. Three families:

* ``exact``: P(z_t | z_{t-1}, x, y), by a backward pass from the sampled globals. Nothing is left to learn.
* ``learnt``: log odds for every time and previous state, to which x is added by slopes that know y_t and the previous
  state: 199 + 12 numbers, all learnt.
* ``free``: the same without x: the chain is independent of the globals.

Run it with::

    python -m applications.vi.hmm --seed 0

Ctrl-C ends the present fit after its step; what was fitted is still compared and written. The pieces (``Chain`` and
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

DATA = Path(__file__).parent / "data" / "hmm.json"
PARTICLES, STEPS = 256, 400
RATES = {"globals": 0.05, "slopes": 0.05, "first": 0.5, "later": 0.5}


def load() -> tuple[Tensor, dict[str, dict[str, float]]]:
    """y ``[100]``, float64, and posteriordb's reference: mean and sd by global."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    return torch.tensor(found["y"], dtype=torch.float64), found["reference"]


class Chain(Program):
    """The model; x is (logit theta_1, logit theta_2, log mu_1, log(mu_2 - mu_1)), theta_a = P(next is 1 | a).

    State 1 of the program, of two that are 0 and 1, is the one of mu_2.

    Args:
        y: ``[T]``, float64.
        pathwise: see ``Program``.

    Raises:
        ValueError: y is not a finite vector of two times or more.
    """

    depth = 0
    labels = ("theta1[1]", "theta2[1]", "mu[1]", "mu[2]")

    def __init__(self, y: Tensor, *, pathwise: bool = True) -> None:
        if y.ndim != 1 or len(y) < 2 or not bool(torch.isfinite(y).all()):
            raise ValueError(
                f"y has shape {tuple(y.shape)}, but a chain is a finite vector [T], T of 2 or more: mend it."
            )
        super().__init__(pathwise=pathwise)
        self.y = y

    def start(self) -> Tensor:
        """Even transitions, means 2 and 6."""
        return torch.tensor([0.0, 0.0, math.log(2.0), math.log(4.0)], dtype=torch.float64)

    def parts(self, x: Tensor) -> dict[str, Part]:
        """Stan's positive ordered vector, and probabilities to enter the first state, by the logistic function."""
        logit, low = x[..., :2], x[..., 2].exp()
        mu = torch.stack([low, low + x[..., 3].exp()], -1)
        return {
            "theta": Part(logit.sigmoid(), (logsigmoid(logit) + logsigmoid(-logit)).sum(-1)),
            "mu": Part(mu, x[..., 2:].sum(-1)),
        }

    def values(self, x: Tensor) -> Tensor:
        """As ``labels`` says."""
        parts = self.parts(x)
        return torch.cat([parts["theta"].value, parts["mu"].value], -1)

    @staticmethod
    def priors() -> dict[str, Any]:
        """Of each global; the guide keeps mu positive and in order."""
        one = torch.ones(2, dtype=torch.float64)
        return {
            "theta": dist.Uniform(0 * one, one).to_event(1),
            "mu": dist.Normal(torch.tensor([3.0, 10.0], dtype=torch.float64), one).to_event(1),
        }

    def model(self) -> None:
        """One time after the other."""
        theta, mu = (pyro.sample(name, prior) for name, prior in self.priors().items())
        enter = 1 - theta  # the second state, from the first and from the second
        probability, one = 0.5 * torch.ones_like(enter[..., 0]), torch.ones_like(self.y[0])
        for t in pyro.markov(range(len(self.y))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(probability))
            pyro.sample(f"y_{t}", dist.Normal(torch.where(z > 0, mu[..., 1], mu[..., 0]), one), obs=self.y[t])
            probability = torch.where(z > 0, enter[..., 1], enter[..., 0])

    def sample_states(self, x: Tensor, infer: dict[str, Any]) -> None:
        """One after the other."""
        first, later = self.logits(x)
        rows, logits = later.unbind(-2), first
        for t in pyro.markov(range(len(self.y))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=logits), infer=infer)
            if t < len(rows):
                logits = torch.where(z > 0, rows[t][..., 1], rows[t][..., 0])

    @abstractmethod
    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log odds of z_1 = 1, ``[*batch]``, and of z_t = 1 given z_{t-1} = 0 and 1, ``[*batch, T - 1, 2]``."""

    def pieces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log transition probabilities ``[*batch, 2, 2]`` (from, to) and log p(y_t | z_t, x), ``[*batch, T, 2]``."""
        logit, mu = x[..., :2], self.parts(x)["mu"].value
        step = torch.stack([logsigmoid(logit), logsigmoid(-logit)], -1)
        square = (self.y.unsqueeze(-1) - mu.unsqueeze(-2)).square()
        return step, -0.5 * (square + math.log(2 * math.pi))

    def backward_pass(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(y | x), ``[*batch]``, and ``logits`` of the exact chain.

        With beta_T = 0 and e_t(b) = log p(y_t | b)::

            beta_t(a) = log sum_b exp(log A(a, b) + e_{t+1}(b) + beta_{t+1}(b))
        """
        step, emission = self.pieces(x)
        message, later = torch.zeros_like(emission[..., 0, :]), list[Tensor]()
        for e in reversed(emission.unbind(-2)[1:]):
            to = step + (e + message).unsqueeze(-2)
            later.append(to[..., 1] - to[..., 0])
            message = to.logsumexp(-1)
        first = emission[..., 0, :] + message
        return first.logsumexp(-1) - math.log(2), first[..., 1] - first[..., 0], torch.stack(later[::-1], -2)

    def log_prior(self, x: Tensor) -> Tensor:
        """log p(x), ``[M]``; uniform transitions have density 1."""
        parts, prior = self.parts(x), self.priors()["mu"]
        found: Tensor = prior.log_prob(parts["mu"].value) + sum(part.log_jacobian for part in parts.values())
        return found

    def log_joint(self, x: Tensor) -> Tensor:
        return self.log_prior(x) + self.backward_pass(x)[0]

    def states(self, x: Tensor) -> Tensor:
        return marginals(*self.backward_pass(x)[1:])

    def guide_states(self, x: Tensor) -> Tensor:
        return marginals(*self.logits(x)).expand(len(x), -1)

    def expected(self, x: Tensor) -> Tensor:
        (first, later), (step, emission) = self.logits(x), self.pieces(x)
        second = marginals(first, later)
        q = torch.stack([1 - second, second], -1)
        own = torch.stack([logsigmoid(-first), logsigmoid(first)], -1)
        start = (q[..., 0, :] * (-math.log(2) - own)).sum(-1)
        own = torch.stack([logsigmoid(-later), logsigmoid(later)], -1)
        pairs = q[..., :-1, :, None] * own.exp() * (step.unsqueeze(-3) - own)
        return self.log_prior(x) + start + (q * emission).sum((-1, -2)) + pairs.sum((-1, -2, -3))


def marginals(first: Tensor, later: Tensor) -> Tensor:
    """P(z_t = 1), ``[*batch, T]``, of a chain with these log odds."""
    found = [first.sigmoid()]
    for stay, enter in zip(later[..., 1].sigmoid().unbind(-1), later[..., 0].sigmoid().unbind(-1), strict=True):
        found.append(found[-1] * stay + (1 - found[-1]) * enter)
    return torch.stack(found, -1)


class Exact(Chain):
    """P(z_t | z_{t-1}, x, y)."""

    name = "exact"

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By the backward pass."""
        return self.backward_pass(x)[1:]


class Free(Chain):
    """Log odds that do not know x."""

    name = "free"

    def __init__(self, y: Tensor, *, pathwise: bool = True) -> None:
        super().__init__(y, pathwise=pathwise)
        self.first = nn.Parameter(y.new_zeros(()))
        self.later = nn.Parameter(y.new_zeros(len(y) - 1, 2))

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whatever x is."""
        batch = x.shape[:-1]
        return self.first.expand(batch), self.later.expand(*batch, -1, -1)


class Learnt(Free):
    """Log odds whose slopes in x depend on y_t and on the previous state, and on nothing else of the time."""

    name = "learnt"

    def __init__(self, y: Tensor, *, pathwise: bool = True) -> None:
        super().__init__(y, pathwise=pathwise)
        self.standard = (y - y.mean()) / y.std()
        self.slopes = nn.Parameter(y.new_zeros(4, 3))

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of x in whitened coordinates, so that each slope is of the order of its effect."""
        always, by_data, by_state = (self.globals.white(x) @ self.slopes).unbind(-1)
        shift = always.unsqueeze(-1) + by_data.unsqueeze(-1) * self.standard
        later = torch.stack([shift[..., 1:], shift[..., 1:] + by_state.unsqueeze(-1)], -1)
        return self.first + shift[..., 0], self.later + later


FAMILIES: dict[str, type[Chain]] = {family.name: family for family in (Exact, Learnt, Free)}


def main(argv: list[str] | None = None) -> int:
    """Fit the families in turn, then compare with what is exact."""
    return run(argv, __doc__, FAMILIES, load(), name="hmm", nodes=10, steps=STEPS, particles=PARTICLES, rates=RATES)


if __name__ == "__main__":
    sys.exit(main())
