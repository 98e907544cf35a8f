"""rlax: policy-gradient losses, discounted returns, generalised advantages. It never draws: the worker does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rlax

from applications.benchmarks.scorecard.peers.from_jax import answer
from applications.benchmarks.scorecard.problems import Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer
from applications.benchmarks.scorecard.trajectories import (
    DISCOUNT,
    GAMMA,
    LAMBDA,
    NEXT_VALUE,
    REWARD,
    REWARDS,
    SECOND,
    TRUNCATED,
    VALUE,
)

API = "https://rlax.readthedocs.io/en/latest/api.html"
MEAN = "policy_gradient_loss averages over the time steps of what it is given; the gradient is a sum over them"
STEPS = 60  # of the chain: the chance to stay longer is 2^-60
peer = Peer("rlax", packages=("rlax", "distrax", "jax", "numpy"))


@peer.row("bandit", "policy_gradient_loss", link=API, evaluations=4)
def bandit(problem: Problem) -> Answer:
    def gradient(key: Any) -> Any:
        actions = jax.random.categorical(key, jnp.asarray(problem.start), shape=(4,))

        def loss(logits: Any) -> Any:
            return rlax.policy_gradient_loss(
                jnp.tile(logits, (4, 1)), actions, jnp.asarray(REWARDS)[actions], jnp.ones(4)
            )

        return -jax.grad(loss)(jnp.asarray(problem.start))

    return answer(gradient, peer.seed)


def chain(problem: Problem, steps_of: str) -> Answer:
    """One episode; action 1 stays. ``w_t`` masks what comes after the end."""

    def gradient(key: Any) -> Any:
        stays = jax.random.bernoulli(key, 0.5, (STEPS,)).astype(jnp.int32)
        alive = jnp.concatenate([jnp.ones(1), jnp.cumprod(stays)[:-1]]) * 1.0
        returns = rlax.discounted_returns(stays * alive, alive * stays, jnp.zeros(STEPS))

        def loss(logit: Any) -> Any:
            logits = jnp.stack([jnp.zeros(STEPS), jnp.repeat(logit, STEPS)], -1)
            found = rlax.policy_gradient_loss(logits, stays, returns, alive)
            return found * (STEPS / alive.sum() if steps_of == "episode" else STEPS)

        return -jax.grad(loss)(problem.start[0])

    return answer(gradient, peer.seed)


@peer.row("chain", "policy_gradient_loss", link=API, choice=MEAN, reading="of the steps of one episode")
def chain_mean(problem: Problem) -> Answer:
    return chain(problem, "episode")


@peer.row("chain", "policy_gradient_loss", link=API, reading="padded to 60 steps with w_t = 0, times 60 by hand")
def chain_sum(problem: Problem) -> Answer:
    return chain(problem, "padded")


def two_steps(problem: Problem, weights: Any) -> Answer:
    """The two steps, their returns by ``discounted_returns``; the mean over the two is turned into the sum by hand."""

    def gradient(key: Any) -> Any:
        actions = jax.random.bernoulli(key, 0.5, (2,)).astype(jnp.int32)
        rewards = jnp.stack([actions[0] * 1.0, SECOND * (1 - actions[1])])
        returns = rlax.discounted_returns(rewards, jnp.array([DISCOUNT, 0.0]), jnp.zeros(2))

        def loss(logit: Any) -> Any:
            logits = jnp.stack([jnp.zeros(2), jnp.repeat(logit, 2)], -1)
            return 2 * rlax.policy_gradient_loss(logits, actions, returns, jnp.array(weights))

        return -jax.grad(loss)(problem.start[0])

    return answer(gradient, peer.seed)


@peer.row("discount", "policy_gradient_loss", link=API, reading="w_t = 1", evaluations=1,
          choice="the usual update leaves out gamma^t, as every agent does")  # fmt: skip
def discount_usual(problem: Problem) -> Answer:
    return two_steps(problem, [1.0, 1.0])


@peer.row("discount", "policy_gradient_loss", link=API, reading="w_t = gamma^t", evaluations=1)
def discount_weighted(problem: Problem) -> Answer:
    return two_steps(problem, [1.0, DISCOUNT])


def advantages(pieces: list[slice], discounts: Any) -> Answer:
    """``truncated_generalized_advantage_estimation`` of each piece, with the value after its last step."""

    def one() -> Any:
        found = []
        for piece in pieces:
            values = jnp.asarray(np.append(VALUE[piece], NEXT_VALUE[piece][-1]))
            rewards, discount = jnp.asarray(REWARD[piece]), jnp.asarray(discounts[piece])
            found.append(rlax.truncated_generalized_advantage_estimation(rewards, discount, LAMBDA, values))
        return np.concatenate(found)

    one()
    return Answer(one, exact=True)


@peer.row(
    "advantages", "truncated_generalized_advantage_estimation", link=API, reading="one stream, discount 0 at the cut"
)
def advantages_ended(problem: Problem) -> Answer:
    return advantages([slice(0, 4)], GAMMA * (1.0 - TRUNCATED))


@peer.row("advantages", "truncated_generalized_advantage_estimation", link=API,
          reading="one stream, discount gamma at the cut",
          note="takes one value per step, so the value after the cut is the next episode's first")  # fmt: skip
def advantages_streamed(problem: Problem) -> Answer:
    return advantages([slice(0, 4)], GAMMA + 0.0 * TRUNCATED)


@peer.row("advantages", "truncated_generalized_advantage_estimation", link=API, reading="two calls, cut by the user")
def advantages_in_pieces(problem: Problem) -> Answer:
    return advantages([slice(0, 3), slice(3, 4)], GAMMA + 0.0 * TRUNCATED)


peer.lacks("tokens", "has no losses for groups of sequences")

if __name__ == "__main__":
    peer.main()
