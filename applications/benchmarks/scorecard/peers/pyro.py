"""Pyro: its ELBOs on the variational problems, and ``pyro.factor`` for an f that is no density."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO

from applications.benchmarks.scorecard import problems
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import BRANCHES, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

SVI_III = "https://pyro.ai/examples/svi_part_iii.html"
DOCS = "https://docs.pyro.ai/en/stable/inference_algos.html"
FACTOR = "f enters by pyro.factor; the model's prior is the guide's own value, so that only f is left of the ELBO"

peer = Peer("pyro", packages=("pyro-ppl", "torch", "numpy"), seed_all=pyro.set_rng_seed)
OBSERVED = torch.tensor(problems.OBSERVED)


def estimates(problem: Problem, elbo, model, guide, replicas: bool = True) -> Answer:
    """The gradient that ``SVI.step`` would follow; several at once are independent elements of one plate."""

    def many(count: int):
        pyro.clear_param_store()
        start = side.leaf(problem, count).detach()

        def with_parameters(program):
            return lambda: program(pyro.param("parameters", start))

        elbo.loss_and_grads(with_parameters(model), with_parameters(guide))
        return -pyro.param("parameters").grad.double().numpy().copy()

    return Answer(one=lambda: many(1), many=many if replicas else None)


def model(logits):
    with pyro.plate("data", len(logits)):
        z = pyro.sample("z", dist.Bernoulli(problems.PRIOR))
        pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=OBSERVED.expand(len(logits)))


def guide(logits):
    with pyro.plate("data", len(logits)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


@peer.row("elbo", "Trace_ELBO", link=SVI_III, evaluations=1)
def trace(problem: Problem) -> Answer:
    return estimates(problem, Trace_ELBO(), model, guide)


@peer.row("elbo", "TraceGraph_ELBO", link=SVI_III, evaluations=1)
def trace_graph(problem: Problem) -> Answer:
    return estimates(problem, TraceGraph_ELBO(), model, guide)


@peer.row("elbo", "TraceGraph_ELBO, decaying average baseline", link=SVI_III, evaluations=1)
def decaying(problem: Problem) -> Answer:
    def guide_with_baseline(logits):
        logits = pyro.param("parameters")
        with pyro.plate("data", 1):
            options = {"use_decaying_avg_baseline": True, "baseline_beta": 0.95}
            pyro.sample("z", dist.Bernoulli(logits=logits), infer={"baseline": options})

    pyro.clear_param_store()
    elbo, start = TraceGraph_ELBO(), side.leaf(problem, 1).detach()

    def one():  # the baseline lives in the parameter store, which therefore is not cleared
        parameters = pyro.param("parameters", start)
        parameters.grad = None
        elbo.loss_and_grads(model, guide_with_baseline, parameters)
        return -parameters.grad.double().numpy().copy()

    return Answer(one=one)


@peer.row(
    ("iw-2", "iw-5"), "RenyiELBO(alpha=0)", link=DOCS, note="its documentation: alpha = 0 gives the bound of IWAE"
)
def renyi(problem: Problem) -> Answer:
    K = int(problem.name[-1])
    elbo = RenyiELBO(alpha=0, num_particles=K, vectorize_particles=True, max_plate_nesting=0)
    pyro.clear_param_store()
    start = side.leaf(problem).detach()

    def model():
        z = pyro.sample("z", dist.Bernoulli(problems.PRIOR))
        pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=OBSERVED)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", start)))

    def one():
        elbo.loss_and_grads(model, guide)
        logits = pyro.param("logits")
        found = torch.zeros(()) if logits.grad is None else -logits.grad.clone()
        logits.grad = None
        return found.double().numpy()

    return Answer(one=one)


def branching(name: str):
    def model(logits):
        z = pyro.sample("z", dist.Bernoulli(problems.PRIOR))
        if name == "branch":
            loc = 1.0 if z else -1.0
        elif name == "item":
            loc = 2 * z.item() - 1
        else:
            loc = [-1.0, 1.0][int(z)]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=OBSERVED)

    def guide(logits):
        pyro.sample("z", dist.Bernoulli(logits=logits[0]))

    return model, guide


@peer.row(tuple(BRANCHES), "Trace_ELBO", link=SVI_III, evaluations=1)
def branch_trace(problem: Problem) -> Answer:
    return estimates(problem, Trace_ELBO(), *branching(problem.name), replicas=False)


@peer.row(tuple(BRANCHES), "TraceGraph_ELBO", link=SVI_III, evaluations=1)
def branch_trace_graph(problem: Problem) -> Answer:
    return estimates(problem, TraceGraph_ELBO(), *branching(problem.name), replicas=False)


def factor_model(f, cost_of_prior):
    def model(parameters):
        with pyro.plate("data", len(parameters)):
            b = pyro.sample("b", cost_of_prior(parameters.detach()))
            pyro.factor("f", f(b))

    return model


@peer.row(("bernoulli-.5", "bernoulli-.3", "bernoulli-.1"), "Trace_ELBO", link=DOCS, reading=FACTOR, evaluations=1)
def coin(problem: Problem) -> Answer:
    def guide(logits):
        with pyro.plate("data", len(logits)):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    return estimates(problem, Trace_ELBO(), factor_model(lambda b: b, lambda v: dist.Bernoulli(logits=v)), guide)


@peer.row("moving-support", "Trace_ELBO, has_rsample_(False)", link=DOCS, reading=FACTOR, evaluations=1)
def support(problem: Problem) -> Answer:
    def guide(ends):
        with pyro.plate("data", len(ends)):
            pyro.sample("b", dist.Uniform(ends[:, 0], ends[:, 1]).has_rsample_(False))

    prior = factor_model(lambda x: x**2, lambda v: dist.Uniform(v[:, 0], v[:, 1]))
    return estimates(problem, Trace_ELBO(), prior, guide)


@peer.row("own-draw", "TraceGraph_ELBO, nn_baseline", link=SVI_III, reading=FACTOR, evaluations=1)
def own_draw(problem: Problem) -> Answer:
    drawn = {}

    def baseline(_):
        return drawn["b"].detach() / 2

    def model(logits):
        b = pyro.sample("b", dist.Bernoulli(logits=logits[0].detach()))
        pyro.factor("f", b)

    def guide(logits):
        options = {"nn_baseline": baseline, "nn_baseline_input": torch.zeros(())}
        drawn["b"] = pyro.sample("b", dist.Bernoulli(logits=logits[0]), infer={"baseline": options})

    return estimates(problem, TraceGraph_ELBO(), model, guide, replicas=False)


peer.lacks("second-order", "the ELBOs of score-function sites are differentiated once")
peer.lacks(("chain", "discount", "bandit", "tokens", "advantages"), "no trajectories")
peer.lacks(("nan-fitness", "flat-fitness", "correlation"), "no search")

if __name__ == "__main__":
    peer.main()
