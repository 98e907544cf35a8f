"""GenJAX (the release on PyPI): ADEV's estimators of expectations, and variational inference built on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import genjax
import jax
import jax.numpy as jnp
from genjax import ChoiceMap, Target, adev
from genjax.adev import add_cost, baseline, categorical_enum_parallel, flip_reinforce, normal_reinforce, reinforce
from genjax.inference import vi

from applications.benchmarks.scorecard.peers.from_jax import answer
from applications.benchmarks.scorecard.problems import (
    GUIDE,
    OBSERVED,
    PRIOR,
    SHARED,
    SMOOTHING,
    Problem,
    independent_cost,
    quadratic,
)
from applications.benchmarks.scorecard.protocol import Answer, Peer
from applications.benchmarks.scorecard.trajectories import REWARDS

LINK = "https://pypi.org/project/genjax/"
BERNOULLI = ("bernoulli-.5", "bernoulli-.3", "bernoulli-.1")
LOST = (
    "marginal() with its default selection gives the guide's draw the weight 0 instead of log q, so the gradient is "
    "that of E log p(x, z), without the guide's entropy"
)
FLIP = vi.adev_distribution(flip_reinforce, lambda b, p: jnp.log(jnp.where(b, p, 1.0 - p)), "flip_reinforce")
peer = Peer("genjax", packages=("genjax", "jax", "tensorflow-probability", "numpy"))


def expectation(problem: Problem, program: Callable[..., Any], exact: bool = False, chunk: int = 20_000) -> Answer:
    """``genjax.adev.expectation(program).grad_estimate`` at the problem's parameters."""
    found = adev.expectation(program)
    start = jnp.asarray(problem.start)
    scalar = start[0] if start.shape == (1,) else start
    got = answer(lambda key: found.grad_estimate(key, (scalar,))[0], peer.seed, chunk=chunk)
    return Answer(got.one, exact=True) if exact else got


def flip(problem: Problem, primitive: str, exact: bool = False) -> Answer:
    one = getattr(adev, primitive)
    return expectation(problem, lambda logit: jnp.where(one(jax.nn.sigmoid(logit)), 1.0, 0.0), exact)


@peer.row(BERNOULLI, "flip_reinforce", link=LINK, evaluations=1)
def one_flip(problem: Problem) -> Answer:
    return flip(problem, "flip_reinforce")


@peer.row("bernoulli-.3", "flip_enum", link=LINK, evaluations=2)
def one_flip_summed(problem: Problem) -> Answer:
    return flip(problem, "flip_enum", exact=True)


@peer.row("bernoulli-.3", "flip_enum_parallel", link=LINK, evaluations=2)
def one_flip_in_parallel(problem: Problem) -> Answer:
    return flip(problem, "flip_enum_parallel")


@peer.row("bernoulli-.3", "flip_mvd", link=LINK, evaluations=2)
def one_flip_measure_valued(problem: Problem) -> Answer:
    return flip(problem, "flip_mvd")


@peer.row(
    "bernoulli-.3", "baseline(flip_reinforce)", link=LINK, evaluations=1, note="the baseline is given before the draw"
)
def with_baseline(problem: Problem) -> Answer:
    primitive = baseline(flip_reinforce)
    return expectation(problem, lambda logit: jnp.where(primitive(0.3, jax.nn.sigmoid(logit)), 1.0, 0.0))


@peer.row(("shared-0", "shared-4"), "flip_reinforce, three times", link=LINK, evaluations=1)
def shared(problem: Problem) -> Answer:
    def program(logit: Any) -> Any:
        draws = [flip_reinforce(jax.nn.sigmoid(logit)) for _ in range(3)]
        return sum((1.0 * b - target) ** 2 for b, target in zip(draws, SHARED, strict=True))

    return expectation(problem, program)


@peer.row(("shared-0", "shared-4"), "flip_reinforce and add_cost", link=LINK, evaluations=1)
def shared_costs(problem: Problem) -> Answer:
    def program(logit: Any) -> Any:
        for target in SHARED:
            add_cost((1.0 * flip_reinforce(jax.nn.sigmoid(logit)) - target) ** 2)
        return 0.0 * logit

    return expectation(problem, program)


@peer.row("independent-200", "reinforce(sample, logpdf)", link=LINK, evaluations=1)
def independent(problem: Problem) -> Answer:
    primitive = reinforce(
        lambda key, logits: jax.random.bernoulli(key, jax.nn.sigmoid(logits)) * 1.0,
        lambda b, logits: (b * logits - jax.nn.softplus(logits)).sum(),
    )
    return expectation(problem, lambda logits: independent_cost(primitive(logits)), chunk=2_000)


@peer.row("normal", "normal_reinforce", link=LINK, evaluations=1)
def normal(problem: Problem) -> Answer:
    return expectation(problem, lambda mean: normal_reinforce(mean, 1.0) ** 2)


@peer.row("smoothing", "normal_reinforce, twice", link=LINK, evaluations=1)
def smoothing(problem: Problem) -> Answer:
    return expectation(problem, lambda mean: quadratic(jnp.stack([normal_reinforce(m, SMOOTHING) for m in mean])))


@peer.row("bandit", "categorical_enum_parallel", link=LINK, evaluations=3)
def bandit(problem: Problem) -> Answer:
    pays = jnp.asarray(REWARDS)
    return expectation(problem, lambda logits: pays[categorical_enum_parallel(jax.nn.softmax(logits))], exact=True)


@peer.row("moving-support", "reinforce(sample, logpdf)", link=LINK, evaluations=1)
def moving_support(problem: Problem) -> Answer:
    primitive = reinforce(
        lambda key, a, b: jax.random.uniform(key, minval=a, maxval=b), lambda x, a, b: 0.0 * x - jnp.log(b - a)
    )
    return expectation(problem, lambda ends: primitive(ends[0], ends[1]) ** 2)


def location(z: Any) -> Any:
    """2 z - 1 of a Boolean."""
    return jnp.where(z, 1.0, -1.0)


def variational(locate: Callable[[Any], Any] = location, exact: bool = False) -> Answer:
    """The gradient of the bound: minus that of ``genjax.inference.vi.ELBO`` of a ``marginal()`` guide."""
    choose = vi.flip_enum if exact else FLIP

    @genjax.gen
    def model(logit: Any) -> None:
        z = genjax.flip(PRIOR) @ "z"
        genjax.normal(locate(z), 1.0) @ "x"

    @genjax.marginal()
    @genjax.gen
    def guide(target: Any) -> None:
        (logit,) = target.args
        choose(jax.nn.sigmoid(logit)) @ "z"

    def target(logit: Any) -> Any:
        return Target(model, (logit,), ChoiceMap.d({"x": OBSERVED}))

    bound = vi.ELBO(guide, target)
    got = answer(lambda key: -jnp.asarray(bound(key, (jnp.asarray(GUIDE),))[0]), peer.seed)
    return Answer(got.one, exact=True) if exact else got


@peer.row("elbo", "vi.ELBO, flip_enum", link=LINK, evaluations=2, note=LOST)
def elbo_enum(problem: Problem) -> Answer:
    return variational(exact=True)


@peer.row("elbo", "vi.ELBO, flip_reinforce", link=LINK, evaluations=1, note=LOST)
def elbo(problem: Problem) -> Answer:
    return variational()


@peer.row("elbo", "flip_reinforce", link=LINK, evaluations=1, reading="log p - log q written out in an ADEV program")
def elbo_by_hand(problem: Problem) -> Answer:
    def program(logit: Any) -> Any:
        z = flip_reinforce(jax.nn.sigmoid(logit))
        prior = jnp.log(jnp.where(z, PRIOR, 1.0 - PRIOR))
        likelihood = jax.scipy.stats.norm.logpdf(OBSERVED, location(z), 1.0)
        return prior + likelihood - jax.nn.log_sigmoid(jnp.where(z, logit, -logit))

    return expectation(problem, program)


@peer.row("branch", "vi.ELBO, flip_reinforce", link=LINK)
def branch(problem: Problem) -> Answer:
    return variational(lambda z: 1.0 if z else -1.0)


@peer.row("item", "vi.ELBO, flip_reinforce", link=LINK)
def item(problem: Problem) -> Answer:
    return variational(lambda z: 2.0 * z.item() - 1.0)


@peer.row("index", "vi.ELBO, flip_reinforce", link=LINK)
def index(problem: Problem) -> Answer:
    return variational(lambda z: [-1.0, 1.0][int(z)])


peer.lacks("own-draw", "takes a baseline before the draw, so it cannot read the draw")
peer.lacks("columns", "one program is one draw")
peer.lacks("second-order", "its documentation offers first derivatives only")
peer.lacks(("iw-2", "iw-5"), "vi.IWELBO raises NotImplementedError in this release")

if __name__ == "__main__":
    peer.main()
