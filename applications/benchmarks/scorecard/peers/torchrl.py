"""TorchRL: its REINFORCE and A2C losses on one-step data, and its advantage estimators."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss, ReinforceLoss
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    reward2go,
    vec_generalized_advantage_estimate,
)

from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://docs.pytorch.org/rl/stable/reference/objectives.html"

peer = Peer("torchrl", packages=("torchrl", "tensordict", "torch", "numpy"), seed_all=torch.manual_seed)


class Logits(nn.Module):
    """A policy that is one row of logits."""

    def __init__(self, start: np.ndarray) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(start, dtype=torch.float32))

    def forward(self, observation):
        return self.logits.expand(*observation.shape[:-1], -1)


def one_step(problem: Problem, loss_class, start: np.ndarray, rewards: torch.Tensor, draws: int, column: bool):
    """Draw, pay, call the loss with the reward as the advantage, go backward."""
    policy = Logits(start)
    module = TensorDictModule(policy, in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(module, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True)
    critic = ValueOperator(nn.Linear(1, 1), in_keys=["observation"])
    options = {"entropy_bonus": False} if loss_class is A2CLoss else {}
    loss = loss_class(actor, critic, **options)
    observation = torch.zeros(draws, 1)

    def one():
        data = TensorDict({"observation": observation}, [draws])
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):  # as a data collector does
            data = actor(data)
        reward = (data["action"].float() * rewards).sum(-1)
        data["advantage"] = reward[:, None] if column else reward
        data["value_target"] = torch.zeros(draws, 1)
        found = loss(data)
        key = "loss_objective" if loss_class is A2CLoss else "loss_actor"
        (gradient,) = torch.autograd.grad(-found[key], [loss.actor_network_params["module", "0", "module", "logits"]])
        return gradient.double().numpy()

    return one


def bandit_of(loss_class):
    def build(problem: Problem) -> Answer:
        one = one_step(problem, loss_class, np.asarray(problem.start), side.arm_rewards(), 4, True)
        return Answer(one=one)

    return build


@peer.row("bandit", "ReinforceLoss", link=DOCS, reading="advantage = reward, no baseline", evaluations=4)
def reinforce_bandit(problem: Problem) -> Answer:
    return bandit_of(ReinforceLoss)(problem)


@peer.row("bandit", "A2CLoss", link=DOCS, reading="advantage = reward, no baseline", evaluations=4)
def a2c_bandit(problem: Problem) -> Answer:
    return bandit_of(A2CLoss)(problem)


def two_arms(problem: Problem, loss_class, column: bool) -> Answer:
    """Bernoulli(p) as two arms with logits (0, logit): the derivative in the second one."""
    start = np.array([0.0, float(problem.start[0])])
    draws = 16 if problem.name == "columns" else 1
    one = one_step(problem, loss_class, start, torch.tensor([0.0, 1.0]), draws, column)
    return Answer(one=lambda: one()[1:])


@peer.row("bernoulli-.3", "ReinforceLoss", link=DOCS, reading="a policy of two actions", evaluations=1)
def coin(problem: Problem) -> Answer:
    return two_arms(problem, ReinforceLoss, True)


@peer.row("columns", "ReinforceLoss", link=DOCS, reading="advantage [16, 1], the shape its documentation gives")
def columns(problem: Problem) -> Answer:
    return two_arms(problem, ReinforceLoss, True)


@peer.row("columns", "ReinforceLoss", link=DOCS, reading="advantage [16]")
def rows(problem: Problem) -> Answer:
    return two_arms(problem, ReinforceLoss, False)


def column(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values)[None, :, None]


def gae_of(function, terminated: bool):
    done = column(sequential.TERMINATED | sequential.TRUNCATED)
    options = {"terminated": column(sequential.TERMINATED)} if terminated else {}
    found, _ = function(
        gamma=sequential.GAMMA,
        lmbda=sequential.LAMBDA,
        state_value=column(sequential.VALUE),
        next_state_value=column(sequential.NEXT_VALUE),
        reward=column(sequential.REWARD),
        done=done,
        **options,
    )
    return found.reshape(-1).numpy()


@peer.row("advantages", "generalized_advantage_estimate", link=DOCS, reading="with `terminated`")
def gae(problem: Problem) -> Answer:
    return Answer(one=lambda: gae_of(generalized_advantage_estimate, True), exact=True)


@peer.row("advantages", "vec_generalized_advantage_estimate", link=DOCS, reading="with `terminated`")
def vectorised_gae(problem: Problem) -> Answer:
    return Answer(one=lambda: gae_of(vec_generalized_advantage_estimate, True), exact=True)


@peer.row(
    "advantages",
    "generalized_advantage_estimate",
    link=DOCS,
    reading="`done` alone: `terminated` is optional and then equals `done`",
    choice="its documentation says that `terminated` defaults to `done`",
)
def gae_done(problem: Problem) -> Answer:
    return Answer(one=lambda: gae_of(generalized_advantage_estimate, False), exact=True)


@peer.row("chain", "reward2go", link=DOCS, reading="its returns, the product with log_prob by hand")
def chain(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        actions, rewards, mask = side.episodes(logits)
        done = torch.zeros_like(mask)
        done[:, -1] = True
        to_go = reward2go(rewards[..., None], done[..., None], 1.0).reshape(rewards.shape)
        log_prob = torch.distributions.Bernoulli(logits=logits[:, None]).log_prob(actions)
        return side.gradient((log_prob * to_go * mask).sum(), logits)

    return Answer(one=lambda: many(1), many=many, chunk=500)


@peer.row(
    "discount",
    "reward2go",
    link=DOCS,
    reading="its returns, the product with log_prob by hand",
    choice="no gamma^t: not the discounted return's gradient",
)
def discount(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        m = torch.distributions.Bernoulli(logits=logits[:, None])
        a = torch.cat([m.sample(), m.sample()], 1)
        rewards = torch.stack([a[:, 0], sequential.SECOND * (1 - a[:, 1])], 1)
        done = torch.tensor([False, True]).expand(count, 2)
        to_go = reward2go(rewards[..., None], done[..., None], sequential.DISCOUNT).reshape(count, 2)
        return side.gradient((m.log_prob(a) * to_go).sum(), logits)

    return Answer(one=lambda: many(1), many=many, chunk=500)


_asked = ("bandit", "bernoulli-.3", "columns", "advantages", "chain", "discount")
peer.lacks(tuple(name for name in PROBLEMS if name not in _asked), "losses of reinforcement learning only")

if __name__ == "__main__":
    peer.main()
