"""Objectives for sequences, each composed of named parts: an advantage, a ratio, a reduction; with the bias declared.

    objective = sum_i w_i sum_t transform(ratio_it, A_it) ,

A the advantage, w the reduction's weight of a sequence. A recipe is a choice of parts. Each is to be *maximised*, and
its denominator is a constant that may be passed in, so that microbatches and ranks add up exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import Draws, NonFiniteError, ShapeError
from scorefn.core.representation import representation
from scorefn.trajectories.bias import Bias
from scorefn.trajectories.group_advantages import (
    Advantage,
    GroupMeanAdvantage,
    GroupStandardizedAdvantage,
    LeaveOneOutAdvantage,
    WhitenedAdvantage,
    count_groups,
    present_decisions,
)
from scorefn.trajectories.ratio_meters import effective_sample_size
from scorefn.trajectories.ratios import (
    Clipped,
    Geometric,
    Level,
    PerDecision,
    Raw,
    Sequence,
    Transform,
    ratio_surrogate,
)
from scorefn.trajectories.reductions import Reduction, SequenceMean, TokenMean, TokenSum, positive


@dataclass(frozen=True, eq=False)
class Objective:
    """What a recipe returns.

    Args:
        value: the objective, a scalar (``[*B]`` for draws of B problems); differentiate it and go uphill. Its value
            says little: watch the reward.
        per_sequence: ``[N, *B]``, the part of each sequence; they sum to value.
        bias: what its expected gradient is; not known from a part of the batch, whose advantage was given.
        degenerate_groups: how many groups of these draws, of two or more sequences, have one and the same return
            throughout, so that their advantages are 0 and they teach nothing (over all problems).
        singleton_groups: how many groups have one sequence only; it has no baseline.
        effective_sample_size: of the whole sequences' importance weights, ``(sum w)^2 / sum w^2``, ``[*B]``; N
            on-policy.
        clip_fraction: the share of present tokens whose gradient the clip removed; 0 without one.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import rloo, sequence_draws
        >>> logp = torch.zeros(4, 2, requires_grad=True)
        >>> found = rloo(sequence_draws(logp, [1, 0, 1, 1], group=torch.tensor([0, 0, 1, 1])))
        >>> found.value.requires_grad, found.per_sequence.shape
        (True, torch.Size([4]))
        >>> print(found.bias, found.degenerate_groups, found.clip_fraction, sep=", ")
        unbiased, 1, 0.0
    """

    value: Tensor
    per_sequence: Tensor
    bias: Bias
    degenerate_groups: int
    singleton_groups: int
    effective_sample_size: Tensor
    clip_fraction: float

    __repr__ = representation


_GIVEN = Bias(None, ("the advantage was given: ask the whole batch's objective for the bias",))


def objective(
    draws: Draws,
    advantage: Advantage,
    reduction: Reduction,
    *,
    level: Level | None = None,
    transform: Transform | None = None,
    given: Tensor | None = None,
) -> Objective:
    """An objective composed of its parts, ``sum_i w_i sum_t transform(ratio_it, A_it)``, to be maximised.

    Microbatches add up to the whole batch if the advantage is computed once and the denominators are the whole's. It
    reads rewards and groups only, so that the whole batch's draws may be made under ``torch.no_grad()``:

    >>> import torch
    >>> from scorefn.trajectories import GroupStandardizedAdvantage, grpo, sequence_draws
    >>> logp = torch.zeros(6, 4, requires_grad=True)
    >>> group = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> whole = sequence_draws(logp, [1, 0, 1, 1, 0, 0], group=group)
    >>> A = GroupStandardizedAdvantage()(whole)
    >>> first, second = slice(0, 2), slice(2, 6)
    >>> value = grpo(whole[first], denominator=6, given=A[first]).value
    >>> value = value + grpo(whole[second], denominator=6, given=A[second]).value
    >>> bool(torch.isclose(value, grpo(whole).value))
    True

    Args:
        draws: of ``sequence_draws``; with behaviour_log_prob off-policy.
        advantage: what each token is weighed with.
        reduction: how tokens and sequences are added.
        level: of the importance ratio; None: the whole sequence.
        transform: of the ratio; None: none.
        given: the advantage's values ``[N, *B, K]`` or ``[N, *B, 1]``, computed once on the whole batch and sliced with
            the draws; None: computed on these draws.

    Raises:
        ShapeError: given values of another shape.
        NonFiniteError: an advantage that is NaN or infinite, or a ratio that overflows.
        ScorefnError: a denominator that is not positive.
    """
    level = Sequence() if level is None else level
    transform = Raw() if transform is None else transform
    if given is None:
        values, declared = advantage(draws), advantage.bias(draws)
    else:  # the groups of a part tell nothing of those of the whole
        values, declared = _checked_advantage(given, draws), _GIVEN
    weighed = (values * reduction(draws)).to(draws.fx.dtype)
    estimate = ratio_surrogate(draws, weighed, level=level, transform=transform)
    degenerate, singletons = count_groups(draws)
    return Objective(
        value=estimate.sum(0),
        per_sequence=estimate,
        bias=declared * reduction.bias() * _ratio_bias(draws, level, transform),
        degenerate_groups=degenerate,
        singleton_groups=singletons,
        effective_sample_size=effective_sample_size(Sequence()(draws).squeeze(-1)),
        clip_fraction=_clip_fraction(draws, values, level, transform),
    )


# ------------------------------------------------------------------------------------------------------------ recipes


def rloo(draws: Draws, *, denominator: float | None = None, given: Tensor | None = None) -> Objective:
    """REINFORCE with the leave-one-out baseline of each prompt: unbiased, on-policy and off-policy.

        1/denominator sum_i w_i sum_t (R_i - mean_{j != i} R_j) log pi(token_it) ,

    w the importance weight of the whole sequence. Kool, van Hoof & Welling (2019); Ahmadian et al. (2024), "Back to
    basics". Draws with a reward per token, or with the KL in the reward, are charged with reward-to-go instead of R.

    Args:
        draws: of ``sequence_draws``.
        denominator: the number of sequences of the whole batch; None: of these draws.
        given: the advantage, ``[N, *B, K]`` or ``[N, *B, 1]``, computed on the whole batch and sliced with the draws;
            None: of these draws.

    Raises:
        ScorefnError: a denominator that is not positive.
        ShapeError, NonFiniteError: as ``objective``.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import rloo, sequence_draws
        >>> logp = torch.zeros(4, 2, requires_grad=True)  # of the sampled tokens, under the model
        >>> draws = sequence_draws(logp, [1, 0, 0, 1], group=torch.tensor([0, 0, 1, 1]))
        >>> rloo(draws).value.backward()
        >>> logp.grad[:, 0].tolist()  # A/N: what is better than the other answer becomes likelier
        [0.25, -0.25, -0.25, 0.25]
    """
    return objective(draws, LeaveOneOutAdvantage(), TokenSum(denominator), given=given)


def reinforce_plus_plus_baseline(
    draws: Draws,
    *,
    clip: float = 0.2,
    epsilon: float = 1e-8,
    denominator: float | None = None,
    given: Tensor | None = None,
) -> Objective:
    """REINFORCE++-baseline: less the group's mean, whitened over the batch's tokens, clipped as PPO; biased.

        1/denominator sum_i sum_t min(r_it A_it, clip(r_it, 1 - clip, 1 + clip) A_it) ,

    r the ratio of a token. Hu, Liu, Xu & Shen (2025), "REINFORCE++: stabilizing critic-free policy optimization with
    global advantage normalization", arXiv 2501.03262.

    Args:
        draws: of ``sequence_draws``.
        clip: how far the ratio may move.
        epsilon: added to the variance of the tokens' advantages.
        denominator: as for ``rloo``.
        given: as for ``rloo``.

    Raises:
        ScorefnError: a clip outside [0, 1], an epsilon below 0, or a denominator that is not positive.
        ShapeError, NonFiniteError: as ``objective``.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import reinforce_plus_plus_baseline, sequence_draws
        >>> logp = torch.zeros(4, 2, requires_grad=True)
        >>> draws = sequence_draws(logp, [1, 0, 0, 1], group=torch.tensor([0, 0, 1, 1]))
        >>> found = reinforce_plus_plus_baseline(draws)
        >>> found.value.backward()
        >>> logp.grad.sign()[:, 0].tolist(), found.bias.unbiased
        ([1.0, -1.0, -1.0, 1.0], False)
    """
    advantage = WhitenedAdvantage(GroupMeanAdvantage(), epsilon)
    return objective(
        draws, advantage, TokenSum(denominator), level=PerDecision(), transform=Clipped(clip, clip), given=given
    )


def grpo(
    draws: Draws,
    *,
    clip: float = 0.2,
    epsilon: float = 1e-4,
    denominator: float | None = None,
    given: Tensor | None = None,
) -> Objective:
    """GRPO: standardised within the group, averaged over each sequence's tokens; biased by spread and by length.

        1/denominator sum_i 1/T_i sum_t min(r_it A_i, clip(r_it, 1 - clip, 1 + clip) A_i) ,
        A_i = (R_i - mean of the group)/(std of the group + epsilon) .

    Shao et al. (2024), "DeepSeekMath", eq. 3, without its KL: subtract ``beta * kl_surrogate(draws).mean()``, whose
    gradient is that of ``KL(pi || ref)``, unlike that of the paper's term.

    Args:
        draws: of ``sequence_draws``.
        clip: how far the ratio may move.
        epsilon: added to the spread: 1e-4 in TRL, 1e-6 in verl.
        denominator: as for ``rloo``.
        given: as for ``rloo``.

    Raises:
        ScorefnError: a clip outside [0, 1], an epsilon below 0, or a denominator that is not positive.
        ShapeError, NonFiniteError: as ``objective``.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import grpo, sequence_draws
        >>> logp = torch.zeros(2, 4, requires_grad=True)
        >>> mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
        >>> found = grpo(sequence_draws(logp, [0, 1], mask=mask), epsilon=0.0)
        >>> found.value.backward()
        >>> # a token of the short sequence weighs four times as much: one of the biases
        >>> logp.grad[:, 0]
        tensor([-0.3536,  0.0884])
        >>> len(found.bias.because)
        2
    """
    advantage = GroupStandardizedAdvantage(epsilon)
    return objective(
        draws, advantage, SequenceMean(denominator), level=PerDecision(), transform=Clipped(clip, clip), given=given
    )


def dr_grpo(
    draws: Draws, *, max_length: int, clip: float = 0.2, denominator: float | None = None, given: Tensor | None = None
) -> Objective:
    """Dr.GRPO: less the group's mean, no spread, a constant length: unbiased up to ``(K - 1)/K`` on-policy.

        1/(denominator max_length) sum_i sum_t min(r_it A_i, clip(r_it, 1 - clip, 1 + clip) A_i) ,
        A_i = R_i - mean of the group .

    Liu et al. (2025), "Understanding R1-Zero-like training: a critical perspective", section 3.2.

    Args:
        draws: of ``sequence_draws``.
        max_length: the constant that lengths are divided by: the largest number of tokens that may be generated.
        clip: how far the ratio may move.
        denominator: as for ``rloo``.
        given: as for ``rloo``.

    Raises:
        ScorefnError: a clip outside [0, 1], or a max_length or denominator that is not positive.
        ShapeError, NonFiniteError: as ``objective``.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import dr_grpo, sequence_draws
        >>> logp = torch.zeros(2, 4, requires_grad=True)
        >>> mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
        >>> found = dr_grpo(sequence_draws(logp, [0, 1], mask=mask), max_length=4)
        >>> found.value.backward()
        >>> logp.grad[:, 0].tolist(), str(found.bias)  # tokens weigh alike
        ([-0.0625, 0.0625], 'unbiased up to the known scale 0.5')
    """
    sequences = positive("denominator", denominator, len(draws))
    reduction = TokenSum(sequences * positive("max_length", max_length, 1))
    return objective(
        draws, GroupMeanAdvantage(), reduction, level=PerDecision(), transform=Clipped(clip, clip), given=given
    )


def dapo(
    draws: Draws,
    *,
    tokens: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    epsilon: float = 1e-4,
    given: Tensor | None = None,
) -> Objective:
    """DAPO: standardised within the group, clipped higher above than below, averaged over all tokens; biased.

        1/tokens sum_i sum_t min(r_it A_i, clip(r_it, 1 - clip_low, 1 + clip_high) A_i) ,

    A as for ``grpo``. Yu et al. (2025), "DAPO: an open-source LLM reinforcement learning system at scale", eq. 8. Its
    dynamic sampling leaves out what ``degenerate_groups`` counts.

    Args:
        draws: of ``sequence_draws``.
        tokens: how many tokens the whole batch has: ``draws.mask.sum()`` of the whole.
        clip_low: how far the ratio may fall.
        clip_high: how far it may rise.
        epsilon: added to the spread.
        given: as for ``rloo``.

    Raises:
        ScorefnError: a clip_low outside [0, 1], a clip_high or an epsilon below 0, or tokens that are not positive.
        ShapeError, NonFiniteError: as ``objective``.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import dapo, sequence_draws
        >>> logp = torch.zeros(4, 2, requires_grad=True)
        >>> draws = sequence_draws(logp, [1, 0, 1, 1], group=torch.tensor([0, 0, 1, 1]))
        >>> found = dapo(draws, tokens=8)
        >>> # the second prompt teaches nothing: draw another one in its place
        >>> found.degenerate_groups
        1
    """
    advantage = GroupStandardizedAdvantage(epsilon)
    return objective(
        draws, advantage, TokenMean(tokens), level=PerDecision(), transform=Clipped(clip_low, clip_high), given=given
    )


def _ratio_bias(draws: Draws, level: Level, transform: Transform) -> Bias:
    """What the ratio adds: on-policy, where it is 1, nothing unless its gradient is another one."""
    parts: list[Level | Transform] = [level] if isinstance(level, Geometric) else []
    if draws.behaviour_log_prob is not None:
        parts = [part for part in (level, transform) if not part.unbiased]
    because = tuple(part.bias[0].lower() + part.bias[1:].rstrip(".") for part in parts)
    return Bias(None, because) if because else Bias()


@torch.no_grad()
def _clip_fraction(draws: Draws, advantage: Tensor, level: Level, transform: Transform) -> float:
    """The share of present tokens whose gradient the transform removes."""
    ratio, present = level(draws).exp(), present_decisions(draws)
    advantage = advantage.to(ratio.dtype)
    clipped = (transform(ratio, advantage) != ratio * advantage) & present
    return float(clipped.sum() / present.sum())


def _checked_advantage(given: Tensor, draws: Draws) -> Tensor:
    """Values computed elsewhere, refused where they do not fit."""
    full = tuple(draws.log_prob.shape)
    if given.shape not in (full, (*full[:-1], 1)):
        raise ShapeError(
            f"given has shape {tuple(given.shape)}, but beside log_prob [N, *B, K] = {full} it must be {full} or "
            f"{(*full[:-1], 1)}: slice the whole batch's advantage with the draws, given[a:b] beside draws[a:b]."
        )
    if not bool((finite := given.isfinite()).all()):
        raise NonFiniteError(f"given is {given[~finite][0].item()} somewhere: it would make the whole gradient NaN.")
    return given.detach()
