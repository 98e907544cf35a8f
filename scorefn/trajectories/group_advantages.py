"""Advantages of sequences in groups: what each token is weighed with, and what that does to the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import Draws, LeaveOneOut, ScorefnError
from scorefn.core.representation import representation
from scorefn.trajectories.bias import Bias


@dataclass(frozen=True)
class LeaveOneOutAdvantage:
    """``A = signal - mean signal of the others of the group``, charged as the draws say: unbiased.

    For one reward a sequence ``A_i = R_i - mean_{j != i} R_j``, the same for all tokens; for a reward per token,
    reward-to-go less the others' at the same step. A sequence alone in its group keeps its signal. Called with draws of
    N sequences it returns ``[N, *B, K]``, or ``[N, *B, 1]`` where all tokens share one number. Sources: Kool, van Hoof
    & Welling (2019), "Buy 4 REINFORCE samples, get a baseline for free!", eq. 5; Ahmadian et al. (2024), "Back to
    basics: revisiting REINFORCE style optimization".

    Example:
        >>> import torch
        >>> from scorefn.trajectories import LeaveOneOutAdvantage, sequence_draws
        >>> logp = torch.zeros(3, 2, requires_grad=True)
        >>> draws = sequence_draws(logp, [3.0, 0.0, 0.0])  # three answers to one prompt
        >>> LeaveOneOutAdvantage()(draws)[:, 0].tolist()
        [3.0, -1.5, -1.5]
        >>> print(LeaveOneOutAdvantage().bias(draws))
        unbiased
    """

    def __call__(self, draws: Draws) -> Tensor:
        """``[N, *B, K]`` or ``[N, *B, 1]``."""
        signal = draws.credit(draws.fx.detach())
        return signal if draws.num_blocks < 2 else signal - LeaveOneOut()(signal, draws)

    def bias(self, draws: Draws) -> Bias:
        """None."""
        return Bias()


@dataclass(frozen=True)
class GroupMeanAdvantage:
    """``A_i = R_i - mean of the group``, its own return included: leave-one-out times ``(K - 1)/K``.

    R is the whole return, all values of a sequence summed. A sequence alone in its group has no baseline. Called with
    draws of N sequences it returns ``[N, *B, 1]``. Source: Liu et al. (2025), "Understanding R1-Zero-like training: a
    critical perspective", section 3.2.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import GroupMeanAdvantage, sequence_draws
        >>> logp = torch.zeros(3, 2, requires_grad=True)
        >>> draws = sequence_draws(logp, [3.0, 0.0, 0.0])  # three answers to one prompt
        >>> GroupMeanAdvantage()(draws)[:, 0].tolist()
        [2.0, -1.0, -1.0]
        >>> print(GroupMeanAdvantage().bias(draws))
        unbiased up to the known scale 0.666667
    """

    def __call__(self, draws: Draws) -> Tensor:
        """``[N, *B, 1]``."""
        returns, centred, _ = _group_moments(draws)
        return torch.where(_group_size(draws) > 1, centred, returns)

    def bias(self, draws: Draws) -> Bias:
        """``(K - 1)/K`` for groups of one size K."""
        sizes = torch.bincount(_index(draws))
        if bool((sizes == sizes[0]).all()):
            K = int(sizes[0])
            return Bias((K - 1) / K if K > 1 else 1.0)
        return Bias(None, ("the mean of the group contains the sequence itself, and groups differ in size",))


@dataclass(frozen=True)
class GroupStandardizedAdvantage:
    """``A_i = (R_i - mean of the group)/(std of the group + epsilon)``, the spread that of a sample (K - 1).

    A sequence alone in its group keeps its return, and where all returns of a group are equal the advantages are 0.
    Called with draws of N sequences it returns ``[N, *B, 1]``. Source: Shao et al. (2024), "DeepSeekMath", section
    4.1.2.

    Args:
        epsilon: added to the spread: 1e-4 in TRL, 1e-6 in verl.
        correction: 1 divides squares by ``K - 1``, as both do; 0 by K.

    Raises:
        ScorefnError: an epsilon below 0, or a correction that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import GroupStandardizedAdvantage, sequence_draws
        >>> logp = torch.zeros(6, 2, requires_grad=True)
        >>> group = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> draws = sequence_draws(logp, [300.0, 0.0, 0.0, 3.0, 0.0, 0.0], group=group)
        >>> # the size of the rewards is gone, prompt by prompt
        >>> GroupStandardizedAdvantage(epsilon=0.0)(draws)[:, 0]
        tensor([ 1.1547, -0.5774, -0.5774,  1.1547, -0.5774, -0.5774])
    """

    epsilon: float = 1e-4
    correction: int = 1

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check the constants."""
        _check_spread(self.epsilon, self.correction)

    def __call__(self, draws: Draws) -> Tensor:
        """``[N, *B, 1]``."""
        returns, centred, square = _group_moments(draws)
        size = _group_size(draws)
        spread = (square / (size - self.correction).clamp(min=1)).sqrt()
        slope = torch.where(square > 0, 1 / (spread + self.epsilon), 0.0)
        return torch.where(size > 1, centred * slope, returns)

    def bias(self, draws: Draws) -> Bias:
        """Prompts are weighted by their difficulty."""
        return Bias(
            None, ("each group is divided by the spread of its own returns, which weighs easy and hard prompts more",)
        )


@dataclass(frozen=True)
class WhitenedAdvantage:
    """Another advantage, less its mean over all present tokens, divided by their standard deviation.

    With m and v the mean and the variance over tokens, ``(A - m)/sqrt(v + epsilon)``: a sequence counts as often as it
    has tokens. Called with draws of N sequences it returns ``[N, *B, K]``, 0 where a token is absent. Source: Hu, Liu,
    Xu & Shen (2025), "REINFORCE++".

    Args:
        advantage: what is whitened.
        epsilon: added to the variance.
        correction: 1 divides squares by the number of tokens less one, as verl does; 0 by that number, as OpenRLHF.

    Raises:
        ScorefnError: an epsilon below 0, or a correction that is neither 0 nor 1.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import WhitenedAdvantage, sequence_draws
        >>> logp = torch.zeros(2, 3, requires_grad=True)
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> # [N, T], 0 where masked
        >>> A = WhitenedAdvantage()(sequence_draws(logp, [1.0, 0.0], mask=mask))
        >>> # mean 0 and variance 1, over four tokens
        >>> A.sum().abs() < 1e-5, (A.square().sum() / 3).round(decimals=3)
        (tensor(True), tensor(1.))
    """

    advantage: GroupMeanAdvantage | LeaveOneOutAdvantage = GroupMeanAdvantage()
    epsilon: float = 1e-8
    correction: int = 1

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check the constants."""
        _check_spread(self.epsilon, self.correction)

    def __call__(self, draws: Draws) -> Tensor:
        """``[N, *B, K]``."""
        advantage = wide(self.advantage(draws)).expand(draws.log_prob.shape)
        present = present_decisions(draws)
        count = _total(present.to(advantage))
        mean = _total(torch.where(present, advantage, 0.0)) / count
        centred = torch.where(present, advantage - mean, 0.0)
        variance = _total(centred.square()) / (count - self.correction).clamp(min=1)
        return centred * torch.where(variance > 0, (variance + self.epsilon).rsqrt(), 0.0)

    def bias(self, draws: Draws) -> Bias:
        """Its own tokens stand in mean and spread."""
        because = self.advantage.bias(draws).because
        return Bias(
            None,
            (*because, "mean and spread are taken over the tokens that they correct, long sequences counting more"),
        )


Advantage = LeaveOneOutAdvantage | GroupMeanAdvantage | GroupStandardizedAdvantage | WhitenedAdvantage


def count_groups(draws: Draws) -> tuple[int, int]:
    """How many groups have one return throughout, and how many have one sequence."""
    returns, index = wide(draws.fx.detach()).sum(-1, keepdim=True), _index(draws)
    low, high = _group_range(returns, index)
    sizes = torch.bincount(index)
    many = (sizes > 1).reshape(-1, *[1] * (returns.ndim - 1))
    return int(((low == high) & many).sum()), int((sizes == 1).sum())


def present_decisions(draws: Draws) -> Tensor:
    """Which decisions are there, bool ``[N, *B, K]``."""
    return torch.ones_like(draws.log_prob, dtype=torch.bool) if draws.mask is None else draws.mask


def wide(v: Tensor) -> Tensor:
    """In single precision at least: half precision cannot count beyond a few hundred."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def _index(draws: Draws) -> Tensor:
    """The group of each sequence as 0, 1, ..., ``[N]``."""
    if draws.group is None:
        return torch.zeros(len(draws), dtype=torch.long, device=draws.log_prob.device)
    index: Tensor = torch.unique(draws.group, return_inverse=True)[1]
    return index


def _by_group(v: Tensor, index: Tensor) -> Tensor:
    """Sum of v ``[N, ...]`` over each group, ``[G, ...]``."""
    total = torch.zeros(int(index.max()) + 1, *v.shape[1:], dtype=v.dtype, device=v.device)
    return total.index_add(0, index, v)


def _group_size(draws: Draws) -> Tensor:
    """How many sequences the group of each has, ``[N, 1, ..., 1]`` beside ``[N, *B, 1]``."""
    index = _index(draws)
    return torch.bincount(index)[index].to(wide(draws.fx).dtype).reshape(-1, *[1] * (draws.fx.ndim - 1))


def _group_moments(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each sequence, that less its group's mean, and the squares of this summed: each ``[N, *B, 1]``.

    The last two are 0 to the bit where all returns of a group are equal: what rounding leaves would be blown up.
    """
    returns, index = wide(draws.fx.detach()).sum(-1, keepdim=True), _index(draws)
    low, high = _group_range(returns, index)
    centred = returns - _by_group(returns, index)[index] / _group_size(draws)
    centred = torch.where((low == high)[index], 0.0, centred)
    return returns, centred, _by_group(centred.square(), index)[index]


def _group_range(returns: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest return of each group, ``[G, ...]``."""
    shape = (int(index.max()) + 1, *returns.shape[1:])
    where = index.reshape(-1, *[1] * (returns.ndim - 1)).expand_as(returns)
    low = returns.new_full(shape, torch.inf).scatter_reduce(0, where, returns, "amin")
    return low, returns.new_full(shape, -torch.inf).scatter_reduce(0, where, returns, "amax")


def _total(v: Tensor) -> Tensor:
    """Sum over draws and decisions of each problem, ``[*B, 1]``."""
    return v.sum(-1, keepdim=True).sum(0)


def _check_spread(epsilon: float, correction: int) -> None:
    """Refuse constants that make no standard deviation."""
    if not 0.0 <= epsilon < float("inf"):
        raise ScorefnError(f"epsilon must be a number of at least 0, but it is {epsilon!r}: it is added to the spread.")
    if correction not in (0, 1):
        raise ScorefnError(f"correction must be 1, for the spread of a sample, or 0, but it is {correction!r}.")
