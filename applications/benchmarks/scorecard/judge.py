"""One judge for everybody: estimates ``[n, P]`` and the exact answer in, a verdict out.

The test is ``scorefn.diagnostics.FixedSample``: a coordinate's bias is ``mean - exact`` with an interval of Student's
t, Bonferroni-corrected over the coordinates, in shares of the largest exact coordinate. The verdicts:

- "right": every interval lies within +- ``TOLERANCE``; equivalence is shown, not merely no difference found;
- "no bias found": every interval holds 0, but reaches beyond ``TOLERANCE``: the row says how far;
- "biased": an interval excludes 0 and what it leaves is above rounding; "wrong sign": besides, the projection on the
  exact answer, or a coordinate that matters, is on the wrong side; "zero": every estimate is exactly zero where the
  answer is not;
- "moves": something moved that must stay; "not finite"; "undecided" (too few estimates, or too
  skewed for a normal interval: n < 1000 skewness^2);
- "refuses", "crashes", "not offered", "does not install".

For a problem of judged "sign" only the projection is judged; for "zero" every estimate must be zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from applications.benchmarks.scorecard.problems import Problem
from scorefn.diagnostics import FixedSample

TOLERANCE = 0.02
FALSE_ALARM = 1e-5  # of one row
ROUNDING = 3e-6  # relative: a few ulps of float32
FEWEST, FEWEST_FOR_SIGN = 30, 10
MATTERS = 0.05  # a coordinate of this share of the largest one has a sign worth judging


@dataclass(frozen=True)
class Judgement:
    """What is said of a row.

    Attributes:
        verdict: see the module's docstring.
        detail: one phrase with the numbers.
        bias: relative bias of the worst coordinate; None where nothing was estimated.
        margin: half-width of its interval.
        scale: length of the mean along the exact answer, 1 where it is right; cosine: between the two.
        variance: total over the coordinates, of one estimate.
        repeats: n.
    """

    verdict: str
    detail: str
    bias: float | None = None
    margin: float | None = None
    scale: float | None = None
    cosine: float | None = None
    variance: float | None = None
    repeats: int = 0


def judge(problem: Problem, gradients: np.ndarray, exact_once: bool = False) -> Judgement:
    """Judge estimates ``[n, P]``; ``exact_once``: there is no randomness, one is enough."""
    n, P = gradients.shape
    truth, scale = problem.exact, problem.scale
    if not np.isfinite(gradients).all():
        share = 1.0 - float(np.isfinite(gradients).all(1).mean())
        return Judgement("not finite", f"{share:.0%} of the estimates hold NaN or infinity", repeats=n)
    mean = gradients.mean(0)
    spread = gradients.std(0, ddof=1) if n > 1 else np.zeros(P)
    variance = float((spread**2).sum())
    length = float(truth @ truth)
    along = float(mean @ truth) / length if length else None  # how long the mean is along the answer
    norm = float(np.linalg.norm(mean))
    cosine = float(mean @ truth) / (norm * length**0.5) if length and norm else None
    common: dict[str, Any] = {"scale": along, "cosine": cosine, "variance": variance, "repeats": n}
    largest = float(np.abs(gradients).max())
    if problem.judged == "zero":
        if largest <= ROUNDING * scale:
            return Judgement("right", "exactly zero", bias=0.0, margin=0.0, **common)
        return Judgement("moves", f"median {float(np.median(gradients)):.3g}, exact 0", **common)
    if largest <= 1e-9 * scale:
        return Judgement("zero", "every estimate is exactly zero", bias=1.0, margin=0.0, **common)
    if n < (FEWEST_FOR_SIGN if problem.judged == "sign" else FEWEST) and not exact_once:
        return Judgement("undecided", f"only {n} estimates", **common)

    if problem.judged == "sign":
        middle, half = projected(gradients, truth)
        if middle - half > 0:
            return Judgement("right", f"the right direction ({middle:.3g} +- {half:.2g})", **common)
        if middle + half < 0:
            return Judgement("wrong sign", f"{middle:.3g} +- {half:.2g}", **common)
        return Judgement("undecided", f"{middle:.3g} +- {half:.2g}", **common)
    if exact_once:
        gradients = np.repeat(gradients, 1000, 0)  # without randomness every estimate is the same
    # In float32, whose rounding is what the libraries' numbers hold.
    report = FixedSample().judge(
        torch.tensor(gradients, dtype=torch.float32), torch.tensor(truth), TOLERANCE, FALSE_ALARM
    )
    deviation, half_widths = report.bias.numpy(), (report.interval[1] - report.interval[0]).numpy() / 2
    shown = int(np.argmax(np.abs(deviation) + half_widths * (-1 if report.verdict == "biased" else 1)))
    common |= {"bias": float(deviation[shown]) / scale, "margin": float(half_widths[shown]) / scale}
    number = f"{common['bias']:+.2%} +- {common['margin']:.2%}"
    if report.verdict == "unbiased":
        detail = f"bias below {report.largest_bias:.2%}" if spread.max() > ROUNDING * scale else "exact"
        return Judgement("right", detail, **common)
    if report.verdict == "inconclusive":
        if "skewed" in report.reason:
            return Judgement("undecided", f"too skewed for a verdict on {n} estimates ({number})", **common)
        return Judgement("no bias found", f"below {100 * report.largest_bias:.3g} %", **common)
    middle, half = projected(gradients, truth)
    if middle + half < 0:
        return Judgement("wrong sign", f"{middle:+.3f} +- {half:.3f} times the answer", **common)
    matter = (np.abs(truth) >= MATTERS * scale) & (mean * truth < 0) & (np.abs(mean) > half_widths)
    if matter.any():
        return Judgement("wrong sign", f"in {matter.sum()} of {P} coordinates; cosine {cosine:.3f}", **common)
    if report.largest_bias <= TOLERANCE:
        return Judgement("right", f"bias below {report.largest_bias:.2%} (found: {number})", **common)
    if P == 1 and along is not None:
        return Judgement("biased", f"{number}: {along:.3f} times the answer", **common)
    return Judgement("biased", f"{number} at worst; cosine {cosine or 0.0:.3f}, length {along or 0.0:.3f}", **common)


def projected(gradients: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """The estimates along the exact answer, 1 where they are right: mean and half-width of its interval."""
    along = gradients @ truth / (truth @ truth)
    critical = NormalDist().inv_cdf(1.0 - FALSE_ALARM / 2)
    return float(along.mean()), critical * float(along.std()) / len(along) ** 0.5


STATUS = {"crashed": "crashes", "refused": "refuses", "not offered": "not offered", "not installed": "does not install"}


def verdict_of(record: dict[str, Any], problem: Problem, gradients: np.ndarray | None) -> Judgement:
    """Judge a worker's record: what it measured, or why it measured nothing."""
    if record["status"] == "refused" and problem.kind == "anchor":
        return Judgement("crashes", record["error"])  # there is nothing to refuse
    if record["status"] != "ran" or gradients is None:
        return Judgement(STATUS.get(record["status"], record["status"]), record["error"])
    return judge(problem, gradients, record.get("exact", False))


def unit_cost(record: dict[str, Any]) -> float | None:
    """CPU time per estimate in yardsticks, which environments and busy moments share."""
    if record.get("seconds") is None or not record.get("yardstick"):
        return None
    return float(record["seconds"] / record["yardstick"])
