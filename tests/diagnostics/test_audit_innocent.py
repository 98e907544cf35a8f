"""What is right is not blamed: a false alarm is a defect of the audit."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
    StudentT,
    TanhTransform,
    TransformedDistribution,
    Uniform,
    VonMises,
)

import scorefn as sf
from scorefn.diagnostics import audit
from scorefn.diagnostics.audits.testing import zero_mean
from scorefn.reducers import (
    Antithetic,
    BlockConstants,
    Constant,
    DeltaMethod,
    LeaveOneOut,
    LinearControlVariate,
    MovingAverage,
    NaturalControlVariate,
    OptimalConstant,
    OrthogonalGaussian,
    RegressionBaseline,
    Sobol,
    Stratified,
    Systematic,
    ValueFunction,
)
from scorefn.reducers import Independent as SeparateDraws

MEAN = torch.linspace(-0.5, 0.5, 4)


def normal() -> tuple[Independent, Tensor]:
    mean = MEAN.clone().requires_grad_()
    return Independent(Normal(mean, 1.0), 1), mean


def square(x: Tensor) -> Tensor:
    return (x - 0.3).square().sum(-1)


# --------------------------------------------------------------------------------------------------------- integrands


class Simulator:
    """Random by a generator of its own, some noise for each draw."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, x: Tensor) -> Tensor:
        return square(x) + torch.randn(x.shape, generator=self.generator).sum(-1)


def looped(x: Tensor) -> list[float]:
    """One draw after the other, each with a number of random numbers that depends on it."""
    return [sum(random.gauss(float(row[0]), 1.0) for _ in range(1 + int(row[0] > 0))) for row in x]


def unrepeatable(x: Tensor) -> Tensor:
    return square(x) + torch.as_tensor(np.random.default_rng().normal(size=len(x)), dtype=x.dtype)


def layers(*parts: nn.Module) -> Callable[[Tensor], Tensor]:
    return nn.Sequential(nn.Linear(4, 32), *parts, nn.Linear(32, 1), nn.Flatten(0))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.unsqueeze(1)).flatten(1).tanh().sum(-1)


DATA = torch.linspace(0.0, 1.0, 8)
WEIGHT = torch.linspace(-1.0, 1.0, 4 * 257).reshape(4, 257)

INTEGRANDS: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
    "square": lambda: square,
    "constant": lambda: lambda x: torch.ones(len(x)),
    "numpy": lambda: lambda x: np.square(x.numpy()).sum(-1),
    "list": lambda: lambda x: [float(row.sum()) for row in x],
    "integers": lambda: lambda x: (x > 0).sum(-1),
    "matmul": lambda: lambda x: (x @ WEIGHT).tanh().sum(-1),
    "matmul that cancels": lambda: lambda x: (100 * x @ WEIGHT).square().sum(-1) - (100 * x @ WEIGHT).norm(dim=-1) ** 2,
    "half precision": lambda: lambda x: (x.bfloat16() @ WEIGHT.bfloat16()).float().sum(-1),
    "convolution": lambda: Convolved(),
    "layer norm": lambda: layers(nn.LayerNorm(32), nn.Tanh()),
    "group norm": lambda: layers(nn.GroupNorm(4, 32), nn.Tanh()),
    "batch norm in eval mode": lambda: layers(nn.BatchNorm1d(32), nn.Tanh()).eval(),
    "dropout": lambda: layers(nn.Dropout(0.5)),
    "dropout in eval mode": lambda: layers(nn.Dropout(0.5)).eval(),
    "double precision within": lambda: lambda x: (x.double() @ WEIGHT.double()).exp().sum(-1).log().float(),
    "random by torch": lambda: lambda x: square(x) + torch.randn(len(x)),
    "random by numpy": lambda: lambda x: square(x) + torch.as_tensor(np.random.normal(size=len(x)), dtype=x.dtype),
    "random by its own generator": Simulator,
    "random in a loop": lambda: looped,
    "random beyond repetition": lambda: unrepeatable,
    "data beside the draws": lambda: lambda x: (x.sum(-1) - DATA).square(),
    "step": lambda: lambda x: (x.sum(-1) > 0).float(),
    "large offset": lambda: lambda x: 1e6 + square(x),
    "under vmap": lambda: torch.vmap(square),
    "without gradient": lambda: torch.no_grad()(square),
    "gradient within": lambda: (
        lambda x: torch.autograd.grad(square(y := x.clone().requires_grad_()).sum(), y)[0].square().sum(-1)
    ),
}


@pytest.mark.parametrize("kind", INTEGRANDS)
def test_integrands_without_fault(kind: str) -> None:
    p, mean = normal()
    report = audit(p, INTEGRANDS[kind](), mean)
    assert report, report
    looked = {**report.checked, **report.unchecked}
    assert "interacting draws" in looked
    assert "values that depend on the number of draws" in looked


def test_noise_that_cannot_be_repeated_is_tested_and_says_so() -> None:
    p, mean = normal()
    report = audit(p, unrepeatable, mean)
    assert report.checked["interacting draws"].startswith("statistical")
    assert "random in a way that cannot be repeated" in report.unchecked["dropped gradient"]


def test_values_that_are_all_the_same_show_nothing() -> None:
    p, mean = normal()
    report = audit(p, lambda x: torch.ones(len(x)), mean)
    assert report
    assert "the same value at every draw" in report.unchecked["interacting draws"]


def test_in_double_precision_and_where_gradients_are_off() -> None:
    mean = MEAN.double().requires_grad_()
    p = Independent(Normal(mean, 1.0), 1)
    with torch.no_grad():
        report = audit(p, square)
        assert not torch.is_grad_enabled()
    assert report, report
    assert audit(p, lambda x: square(x) - 1e-3 * square(x).mean(), mean).findings[0].name == "interacting draws"


def test_data_beside_the_draws_are_mentioned() -> None:
    p, mean = normal()
    report = audit(p, INTEGRANDS["data beside the draws"](), mean)
    assert "takes 8 draws only" in report.unchecked["values that depend on the number of draws"]
    moved = audit(p, lambda x: square(x) * torch.arange(1.0, len(x) + 1), mean)
    assert moved
    assert "depends on its place" in moved.checked["values that depend on the number of draws"]


@pytest.mark.parametrize("kind", ["direct", "score left out", "of a network"])
def test_gradients_that_are_complete(kind: str) -> None:
    mean = MEAN.clone().requires_grad_()
    log_scale = torch.full((4,), 0.1, requires_grad=True)

    def q() -> Independent:
        return Independent(Normal(mean, log_scale.exp()), 1)

    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    f: dict[str, Any] = {
        "direct": lambda x: q().log_prob(x) + square(x),
        "score left out": lambda x: square(x) - q().log_prob(x).detach(),  # the mean of the score is zero
        "of a network": lambda x: network(x).square(),
    }
    params = [mean, log_scale, *network.parameters()]
    report = audit(q(), f[kind], params)
    assert report, report
    assert report.checked["dropped gradient"].startswith("statistical")


def test_problems_that_are_apart() -> None:
    p = Bernoulli(logits=torch.zeros(5, requires_grad=True))
    report = audit(p, lambda x: (x - 0.45).square())
    assert report, report
    assert "interacting problems" in report.checked


# -------------------------------------------------------------------------------------------------- measures

t = torch.tensor


FAMILIES: dict[str, Callable[[Tensor], Distribution]] = {
    "Bernoulli": lambda q: Bernoulli(logits=q),
    "Categorical": lambda q: Categorical(logits=torch.stack([q, -q, 0 * q], -1)),
    "OneHotCategorical": lambda q: OneHotCategorical(logits=torch.stack([q, -q, 0 * q], -1)),
    "Binomial": lambda q: Binomial(5, logits=q),
    "Geometric": lambda q: Geometric(logits=q),
    "Poisson": lambda q: Poisson((q + 1).exp()),
    "NegativeBinomial": lambda q: NegativeBinomial(4.0, logits=q),
    "Normal": lambda q: Normal(q, q.exp()),
    "Laplace": lambda q: Laplace(q, q.exp()),
    "Cauchy": lambda q: Cauchy(q, q.exp()),
    "StudentT": lambda q: StudentT(5.0, q, q.exp()),
    "Gamma": lambda q: Gamma((q + 1).exp(), q.exp()),
    "Beta": lambda q: Beta((q + 1).exp(), 2.0),
    "Dirichlet": lambda q: Dirichlet(torch.stack([q.exp(), q.exp() + 1, 1 + 0 * q], -1)),
    "Exponential": lambda q: Exponential(q.exp()),
    "LogNormal": lambda q: LogNormal(q, 0.5),
    "VonMises": lambda q: VonMises(q, 2.0),
    "MultivariateNormal": lambda q: MultivariateNormal(torch.stack([q, -q], -1), torch.eye(2)),
    "mixture": lambda q: MixtureSameFamily(
        Categorical(logits=torch.stack([q, -q], -1)), Normal(torch.stack([q, q + 2], -1), 1.0)
    ),
    "squashed": lambda q: TransformedDistribution(Normal(q, 0.7), [TanhTransform(cache_size=1)]),
    "Independent": lambda q: Independent(Normal(q, 1.0), 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_what_they_score(family: str) -> None:
    q = t([0.3, -0.2], requires_grad=True)
    p = FAMILIES[family](q)
    size = len(p.event_shape)
    report = audit(p, lambda x: x.tanh().sum(tuple(range(1, 1 + size + len(p.batch_shape)))), q)
    assert report, report


def test_a_softmax_whose_score_is_rounding_only() -> None:
    logits = torch.zeros(1, requires_grad=True)  # one value: the score is zero but for rounding
    assert audit(Categorical(logits=logits + 0.1), lambda x: x.float(), logits)


def test_a_support_that_is_fixed() -> None:
    theta = t(0.4, requires_grad=True)
    wrapped = TransformedDistribution(Uniform(0.0, 1.0), [torch.distributions.PowerTransform(theta.exp())])
    assert audit(wrapped, lambda x: x, theta)


def test_too_skewed_a_score_is_not_called_checked() -> None:
    logit = t(-9.0, requires_grad=True)
    rare = audit(Poisson((logit).exp()), lambda x: x, logit)
    assert rare
    assert "too skewed" in rare.unchecked["scores that do not average to zero"]


# -------------------------------------------------------------------------------------------------------- reducers


def value_function(learning: bool) -> ValueFunction:
    module = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1) if learning else None
    return ValueFunction(module, lambda draws: torch.linspace(0.0, 1.0, len(draws)).unsqueeze(-1), optimizer=optimizer)


def features(draws: sf.Draws) -> Tensor:
    return torch.linspace(0.0, 1.0, len(draws)).reshape(-1, 1, 1)


BASELINES: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "none": lambda: None,
    "leave-one-out": LeaveOneOut,
    "constant": lambda: Constant(0.7),
    "moving average": lambda: MovingAverage(0.5),
    "optimal constant": OptimalConstant,
    "shared constant": lambda: OptimalConstant(shared=True),
    "regression": lambda: RegressionBaseline(features),
    "value function": lambda: value_function(False),
    "value function that learns": lambda: value_function(True),
}
COUPLINGS = {
    "none": None,
    "independent": SeparateDraws(),
    "antithetic": Antithetic(),
    "stratified": Stratified(),
    "systematic": Systematic(2),
    "sobol": Sobol(4),
    "orthogonal": OrthogonalGaussian(),
    "mirrored": OrthogonalGaussian(2, mirrored=True),
}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("kind", BASELINES)
def test_every_baseline_with_every_coupling(kind: str, coupling: str) -> None:
    p, mean = normal()
    report = audit(p, square, mean, baseline=BASELINES[kind](), coupling=COUPLINGS[coupling], repeats=1000)
    assert report, report
    assert "baseline after an update" not in report.unchecked


def test_one_block_has_no_leave_one_out() -> None:
    p, mean = normal()
    report = audit(p, square, mean, coupling=Sobol(8))
    assert report, report
    assert report.unchecked["baseline"] == "none was given."
    assert audit(p, square, mean, coupling=Sobol(8), baseline=MovingAverage())


@pytest.mark.parametrize("kind", ["fitted", "given", "delta", "natural", "blocks"])
def test_every_control_variate(kind: str) -> None:
    p, mean = normal()
    variates: dict[str, Callable[[], Any]] = {
        "fitted": lambda: LinearControlVariate(lambda x: x.sum(-1), lambda: mean.sum()),
        "given": lambda: LinearControlVariate(lambda x: x, lambda: mean * 1.0, coefficient=torch.ones(4)),
        "delta": lambda: DeltaMethod(p, square),
        "natural": lambda: NaturalControlVariate(p),
        "blocks": lambda: BlockConstants([mean]),
    }
    report = audit(p, lambda x: square(x).sin(), mean, control_variate=variates[kind]())
    assert report, report
    assert any("control variate" in name for name in report.checked)


def test_false_alarms_are_as_rare_as_stated() -> None:
    """At one in a hundred, ten thousand tests ring at a rate within its binomial interval."""
    runs = 10_000
    rung = sum(zero_mean(torch.randn(200, 1), 0.01, 0.0).off for _ in range(runs))
    assert abs(rung - 0.01 * runs) <= 4 * math.sqrt(0.01 * 0.99 * runs)
