"""TRL's formulas: how its trainers turn rewards of a group into advantages, and these into a loss.

A trainer needs a language model and an accelerator, so the few lines that matter are written out here after
``trl/trainer/rloo_trainer.py`` and ``trl/trainer/grpo_trainer.py`` (version of the requirements), on-policy, where
every ratio is one and nothing is clipped, without a KL term.
"""

from __future__ import annotations

import torch

from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

RLOO = "https://huggingface.co/docs/trl/rloo_trainer"
GRPO = "https://huggingface.co/docs/trl/grpo_trainer"
NOTE = "the formula, not the package"

peer = Peer("trl", packages=("trl", "transformers", "torch", "numpy"), seed_all=torch.manual_seed)


def estimates(advantage, aggregate) -> Answer:
    """``advantage(reward [G, K])`` and ``aggregate(loss per token [G, K, T], mask) -> [G]``, G groups at once."""
    problem = PROBLEMS["tokens"]

    def many(count: int):
        tables = side.leaf(problem, count)
        index, reward, mask, _ = side.token_groups(count, 4)
        log_probs = side.token_log_probs(tables, index)
        ratio = torch.exp(log_probs - log_probs.detach())
        return side.gradient(aggregate(ratio * advantage(reward)[..., None], log_probs, mask).sum(), tables)

    return Answer(one=lambda: many(1), many=many, chunk=2000)


def leave_one_out(reward):
    return reward - (reward.sum(-1, keepdim=True) - reward) / (reward.shape[-1] - 1)


def group_mean(reward):
    return reward - reward.mean(-1, keepdim=True)


def group_standardised(reward):
    return group_mean(reward) / (reward.std(-1, keepdim=True) + 1e-4)


def per_sequence(loss, log_probs, mask):
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean(-1)


def per_token(loss, log_probs, mask):
    return (loss * mask).sum((-1, -2)) / mask.sum((-1, -2)).clamp(min=1.0)


def constant_length(loss, log_probs, mask):
    return (loss * mask).sum((-1, -2)) / (loss.shape[1] * sequential.LONGEST)


@peer.row("tokens", "RLOO: sequence ratio, leave-one-out", link=RLOO, note=NOTE)
def rloo(problem: Problem) -> Answer:
    def sequence(loss, log_probs, mask):
        total = (log_probs * mask).sum(-1)
        return (torch.exp(total - total.detach()) * loss[..., 0].detach()).mean(-1)

    return estimates(leave_one_out, sequence)


GROUP = "divided by the group's own spread and by each sequence's length"


@peer.row("tokens", 'GRPO: loss_type="grpo"', link=GRPO, note=NOTE, choice=GROUP)
def grpo(problem: Problem) -> Answer:
    return estimates(group_standardised, per_sequence)


@peer.row(
    "tokens",
    'GRPO: loss_type="dapo", "bnpo"',
    link=GRPO,
    note=NOTE,
    choice="divided by the group's own spread and by the number of tokens of the batch",
)
def dapo(problem: Problem) -> Answer:
    return estimates(group_standardised, per_token)


@peer.row(
    "tokens",
    'GRPO: loss_type="dr_grpo", scale_rewards="none"',
    link=GRPO,
    note=NOTE,
    choice="group mean with the own reward, constant length: (K - 1)/(K T) times the gradient, 1/4 here",
)
def dr_grpo(problem: Problem) -> Answer:
    return estimates(group_mean, constant_length)


def bandit_of(advantage) -> Answer:
    problem, rewards = PROBLEMS["bandit"], side.arm_rewards()

    def many(count: int):
        logits = side.leaf(problem, count)
        m = torch.distributions.Categorical(logits=logits)
        action = m.sample((4,)).T
        log_prob = m.log_prob(action.T).T
        weight = advantage(rewards[action])
        return side.gradient((torch.exp(log_prob - log_prob.detach()) * weight).mean(-1).sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row("bandit", "RLOO: leave-one-out", link=RLOO, note=NOTE, evaluations=4)
def rloo_bandit(problem: Problem) -> Answer:
    return bandit_of(leave_one_out)


@peer.row(
    "bandit", 'GRPO: scale_rewards="group"', link=GRPO, note=NOTE, choice="normalises by its own batch", evaluations=4
)
def grpo_bandit(problem: Problem) -> Answer:
    return bandit_of(group_standardised)


@peer.row(
    "bandit",
    'GRPO: scale_rewards="none"',
    link=GRPO,
    note=NOTE,
    choice="group mean with the own reward: (K - 1)/K times the gradient",
    evaluations=4,
)
def mean_bandit(problem: Problem) -> Answer:
    return bandit_of(group_mean)


peer.lacks(tuple(name for name in PROBLEMS if name not in ("tokens", "bandit")), "groups of sequences only")

if __name__ == "__main__":
    peer.main()
