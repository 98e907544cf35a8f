"""Survey: one latent with 474 values, its exact posterior beside it.

Each of five helpers handed out n surveys, n unknown, and k_i came back (Lee & Wagenmakers, 2013, section 3.6)::

    n ~ Uniform{1, ..., 500};  theta ~ Uniform(0, 1);  k_i ~ Binomial(n, theta)

The guide is ``q(n) q(theta | n)``: a Categorical over the 474 numbers that are at least the largest k, one logit each,
learnt by the score function; and the conditional Beta(1 + sum k, 1 + 5n - sum k), which conjugacy gives. So the guide
can become the posterior, and the evidence, the bound and KL(q || p) are sums. Run it with::

    python -m applications.vi.survey --compare

The pieces (``Survey``, ``fit``, ``exact``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, TraceGraph_ELBO
from torch import Tensor, nn
from torch.distributions import Categorical

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.correction import corrected, pyro_log_weights
from applications.vi.fitting import Progress, arrival, decaying, draw_ways, show, watched

DATA = Path(__file__).parent / "data" / "survey.json"
PARTICLES = 16
OURS, PLAIN = "ScoreFunctionELBO", "elbo, plain torch"
WAYS = (
    OURS,
    PLAIN,
    "ScoreFunctionELBO, no baseline",
    "TraceGraph_ELBO, decaying average",
    "exact gradient",
)


@dataclass(frozen=True)
class Returns:
    """What is known.

    Args:
        nmax: the largest number of surveys that a helper may have handed out.
        k: ``[5]``, how many came back to each.
    """

    nmax: int
    k: Tensor


def load() -> Returns:
    """The data set Survey_data of posteriordb, in float64."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    return Returns(found["nmax"], torch.tensor(found["k"], dtype=torch.float64))


class Guide(nn.Module):
    """A logit for each number that the data allow."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(numbers, dtype=torch.float64))


class Survey:
    """Model and guide as Pyro programs, as a log-density and a distribution, and as sums.

    Args:
        returns: the data.
    """

    def __init__(self, returns: Returns) -> None:
        self.returns = returns
        self.impossible = int(returns.k.max()) - 1  # of the numbers from 1 on
        self.parameters = Guide(returns.nmax - self.impossible)

    @property
    def numbers(self) -> Tensor:
        """Which the guide knows, ``[474]``."""
        return torch.arange(self.impossible + 1, self.returns.nmax + 1, dtype=torch.float64)

    def model(self) -> None:
        """The site "place" is n - 1."""
        k = self.returns.k
        place = pyro.sample("place", dist.Categorical(torch.full((self.returns.nmax,), 1.0, dtype=k.dtype)))
        theta = pyro.sample("theta", dist.Beta(torch.ones((), dtype=k.dtype), torch.ones((), dtype=k.dtype)))
        with pyro.plate("helpers", len(k), dim=-1):
            pyro.sample("k", dist.Binomial((place + 1).to(k.dtype), theta), obs=k)

    def guide(self, infer: dict[str, Any] | None = None) -> None:
        """q(n) q(theta | n)."""
        logits = pyro.module("guide", self.parameters).logits
        impossible = logits.new_full((self.impossible,), -math.inf)
        place = pyro.sample("place", dist.Categorical(logits=torch.cat([impossible, logits])), infer=infer)
        n, returned = (place + 1).to(logits.dtype), self.returns.k.sum()
        pyro.sample("theta", dist.Beta(1 + returned, 1 + len(self.returns.k) * n - returned))

    def log_joint(self, n: Tensor) -> Tensor:
        """log p(n, k), without theta, of numbers of any shape."""
        k = self.returns.k
        n = n.to(k.dtype).unsqueeze(-1)
        ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
        a, b = 1 + k.sum(), 1 + (n - k).sum(-1)
        found: Tensor = ways.sum(-1) + a.lgamma() + b.lgamma() - (a + b).lgamma() - math.log(self.returns.nmax)
        return found

    def plain_bound(self, num_samples: int) -> Tensor:
        """The same bound in plain torch, with theta summed out."""
        numbers, q = self.numbers, Categorical(logits=self.parameters.logits)
        found: Tensor = sf.posteriors.elbo(lambda place: self.log_joint(numbers[place]), q, num_samples)
        return found

    def exact_bound(self) -> Tensor:
        """The ELBO by summing over n, differentiable."""
        log_q = self.parameters.logits.log_softmax(-1)
        return (log_q.exp() * (self.log_joint(self.numbers) - log_q)).sum()


@dataclass(frozen=True)
class Exact:
    """What the posterior is, by summing over n."""

    log_evidence: float
    expected_number: float
    mode: int
    median: int
    expected_theta: float


def exact(returns: Returns) -> Exact:
    """Enumerate."""
    net = Survey(returns)
    log_joint, n = net.log_joint(net.numbers), net.numbers
    p = log_joint.softmax(-1)
    theta = (1 + returns.k.sum()) / (2 + len(returns.k) * n)
    return Exact(
        log_joint.logsumexp(-1).item(),
        (p * n).sum().item(),
        int(n[p.argmax()]),
        int(n[(p.cumsum(-1) >= 0.5).nonzero()[0, 0]]),
        (p * theta).sum().item(),
    )


@dataclass(frozen=True)
class Fit:
    """A fitted guide, the exact answers, and the way; its gaps are KL(q || p), by summation."""

    net: Survey
    exact: Exact
    curve: list[Progress]


def stepper(net: Survey, way: str, steps: int, particles: int, learning_rate: float) -> Callable[[], Any]:
    """One step of ClippedAdam by one of ``WAYS``; its learning rate decays to a tenth."""
    settings = decaying(steps, learning_rate, 0.1)
    if way in (PLAIN, "exact gradient"):
        optim = pyro.optim.clipped_adam.ClippedAdam(net.parameters.parameters(), **settings)

        def step() -> None:
            optim.zero_grad()
            (-(net.plain_bound(particles) if way == PLAIN else net.exact_bound())).backward()
            optim.step()

        return step
    guide: Callable[..., None] = net.guide
    infer = {"baseline": {"use_decaying_avg_baseline": True}}
    if way.startswith("TraceGraph"):
        loss: ELBO = TraceGraph_ELBO(particles, max_plate_nesting=1, vectorize_particles=True)
        guide = partial(guide, infer)
    else:
        loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1, baseline="auto" if way == OURS else None)
    svi = SVI(net.model, guide, pyro.optim.ClippedAdam(settings), loss=loss)
    return lambda: svi.step()


def fit(
    seed: int = 0,
    steps: int = 2000,
    progress: Callable[[Progress], None] | None = None,
    *,
    way: str = OURS,
    particles: int = PARTICLES,
    learning_rate: float = 0.05,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Fit the 474 logits, from a uniform guide.

    Args:
        seed: of the particles.
        steps: of the optimiser.
        progress: called 60 times on the way.
        way: one of ``WAYS``.
        particles: N.
        learning_rate: at the start.
        should_stop: asked after every step.

    Raises:
        ValueError: no such way.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(map(repr, WAYS))}, but it is {way!r}.")
    pyro.set_rng_seed(seed)
    net = Survey(load())
    answers = exact(net.returns)
    with pyro.get_param_store().scope():
        step = stepper(net, way, steps, particles, learning_rate)
        curve = watched(step, steps, net.exact_bound, answers.log_evidence, progress, should_stop=should_stop)
    return Fit(net, answers, curve)


def plot(fits: dict[str, Fit], path: Path) -> None:
    """KL against CPU time, and the posterior of n beside the guide's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    way, posterior = figure.subplots(1, 2)
    draw_ways(way, {name: fitted.curve for name, fitted in fits.items()}, seconds=True)
    way.axhline(1e-3, color="grey", linewidth=0.8)
    way.set_ylabel("KL(q || p)")
    net = fits[OURS].net
    posterior.plot(net.numbers, net.log_joint(net.numbers).softmax(-1), color="black", linewidth=3, label="exact")
    posterior.plot(net.numbers, net.parameters.logits.detach().softmax(-1), color="tab:orange", label="guide")
    posterior.set(xlabel="n", ylabel="probability")
    posterior.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Fit, then compare with what is exact; Ctrl-C ends the present fit after its step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=2000)
    parser.add_argument("--particles", type=at_least(2), default=PARTICLES, help="leave-one-out takes two or more")
    parser.add_argument("--compare", action="store_true", help=f"fit also by: {'; '.join(WAYS[1:])}")
    parser.add_argument("--out", type=Path, default=Path("runs/survey"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    fits = dict[str, Fit]()
    with Interruption() as interrupted:
        for way in WAYS if options.compare else WAYS[:1]:
            print(way, flush=True)
            fits[way] = fit(
                options.seed, options.steps, show, way=way, particles=options.particles, should_stop=interrupted
            )
            if interrupted():
                break
    net, answers = fits[OURS].net, fits[OURS].exact
    found = corrected(pyro_log_weights(net.model, net.guide, 20_000, together=20_000))
    print(
        f"\nlog evidence {answers.log_evidence:.9f}; {found}\nn: mean {answers.expected_number:.4f}, median "
        f"{answers.median}, mode {answers.mode}; theta: mean {answers.expected_theta:.6f}"
    )
    for way, fitted in fits.items():
        last, near = fitted.curve[-1], arrival(fitted.curve, 1e-3)
        within = f"below 1e-3 from step {near.step} on, {near.seconds:.2f} s CPU" if near else "never below 1e-3"
        print(f"{way:<34} KL(q || p) {last.gap:.2e} after {last.seconds:5.2f} s CPU; {within}")
    record = {
        "complete": not interrupted(),
        "exact": asdict(answers),
        "corrected": asdict(found),
        "curves": {way: [asdict(point) for point in fitted.curve] for way, fitted in fits.items()},
    }
    write_result(options.out, vars(options), record)
    plot(fits, options.out / "survey.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
