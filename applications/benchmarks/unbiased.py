"""Do the tests of ``check_unbiased`` keep their word: false alarms at their rate, and 1 % of bias found.

    OMP_NUM_THREADS=1 python -m applications.benchmarks.unbiased --out runs/unbiased

Calibration: every sampling test judges simulated runs of estimates without bias, at a false-alarm rate of alpha: normal
ones, rare events within the guard n p >= 1000, and leave-one-out gradients drawn from their exact law. Detection: on
every toy, estimators as they are, and with one coordinate of the gradient 1 % too long. Mutations: mistakes that are
often made. The exact answer beside: the sizes of the biases by enumeration.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Gamma, Independent, LogNormal, Normal, Poisson

import scorefn as sf
from applications.arguments import at_least
from applications.benchmarks.false_alarms import calibration_cases, false_alarms
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.diagnostics import Estimation, Sequential, UnbiasedReport, check_unbiased

# --------------------------------------------------------------------------------------------------------- detection


@dataclass(frozen=True)
class Toy:
    """A problem: p from its parameters, f, the parameters, and the estimators to check."""

    name: str
    build: Callable[[Tensor], Any]
    f: Callable[[Tensor], Tensor]
    params: Tensor
    estimators: tuple[Any, ...]

    def nudged(self, share: float) -> Callable[[Any], Any]:
        """p whose gradient in the first parameter is longer by a share; its draws and values are the same."""
        first = torch.zeros_like(self.params)
        first.view(-1)[0] = share

        def longer(p: Any) -> Any:
            q = self.build(self.params + first * (self.params - self.params.detach()))
            return Estimation(q, self.f, sf.DisARM()).at(p.sample).p

        return longer


def own(options: dict[str, Any]) -> Callable[[Any, Any], Tensor]:
    """A user's function, of which nothing is known."""
    return lambda p, f: sf.expectation(p, f, **options)


def spoiled(estimator: Any, nudge: Callable[[Any], Any]) -> Any:
    """The estimator with a gradient that is wrong in one coordinate, and the same draws."""
    if not isinstance(estimator, dict):

        class Spoiled(type(estimator)):  # type: ignore[misc]
            __call__ = sf.DisARM.__call__  # sample, then surrogate; some have a shorter way, which would pass by it

            def surrogate(self, p: Any, x: Tensor, fx: Tensor) -> Tensor:
                return super().surrogate(nudge(p), x, fx)

        other = object.__new__(Spoiled)
        other.__dict__.update(vars(estimator))
        return other
    return lambda p, f: sf.expectation(nudge(p), f, **estimator)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def toys() -> Iterator[Toy]:
    """The anchors, and families of which nothing can be enumerated."""
    loo, bare = {"num_samples": 2}, {"num_samples": 2, "baseline": None}
    targets = torch.tensor([0.6, 0.51, 0.48], dtype=torch.float64)
    for p in (0.5, 0.3, 0.1):
        logit = leaf(float(torch.logit(torch.tensor(p, dtype=torch.float64))))
        yield Toy(f"A, p = {p}", lambda q: Independent(Bernoulli(logits=q), 1), lambda x: x[..., 0], logit,
                  (loo, bare, sf.DisARM()))  # fmt: skip
    for eta in (0.0, -4.0):
        yield Toy(f"B, eta = {eta:g}", lambda q: Independent(Bernoulli(logits=q.expand(3)), 1),
                  lambda x: (x - targets).square().sum(-1), leaf(eta),
                  (loo, {"num_samples": 4}, sf.UnorderedSet(3), sf.DisARM(), sf.LocalExpectation()))  # fmt: skip
    for p in (0.5, 0.3, 0.1):
        logits = torch.full((200,), float(torch.logit(torch.tensor(p, dtype=torch.float64))), dtype=torch.float64)
        yield Toy(f"C, p = {p}", lambda q: Bernoulli(logits=q), lambda x: (x - 0.499).square().mean(-1),
                  logits.requires_grad_(), (loo, sf.DisARM()))  # fmt: skip
    yield Toy("D", lambda q: Independent(Normal(q, torch.ones_like(q)), 1), lambda x: x[..., 0].square(), leaf(1.0),
              (loo, bare))  # fmt: skip
    two = leaf(0.3, -0.2)
    yield Toy("Gamma", lambda q: Independent(Gamma(2 + 0 * q.detach(), q.exp()), 1), lambda x: x.sum(-1).sqrt(), two,
              (loo, bare))  # fmt: skip
    yield Toy("Poisson", lambda q: Independent(Poisson(2 * q.exp()), 1), lambda x: (x[..., 0] - 2 * x[..., 1]).tanh(),
              two, (loo, bare))  # fmt: skip
    yield Toy("LogNormal", lambda q: Independent(LogNormal(q, torch.full_like(q, 0.5)), 1),
              lambda x: x.prod(-1).log1p(), two, (loo, bare))  # fmt: skip


def title(estimator: Any) -> str:
    if isinstance(estimator, dict):
        return ("no baseline" if "baseline" in estimator else "leave-one-out") + f"({estimator['num_samples']})"
    return repr(estimator)


def measured(subject: tuple[Any, ...], params: Tensor, most: int) -> tuple[UnbiasedReport, float]:
    """The default; where the estimate had to be sampled and was not decided, the sequential test."""
    begin = time.process_time()
    report = check_unbiased(subject, params=params)
    if report.verdict == "inconclusive" and report.method != "exact":
        report = check_unbiased(subject, params=params, test=Sequential(most, 4000, 4000))
    return report, time.process_time() - begin


def detection(toy: Toy, estimator: Any, most: int) -> dict[str, Any]:
    p = toy.build(toy.params)
    right = own(estimator) if isinstance(estimator, dict) else estimator
    row: dict[str, Any] = {"toy": toy.name, "estimator": title(estimator)}
    for name, one in (("right", right), ("wrong", spoiled(estimator, toy.nudged(0.01)))):
        report, seconds = measured((p, toy.f, one), toy.params, most)
        row[name] = {"verdict": report.verdict, "method": report.method, "repeats": report.repeats, "seconds": seconds,
                     "largest_bias": report.largest_bias, "snr": report.signal_to_noise}  # fmt: skip
    return row


# --------------------------------------------------------------------------------------------------------- mutations


class Unblocked:
    """Antithetic pairs that do not say that they are pairs: the baseline of a draw sees the draw in its partner."""

    unbiased = True

    def sample(self, p: Any, num_samples: int) -> tuple[Tensor, None]:
        return sf.Antithetic().sample(p, num_samples)[0], None


def log_prob(p: Any, x: Tensor) -> Tensor:
    return p.log_prob(x).reshape(len(x), -1).sum(1)


def self_including(p: Any, f: Any) -> Tensor:
    x = p.sample((4,))
    fx = f(x)
    return ((fx - fx.mean()).detach() * log_prob(p, x)).mean()


def one_over_n(p: Any, f: Any) -> Tensor:
    """The covariance of value and score divided by n, where n - 1 is right."""
    x = p.sample((4,))
    fx, score = f(x), log_prob(p, x)
    return ((fx - fx.mean()).detach() * (score - score.mean())).sum() / 4


def whitened(p: Any, f: Any) -> Tensor:
    x = p.sample((4,))
    fx = f(x)
    return ((fx - fx.mean()) / (fx.std() + 1e-8) * log_prob(p, x)).mean()


def broadcast(p: Any, f: Any) -> Tensor:
    """[N] times [N, 1]."""
    x = p.sample((4,))
    return (f(x) * log_prob(p, x).unsqueeze(1)).mean()


def fitted_to_its_draws(p: Any, f: Any) -> Tensor:
    """The best constant, from the draws that it is used for."""
    x = p.sample((4,))
    fx, score = f(x), log_prob(p, x)
    weight = (x.reshape(4, -1).double() - x.double().mean()).square().sum(1) + 1e-8
    return ((fx - (weight * fx).sum() / weight.sum()).detach() * score).mean()


def paired(p: Any, f: Any) -> Tensor:
    return sf.expectation(p, f, 4, coupling=Unblocked())


MUTATIONS = {
    "mean with its own draw": self_including,
    "1/n for 1/(n - 1)": one_over_n,
    "divided by the deviation": whitened,
    "leave-one-out over antithetic pairs": paired,
    "[N] x [N, 1]": broadcast,
    "constant fitted to the same draws": fitted_to_its_draws,
}


def mutation(name: str, most: int) -> list[dict[str, Any]]:
    """The mistake on a toy that can be enumerated and on one that cannot."""
    rows = []
    coin = next(t for t in toys() if t.name == "B, eta = 0")
    for toy, params in ((coin, leaf(0.4)), (next(t for t in toys() if t.name == "Poisson"), None)):
        q = toy.params if params is None else params
        report, seconds = measured((toy.build(q), toy.f, MUTATIONS[name]), q, most)
        rows.append({"mutation": name, "toy": toy.name.split(",")[0], "verdict": report.verdict,
                     "method": report.method, "repeats": report.repeats, "seconds": seconds,
                     "largest_bias": report.largest_bias})  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------- program


PARTS = ("mutations", "detection", "calibration")


def run(parts: Sequence[str], runs: int, alpha: float, most: int, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """The tables, or as much of them as there was time for."""
    record: dict[str, Any] = {name: [] for name in PARTS}
    work: list[tuple[str, Callable[[], Any]]] = []
    work += [("mutations", partial(mutation, name, most)) for name in MUTATIONS]
    work += [("detection", partial(detection, toy, one, most)) for toy in toys() for one in toy.estimators]
    work += [("calibration", partial(false_alarms, case, runs, alpha)) for case in calibration_cases()]
    work = [(part, task) for part, task in work if part in parts]
    for number, (table, task) in enumerate(work, 1):
        found = task()
        record[table] += found if isinstance(found, list) else [found]
        show_line(f"{number} of {len(work)}: {record[table][-1]}", last=number == len(work))
        if should_stop():
            break
    return record


def table(record: dict[str, Any]) -> str:
    """The three tables in Markdown."""
    lines = ["| law | test | rows | runs | alarms | interval | seen as too skewed | CPU s |", "|---" * 8 + "|"]
    for r in record["calibration"]:
        low, high = r["interval"]
        lines.append(f"| {r['law']} | `{r['test']}` | {r['rows']} | {r['runs']} | {r['alarms']} | {low} to {high} "
                     f"| {r['guarded']} | {r['seconds']:.0f} |")  # fmt: skip
    lines += ["", "| toy | estimator | SNR | right: verdict, bias at most | method, repeats, CPU s | 1 % too long: "
              "verdict | method, repeats, CPU s |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in record["detection"]:
        a, b = r["right"], r["wrong"]
        how = [f"{x['method']}, {x['repeats']}, {x['seconds']:.1f}" for x in (a, b)]
        lines.append(f"| {r['toy']} | {r['estimator']} | {a['snr']:.1e} | {a['verdict']}, {a['largest_bias']:.1e} "
                     f"| {how[0]} | {b['verdict']} | {how[1]} |")  # fmt: skip
    lines += ["", "| mistake | toy | verdict | bias at most | method, repeats, CPU s |", "|---|---|---|---|---|"]
    for r in record["mutations"]:
        lines.append(f"| {r['mutation']} | {r['toy']} | {r['verdict']} | {r['largest_bias']:.0%} | {r['method']}, "
                     f"{r['repeats']}, {r['seconds']:.1f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=at_least(1), default=10_000, help="simulated runs of each test")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--most", type=at_least(4000), default=120_000, help="repeats of a sequential test at most")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/unbiased"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    with Interruption() as interrupted:
        record = run(options.parts, options.runs, 0.01, options.most, interrupted)
    write_result(options.out, vars(options), record)
    (options.out / "tables.md").write_text(table(record), encoding="utf-8")
    print(table(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
