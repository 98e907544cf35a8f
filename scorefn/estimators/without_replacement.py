"""Sampling without replacement from a finite support."""

from __future__ import annotations

import torch
from torch import Tensor

from scorefn.core import ScorefnError, check_count


def sample_without_replacement(log_prob: Tensor, num_samples: int) -> Tensor:
    """k different values in the order of their draw, ``[*B, S] -> [k, *B]``, by perturbed log-probabilities.

    The k largest of ``log p_i + g_i``, g standard Gumbel, in descending order: the first is a draw from p, each later
    one a draw from p among the values that are left, so that an order s has the (Plackett-Luce) probability
    ``prod_i p(s_i) / (1 - p(s_1) - ... - p(s_{i-1}))``. Sources: Yellott (1977); Vieira (2014); Kool, van Hoof &
    Welling (2019), "Stochastic beams and where to find them".

    Args:
        log_prob: log-probabilities or any logits; values of -inf come last.
        num_samples: k, at most S.

    Raises:
        ScorefnError: k is no integer from 1 to S.

    Example:
        >>> import torch
        >>> from scorefn import sample_without_replacement
        >>> sample_without_replacement(torch.tensor([0.7, 0.3]).log(), 2).sort().values
        tensor([0, 1])
    """
    count, size = check_count("num_samples", num_samples), log_prob.shape[-1]
    if count > size:
        raise ScorefnError(
            f"num_samples={count} different values were asked for, but there are {size}: lower num_samples to {size} "
            "at most."
        )
    noise = torch.empty_like(log_prob, dtype=torch.float64, requires_grad=False)  # float32 has no rare values
    gumbel = noise.exponential_().clamp_(min=torch.finfo(torch.float64).tiny).log_().neg_()
    return (log_prob.detach() + gumbel).topk(count).indices.movedim(-1, 0)
