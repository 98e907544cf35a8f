"""Digits as a contextual bandit: ``python -m applications.rl.contextual_bandit``.

A context is a picture of a digit, an action is a guess, and the reward is 1 where it is right: nobody says what would
have been. Each of the contexts of a batch gets ``K`` guesses, and three estimates of the policy gradient are compared:
without baseline, with a value function of the context, and with the mean reward of the other guesses for the same
context. With ten actions the exact gradient is a sum, so that the error of each estimate is known.

Joint estimators make the guesses of a context together: antithetic ones (``ARMS``), different ones (``UnorderedSet``),
or the most probable ones and a sample of the rest (``SumAndSample``). They are measured beside the baselines.

Which of them is least noisy depends on the policy. With rewards of 0 and 1 no baseline at all is hard to beat once most
guesses are right: these have small scores, and the wrong ones, whose scores are large, earn nothing. That is luck: pay
-1 and 0 instead and it is the noisiest of all, while the other two do not notice.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical

import scorefn as sf

BASELINES = ("none", "value function", "leave-one-out")
MEASURED = (*BASELINES, "1")  # subtracting 1 is paying -1 for what is wrong and nothing for what is right
ESTIMATORS: dict[str, Callable[[int], Any]] = {
    "ARMS": sf.ARMS,
    "unordered set": lambda guesses: sf.UnorderedSet(guesses, batch_ndim=1),
    "sum and sample": lambda guesses: sf.SumAndSample(guesses - 1, 1, batch_ndim=1),
}


@dataclass(frozen=True)
class Config:
    """What a run depends on, apart from its seed and baseline."""

    contexts: int = 64  # of each batch
    guesses: int = 4  # K, for each context
    updates: int = 1000
    learning_rate: float = 0.003
    value_learning_rate: float = 0.01
    repeats: int = 200  # estimates of the same gradient, where its variance is measured
    measured_at: tuple[int, ...] = (10, 100, 1000)  # updates


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures ``[n, 64]`` with values in [0, 1] and their classes; every fourth one is for the test."""
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    test = torch.arange(len(x)) % 4 == 3
    return x[~test], y[~test], x[test], y[test]


def network(outputs: int) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def draws_of(policy: nn.Module, x: Tensor, y: Tensor, guesses: int) -> sf.Draws:
    """``guesses`` actions for each of the contexts, which are problems of their own: fx ``[K, B, 1]``."""
    return sf.draw(Categorical(logits=policy(x)), lambda actions: (actions == y).float(), guesses)


def estimate(name: str, policy: nn.Module, x: Tensor, y: Tensor, guesses: int) -> Tensor:
    """The mean reward over the contexts, by one of the joint estimators; its gradient is the estimate."""
    p = Categorical(logits=policy(x))
    value: Tensor = ESTIMATORS[name](guesses)(p, lambda actions: (actions == y).float())
    return value.mean()


def exact_reward(policy: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over the contexts of ``sum_a policy(a | x) reward(x, a)``, differentiable."""
    reward = nn.functional.one_hot(y, 10)
    return (policy(x).softmax(-1) * reward).sum(-1).mean()


def baseline_of(name: str, value: nn.Module, x: Tensor) -> Any:
    """By its name; the value function reads the contexts, for all guesses the same."""
    return {
        "none": lambda: None,
        "value function": lambda: sf.ValueFunction(value, lambda draws: x),
        "leave-one-out": sf.LeaveOneOut,
        "1": lambda: sf.Constant(1.0),
    }[name]()


def flat(value: Tensor, policy: nn.Module) -> Tensor:
    """The gradient in all parameters as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()))])


def gradient_noise(policy: nn.Module, estimated: Callable[[], Tensor], x: Tensor, y: Tensor, config: Config) -> float:
    """``E |estimate - exact|^2 / |exact|^2`` for one batch of contexts, over fresh guesses."""
    exact = flat(exact_reward(policy, x, y), policy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        errors = []
        for _ in range(config.repeats):
            errors.append((flat(estimated(), policy) - exact).square().sum())
    return float(torch.stack(errors).mean() / exact.square().sum())


@dataclass
class Run:
    """What one training gave."""

    accuracy: float  # of the most probable guess, on the test pictures
    sampled: float  # expected reward of a sampled guess there, exactly
    noise: dict[str, list[float]]  # of each baseline and estimator, at the updates where it was measured
    seconds: float


def train(name: str, config: Config = Config(), seed: int = 0) -> Run:
    """Train with one baseline; where asked for, measure the noise that each of them would have for the same policy."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = digits()
    policy, value = network(10), network(1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    value_optimizer = torch.optim.Adam(value.parameters(), lr=config.value_learning_rate)
    noise: dict[str, list[float]] = {other: [] for other in (*MEASURED, *ESTIMATORS)}
    seconds = 0.0
    for update in range(1, config.updates + 1):
        start = time.process_time()
        index = torch.randint(len(x), (config.contexts,))
        draws = draws_of(policy, x[index], y[index], config.guesses)
        baseline = baseline_of(name, value, x[index])
        surrogate = sf.surrogate(draws, baseline=baseline).mean()
        optimizer.zero_grad()
        (-surrogate).backward()
        optimizer.step()
        fitted = sf.ValueFunction(value, lambda draws, x=x[index]: x, optimizer=value_optimizer)
        fitted.update(draws.signal(), draws)  # also where it is not read: it is measured all the same
        seconds += time.process_time() - start
        if update in config.measured_at:
            some = policy, x[:256], y[:256], config.guesses
            for other in MEASURED:
                by = baseline_of(other, value, x[:256])
                by_baseline = lambda by=by, some=some: sf.surrogate(draws_of(*some), baseline=by).mean()  # noqa: E731
                noise[other].append(gradient_noise(policy, by_baseline, x[:256], y[:256], config))
            for other in ESTIMATORS:
                together = lambda other=other, some=some: estimate(other, *some)  # noqa: E731
                noise[other].append(gradient_noise(policy, together, x[:256], y[:256], config))
    with torch.no_grad():
        accuracy = float((policy(x_test).argmax(-1) == y_test).float().mean())
        return Run(accuracy, float(exact_reward(policy, x_test, y_test)), noise, seconds)


def report(runs: dict[str, Run], config: Config) -> str:
    """Two tables in Markdown."""
    lines = [
        "| baseline | test accuracy | expected reward, sampled | training CPU s |",
        "|---|---:|---:|---:|",
        *(f"| {n} | {100 * r.accuracy:.1f} % | {r.sampled:.3f} | {r.seconds:.1f} |" for n, r in runs.items()),
        "",
        "Variance of one estimate, relative to the square of the exact gradient, for the policy of leave-one-out:",
        "",
        f"| baseline or estimator | {' | '.join(f'update {u}' for u in config.measured_at)} |",
        f"|---|{'---:|' * len(config.measured_at)}",
    ]
    noise = runs["leave-one-out"].noise
    return "\n".join(lines + [f"| {n} | {' | '.join(f'{v:.2f}' for v in noise[n])} |" for n in noise])


def main(argv: list[str] | None = None) -> int:
    """Train with each baseline, tabulate; 0 where leave-one-out reads nine digits of ten."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=Config.updates)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    measured = tuple(u for u in Config.measured_at if u <= arguments.updates) or (arguments.updates,)
    config = Config(updates=arguments.updates, measured_at=measured)
    runs = {name: train(name, config, arguments.seed) for name in BASELINES}
    print(report(runs, config))
    return 0 if runs["leave-one-out"].accuracy >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
