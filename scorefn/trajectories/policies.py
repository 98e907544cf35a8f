"""Policies: modules that map observations to a distribution over actions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Categorical


class CategoricalPolicy(nn.Module):
    """A policy over finitely many actions: ``Categorical(logits=network(observations))``.

    Args:
        network: ``[*batch, *obs] -> [*batch, A]``, the logits of A actions.

    Example:
        >>> policy = CategoricalPolicy(nn.Linear(4, 2))
        >>> policy(torch.zeros(3, 4)).logits.shape
        torch.Size([3, 2])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: Tensor) -> Categorical:
        """The distribution of the actions, batch shape ``[*batch]``."""
        return Categorical(logits=self.network(observations), validate_args=False)

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """A draw of ``self(observations)`` ``[*batch]``, without building it.

        Independent exponential clocks of rate ``exp(logits)`` race: action a rings first with probability
        ``softmax(logits)_a`` (Gumbel, 1954; Maddison, Tarlow & Minka, 2014).
        """
        logits: Tensor = self.network(observations)
        return logits.sub(torch.empty_like(logits).exponential_().log_()).argmax(-1)
