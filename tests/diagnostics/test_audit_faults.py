"""Every kind of fault is found, by its name, and nothing else is blamed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf
from scorefn.diagnostics import AuditReport, audit
from scorefn.reducers import Antithetic, LinearControlVariate, MovingAverage, ValueFunction


def normal(features: int = 3) -> tuple[Independent, Tensor]:
    mean = torch.linspace(-0.5, 0.5, features).requires_grad_()
    return Independent(Normal(mean, 1.0), 1), mean


def names(report: AuditReport) -> list[str]:
    return [finding.name for finding in report.findings]


def square(x: Tensor) -> Tensor:
    return (x - 0.3).square().sum(-1)


# --------------------------------------------------------------------------------------------------------- interactions


def random_centred(x: Tensor) -> Tensor:
    noise = np.random.default_rng()
    value = square(x)
    return value - value.mean() * 5 + 0.01 * torch.as_tensor(noise.normal(size=len(x)), dtype=x.dtype)


INTERACTING: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)),
    "centred": lambda: lambda x: square(x) - square(x).mean(),
    "standardised": lambda: lambda x: (square(x) - square(x).mean()) / square(x).std(),
    "ranks": lambda: lambda x: square(x).argsort().argsort().float(),
    "sorted": lambda: lambda x: square(x).sort().values,
    "cumulated": lambda: lambda x: square(x).cumsum(0),
    "clipped at a quantile": lambda: lambda x: square(x).clamp(max=float(square(x).quantile(0.5))),
    "numpy": lambda: lambda x: square(x).numpy() - square(x).numpy().mean(),
    "large offset": lambda: lambda x: 1e4 + square(x) - square(x).mean(),
    "neighbours": lambda: lambda x: square(x) + 0.1 * square(x).roll(1),
    "softmax over draws": lambda: lambda x: square(x).softmax(0),
    "random as well": lambda: lambda x: square(x) - square(x).mean() + torch.randn(len(x)),
    "noise that cannot be repeated": lambda: random_centred,
}


@pytest.mark.parametrize("kind", INTERACTING)
def test_draws_that_interact(kind: str) -> None:
    p, mean = normal()
    report = audit(p, INTERACTING[kind](), mean)
    assert names(report) == ["interacting draws"]
    assert not report


def test_draws_that_interact_in_a_record() -> None:
    class Pairs:
        """A measure of pytrees."""

        def __init__(self, mean: Tensor) -> None:
            self.p = Normal(mean, 1.0)

        def sample(self, shape: torch.Size) -> dict[str, Tensor]:
            return {"a": self.p.sample(shape), "b": torch.randn(shape)}

        def log_prob(self, x: dict[str, Tensor]) -> Tensor:
            return self.p.log_prob(x["a"])

    p = Pairs(torch.tensor(0.5, requires_grad=True))
    assert names(audit(p, lambda x: x["a"] - x["a"].max() * x["b"])) == ["interacting draws"]


def test_problems_that_interact() -> None:
    p = Bernoulli(logits=torch.zeros(3, requires_grad=True))
    report = audit(p, lambda x: x - x.mean(-1, keepdim=True))
    assert names(report) == ["interacting problems"]
    assert report.findings[0].evidence["largest difference"] > 0.3


def test_a_value_that_is_divided_by_the_number_of_draws() -> None:
    p, mean = normal()
    report = audit(p, lambda x: square(x) / len(x), mean)
    assert names(report) == ["values that depend on the number of draws"]


def test_draws_changed_where_torch_cannot_see_it() -> None:
    p, mean = normal()

    def f(x: Tensor) -> Tensor:
        values = square(x)
        x.numpy()[:] = 0.0
        return values

    assert names(audit(p, f, mean)) == ["draws changed in place"]


# ----------------------------------------------------------------------------------------------------- direct gradients


@pytest.mark.parametrize("kind", ["item", "no_grad", "detach", "numpy", "one of two parts"])
def test_a_gradient_that_is_dropped(kind: str) -> None:
    p, mean = normal()
    weight = torch.tensor([1.0, 2.0], requires_grad=True)

    def f(x: Tensor) -> Tensor:
        if kind == "item":
            return square(x) * weight[0].item()
        if kind == "no_grad":
            with torch.no_grad():
                return square(x) * weight.sum()
        if kind == "detach":
            return square(x) * weight.detach().prod()
        if kind == "numpy":
            return torch.as_tensor(square(x).numpy() * weight.detach().numpy().sum())
        return square(x) * weight.sum() + weight.detach().square().sum()

    report = audit(p, f, [mean, weight])
    assert names(report) == ["dropped gradient"]
    assert "parameter 1 of shape (2,)" in report.findings[0].fact


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x: x.sum(-1, keepdim=True), "squeeze"),
        (lambda x: x.sum(), "f returned shape ()"),
        (lambda x: x.sum(-1).log(), "f is"),
        (lambda x: x.add_(1.0).sum(-1), "in place"),
        (lambda x: "many", "one real number per draw"),
    ],
)
def test_what_an_estimate_would_refuse_is_a_finding(f: Callable[[Tensor], Any], words: str) -> None:
    p, mean = normal()
    report = audit(p, f, mean)
    assert names(report) == ["refused"]
    assert words in report.findings[0].fact


def test_a_distribution_without_gradient_is_a_finding() -> None:
    report = audit(Normal(torch.zeros(()), 1.0), lambda x: x)
    assert names(report) == ["refused"]
    assert "scores" in report.unchecked


# ------------------------------------------------------------------------------------------------------------ reducers


class BatchMean:
    unbiased = True

    def __call__(self, signal: Tensor, draws: sf.Draws) -> Tensor:
        return signal.mean(0, keepdim=True).expand(signal.shape)


class BlindLeaveOneOut:
    """Leaves out the draw, not its block."""

    unbiased = True

    def __call__(self, signal: Tensor, draws: sf.Draws) -> Tensor:
        return (signal.sum(0) - signal) / (len(signal) - 1)


class UpdatedFirst(MovingAverage):
    def __call__(self, signal: Tensor, draws: sf.Draws) -> Tensor:
        self.update(signal, draws)
        return super().__call__(signal, draws)


class OwnScore:
    unbiased = True

    def __call__(self, signal: Tensor, draws: sf.Draws) -> Tensor:
        return draws.log_prob.detach()


class Learned(BatchMean):
    """Independent until it has learned."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, signal: Tensor, draws: sf.Draws) -> Tensor:
        return super().__call__(signal, draws) if self.seen else torch.zeros_like(signal)

    def update(self, signal: Tensor, draws: sf.Draws) -> None:
        self.seen = True


OWN: dict[str, tuple[Callable[[], Any], Any]] = {
    "batch mean": (BatchMean, None),
    "its own features": (lambda: ValueFunction(nn.Linear(3, 1), lambda draws: draws.x), None),
    "leave-one-out in spite of blocks": (BlindLeaveOneOut, Antithetic()),
    "its own log-probability": (OwnScore, None),
    "after an update": (Learned, None),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_baseline_of_its_own_draw(kind: str) -> None:
    p, mean = normal()
    make, coupling = OWN[kind]
    assert names(audit(p, square, mean, baseline=make(), coupling=coupling)) == ["baseline of its own draw"]


def test_a_moving_average_that_is_updated_before_it_is_read() -> None:
    p, mean = normal()
    found = names(audit(p, square, mean, baseline=UpdatedFirst()))
    assert found == ["baseline that reading changes", "baseline of its own draw"]


def test_a_baseline_that_does_not_fit() -> None:
    p, mean = normal()
    report = audit(p, square, mean, baseline=lambda signal, draws: signal[:2])
    assert names(report) == ["baseline that is refused"]


class Bandit:
    """A context, and an action that depends on it: a draw of two parts."""

    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    def sample(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        context = torch.randn(shape)
        return context, Normal(self.slope.detach() * context, 1.0).sample()

    def log_prob(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return Normal(self.slope * x[0], 1.0).log_prob(x[1])


@pytest.mark.parametrize("kind", ["context", "action"])
def test_a_baseline_of_one_of_several_parts(kind: str) -> None:
    """What was known before the action is no fault, though it belongs to the draw."""
    module = nn.Linear(1, 1)
    nn.init.ones_(module.weight)
    part = ["context", "action"].index(kind)
    baseline = ValueFunction(module, lambda draws: draws.x[part].abs().clamp(max=1.0).unsqueeze(-1))
    slope = torch.tensor(0.7, requires_grad=True)
    report = audit(Bandit(slope), lambda x: (x[0] - x[1]).square(), slope, baseline=baseline, num_samples=128)
    assert names(report) == ([] if kind == "context" else ["baseline of its own features"])
    assert kind == "action" or "baseline of its own features" in report.checked


class OwnCoefficient:
    """c fitted on the same draws."""

    unbiased = True

    def __call__(self, draws: sf.Draws) -> sf.Draws:
        h = draws.x.sum(-1).reshape(draws.fx.shape)
        c = (draws.fx.detach() * h).mean() / h.square().mean()
        return sf.Draws(draws.x, draws.log_prob, draws.fx - c * h)


def test_a_control_variate_of_its_own_draw() -> None:
    mean = torch.zeros(3, requires_grad=True)
    p = Independent(Normal(mean, 1.0), 1)
    assert names(audit(p, square, mean, control_variate=OwnCoefficient()))[0] == "control variate of its own draw"


@pytest.mark.parametrize("kind", ["wrong value", "numbers that move", "of another parameter"])
def test_an_expectation_of_h_that_is_wrong(kind: str) -> None:
    p, mean = normal()
    constant = float(mean.detach().sum())
    strange = torch.tensor(constant, requires_grad=True)
    expected: dict[str, Any] = {
        "wrong value": lambda: mean.sum() + 0.5,
        "numbers that move": constant,
        "of another parameter": lambda: strange * 1.0,
    }
    cv = LinearControlVariate(lambda x: x.sum(-1), expected[kind], coefficient=0.7)
    assert names(audit(p, square, mean, control_variate=cv)) == ["expectation of the control variate"]
