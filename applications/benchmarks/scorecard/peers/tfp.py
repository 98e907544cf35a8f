"""TensorFlow Probability on JAX: ``tfp.monte_carlo.expectation`` and the variational losses of ``tfp.vi``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tensorflow_probability.substrates.jax as tfp

from applications.benchmarks.scorecard.peers.from_jax import answer
from applications.benchmarks.scorecard.problems import (
    GUIDE,
    OBSERVED,
    PRIOR,
    SMOOTHING,
    Problem,
    independent_cost,
    quadratic,
    shared_cost,
)
from applications.benchmarks.scorecard.protocol import Answer, Peer
from applications.benchmarks.scorecard.trajectories import REWARDS

LINK = "https://www.tensorflow.org/probability/api_docs/python/tfp/monte_carlo/expectation"
LOSS = "https://www.tensorflow.org/probability/api_docs/python/tfp/vi/monte_carlo_variational_loss"
peer = Peer("tfp", packages=("tfp-nightly", "jax", "numpy"))


def expectation(problem: Problem, family: Callable[..., Any], f: Callable[[Any], Any], draws: int = 1,
                reparameterised: bool | None = False, order: int = 1, chunk: int = 20_000) -> Answer:  # fmt: skip
    """The gradient of ``tfp.monte_carlo.expectation`` by the score function, of ``family(tfd, parameters)``."""
    said = {} if reparameterised is None else {"use_reparameterization": reparameterised}

    def value(parameters: Any, key: Any) -> Any:
        p = family(tfp.distributions, parameters)
        return jnp.sum(tfp.monte_carlo.expectation(f, p.sample(draws, seed=key), p.log_prob, **said))

    derivative = jax.grad(value) if order == 1 else jax.hessian(value)
    return answer(lambda key: derivative(jnp.asarray(problem.start), key), peer.seed, chunk=chunk)


def bernoulli(tfd: Any, logits: Any) -> Any:
    return tfd.Independent(tfd.Bernoulli(logits=logits, dtype=logits.dtype), 1)


@peer.row(("bernoulli-.5", "bernoulli-.3", "bernoulli-.1"), "expectation", link=LINK, evaluations=1)
def one_bernoulli(problem: Problem) -> Answer:
    return expectation(problem, bernoulli, lambda b: b.sum(-1))


@peer.row("bernoulli-.3", "expectation", link=LINK, evaluations=1, reading="use_reparameterization left at its default",
          choice="the default is True, and the documentation leaves it to the user to set it to False")  # fmt: skip
def left_at_default(problem: Problem) -> Answer:
    return expectation(problem, bernoulli, lambda b: b.sum(-1), reparameterised=None)


@peer.row(("shared-0", "shared-4"), "expectation", link=LINK, evaluations=1)
def shared(problem: Problem) -> Answer:
    return expectation(problem, lambda tfd, eta: bernoulli(tfd, jnp.repeat(eta, 3)), shared_cost)


@peer.row("independent-200", "expectation", link=LINK, evaluations=2)
def independent(problem: Problem) -> Answer:
    return expectation(problem, bernoulli, independent_cost, draws=2, chunk=2_000)


@peer.row("normal", "expectation", link=LINK, evaluations=1)
def normal(problem: Problem) -> Answer:
    return expectation(problem, lambda tfd, mean: tfd.MultivariateNormalDiag(mean), lambda x: x[..., 0] ** 2)


@peer.row("smoothing", "expectation", link=LINK, evaluations=1)
def smoothing(problem: Problem) -> Answer:
    return expectation(problem, lambda tfd, m: tfd.MultivariateNormalDiag(m, jnp.full(2, SMOOTHING)), quadratic)


@peer.row("second-order", "expectation, differentiated twice", link=LINK, evaluations=1)
def second_order(problem: Problem) -> Answer:
    return expectation(problem, bernoulli, lambda b: b.sum(-1), order=2)


@peer.row("bandit", "expectation", link=LINK, evaluations=4)
def bandit(problem: Problem) -> Answer:
    return expectation(problem, lambda tfd, logits: tfd.Categorical(logits), lambda a: jnp.asarray(REWARDS)[a], draws=4)


@peer.row("moving-support", "expectation", link=LINK, evaluations=1)
def moving_support(problem: Problem) -> Answer:
    return expectation(problem, lambda tfd, ends: tfd.Uniform(ends[0], ends[1]), lambda x: x**2)


def column(problem: Problem, share: float) -> Answer:
    """f as a column: ``expectation`` then returns 16 numbers instead of one."""

    def unbatched(tfd: Any, logits: Any) -> Any:
        return tfd.Bernoulli(logits=logits[0], dtype=logits.dtype)

    found = expectation(problem, unbatched, lambda b: b[:, jnp.newaxis], draws=16)
    return Answer(lambda: share * found.one(), lambda count: share * found.many(count))


@peer.row("columns", "expectation", link=LINK, evaluations=16, reading="its 16 results are averaged to a loss")
def column_averaged(problem: Problem) -> Answer:
    return column(problem, 1 / 16)


@peer.row("columns", "expectation", link=LINK, evaluations=16, reading="its 16 results are summed to a loss",
          note="jax.grad refuses the 16 results as they are")  # fmt: skip
def column_summed(problem: Problem) -> Answer:
    return column(problem, 1.0)


def location(z: Any) -> Any:
    """2 z - 1, in the tensor library."""
    return 2.0 * z - 1.0


def variational(K: int, locate: Callable[[Any], Any] = location, estimator: str | None = None, draws: int = 1,
                compiled: bool = True, mapped: bool = True) -> Answer:  # fmt: skip
    """The gradient of the bound: minus that of ``tfp.vi.monte_carlo_variational_loss``."""
    tfd = tfp.distributions
    chosen = {"gradient_estimator": tfp.vi.GradientEstimators[estimator]} if estimator else {}

    def loss(logit: Any, key: Any) -> Any:
        guide = tfd.Bernoulli(logits=logit, dtype=jnp.float64)

        def joint(z: Any) -> Any:
            return tfd.Bernoulli(probs=PRIOR).log_prob(z) + tfd.Normal(locate(z), 1.0).log_prob(OBSERVED)

        return tfp.vi.monte_carlo_variational_loss(
            joint, guide, sample_size=draws, importance_sample_size=K, seed=key, **chosen
        )

    def gradient(key: Any) -> Any:
        return -jax.grad(loss)(GUIDE, key)

    return answer(gradient, peer.seed, chunk=20_000 // draws, compiled=compiled, mapped=mapped)


@peer.row("elbo", "monte_carlo_variational_loss", link=LOSS, evaluations=1)
def elbo(problem: Problem) -> Answer:
    return variational(1)


@peer.row("elbo", "monte_carlo_variational_loss, 100 draws", link=LOSS, evaluations=100)
def elbo_100(problem: Problem) -> Answer:
    return variational(1, draws=100)


@peer.row(("iw-2", "iw-5"), "GradientEstimators.VIMCO", link=LOSS, reading="as it is written, without jax.jit")
def vimco(problem: Problem) -> Answer:
    return variational(int(problem.name.removeprefix("iw-")), estimator="VIMCO", compiled=False)


@peer.row(("iw-2", "iw-5"), "GradientEstimators.VIMCO", link=LOSS, reading="within jax.jit")
def vimco_compiled(problem: Problem) -> Answer:
    return variational(int(problem.name.removeprefix("iw-")), estimator="VIMCO")


@peer.row("branch", "monte_carlo_variational_loss", link=LOSS, reading="in Python, without jax.jit", evaluations=1)
def branch(problem: Problem) -> Answer:
    return variational(1, lambda z: 1.0 if z else -1.0, compiled=False, mapped=False)


@peer.row("branch", "monte_carlo_variational_loss", link=LOSS, reading="jnp.where, as JAX asks", evaluations=1)
def where(problem: Problem) -> Answer:
    return variational(1, lambda z: jnp.where(z == 1, 1.0, -1.0))


@peer.row("item", "monte_carlo_variational_loss", link=LOSS, reading="without jax.jit", evaluations=1)
def item(problem: Problem) -> Answer:
    return variational(1, lambda z: 2.0 * z.item() - 1.0, compiled=False, mapped=False)


@peer.row("index", "monte_carlo_variational_loss", link=LOSS, reading="without jax.jit", evaluations=1)
def index(problem: Problem) -> Answer:
    return variational(1, lambda z: [-1.0, 1.0][int(z[0])], compiled=False, mapped=False)


peer.lacks("own-draw", "has no baselines for an expectation")
peer.lacks(("iw-2", "iw-5"), "GradientEstimators.SCORE_FUNCTION refuses importance_sample_size != 1, as documented")

if __name__ == "__main__":
    peer.main()
