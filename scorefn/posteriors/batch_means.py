"""The error of a mean of dependent numbers, from the means of consecutive batches."""

from __future__ import annotations

from torch import Tensor


def lugsail(means: Tensor) -> tuple[Tensor, Tensor]:
    """The variance of the mean of all, from batches of one block and of two, ``[P]`` each.

    With a batches of mean m_i, ``V = sum_i (m_i - m)^2 / (a (a - 1))``; of an odd number of blocks the oldest is left
    out. Where the autocovariances are gamma_k, V falls short of the variance of the mean by the share ``c/b`` of
    batches of length b, so that twice the second minus the first is right to first order.

    Args:
        means: ``[A, P]``, of consecutive blocks of one length, A at least 4.
    """
    means = means[len(means) % 2 :]
    return _batch_variance(means), _batch_variance(means.reshape(-1, 2, means.shape[1]).mean(1))


def _batch_variance(means: Tensor) -> Tensor:
    return means.var(0) / len(means)
