"""optax 0.2.6, the last release that has ``optax.monte_carlo`` (deprecated in 0.2.4, removed since)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import monte_carlo
from optax._src.utils import multi_normal

from applications.benchmarks.scorecard.peers.from_jax import answer
from applications.benchmarks.scorecard.problems import SMOOTHING, Problem, independent_cost, quadratic, shared_cost
from applications.benchmarks.scorecard.protocol import Answer, Peer

SOURCE = "https://github.com/google-deepmind/optax/blob/v0.2.6/optax/monte_carlo/"
LINK = SOURCE + "stochastic_gradient_estimators.py"
VARIATES = SOURCE + "control_variates.py"
BERNOULLI = ("bernoulli-.5", "bernoulli-.3", "bernoulli-.1")
AVERAGE = (
    "control_variates_jacobians updates the average with the draws at hand before it subtracts it, so the "
    "baseline holds its own draws"
)
peer = Peer("optax", packages=("optax", "jax", "numpy"))


class Bernoulli:
    """What ``dist_builder`` returns: ``sample(shape, key)`` and ``log_prob``, over logits ``[D]``."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def sample(self, shape: tuple[int, ...], key: Any) -> Any:
        return jax.random.bernoulli(key, jax.nn.sigmoid(self.logits), (*shape, *self.logits.shape)) * 1.0

    def log_prob(self, x: Any) -> Any:
        return (x * self.logits - jax.nn.softplus(self.logits)).sum(-1)


class Uniform(Bernoulli):
    """Between the two ends of ``logits [2]``."""

    def sample(self, shape: tuple[int, ...], key: Any) -> Any:
        return jax.random.uniform(key, shape, minval=self.logits[0], maxval=self.logits[1])

    def log_prob(self, x: Any) -> Any:
        return 0.0 * x - jnp.log(self.logits[1] - self.logits[0])


def ask(problem: Problem, f: Any, builder: Any, parameters: Any, *, draws: int = 1, variate: Any = None,
        state: Any = None, estimator: str = "score_function_jacobians", chunk: int = 20_000) -> Answer:  # fmt: skip
    """Mean of the draws' jacobians in the first parameter; ``builder=None``: optax's own diagonal normal."""
    estimate = getattr(monte_carlo, estimator)
    values, builder = tuple(jnp.asarray(p) for p in parameters), builder or multi_normal

    def gradient(key: Any) -> Any:
        if variate is None:
            return estimate(f, values, builder, key, draws)[0].mean(0)
        found = monte_carlo.control_variates_jacobians(
            f, variate, estimate, values, builder, key, draws, control_variate_state=state
        )
        return found[0][0].mean(0)

    return answer(gradient, peer.seed, chunk=chunk)


@peer.row(BERNOULLI, "score_function_jacobians", link=LINK, evaluations=1)
def bernoulli(problem: Problem) -> Answer:
    return ask(problem, lambda b: b.sum(), Bernoulli, [problem.start])


def average(problem: Problem, step: int) -> Answer:
    """One draw with the average at E f, as training leaves it by that step (0 before the first)."""
    settled = (0.3 if step else 0.0, step)
    return ask(
        problem, lambda b: b.sum(), Bernoulli, [problem.start], variate=monte_carlo.moving_avg_baseline, state=settled
    )


@peer.row("bernoulli-.3", "moving_avg_baseline", link=VARIATES, evaluations=3, reading="the first step", note=AVERAGE)
def average_at_first(problem: Problem) -> Answer:
    return average(problem, 0)


@peer.row("bernoulli-.3", "moving_avg_baseline", link=VARIATES, evaluations=3, reading="step 20", note=AVERAGE)
def average_at_20(problem: Problem) -> Answer:
    return average(problem, 20)


@peer.row("bernoulli-.3", "moving_avg_baseline", link=VARIATES, evaluations=3, reading="step 10000", note=AVERAGE)
def average_at_10000(problem: Problem) -> Answer:
    return average(problem, 10_000)


@peer.row(("shared-0", "shared-4"), "score_function_jacobians", link=LINK, evaluations=1)
def shared(problem: Problem) -> Answer:
    return ask(problem, shared_cost, lambda eta: Bernoulli(jnp.repeat(eta, 3)), [problem.start])


@peer.row("independent-200", "score_function_jacobians", link=LINK, evaluations=2)
def independent(problem: Problem) -> Answer:
    return ask(problem, independent_cost, Bernoulli, [problem.start], draws=2, chunk=2_000)


@peer.row("normal", "score_function_jacobians", link=LINK, evaluations=1)
def normal(problem: Problem) -> Answer:
    return ask(problem, lambda x: (x**2).sum(), None, [problem.start, [0.0]])


@peer.row("normal", "control_delta_method", link=VARIATES, evaluations=2)
def delta(problem: Problem) -> Answer:
    return ask(problem, lambda x: (x**2).sum(), None, [problem.start, [0.0]], variate=monte_carlo.control_delta_method)


@peer.row("normal", "measure_valued_jacobians", link=LINK, evaluations=2)
def measure(problem: Problem) -> Answer:
    return ask(problem, lambda x: (x**2).sum(), None, [problem.start, [0.0]], estimator="measure_valued_jacobians")


@peer.row("smoothing", "score_function_jacobians", link=LINK, evaluations=1)
def smoothing(problem: Problem) -> Answer:
    return ask(problem, quadratic, None, [problem.start, np.log([SMOOTHING, SMOOTHING])])


@peer.row("moving-support", "score_function_jacobians", link=LINK, evaluations=1)
def moving_support(problem: Problem) -> Answer:
    return ask(problem, lambda x: x**2, Uniform, [problem.start])


@peer.row(
    "columns", "score_function_jacobians", link=LINK, evaluations=16, note="f is called on one draw at a time (vmap)"
)
def columns(problem: Problem) -> Answer:
    return ask(problem, lambda b: b, Bernoulli, [problem.start], draws=16)


@peer.row("own-draw", "control_variates_jacobians", link=VARIATES, evaluations=1,
          note="the interface asks for the control variate's expectation and adds its gradient back")  # fmt: skip
def own_draw(problem: Problem) -> Answer:
    half = (lambda values, b, state: b.sum() / 2, lambda values, state: jax.nn.sigmoid(values[0]).sum() / 2,
            lambda values, draws, state: state)  # fmt: skip
    return ask(problem, lambda b: b.sum(), Bernoulli, [problem.start], variate=lambda f: half)


peer.lacks("second-order", "returns jacobians, not a surrogate to differentiate again")
peer.lacks(("elbo", "iw-2", "iw-5", "branch", "item", "index"), "no probabilistic programs and no bounds")

if __name__ == "__main__":
    peer.main()
