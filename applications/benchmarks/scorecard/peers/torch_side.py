"""What the workers on PyTorch share: parameters, gradients and the problems' functions as tensors."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from applications.benchmarks.scorecard import problems
from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.problems import Problem

torch.set_num_threads(1)


def leaf(problem: Problem, *replicas: int) -> Tensor:
    """The parameters ``[*replicas, *start]`` as float32 that wants a gradient; a single one is a scalar."""
    start = torch.tensor(problem.start, dtype=torch.float32)
    if len(start) == 1:
        start = start[0]
    return start.expand((*replicas, *start.shape)).clone().requires_grad_()


def gradient(value: Tensor, parameters: Tensor) -> np.ndarray:
    """What one backward pass leaves in the parameters."""
    parameters.grad = None
    value.backward()
    assert parameters.grad is not None
    return parameters.grad.double().numpy().copy()


def log_joint(z: Tensor) -> Tensor:
    """log p(x, z) of the variational problems."""
    prior = Bernoulli(probs=torch.tensor(problems.PRIOR)).log_prob(z)
    return prior + Normal(2 * z - 1, 1.0).log_prob(torch.tensor(problems.OBSERVED))


def log_joint_of_number(name: str, z: Tensor) -> Tensor:
    """The same for one z, computed the way the traps are: a branch, a number, a list index."""
    if name == "branch":
        loc = 1.0 if z else -1.0
    elif name == "item":
        loc = 2 * z.item() - 1
    else:
        loc = [-1.0, 1.0][int(z)]
    prior = math.log(problems.PRIOR if loc > 0 else 1 - problems.PRIOR)
    return prior + Normal(loc, 1.0).log_prob(torch.tensor(problems.OBSERVED))


def shared_cost(b: Tensor) -> Tensor:
    return ((b - torch.tensor(problems.SHARED, dtype=b.dtype)) ** 2).sum(-1)


def independent_cost(b: Tensor) -> Tensor:
    return ((b - problems.T) ** 2).mean(-1)


def quadratic(x: Tensor) -> Tensor:
    return x[..., 0] ** 2 + x[..., 1] ** 2 + x[..., 0] * x[..., 1]


def arm_rewards() -> Tensor:
    return torch.tensor(sequential.REWARDS, dtype=torch.float32)


def episodes(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One episode of the chain for each logit ``[R]``: actions, rewards and mask, ``[R, T]``."""
    stays = torch.distributions.Geometric(probs=1 - torch.sigmoid(logits.detach())).sample()
    length = int(stays.max()) + 1
    place = torch.arange(length)
    actions = (place < stays[:, None]).float()
    return actions, actions, place <= stays[:, None]


def token_groups(groups: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Groups of sequences drawn with their probability: index ``[G, K]``, reward, mask ``[G, K, T]``, tokens."""
    chance = torch.tensor(np.exp(sequential.token_log_probabilities().sum(-1)))
    index = torch.multinomial(chance, groups * size, replacement=True).reshape(groups, size)
    reward = torch.tensor(sequential.PAYS, dtype=torch.float32)[index]
    mask = torch.tensor(sequential.token_mask(), dtype=torch.float32)[index]
    return index, reward, mask, torch.tensor(sequential.token_of_place())[index]


def token_log_probs(tables: Tensor, index: Tensor) -> Tensor:
    """log pi of every token ``[G, K, T]`` under tables ``[G, 21]``; arbitrary where the mask is 0."""
    logs = torch.log_softmax(tables.reshape(-1, len(sequential.PREFIXES), sequential.LETTERS + 1), -1)
    prefix = torch.tensor(sequential.prefix_of_token())[index]
    token = torch.tensor(sequential.token_of_place())[index]
    rows = torch.arange(len(logs))[:, None, None]
    return logs[rows, prefix, token]
