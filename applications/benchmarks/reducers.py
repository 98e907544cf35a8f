"""What each reducer saves and what it costs: ``python -m applications.benchmarks.reducers --out FILE``.

Variance of a gradient estimate, CPU time, and their product, which is the price of precision, on two problems in closed
form and four larger ones. The estimators of a problem take turns, round by round, on one thread; those with a state are
warmed up on draws that do not count. Intervals are percentiles of a bootstrap over rounds, 95 %.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

import scorefn as sf
from applications.rl import cartpole
from applications.vi import belief_net_training, capture_recapture
from applications.vi.belief_net import BeliefNet
from applications.vi.images import BATCH, Batches

Estimate = Callable[[], Tensor]
"""One gradient, flat."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Problem:
    """One table.

    Args:
        title: its heading.
        about: what is estimated.
        estimates: by name; the first is what ratios are to.
        parts: which coordinates of the gradient are summed to a variance; one column each.
        prepare: called at the start of each round, for what the estimators of a round share; it returns the exact
            gradient, or None where there is none, and the CPU seconds that each estimate would have spent on it.
        repeats: rounds that count, as a multiple of those asked for.
        warm_up: rounds before.
    """

    title: str
    about: str
    estimates: dict[str, Estimate]
    parts: dict[str, slice]
    prepare: Callable[[], tuple[Tensor | None, float]]
    repeats: float = 1.0
    warm_up: int = 40


@dataclass
class Measured:
    """Gradients and times of one estimator."""

    gradients: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure(problem: Problem, repeats: int, warm_up: int) -> tuple[dict[str, Measured], list[Tensor] | None]:
    """Gradients and times by name, interleaved, and the exact gradient of each round."""
    measured = {name: Measured() for name in problem.estimates}
    truths: list[Tensor] = []
    for number in range(-warm_up, repeats):
        truth, shared = problem.prepare()
        for name, estimate in problem.estimates.items():
            begin = time.process_time()
            gradient = estimate()
            spent = time.process_time() - begin + shared
            if number >= 0:
                measured[name].gradients.append(gradient.detach().clone())
                measured[name].seconds.append(spent)
        if number >= 0 and truth is not None:
            truths.append(truth)
    return measured, truths or None


@dataclass(frozen=True)
class Row:
    """One estimator on one problem; a triple is an estimate with its interval.

    Args:
        name: of the estimator.
        variance: by part, summed over its coordinates.
        ratio: by part, of the variance to that of the first estimator.
        error: length of the mean deviation from the exact gradient in its own standard errors, by part; about 1 if
            unbiased, and at most about 3 by chance where a part is one coordinate. Empty without an exact gradient.
        milliseconds: CPU time of an estimate, median.
        time_ratio: of the CPU time to that of the first estimator: median over rounds.
    """

    name: str
    variance: dict[str, tuple[float, float, float]]
    ratio: dict[str, tuple[float, float, float]]
    error: dict[str, float]
    milliseconds: float
    time_ratio: float


def rows(problem: Problem, repeats: int, warm_up: int | None = None) -> list[Row]:
    """Measure a problem.

    Args:
        problem: what to measure.
        repeats: rounds that count.
        warm_up: rounds before; None: as many as the problem asks for.
    """
    measured, truths = measure(problem, repeats, problem.warm_up if warm_up is None else warm_up)
    resamples = torch.randint(repeats, (RESAMPLES, repeats), generator=torch.Generator().manual_seed(0))
    first, found = next(iter(measured)), list[Row]()
    squares = {name: _squares(m, truths, problem.parts) for name, m in measured.items()}
    for name, own in measured.items():
        variance, ratio, error = {}, {}, {}
        for part, square in squares[name].items():
            reference = squares[first][part]
            variance[part] = _interval(square.mean(), square[resamples].mean(1))
            ratio[part] = _interval(
                square.mean() / reference.mean(), square[resamples].mean(1) / reference[resamples].mean(1)
            )
            if truths is not None:
                mean = (torch.stack(own.gradients) - torch.stack(truths))[:, problem.parts[part]].double().mean(0)
                error[part] = float(mean.norm() / (square.mean() / repeats).sqrt())
        times = zip(own.seconds, measured[first].seconds, strict=True)
        found.append(Row(name, variance, ratio, error, 1e3 * median(own.seconds), median(a / b for a, b in times)))
    return found


def _squares(measured: Measured, truths: list[Tensor] | None, parts: dict[str, slice]) -> dict[str, Tensor]:
    """Squared deviation of each round ``[repeats]``: from the exact gradient, or from the mean of the others."""
    gradients = torch.stack(measured.gradients).double()
    if truths is None:
        deviations = (gradients - gradients.mean(0)) * (len(gradients) / (len(gradients) - 1)) ** 0.5
    else:
        deviations = gradients - torch.stack(truths)
    return {part: deviations[:, columns].square().sum(-1) for part, columns in parts.items()}


def _interval(value: Tensor, resampled: Tensor) -> tuple[float, float, float]:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return float(value), low, high


def table(found: list[Row]) -> list[str]:
    """As Markdown."""
    parts, exact = list(found[0].variance), bool(found[0].error)
    heads = ["estimator"]
    for part in parts:
        of = f" of {part}" if len(parts) > 1 else ""
        heads += [f"variance{of}", f"ratio{of}", *(["error"] if exact else [])]
    heads += ["CPU ms", "time ratio", *(f"variance x ms{f' of {part}' if len(parts) > 1 else ''}" for part in parts)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in found:
        cells = [row.name]
        for part in parts:
            cells += [_cell(*row.variance[part]), _cell(*row.ratio[part])]
            cells += [f"{row.error[part]:.2f}"] if exact else []
        cells += [f"{row.milliseconds:.2f}", f"{row.time_ratio:.2f}"]
        cells += [_number(row.variance[part][0] * row.milliseconds) for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: float, low: float, high: float) -> str:
    return f"{_number(value)} ({_number(low)} – {_number(high)})"


def _number(value: float) -> str:
    """Three digits, without an exponent where it can be read without."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits_before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
        if digits_before >= 3:
            return f"{value:,.0f}"
        text = f"{value:.3g}"
        return text if "e" not in text else f"{value:.4f}"
    return f"{value:.2e}"


# -------------------------------------------------------------------------------------------------- plain measures


def flat_gradient(value: Tensor, parameters: Sequence[Tensor], *, keep: bool = False) -> Tensor:
    """Of a scalar, all parameters in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=keep)])


def plain(
    make: Callable[[], Distribution],
    f: Callable[[Tensor], Tensor],
    num_samples: int,
    parameters: Sequence[Tensor],
    *,
    coupling: Any = None,
    baseline: Any = "auto",
    control: Callable[[Distribution], Any] | None = None,
) -> Estimate:
    """``sf.expectation`` of a distribution that is made anew from its parameters; ``control`` is told which it is."""

    def estimate() -> Tensor:
        p = make()
        control_variate = None if control is None else control(p)
        value = sf.expectation(p, f, num_samples, coupling=coupling, baseline=baseline, control_variate=control_variate)
        return flat_gradient(value, parameters)

    return estimate


def pathwise(
    make: Callable[[], Distribution], f: Callable[[Tensor], Tensor], num_samples: int, parameters: Sequence[Tensor]
) -> Estimate:
    """The reparameterised gradient, which needs a differentiable f: what all this is compared with."""
    return lambda: flat_gradient(f(make().rsample((num_samples,))).mean(), parameters)


def learned(control: Any) -> Callable[[Callable[[], Distribution], Any, int, Sequence[Tensor]], Estimate]:
    """An estimate whose control variate is fitted to past draws."""

    def with_draws(make: Any, f: Any, num_samples: int, parameters: Sequence[Tensor]) -> Estimate:
        def estimate() -> Tensor:
            draws = sf.draw(make(), f, num_samples)
            value = sf.surrogate(control(draws), baseline=sf.LeaveOneOut()).mean()
            control.update(draws)
            return flat_gradient(value, parameters)

        return estimate

    return with_draws


def bernoulli(eta: float) -> Problem:
    """Three bits that share one logit, f quadratic: variances known by enumeration."""
    logit = torch.tensor(eta, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.6, 0.51, 0.48], dtype=torch.float64)

    def make() -> Distribution:
        return Independent(Bernoulli(logits=logit.expand(3)), 1)

    def f(x: Tensor) -> Tensor:
        return (x - target).square().sum(-1)

    exact = flat_gradient(sf.diagnostics.exact_expectation(make(), f), [logit])
    value = sf.diagnostics.exact_expectation(make(), f).item()
    arguments = (make, f, 4, [logit])
    total = sf.LinearControlVariate(lambda x: x.sum(-1), lambda: 3 * logit.sigmoid(), coefficient=-0.06)
    return Problem(
        f"Bernoulli, logit {eta:g}",
        "Three bits share one logit, f = sum (b - (.6, .51, .48))^2, 4 draws. By enumeration, leave-one-out has "
        f"{'.0019875' if eta == 0 else '1.82276e-4'}.",
        {
            "leave-one-out": plain(*arguments),
            "no baseline": plain(*arguments, baseline=None),
            "Constant(E f)": plain(*arguments, baseline=sf.Constant(value)),
            "MovingAverage": plain(*arguments, baseline=sf.MovingAverage(0.9)),
            "OptimalConstant": plain(*arguments, baseline=sf.OptimalConstant()),
            "Antithetic": plain(*arguments, coupling=sf.Antithetic()),
            "Stratified": plain(*arguments, coupling=sf.Stratified()),
            "LinearControlVariate(sum x), c given": plain(*arguments, control=lambda p: total),
            "NaturalControlVariate": learned(sf.NaturalControlVariate(make))(*arguments),
        },
        {"the logit": slice(None)},
        lambda: (exact, 0.0),
        repeats=5,
    )


def gaussian() -> Problem:
    """f = x^2 under Normal(1, 1), in the mean: variances known in closed form."""
    mean = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def make() -> Distribution:
        return Normal(mean, 1.0)

    arguments = (make, torch.square, 64, [mean])
    return Problem(
        "Gaussian",
        "d/dm of E x^2, x ~ Normal(m, 1) at m = 1, 64 draws. In closed form, variance x 64 is 30 without baseline, 18 "
        "with E f, 14 with the best constant, 4 pathwise: .469, .281, .219, .0625.",
        {
            "leave-one-out": plain(*arguments),
            "no baseline": plain(*arguments, baseline=None),
            "Constant(E f)": plain(*arguments, baseline=sf.Constant(2.0)),
            "MovingAverage": plain(*arguments, baseline=sf.MovingAverage(0.9)),
            "OptimalConstant": plain(*arguments, baseline=sf.OptimalConstant()),
            "LinearControlVariate(x)": plain(
                *arguments, control=lambda p: sf.LinearControlVariate(lambda x: x, lambda: p.mean)
            ),
            "pathwise, for comparison": pathwise(*arguments),
        },
        {"the mean": slice(None)},
        lambda: (torch.tensor([2.0], dtype=torch.float64), 0.0),
        repeats=5,
    )


def couplings() -> Problem:
    """A Gaussian in three dimensions and an f that is smooth and not additive."""
    mean = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor([0.0, -0.5, 0.3], dtype=torch.float64, requires_grad=True)

    def make() -> Distribution:
        return Independent(Normal(mean, log_scale.exp()), 1)

    def f(x: Tensor) -> Tensor:
        return nn.functional.softplus(x.sum(-1)) + 0.5 * (x - 1).square().sum(-1)

    parameters = [mean, log_scale]
    exact = flat_gradient(sf.diagnostics.exact_expectation(make(), f), parameters)
    arguments = (make, f, 256, parameters)
    coupled = {
        "Antithetic": sf.Antithetic(),
        "Stratified": sf.Stratified(),
        "Stratified(4)": sf.Stratified(4),
        "Systematic": sf.Systematic(),
        "Sobol": sf.Sobol(),
        "OrthogonalGaussian(2)": sf.OrthogonalGaussian(2),
        "OrthogonalGaussian(2, mirrored=True)": sf.OrthogonalGaussian(2, mirrored=True),
    }
    return Problem(
        "Couplings and control variates, Gaussian",
        "f = softplus(x_1 + x_2 + x_3) + |x - 1|^2 / 2 under a normal distribution with three means and three "
        "logarithms of scales, 256 draws; all with leave-one-out, which leaves out whole blocks. Exact gradient by "
        "quadrature.",
        {
            "independent draws": plain(*arguments),
            **{name: plain(*arguments, coupling=coupling) for name, coupling in coupled.items()},
            "OptimalConstant": plain(*arguments, baseline=sf.OptimalConstant()),
            "LinearControlVariate(x)": plain(
                *arguments, control=lambda p: sf.LinearControlVariate(lambda x: x, lambda: p.mean)
            ),
            "DeltaMethod": plain(*arguments, control=lambda p: sf.DeltaMethod(p, f)),
            "NaturalControlVariate": learned(sf.NaturalControlVariate(make))(*arguments),
            "pathwise, for comparison": pathwise(*arguments),
        },
        {"the means": slice(0, 3), "the scales": slice(3, 6)},
        lambda: (exact, 0.0),
    )


# ------------------------------------------------------------------------------------------------- Pyro's programs


def with_pyro(
    loss: ELBO, model: Callable[..., None], guide: Callable[..., None], parameters: Sequence[Tensor], *arguments: Any
) -> Tensor:
    """The gradient of the ELBO as Pyro's SVI would take it."""
    loss.loss_and_grads(model, guide, *arguments)
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for value in pyro.get_param_store().values():
        value.unconstrained().grad = None
    return -gradient


def belief_net(net: BeliefNet, images: Tensor, title: str, particles: int = 8) -> Problem:
    """The encoder's gradient of a sigmoid belief net on batches of 100 digits."""
    encoder, batches, now = list(net.encoder.parameters()), Batches(images, 0), [images[:1]]

    def prepare() -> tuple[Tensor, float]:
        now[0] = next(batches)
        return flat_gradient(net.exact_bound(now[0]).mean(), encoder), 0.0

    def elbo(**options: Any) -> Estimate:
        loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1, **options)

        def estimate() -> Tensor:
            gradient = with_pyro(loss, net.model, net.guide, encoder, now[0]) / net.num_images
            for parameter in net.parameters():
                parameter.grad = None
            return gradient

        return estimate

    scale = net.num_images / BATCH
    value = nn.Sequential(nn.Linear(images.shape[1], 64), nn.Tanh(), nn.Linear(64, 1), Scaled(-20 * scale))
    network = sf.ValueFunction(value, lambda draws: now[0], optimizer=torch.optim.Adam(value.parameters(), lr=1e-2))
    regression = sf.RegressionBaseline(lambda draws: now[0].expand(len(draws), *now[0].shape))
    return Problem(
        f"Digits, {title}",
        f"Sigmoid belief net of `applications/vi/discrete_vae.py`, gradient of the encoder, nats per image, "
        f"{particles} particles; variance about the exact gradient of the same batch of 100 images.",
        {
            "leave-one-out": elbo(),
            "no baseline": elbo(baseline=None),
            "MovingAverage": elbo(baseline=sf.MovingAverage(0.9)),
            "ValueFunction(image)": elbo(baseline=network),
            "RegressionBaseline(image)": elbo(baseline=regression),
            "OptimalConstant": elbo(baseline=sf.OptimalConstant()),
            "AdaptiveRaoBlackwell": elbo(baseline=sf.AdaptiveRaoBlackwell()),
            "Total credit, leave-one-out": elbo(credit=sf.Total()),
        },
        {"the encoder": slice(None)},
        prepare,
        warm_up=200,
    )


class Scaled(nn.Module):
    """Times a number, plus it: outputs of order one become values of the right size."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 1] -> [...]``."""
        return self.scale * (1 + x.squeeze(-1))


def recapture(
    net: capture_recapture.CaptureRecapture, title: str, remark: str = "", *, by_hand: bool = False
) -> Problem:
    """The gradient of capture-recapture in all parameters of its guide."""
    particles = capture_recapture.PARTICLES
    parameters = list(net.parameters.parameters())
    exact = flat_gradient(net.exact_bound(), parameters)

    def elbo(**options: Any) -> Estimate:
        loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1, **options)
        return lambda: with_pyro(loss, net.model, net.guide, parameters)

    class Stated:
        """The draws of plain PyTorch as a measure."""

        def draws(self, f: Any, num_samples: int, *, coupling: Any = None) -> sf.Draws:
            return net.draws(num_samples)

    def drawn(baseline: Any, credit: Any = None) -> Estimate:
        def value() -> Tensor:
            return sf.expectation(Stated(), net.draws, particles, credit=credit, baseline=baseline)

        return lambda: flat_gradient(value(), parameters)

    make: Any = (lambda baseline=None, credit=None: drawn(baseline, credit)) if by_hand else elbo
    return Problem(
        f"Capture-recapture, {title}",
        f"`applications/vi/capture_recapture.py`, {particles} particles, Betas by the score function; exact gradient "
        f"in closed form. Globals: four parameters of two Betas; locals: 150 logits. {remark}",
        {
            "leave-one-out": make(baseline=sf.LeaveOneOut()),
            "AdaptiveRaoBlackwell": make(baseline=sf.AdaptiveRaoBlackwell()),
            "Total credit, leave-one-out": make(baseline=sf.LeaveOneOut(), credit=sf.Total()),
            "no baseline": make(baseline=None),
            "MovingAverage": make(baseline=sf.MovingAverage(0.9)),
            "OptimalConstant": make(baseline=sf.OptimalConstant()),
        },
        {"globals": slice(0, 4), "locals": slice(4, None)},
        lambda: (exact, 0.0),
        repeats=2,
    )


FIRST = (
    "Program order charges the globals with everything that follows, which is the whole log-ratio: near the optimum it "
    "is almost constant, and nothing is left to win."
)
LAST = (
    "Program order charges the globals with log p but not with -log q of the individuals, which had balanced it, and "
    "the individuals with everybody's log p, since the globals between them may have read all. AdaptiveRaoBlackwell "
    "learns to add what was left out; one coefficient cannot take away what others brought in."
)
BY_HAND = (
    "The credit is an `Influence` of what truly depends on what, as a dependency tracker would find it: best for the "
    "individuals, and for the globals worse than no tracking at all until AdaptiveRaoBlackwell adds the rest."
)


def recaptures() -> Iterator[Problem]:
    """Both orders of the guide and the dependencies stated by hand, at the start and at the optimum."""
    histories = capture_recapture.load()
    for stage in ("at the start", "at the optimum"):
        for title, remark, last, by_hand in (
            ("ScoreFunctionELBO, globals sampled first", FIRST, False, False),
            ("ScoreFunctionELBO, globals sampled last", LAST, True, False),
            ("plain PyTorch, dependencies stated by hand", BY_HAND, False, True),
        ):
            net = capture_recapture.CaptureRecapture(histories, globals_last=last)
            if stage == "at the optimum":
                net.to_optimum()
            yield recapture(net, f"{stage}: {title}", remark, by_hand=by_hand)


# ------------------------------------------------------------------------------------------------------- CartPole


def policies(seed: int, config: cartpole.Config) -> dict[str, sf.trajectories.CategoricalPolicy]:
    """The policy when fresh, half-way and near the end of training."""
    states: list[dict[str, Tensor]] = []

    def remember(run: cartpole.Run) -> None:
        states.append({name: value.clone() for name, value in run.policy.state_dict().items()})

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = cartpole.new_run(seed, config).policy.state_dict()
    cartpole.train(seed, config, progress=remember)
    stages = {
        "fresh": fresh,
        f"half-way, after {len(states) // 2} updates": states[len(states) // 2 - 1],
        f"near the end, after {len(states) - 1} updates": states[-2],
    }
    found = {}
    for name, state in stages.items():
        found[name] = cartpole.new_run(seed, config).policy
        found[name].load_state_dict(state)
    return found


def time_and_observations(draws: sf.Draws) -> Tensor:
    """What a value function of CartPole needs to know: the episode ends after 500 steps, ``[N, T, 5]``."""
    observations = draws.context
    steps = torch.arange(observations.shape[1]) / 500.0
    return torch.cat([observations, steps.expand(observations.shape[:2]).unsqueeze(-1)], -1)


def polynomial(draws: sf.Draws) -> Tensor:
    """First and second powers, ``[N, T, 10]``."""
    features = time_and_observations(draws)
    return torch.cat([features, features.square()], -1)


def pole(policy: sf.trajectories.CategoricalPolicy, title: str, episodes: int = 32) -> Problem:
    """The policy gradient; the estimators of a round share its episodes, which are the dearest part."""
    tau = sf.trajectories.TrajectoryDistribution(cartpole.make_env(episodes), policy)
    parameters = list(policy.parameters())
    shared: list[sf.Draws] = []

    def prepare() -> tuple[None, float]:
        begin = time.process_time()
        shared[:] = [sf.draw(tau, sf.trajectories.rewards, episodes)]
        return None, time.process_time() - begin

    def estimate(baseline: Any, credit: Any = None, fit: int = 1) -> Estimate:
        def gradient() -> Tensor:
            draws = shared[0]
            value = sf.surrogate(draws, credit=credit, baseline=baseline).mean()
            if hasattr(baseline, "update"):
                for _ in range(fit):
                    baseline.update(draws.signal(credit), draws)
            return flat_gradient(value, parameters, keep=True)

        return gradient

    def value() -> sf.ValueFunction:
        module = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1), Scaled(100.0))
        return sf.ValueFunction(module, time_and_observations, optimizer=torch.optim.Adam(module.parameters(), lr=1e-2))

    total = sf.Total()
    return Problem(
        f"CartPole, {title}",
        f"Policy of `applications/rl/cartpole.py`, {episodes} episodes an update, all parameters; the estimators of a "
        "round share its episodes, and the time of drawing and scoring them is counted for each.",
        {
            "reward-to-go, leave-one-out": estimate(sf.LeaveOneOut()),
            "reward-to-go, no baseline": estimate(None),
            "reward-to-go, MovingAverage": estimate(sf.MovingAverage(0.9)),
            "reward-to-go, ValueFunction, 4 steps": estimate(value(), fit=4),
            "reward-to-go, RegressionBaseline": estimate(sf.RegressionBaseline(polynomial)),
            "reward-to-go, OptimalConstant": estimate(sf.OptimalConstant()),
            "reward-to-go, AdaptiveRaoBlackwell": estimate(sf.AdaptiveRaoBlackwell()),
            "total, leave-one-out": estimate(sf.LeaveOneOut(), total),
            "total, no baseline": estimate(None, total),
            "total, MovingAverage": estimate(sf.MovingAverage(0.9), total),
            "total, ValueFunction, 4 steps": estimate(value(), total, fit=4),
            "total, OptimalConstant": estimate(sf.OptimalConstant(), total),
        },
        {"the policy": slice(None)},
        prepare,
        repeats=0.5,
        warm_up=80,
    )


# --------------------------------------------------------------------------------------------------------- the page


def problems(*, quick: bool = False) -> Iterator[Problem]:
    """All of them, each made when its turn comes; ``quick`` trains next to nothing."""
    yield bernoulli(0.0)
    yield bernoulli(-4.0)
    yield gaussian()
    yield couplings()
    yield from recaptures()
    for steps in (10, 20) if quick else (100, 5000):
        fitted = belief_net_training.fit(0, steps)
        yield belief_net(fitted.net, fitted.train, f"after {steps} steps")
    config = cartpole.Config(num_samples=8, max_updates=4) if quick else cartpole.Config()
    for title, policy in policies(0, config).items():
        yield pole(policy, title, episodes=4 if quick else 32)


def page(sections: list[str], command: str) -> str:
    """The whole page."""
    packages = "".join(f", {name} {version(name)}" for name in ("pyro-ppl", "gymnasium", "scikit-learn"))
    head = f"""# What each reducer saves

Measured on {date.today()} on a 2-core shared x86-64 machine with one torch thread, in CPU seconds: scorefn
{sf.__version__}, Python {platform.python_version()}, torch {torch.__version__}{packages}. The machine was
busy; ratios within one table are more reliable than absolute times.

    OMP_NUM_THREADS=1 {command}

The variance is that of one estimate, summed over the parameters that are named. The estimators of a table take turns
in every round; what has a state is warmed up on rounds that do not count, with the parameters held, which flatters it:
in training they move. Brackets are 95 % intervals of a bootstrap over rounds. *Ratio* is to the variance of the first
row, *time ratio* to its time, a median over rounds. *Error*, where the exact gradient is known, is the length of the
mean deviation from it in its own standard errors: about 1 if unbiased, up to 3 by chance where there is a single
parameter. *Variance x ms* is the price of precision: the lower the better."""
    return "\n\n".join([head, *sections]) + "\n"


def summary(found: list[tuple[Problem, list[Row]]]) -> str:
    """Of each problem and part, the estimator with the least variance x time, where it is clearly not the first."""
    lines = [
        "## In short",
        "",
        "The least variance x time of each table relative to its first row, which stays where no other is better by",
        "more than its interval.",
        "",
        "| problem | cheapest | variance | CPU time | variance x time |",
        "|---|---|---|---|---|",
    ]
    for problem, (first, *others) in found:
        for part in problem.parts:
            clear = [
                row for row in others if row.ratio[part][2] * row.time_ratio < 1 and not row.name.startswith("pathwise")
            ]
            best = min(clear, key=lambda row: row.ratio[part][0] * row.time_ratio, default=first)
            ratio = best.ratio[part][0]
            of = f", {part}" if len(problem.parts) > 1 else ""
            cells = [_number(ratio), f"{best.time_ratio:.2f}", _number(ratio * best.time_ratio)]
            lines.append(f"| {problem.title}{of} | {best.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


LESSONS = """## What to take from it

* Leave-one-out is the row to beat. `OptimalConstant` is noisier or no better with 4 or 8 draws; with many it pays where
  scores and values go together, as for scales.
* `AdaptiveRaoBlackwell` is worth its time wherever a value that a decision does not influence balances one that it
  does, which is the case of a bound that is nearly tight; elsewhere it costs a tenth and changes little. `Total()` does
  as well for what is global, at twenty times the variance of what is local. In a Pyro guide, sample what is global
  first: program order then charges it with the whole log-ratio, and the individuals with their own factors alone.
* In CartPole the past rewards are known numbers, so that there is nothing for it to learn, except where an episode has
  outlived all others. Reward-to-go saves a third to a half of the variance while episodes end at different times. Near
  the end of training most run to the limit, and all centred estimators are alike.
* Knowing f pays more than any baseline: a quadratic model of it, from its derivatives (`DeltaMethod`) or from past
  draws (`NaturalControlVariate`), leaves a hundredth of the variance where f is smooth.
* Antithetic and orthogonal mirrored draws are for locations, and make scales noisier; Sobol points serve both.
* A value function of the datum loses to leave-one-out where several particles share the datum, and can win where draws
  pass through states that differ."""


def fits(steps: int, report: Callable[[str], None] = print) -> str:
    """Where the fits of capture-recapture end."""
    optimum = capture_recapture.exact(capture_recapture.load()).optimum
    lines = [
        "## Capture-recapture: where a fit ends",
        "",
        f"{steps} steps of ClippedAdam from Beta(2, 2) and fair coins, learning rate .05 decayed to a tenth, "
        f"{capture_recapture.PARTICLES} particles, seed 0: nats below the best bound of the family ({optimum:.6f}), "
        "evaluated in closed form.",
        "",
        "| guide | baseline | after 1/3 | 2/3 | all steps | within .1 nat from step | E[N] | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for guide, options in {
        "globals first": {},
        "globals last": {"globals_last": True},
        "globals first, Betas reparameterised": {"pathwise": True},
    }.items():
        for name, baseline in {"leave-one-out": "auto", "AdaptiveRaoBlackwell": "adaptive"}.items():
            report(f"Fit of capture-recapture, {guide}, {name} ...")
            settings: dict[str, Any] = {"learning_rate": 0.05, "decays_to": 0.1, **options}
            fitted = capture_recapture.fit(0, steps, baseline=baseline, **settings)
            curve = fitted.curve
            gaps = [f"{curve[len(curve) * third // 3 - 1].gap:.3f}" for third in (1, 2, 3)]
            cells = [guide, name, *gaps, str(fitted.steps_within(0.1) or "–"), f"{fitted.net.expected_number():.2f}"]
            lines.append(f"| {' | '.join(cells)} | {curve[-1].seconds:.1f} |")
    return "\n".join(lines)


def section(problem: Problem, found: list[Row], rounds: int) -> str:
    """Heading, what is estimated, the table."""
    return "\n".join([f"## {problem.title}", "", f"{problem.about} {rounds} rounds.", "", *table(found)])


def run(
    repeats: int, *, quick: bool = False, report: Callable[[str], None] = print, only: str = ""
) -> Iterator[tuple[Problem, list[Row], str]]:
    """Problems, their rows and their sections, one after the other.

    Args:
        repeats: rounds; a problem takes a multiple of them.
        quick: a few rounds of everything, to see that it works.
        report: told what comes next.
        only: measure the problems whose title contains this.
    """
    pyro.set_rng_seed(0)
    for problem in problems(quick=quick):
        if only.lower() not in problem.title.lower():
            continue
        rounds = 4 if quick else max(10, round(problem.repeats * repeats))
        report(f"{problem.title}: {rounds} rounds ...")
        with pyro.get_param_store().scope():
            found = rows(problem, rounds, 2 if quick else None)
        yield problem, found, section(problem, found, rounds)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the page where one is asked for; Ctrl-C keeps what is finished."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=400, help="rounds; problems take up to five times as many")
    parser.add_argument("--quick", action="store_true", help="a few rounds of everything, to see that it works")
    parser.add_argument("--only", default="", help="measure only the problems whose title contains this")
    parser.add_argument("--out", type=Path, help="write the page to this Markdown file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sections: list[str] = []
    found: list[tuple[Problem, list[Row]]] = []
    interrupted = False

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        for problem, measured, text in run(options.repeats, quick=options.quick, report=report, only=options.only):
            found.append((problem, measured))
            sections.append(text)
            print(f"{text}\n", flush=True)
        if not options.only:
            sections.append(fits(20 if options.quick else 3000, report))
            print(f"{sections[-1]}\n\n{summary(found)}\n", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print("Stopped; the problems above are complete.", file=sys.stderr)
    if options.out is not None and sections and not interrupted:
        command = f"python -m applications.benchmarks.reducers --repeats {options.repeats} --out {options.out}"
        options.out.write_text(page([summary(found), LESSONS, *sections], command), encoding="utf-8")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
