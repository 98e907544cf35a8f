"""NumPyro: ELBOs with discrete guides, their importance-weighted bound, and dependencies through branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from applications.benchmarks.scorecard.peers.from_jax import answer
from applications.benchmarks.scorecard.problems import GUIDE, OBSERVED, PRIOR, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

LINK = "https://num.pyro.ai/en/stable/svi.html"
UNMEANT = (
    "SVI warns that this loss does not support discrete latent variables; called directly, as here after SVI.init, the "
    "loss says nothing and returns a number"
)
peer = Peer("numpyro", packages=("numpyro", "jax", "numpy", "funsor"))


def location(z: Any) -> Any:
    """2 z - 1, in the tensor library."""
    return 2.0 * z - 1.0


def of_bound(elbo: Any, locate: Callable[[Any], Any] = location, exact: bool = False) -> Answer:
    """The gradient of the bound in the guide's logit: minus the gradient of NumPyro's loss."""

    def model() -> None:
        z = numpyro.sample("z", dist.Bernoulli(PRIOR))
        numpyro.sample("x", dist.Normal(locate(z), 1.0), obs=OBSERVED)

    enumerate_guide = {"infer": {"enumerate": "parallel"}} if exact else {}

    def guide() -> None:
        logit = numpyro.param("logit", jnp.asarray(GUIDE))
        numpyro.sample("z", dist.Bernoulli(logits=logit), **enumerate_guide)

    state = SVI(model, guide, numpyro.optim.SGD(1.0), elbo).init(jax.random.PRNGKey(peer.seed))
    del state  # it is where NumPyro warns

    def gradient(key: Any) -> Any:
        start = {"logit": jnp.asarray(GUIDE)}
        return -jax.grad(elbo.loss, argnums=1)(key, start, model, guide)["logit"]

    found = answer(gradient, peer.seed, chunk=20_000 // elbo.num_particles)
    return Answer(found.one, exact=True) if exact else found


@peer.row("elbo", "TraceGraph_ELBO", link=LINK, evaluations=1)
def trace_graph(problem: Problem) -> Answer:
    return of_bound(TraceGraph_ELBO())


@peer.row("elbo", "TraceGraph_ELBO, 100 particles", link=LINK, evaluations=100)
def trace_graph_100(problem: Problem) -> Answer:
    return of_bound(TraceGraph_ELBO(num_particles=100))


@peer.row("elbo", "TraceEnum_ELBO", link=LINK, evaluations=2)
def trace_enum(problem: Problem) -> Answer:
    return of_bound(TraceEnum_ELBO(), exact=True)


@peer.row("elbo", "Trace_ELBO", link=LINK, choice="documented for reparameterised guides only", note=UNMEANT)
def trace(problem: Problem) -> Answer:
    return of_bound(Trace_ELBO())


@peer.row(("iw-2", "iw-5"), "RenyiELBO(alpha=0)", link=LINK, note=UNMEANT)
def renyi(problem: Problem) -> Answer:
    K = int(problem.name.removeprefix("iw-"))
    return of_bound(RenyiELBO(alpha=0, num_particles=K))


@peer.row("branch", "TraceGraph_ELBO", link=LINK, reading="the branch in Python")
def branch(problem: Problem) -> Answer:
    return of_bound(TraceGraph_ELBO(), lambda z: 1.0 if z else -1.0)


@peer.row("branch", "TraceGraph_ELBO", link=LINK, reading="the branch by jax.lax.cond, as JAX asks", evaluations=1)
def cond(problem: Problem) -> Answer:
    return of_bound(TraceGraph_ELBO(), lambda z: jax.lax.cond(z == 1, lambda: 1.0, lambda: -1.0))


@peer.row("item", "TraceGraph_ELBO", link=LINK)
def item(problem: Problem) -> Answer:
    return of_bound(TraceGraph_ELBO(), lambda z: 2.0 * z.item() - 1.0)


@peer.row("index", "TraceGraph_ELBO", link=LINK, reading="a Python list")
def index(problem: Problem) -> Answer:
    return of_bound(TraceGraph_ELBO(), lambda z: [-1.0, 1.0][int(z)])


@peer.row("index", "TraceGraph_ELBO", link=LINK, reading="an array, as JAX asks", evaluations=1)
def index_array(problem: Problem) -> Answer:
    return of_bound(TraceGraph_ELBO(), lambda z: jnp.array([-1.0, 1.0])[z.astype(int)])


peer.lacks(
    (
        "bernoulli-.5",
        "bernoulli-.3",
        "bernoulli-.1",
        "shared-0",
        "shared-4",
        "independent-200",
        "normal",
        "second-order",
    ),
    "gradients of ELBOs only, not of an expectation of the user's f",
)
peer.lacks(("own-draw", "columns", "moving-support"), "gradients of ELBOs only; no baselines")

if __name__ == "__main__":
    peer.main()
