"""What is asked, with the exact answer: anchors that every library should get right, and traps that catch some.

numpy only. Every exact answer is computed here, by enumeration or in closed form; ``Problem.references`` are exact
variances of well-known estimators, total over the coordinates that are judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import comb
from typing import Literal

import numpy as np

from applications.benchmarks.scorecard import trajectories

Array = np.ndarray


def sigmoid(x: float | Array) -> Array:
    return 1.0 / (1.0 + np.exp(-np.asarray(x, dtype=np.float64)))


def softmax(x: Array) -> Array:
    weights = np.exp(x - np.max(x, -1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Problem:
    """One question to every library.

    Attributes:
        name: on the command line.
        kind: "anchor", or "trap": a program that invites a known mistake.
        quantity: what one estimate is, for example "gradient in the logit".
        ask: the problem in words.
        start: the parameters at which it is asked.
        exact: the true value ``[P]``.
        width: numbers a worker returns per estimate; ``view`` turns them into the P that are judged.
        scale: the unit of relative bias; the largest exact coordinate unless said.
        judged: "value"; "sign": only the direction is defined, as libraries differ in units; "zero": nothing may move.
        references: exact variances of named estimators, total over the P coordinates.
        mistake: for traps: what goes wrong where it does.
        summed: the P numbers are one, the sum over what a worker returns.
    """

    name: str
    kind: Literal["anchor", "trap"]
    quantity: str
    ask: str
    start: Array
    exact: Array
    width: int = 0
    scale: float = 0.0
    judged: Literal["value", "sign", "zero"] = "value"
    references: dict[str, float] = field(default_factory=dict)
    mistake: str = ""
    summed: bool = False

    def __post_init__(self) -> None:
        """Fill in what follows from the exact answer."""
        object.__setattr__(self, "start", np.atleast_1d(np.asarray(self.start, dtype=np.float64)))
        object.__setattr__(self, "exact", np.asarray(self.exact, dtype=np.float64).reshape(-1))
        object.__setattr__(self, "width", self.width or len(self.exact))
        object.__setattr__(self, "scale", self.scale or float(np.abs(self.exact).max()))

    def view(self, gradients: Array) -> Array:
        """The coordinates that are judged ``[n, P]`` of what a worker returned ``[n, width]``."""
        return gradients.sum(-1, keepdims=True) if self.summed else gradients


# Bernoulli problems ---------------------------------------------------------------------------------------------------
T = 0.499  # the target of ``independent-200``
SHARED = np.array([0.6, 0.51, 0.48])


def bernoulli_tuples(p: Array) -> Iterator[tuple[Array, float]]:
    """Every outcome of independent Bernoullis with its probability."""
    for bits in itertools.product((0.0, 1.0), repeat=len(p)):
        b = np.array(bits)
        yield b, float(np.prod(np.where(b == 1.0, p, 1.0 - p)))


def shared_cost(b: Array) -> Array:
    """f of ``shared-0`` and ``shared-4``: ``sum (b - p0)^2``, ``b [..., 3]``."""
    return ((b - SHARED) ** 2).sum(-1)


def independent_cost(b: Array) -> Array:
    """f of ``independent-200``: ``mean (b - .499)^2``, ``b [..., 200]``."""
    return ((b - T) ** 2).mean(-1)


def bernoulli(p: float) -> Problem:
    m, q, v = min(p, 1 - p), 1 - p, p * (1 - p)
    return Problem(
        f"bernoulli-{p:g}".replace("0.", "."),
        "anchor",
        "gradient in the logit",
        f"b ~ Bernoulli({p:g}), f(b) = b: d/dlogit E f.",
        np.log(p / q),
        v,
        references={
            "score function, 1 draw": p * q**2 - v**2,
            "leave-one-out, 2 draws": v / 2 - v**2,
            "ARM, 2 evaluations": (2 / 3) * (1 / 8 - (0.5 - m) ** 3) - v**2,
            "DisARM, 2 evaluations": m * (1 - m) ** 2 / 2 - m**2 * (1 - m) ** 2,
        },
    )


def leave_one_out_variance(values: Array, scores: Array, probabilities: Array, k: int) -> float:
    """Exact total variance of leave-one-out over k independent draws; ``values [S]``, ``scores [S, P]``."""
    mean = probabilities @ (values[:, None] * scores)
    second = 0.0
    for pick in itertools.product(range(len(values)), repeat=k):
        index = list(pick)
        f, s = values[index], scores[index]
        second += (
            float(np.prod(probabilities[index]) * (((f - f.mean())[:, None] * s).sum(0) ** 2).sum()) / (k - 1) ** 2
        )
    return second - float((mean**2).sum())


def shared(eta: float) -> Problem:
    p = np.full(3, float(sigmoid(eta)))
    table = list(bernoulli_tuples(p))
    f, prob = np.array([shared_cost(b) for b, _ in table]), np.array([w for _, w in table])
    score = np.array([[(b - p).sum()] for b, _ in table])
    gradient = prob @ (f[:, None] * score)
    plain = float(prob @ ((f[:, None] * score) ** 2)[:, 0] - gradient[0] ** 2)
    centred = float(prob @ (((f - prob @ f)[:, None] * score) ** 2)[:, 0] - gradient[0] ** 2)
    return Problem(
        f"shared-{abs(eta):g}",
        "anchor",
        "gradient in the one logit",
        f"three Bernoullis share one logit {eta:g}, f(b) = sum (b - p0)^2, p0 = (.6, .51, .48): d/dlogit E f.",
        eta,
        gradient,
        references={
            "score function, 1 draw": plain,
            "baseline E f, 1 draw": centred,
            "leave-one-out, 2 draws": leave_one_out_variance(f, score, prob, 2),
            "leave-one-out, 4 draws": leave_one_out_variance(f, score, prob, 4),
        },
    )


def independent() -> Problem:
    slope, D = (1 - 2 * T) / 200, 200
    fourth = 3 * (D / 2) ** 2 + D * (0.5 - 3 * 0.25)
    return Problem(
        "independent-200",
        "anchor",
        "gradient in the 200 logits, summed",
        "200 Bernoullis with logits 0, f(b) = mean (b - .499)^2: the sum of the 200 derivatives (each 2.5e-6).",
        np.zeros(D),
        D * slope / 4,
        width=D,
        summed=True,
        references={"leave-one-out, 2 draws": slope**2 / 4 * (fourth - (D / 2) ** 2)},
    )


# Gaussian problems ----------------------------------------------------------------------------------------------------
SMOOTHING = 0.1


def quadratic(x: Array) -> Array:
    """f of ``smoothing``: ``x_0^2 + x_1^2 + x_0 x_1``, ``x [..., 2]``."""
    return x[..., 0] ** 2 + x[..., 1] ** 2 + x[..., 0] * x[..., 1]


def normal() -> Problem:
    return Problem(
        "normal",
        "anchor",
        "gradient in the mean",
        "x ~ Normal(1, 1), f(x) = x^2: d/dmean E f.",
        1.0,
        2.0,
        references={"score function, 1 draw": 30.0, "optimal constant, 1 draw": 14.0, "pathwise, 1 draw": 4.0},
    )


def smoothing() -> Problem:
    m = np.array([1.0, -0.5])
    return Problem(
        "smoothing",
        "anchor",
        "gradient in the mean",
        "f(x) = x0^2 + x1^2 + x0 x1 smoothed by N(m, .1^2 I) at m = (1, -.5): the gradient of E f in m.",
        m,
        [2 * m[0] + m[1], 2 * m[1] + m[0]],
    )


# Variational problems -------------------------------------------------------------------------------------------------
PRIOR, OBSERVED, GUIDE = 0.3, 0.7, 0.4  # z ~ Bernoulli(.3), x = .7 ~ Normal(2 z - 1, 1), q = Bernoulli(logit .4)


def log_joint(z: Array | float) -> Array:
    """log p(x, z) of the variational problems."""
    z = np.asarray(z, dtype=np.float64)
    prior = np.log(np.where(z == 1.0, PRIOR, 1.0 - PRIOR))
    return prior - 0.5 * (OBSERVED - (2 * z - 1)) ** 2 - 0.5 * np.log(2 * np.pi)


def log_guide(z: Array | float, logit: float = GUIDE) -> Array:
    """log q(z)."""
    q = sigmoid(logit)
    return np.log(np.where(np.asarray(z) == 1.0, q, 1.0 - q))


def bound(K: int, logit: float = GUIDE) -> float:
    """The exact K-sample importance-weighted bound."""
    weights = [np.exp(log_joint(z) - log_guide(z, logit)) for z in (0.0, 1.0)]
    q = float(sigmoid(logit))
    ones = np.arange(K + 1)
    chance = np.array([comb(K, int(j)) * q**j * (1 - q) ** (K - j) for j in ones])
    return float(chance @ np.log((ones * weights[1] + (K - ones) * weights[0]) / K))


def bound_gradient(K: int) -> float:
    """Its derivative in the guide's logit, K draws enumerated."""
    q = float(sigmoid(GUIDE))
    weights = [float(np.exp(log_joint(z) - log_guide(z))) for z in (0.0, 1.0)]
    total = 0.0
    for j in range(K + 1):
        chance = comb(K, j) * q**j * (1 - q) ** (K - j)
        mean = (j * weights[1] + (K - j) * weights[0]) / K
        score = j * (1 - q) - (K - j) * q
        own = -(j * weights[1] * (1 - q) - (K - j) * weights[0] * q) / (K * mean)  # log q inside the weights
        total += chance * (np.log(mean) * score + own)
    return total


def variational(name: str, K: int, references: dict[str, float], how: str = "", mistake: str = "") -> Problem:
    return Problem(
        name,
        "trap" if mistake else "anchor",
        "gradient of the bound in the guide's logit",
        f"z ~ Bernoulli(.3), x = .7 ~ Normal(2 z - 1, 1), guide Bernoulli(logit .4): the gradient of the "
        f"{'ELBO' if K == 1 else f'{K}-sample importance-weighted bound'}{how}.",
        GUIDE,
        bound_gradient(K),
        references=references,
        mistake=mistake,
    )


def second_order() -> Problem:
    p = float(sigmoid(GUIDE))
    return Problem(
        "second-order",
        "anchor",
        "second derivative in the logit",
        "z ~ Bernoulli(logit .4), f(z) = z: d^2/dlogit^2 E f, by differentiating twice.",
        GUIDE,
        p * (1 - p) * (1 - 2 * p),
    )


# Traps ----------------------------------------------------------------------------------------------------------------
def moving_support() -> Problem:
    a, b = -1.0, 2.0
    return Problem(
        "moving-support",
        "trap",
        "gradient in the two ends",
        "x ~ Uniform(-1, 2), f(x) = x^2, by the score function: d/d(a, b) E f = (0, 1).",
        [a, b],
        [(2 * a + b) / 3, (2 * b + a) / 3],
        mistake="the support moves with the parameters, so the score function misses the boundary: (1/3, -1/3)",
    )


def own_draw() -> Problem:
    v = 0.3 * 0.7
    return Problem(
        "own-draw",
        "trap",
        "gradient in the logit",
        "b ~ Bernoulli(.3), f(b) = b, with a baseline of the user's that reads the draw it multiplies (here b / 2).",
        np.log(0.3 / 0.7),
        v,
        mistake="a baseline that depends on its own draw shifts the mean: half the gradient is gone",
    )


def column_of_costs() -> Problem:
    return Problem(
        "columns",
        "trap",
        "gradient in the logit",
        "16 draws b ~ Bernoulli(.3), f(b) = b given as a column [16, 1] beside log-probabilities [16]: d/dlogit E f.",
        np.log(0.3 / 0.7),
        0.21,
        mistake="[16] times [16, 1] broadcasts to [16, 16], every cost meets every score: a sixteenth of the gradient",
    )


def flat_fitness() -> Problem:
    return Problem(
        "flat-fitness",
        "trap",
        "squared step of the mean over 20 generations, in units of the first standard deviation",
        "D = 10, f(x) = 1 everywhere: 20 generations of search must not move the mean.",
        np.zeros(10),
        0.0,
        scale=1.0,
        judged="zero",
        mistake="tied fitness is ranked by the order of the draws, and the search walks at random",
    )


def hole() -> Problem:
    return Problem(
        "nan-fitness",
        "trap",
        "step of the mean in the first coordinate, in standard deviations",
        "maximise f(x) = -|x|^2, which is NaN where x0 > 1, D = 10, from x = (.8, 0, ...) with sigma .5, popsize 20: "
        "one generation must step away from the hole (only the sign is judged).",
        [0.8, *([0.0] * 9)],
        -1.0,
        scale=1.0,
        judged="sign",
        mistake="NaN sorts as the largest number, so the points in the hole are ranked best",
    )


def ridge() -> Problem:
    return Problem(
        "correlation",
        "trap",
        "correlation of the search distribution after 200 generations",
        "minimise f(x) = 50.5 x0^2 + 50.5 x1^2 - 99 x0 x1 from (1, -.5), sigma 1: a full-covariance search must "
        "learn that the coordinates correlate (the sign is judged; the level sets have 99/101 = .98).",
        [1.0, -0.5],
        99 / 101,
        judged="sign",
        mistake="an element-wise exponential of the covariance step never leaves the axes",
    )


def ridge_cost(x: Array) -> Array:
    """f of ``correlation``, ``x [..., 2]``."""
    return 50.5 * x[..., 0] ** 2 + 50.5 * x[..., 1] ** 2 - 99 * x[..., 0] * x[..., 1]


BRANCHES = {
    "branch": ", where the model branches on z in Python: `loc = 1. if z else -1.`",
    "item": ", where the model reads z as a Python number: `loc = 2 * z.item() - 1`",
    "index": ", where the model indexes a list with z: `loc = [-1., 1.][int(z)]`",
}
DROPPED = "the dependency leaves the tensor graph, and the cost downstream of z is dropped"

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        bernoulli(0.5),
        bernoulli(0.3),
        bernoulli(0.1),
        shared(0.0),
        shared(-4.0),
        independent(),
        normal(),
        smoothing(),
        variational("elbo", 1, {}),
        variational("iw-2", 2, {"score function": 2.37897, "VIMCO": 0.12405788}),
        variational("iw-5", 5, {"score function": 4.41069, "VIMCO, geometric mean": 0.04852573}),
        second_order(),
        *(Problem(**question) for question in trajectories.questions("anchor")),
        *(variational(name, 1, {}, how, DROPPED) for name, how in BRANCHES.items()),
        moving_support(),
        own_draw(),
        column_of_costs(),
        *(Problem(**question) for question in trajectories.questions("trap")),
        hole(),
        flat_fitness(),
        ridge(),
    )
}


def named(name: str) -> Problem:
    """The problem of that name.

    Raises:
        KeyError: there is none; the message lists them.
    """
    if name not in PROBLEMS:
        raise KeyError(f"there is no problem {name!r}; there are {', '.join(PROBLEMS)}")
    return PROBLEMS[name]
