"""The report, what an audit leaves behind (nothing), and what it refuses."""

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import scorefn as sf
from scorefn.diagnostics import AuditReport, Finding, audit
from scorefn.reducers import Constant, MovingAverage, NaturalControlVariate, ValueFunction


def normal() -> tuple[Independent, Tensor]:
    mean = torch.linspace(-0.5, 0.5, 3).requires_grad_()
    return Independent(Normal(mean, 1.0), 1), mean


def square(x: Tensor) -> Tensor:
    return (x - 0.3).square().sum(-1)


# --------------------------------------------------------------------------------------------------------- the report


def test_a_report_without_findings() -> None:
    p, mean = normal()
    report = audit(p, square, mean)
    assert report
    assert report.findings == ()
    assert set(report.checked) == {
        "draws changed in place",
        "interacting draws",
        "values that depend on the number of draws",
        "dropped gradient",
        "scores that do not average to zero",
        "baseline that reading changes",
        "baseline of its own draw",
    }
    assert set(report.unchecked) == {
        "probabilities that do not add up to one",
        "control variate",
        "behaviour log-probability",
        "claimed dependencies",
    }
    assert str(report).startswith("0 finding(s)\nchecked\n  - draws changed in place: ")


def test_a_report_with_a_finding_says_fact_reason_repair_and_numbers() -> None:
    finding = Finding("trouble", "It is so.", "It matters.", "Do this.", {"size": 0.25})
    report = AuditReport((finding,), {}, {"more": "nobody asked."})
    assert not report
    assert str(report) == (
        "1 finding(s)\n  1. trouble: It is so. It matters. Do this. [size 0.25]\nnot checked\n  - more: nobody asked."
    )


def test_what_was_found_has_not_passed() -> None:
    p, mean = normal()
    report = audit(p, lambda x: x.sum(-1) - x.sum(-1).mean(), mean)
    assert not {finding.name for finding in report.findings} & set(report.checked)


def test_an_audit_is_reproducible() -> None:
    p, mean = normal()
    torch.manual_seed(3)
    first = str(audit(p, square, mean))
    assert str(audit(p, square, mean)) == first  # the generators are where they were


def test_small_changes_of_a_mean_are_within_the_stated_size() -> None:
    """A score whose mean is twice what the report says would have been found is found."""
    theta = torch.tensor(0.2, requires_grad=True)
    shift = torch.zeros(())

    class Shifted:
        def sample(self, shape: torch.Size) -> Tensor:
            return Normal(theta.detach() + shift, 1.0).sample(shape)

        def log_prob(self, x: Tensor) -> Tensor:
            return Normal(theta, 1.0).log_prob(x)

    text = audit(Shifted(), lambda x: x * 1.0).checked["scores that do not average to zero"]
    shift += 2 * float(text.split("mean score of ")[1].split(" ")[0])
    assert not audit(Shifted(), lambda x: x * 1.0)


# ----------------------------------------------------------------------------------------------- what is left behind


class Everything:
    """An f with all that a call may change."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Dropout(0.5), nn.Flatten(0))
        self.module[1].weight.grad = torch.full((1, 3), 0.5)
        self.own = torch.Generator().manual_seed(7)
        self.numpy = np.random.default_rng(3)
        self.running = np.zeros(2)
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyError("the simulator is down")
        self.running[0] += 1.0
        self.module[1].weight.grad.add_(1.0)
        noise = torch.randn(len(x), generator=self.own) + float(self.numpy.normal()) + random.random()
        value = self.module(x) + noise + float(np.random.normal()) + torch.randn(len(x))
        self.module.eval() if self.calls % 3 == 0 else self.module.train()
        return value

    def state(self) -> bytes:
        tensors = {name: part.detach().numpy().tobytes() for name, part in self.module.state_dict().items()}
        grad = self.module[1].weight.grad.numpy().tobytes()
        generators = (self.own.get_state().numpy().tobytes(), self.numpy.bit_generator.state)
        modes = [part.training for part in self.module.modules()]
        return pickle.dumps((tensors, grad, generators, modes, self.running.tobytes()))


def global_state() -> bytes:
    return pickle.dumps((torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()))


def learned_state(learner: Any) -> bytes:
    if isinstance(learner, ValueFunction):
        parts = [*learner.module.state_dict().values(), *(q.grad for q in learner.module.parameters())]
        assert learner.optimizer is not None
        steps = [state["step"] for state in learner.optimizer.state.values()]
        return pickle.dumps([None if part is None else part.detach().numpy().tobytes() for part in [*parts, *steps]])
    return pickle.dumps({name: str(value) for name, value in vars(learner).items() if name != "measure"})


def learners() -> dict[str, Any]:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    return {
        "moving average": MovingAverage(),
        "value function": ValueFunction(module, lambda draws: torch.ones(len(draws), 2), optimizer=optimizer),
    }


@pytest.mark.parametrize("kind", ["moving average", "value function"])
@pytest.mark.parametrize("fail_at", [None, 1, 2, 3, 6, 9, 12])
def test_everything_is_left_as_it_was(kind: str, fail_at: int | None) -> None:
    p, mean = normal()
    mean.grad = torch.tensor([1.0, 2.0, -0.0])
    f, learner = Everything(fail_at), learners()[kind]
    learner.update(torch.randn(8, 1), sf.draw(p, square, 8))
    held, bits = mean.grad, mean.detach().numpy().tobytes()
    before = (f.state(), learned_state(learner), global_state(), mean.grad.numpy().tobytes())
    loss = sf.expectation(p, square, 4)  # a graph that has saved the parameters
    before = (*before[:2], global_state(), before[3])
    if fail_at is None:
        audit(p, f, [mean, *f.module.parameters()], baseline=learner)
    else:
        with pytest.raises(KeyError, match="simulator"):
            audit(p, f, [mean, *f.module.parameters()], baseline=learner)
    assert mean.grad is held
    assert (f.state(), learned_state(learner), global_state(), held.numpy().tobytes()) == before
    assert mean.detach().numpy().tobytes() == bits
    loss.backward()  # no version of a parameter has moved


def test_parameters_that_f_depends_on_are_put_back() -> None:
    p, mean = normal()
    weight = torch.tensor([-0.0, 1e-30, 3.0], requires_grad=True)
    bits, place, version = weight.detach().numpy().tobytes(), weight.data_ptr(), weight._version
    y = weight.square().sum()
    audit(p, lambda x: square(x) + (x * weight).sum(-1), [mean, weight])
    assert (weight.detach().numpy().tobytes(), weight.data_ptr(), weight._version) == (bits, place, version)
    y.backward()


def test_parameters_are_put_back_when_f_fails_beside_them() -> None:
    p, mean = normal()
    weight = torch.tensor(1.0, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        if weight.item() != 1.0:
            raise KeyError("off the path")
        return square(x) * weight

    report = audit(p, f, [mean, weight])
    assert report.unchecked["dropped gradient"] == "f fails beside the present parameters (KeyError)."
    assert weight.item() == 1.0


def test_a_control_variate_that_learns_is_left_as_it_was() -> None:
    p, mean = normal()
    cv = NaturalControlVariate(p)
    cv.update(sf.draw(p, square, 16))
    before = learned_state(cv)
    assert audit(p, square, mean, control_variate=cv)
    assert learned_state(cv) == before


# ------------------------------------------------------------------------------------------------ structured measures


class Chain:
    """Two steps of a Markov chain of bits, the second with the first as its observation."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def draws(self, f: Any, num_samples: int, *, coupling: Any = None) -> sf.Draws:
        first = Bernoulli(logits=self.logits[0].detach()).sample((num_samples,))
        second = Bernoulli(logits=(self.logits[1] * (1 + first)).detach()).sample()
        log_prob = torch.stack(
            [
                Bernoulli(logits=self.logits[0]).log_prob(first),
                Bernoulli(logits=self.logits[1] * (1 + first)).log_prob(second),
            ],
            -1,
        )
        x = torch.stack([first, second], -1)
        context = torch.stack([torch.zeros_like(first), first], -1).unsqueeze(-1)
        return sf.Draws(x, log_prob, f(x), credit=sf.RewardToGo(), context=context)


@pytest.mark.parametrize("kind", ["auto", "context", "constant", "own draw", "later context"])
def test_structured_measures(kind: str) -> None:
    logits = torch.tensor([0.3, -0.4], requires_grad=True)
    module = nn.Linear(1, 1)
    baselines: dict[str, Any] = {
        "auto": "auto",
        "context": ValueFunction(module),
        "constant": Constant(0.3),
        "own draw": ValueFunction(module, lambda draws: draws.x.unsqueeze(-1)),
        "later context": ValueFunction(module, lambda draws: draws.context.flip(1)),
    }
    report = audit(Chain(logits), lambda x: x * 2.0, logits, num_samples=64, baseline=baselines[kind])
    fault = ["baseline of its own draw"] if kind in {"own draw", "later context"} else []
    assert [finding.name for finding in report.findings] == fault
    assert report.checked["scores that do not average to zero"].startswith("statistical, 4096 terms")


def test_structured_measures_whose_draws_interact() -> None:
    logits = torch.tensor([0.3, -0.4], requires_grad=True)
    report = audit(Chain(logits), lambda x: x - x.mean(0))
    assert [finding.name for finding in report.findings] == ["interacting draws"]


# ------------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p": 3}, "p=3 is not a measure"),
        ({"p": Normal}, "is not a measure"),
        ({"f": 3.0}, "f=3.0 cannot be called"),
        ({"params": [torch.zeros(2)]}, r"params\[0\] does not require grad"),
        ({"params": [3]}, r"params\[0\] is a int"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"num_samples": 2.5}, "num_samples must be an integer"),
        ({"coupling": 2}, "coupling=2 is no coupling"),
        ({"baseline": "mean"}, "baseline='mean' cannot be called"),
        ({"baseline": MovingAverage}, "cannot be called"),
        ({"control_variate": 1}, "control_variate=1 cannot be called"),
        ({"draws": torch.zeros(3)}, "draws must be a scorefn.Draws, but it is a Tensor"),
        ({"behaviour": 1}, "behaviour=1 is not a measure"),
        ({"program": lambda ledger: None}, "program and claimed belong together"),
        ({"claimed": torch.ones(1, 1, dtype=torch.bool)}, "program and claimed belong together"),
        ({"program": lambda ledger: None, "claimed": torch.ones(1, 1)}, "claimed must be a bool tensor"),
        ({"repeats": 0}, "repeats must be an integer of at least 1"),
        ({"trials": 0}, "trials must be an integer of at least 1"),
        ({"false_alarm": 1.5}, "false_alarm is a probability"),
    ],
)
def test_arguments_that_cannot_play_their_part(change: dict[str, Any], words: str) -> None:
    p, mean = normal()
    given: dict[str, Any] = {"p": p, "f": square, "params": mean} | change
    state = global_state()
    with pytest.raises(sf.ScorefnError, match=words):
        audit(**given)
    assert global_state() == state


def test_a_structure_of_another_shape() -> None:
    p, mean = normal()

    def program(ledger: Any) -> None:
        ledger.value("v", ledger.decision("d", torch.randn(()), given=()))

    with pytest.raises(sf.ShapeError, match="claimed has shape"):
        audit(p, square, mean, program=program, claimed=torch.ones(2, 2, dtype=torch.bool))


def test_not_inside_a_transform() -> None:
    def inside(q: Tensor) -> Tensor:
        audit(Categorical(logits=q), lambda x: x.float())
        return q.sum()

    with pytest.raises(sf.ScorefnError, match="call it outside"):
        torch.func.grad(inside)(torch.zeros(3))
