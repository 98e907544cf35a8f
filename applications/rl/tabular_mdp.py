"""Five ways to one policy gradient, exactly: ``python -m applications.rl.tabular_mdp``.

A small Markov decision process whose dynamics are known, so that nothing needs to be sampled. The policy gradient is
computed as

1. the derivative of the sum over all episodes of probability times return;
2. the expectation of the estimate that ``scorefn`` makes from the policy's log-probabilities alone, action by action,
   by enumerating every episode;
3. the expectation of the estimate made from the log-probability of the whole episode, dynamics included;
4. the policy gradient theorem, with occupancies and action values from linear systems;
5. the derivative of the value that backward induction finds.

All five agree to rounding: the factors of the dynamics do not depend on the policy, so they vanish from the score, and
an estimate needs no model of them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import scorefn as sf


class Episodes(NamedTuple):
    """N episodes of T steps."""

    states: Tensor  # [N, T] int
    actions: Tensor  # [N, T] int
    payments: Tensor  # [N, T] int: which of the possible rewards was paid
    rewards: Tensor  # [N, T]


@dataclass(frozen=True)
class TabularMDP:
    """S states, A actions, V possible rewards of each; everything known."""

    start: Tensor  # [S], probabilities of the first state
    transition: Tensor  # [S, A, S], probabilities of the next one
    payment: Tensor  # [S, A, V], probabilities of each possible reward
    reward: Tensor  # [S, A, V], what it pays
    horizon: int  # T

    @classmethod
    def random(cls, seed: int, states: int = 3, actions: int = 2, payments: int = 2, horizon: int = 3) -> TabularMDP:
        """Dynamics and random rewards drawn from a seed, in float64."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return cls(
            start=normal(states).softmax(-1),
            transition=normal(states, actions, states).softmax(-1),
            payment=normal(states, actions, payments).softmax(-1),
            reward=2 * normal(states, actions, payments),
            horizon=horizon,
        )

    def enumerate(self) -> Episodes:
        """Every episode there is: ``S (A V) (S A V)^(T-1)`` of them."""
        steps = list(itertools.product(*map(range, self.reward.shape)))
        episodes = torch.tensor(list(itertools.product(steps, repeat=self.horizon)))
        return self._episodes(*episodes.unbind(-1))

    def sample(self, policy: Tensor, num_samples: int) -> Episodes:
        """Episodes under action probabilities ``policy`` ``[S, A]``, from torch's global generator."""
        state = _choice(self.start.expand(num_samples, -1))
        steps = []
        for _ in range(self.horizon):
            action = _choice(policy[state])
            steps.append((state, action, _choice(self.payment[state, action])))
            state = _choice(self.transition[state, action])
        return self._episodes(*(torch.stack(column, -1) for column in zip(*steps, strict=True)))

    def log_dynamics(self, episodes: Episodes) -> Tensor:
        """Log-probability of all that the policy does not decide, ``[N]``."""
        states, actions, payments, _ = episodes
        steps = self.payment[states, actions, payments].log().sum(-1)
        moves = self.transition[states[:, :-1], actions[:, :-1], states[:, 1:]].log().sum(-1)
        return self.start[states[:, 0]].log() + steps + moves

    def _episodes(self, states: Tensor, actions: Tensor, payments: Tensor) -> Episodes:
        return Episodes(states, actions, payments, self.reward[states, actions, payments])


def _choice(probabilities: Tensor) -> Tensor:
    return torch.multinomial(probabilities, 1).squeeze(-1)


def rewards(episodes: Episodes) -> Tensor:
    """The f of this problem, ``[N, T]``."""
    return episodes.rewards


@dataclass(frozen=True)
class EpisodeDistribution:
    """Episodes of ``mdp`` under a softmax policy with a table of logits ``[S, A]``: a structured measure.

    One decision a step, and no word of the dynamics: what a measure over a real environment can know.
    """

    mdp: TabularMDP
    logits: Tensor

    def draws(self, f: Callable[[Episodes], Tensor], num_samples: int, *, coupling: Any = None) -> sf.Draws:
        """Sampled episodes."""
        if coupling is not None:
            raise sf.ScorefnError("The episodes of a TabularMDP cannot be coupled: leave coupling out.")
        return self.score(f, self.mdp.sample(self.logits.detach().softmax(-1), num_samples))

    def score(self, f: Callable[[Episodes], Tensor], episodes: Episodes) -> sf.Draws:
        """Draws from given episodes, for instance from all of them; the states are their context."""
        log_prob, fx = self.log_policy(episodes), f(episodes)
        return sf.Draws(episodes, log_prob, fx, credit=sf.RewardToGo(), context=episodes.states)

    def log_policy(self, episodes: Episodes) -> Tensor:
        """Log-probability of each action, ``[N, T]``."""
        return self.logits.log_softmax(-1)[episodes.states, episodes.actions]

    def log_prob(self, episodes: Episodes) -> Tensor:
        """Log-probability of the whole episode, dynamics included, ``[N]``."""
        return self.mdp.log_dynamics(episodes) + self.log_policy(episodes).sum(-1)


@dataclass(frozen=True)
class Derivation:
    """The gradients in the logits ``[S, A]`` that five computations gave, and the value they belong to."""

    gradients: dict[str, Tensor]
    value: float
    num_episodes: int

    @property
    def largest_difference(self) -> float:
        """Between any two of them, in any entry."""
        stacked = torch.stack(list(self.gradients.values()))
        return (stacked.amax(0) - stacked.amin(0)).max().item()

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        first = next(iter(self.gradients.values()))
        yield f"{self.num_episodes} episodes, expected return {self.value:.6f}; gradient in {first.numel()} logits:"
        width = max(map(len, self.gradients))
        for name, gradient in self.gradients.items():
            yield f"  {name:{width}}  {'  '.join(f'{g:+.10f}' for g in gradient.flatten().tolist())}"
        yield f"largest difference between any two: {self.largest_difference:.1e}"


def derivation(seed: int = 0, mdp: TabularMDP | None = None) -> Derivation:
    """The policy gradient of a random policy, five times, in float64."""
    mdp = TabularMDP.random(seed) if mdp is None else mdp
    generator = torch.Generator().manual_seed(seed + 1)
    logits = torch.randn(mdp.reward.shape[:2], generator=generator, dtype=torch.float64).requires_grad_()
    p = EpisodeDistribution(mdp, logits)
    episodes = mdp.enumerate()
    probability = p.log_prob(episodes).detach().exp()

    def gradient(expectation: Tensor) -> Tensor:
        return torch.autograd.grad(expectation, logits)[0]

    returns = episodes.rewards.sum(-1)
    value = p.log_prob(episodes).exp() @ returns
    policy_only = sf.surrogate(p.score(rewards, episodes))
    whole = sf.Draws(episodes, p.log_prob(episodes).unsqueeze(-1), returns.unsqueeze(-1))
    return Derivation(
        {
            "sum over episodes": gradient(value),
            "policy only, reward-to-go": gradient(probability @ policy_only),
            "whole episode, with dynamics": gradient(probability @ sf.surrogate(whole)),
            "policy gradient theorem": policy_gradient_theorem(mdp, logits.detach()),
            "backward induction": gradient(backward_induction(mdp, logits)),
        },
        value.item(),
        len(probability),
    )


def policy_gradient_theorem(mdp: TabularMDP, logits: Tensor) -> Tensor:
    """``sum_s d(s) sum_a Q(s, a) grad policy(a | s)`` with ``(I - P^T) d = start`` and ``(I - P) V = r``, ``[S, A]``.

    s counts (step, state) pairs, so that the value may depend on the time that is left (Sutton, McAllester, Singh &
    Mansour, 2000, theorem 1).
    """
    policy = logits.softmax(-1)
    states, steps = len(mdp.start), mdp.horizon
    reward = (mdp.payment * mdp.reward).sum(-1)  # [S, A]
    later = torch.diag(torch.ones(steps - 1, dtype=policy.dtype), 1)  # step t leads to t + 1, the last one nowhere
    chain = torch.kron(later, torch.einsum("sa,saz->sz", policy, mdp.transition))
    identity = torch.eye(steps * states, dtype=policy.dtype)
    start = torch.cat([mdp.start, mdp.start.new_zeros((steps - 1) * states)])
    occupancy = torch.linalg.solve(identity - chain.T, start).view(steps, states)
    value = torch.linalg.solve(identity - chain, (policy * reward).sum(-1).repeat(steps)).view(steps, states)
    action_value = reward + torch.einsum("saz,tz->tsa", mdp.transition, later @ value)
    advantage = action_value - value.unsqueeze(-1)  # the derivative of a softmax subtracts the mean
    return (occupancy.unsqueeze(-1) * policy * advantage).sum(0)


def backward_induction(mdp: TabularMDP, logits: Tensor) -> Tensor:
    """Expected return, by V_t = sum_a policy(a | s) (r + sum_z P(z | s, a) V_t+1(z)); differentiable."""
    policy = logits.softmax(-1)
    reward = (mdp.payment * mdp.reward).sum(-1)
    value = torch.zeros_like(mdp.start)
    for _ in range(mdp.horizon):
        value = (policy * (reward + mdp.transition @ value)).sum(-1)
    return mdp.start @ value


def main() -> int:
    """Print the derivation; 0 where the five agree."""
    result = derivation()
    print("\n".join(result.lines()))
    return 0 if result.largest_difference < 1e-10 else 1


if __name__ == "__main__":
    sys.exit(main())
