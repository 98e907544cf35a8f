"""The constant of least variance for each block of parameters, learned from past steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Draws, LeaveOneOut, NonFiniteError, ScorefnError, Total, in_transform
from scorefn.reducers.baselines import check_moments, check_problems, checked_decay, widened
from scorefn.reducers.cross_fitting import carried
from scorefn.reducers.optimal_constant import leaves, probed_scores


class BlockConstants:
    """A constant of its own for each block of parameters: the location's need not be the scale's.

    A baseline is one number for all parameters. With ``s_gk`` the score of decision k in block g, this control variate
    has value 0 and, in block g alone, the gradient ``- sum_k c_gk s_gk``, of expectation 0. The variance is least at::

        c_gk = E[(f_k - b_k)(s_gk.v) ^ 2] / E[(s_gk.v) ^ 2]

    f_k - b_k being the signal about leave-one-out, or the signal itself where there is one block of draws, and v a
    vector of random signs. Both expectations are decaying averages over *past* steps, so that c does not look at the
    draws it is applied to; before the first update it is 0. Each decision is taken by itself; where the signal has no
    size (``Total``), the decisions are one and their scores are summed. Of independent draws of one decision, c takes
    ``c^2 E[s^2] / N`` from the variance that leave-one-out leaves: for the square of a standard normal about 1 times N,
    18 becomes 14 in the location and 96 becomes 64 in the log of the scale. It takes nothing where f and the squared
    score are uncorrelated. ``update`` costs one backward pass through log_prob and another one back, the estimate one
    for each block, through what that block needs of log_prob; f is not called.

    Use it with leave-one-out, which is what c is learned about (any baseline is unbiased). The correction goes straight
    to the leaves in the blocks: a gradient asked of what was computed from them does not contain it. It has a first
    derivative only.

    Sources: Ranganath, Gerrish & Blei (2014), "Black box variational inference", section 3.2, for the score as control
    variate with a coefficient for each component; Peters & Schaal (2008), "Reinforcement learning of motor skills with
    policy gradients", section 3.2, for the constant.

    Args:
        blocks: each a leaf tensor that requires grad, or several (``module.parameters()``), in one block each.
        decay: of the averages, in [0, 1).

    Raises:
        ScorefnError: no blocks, an empty one, one that log_prob does not depend on, a tensor in two blocks or that is
            no leaf that requires grad; off-policy draws of several decisions or values; log_prob cannot be
            differentiated twice; a second derivative; inside ``torch.func``; decay outside [0, 1).
        ShapeError: the batch shape ``*B`` changed between two updates.
        NonFiniteError: a score that is NaN or infinite, or an average that overflows; nothing was updated then.

    Example:
        >>> import torch, scorefn as sf
        >>> _ = torch.manual_seed(0)
        >>> loc, log_scale = (torch.tensor(start, requires_grad=True) for start in (1.0, 0.0))
        >>> constants = sf.BlockConstants([loc, log_scale])
        >>> for _ in range(100):
        ...     p = torch.distributions.Normal(loc, log_scale.exp())
        ...     loss = sf.expectation(p, torch.square, 64, control_variate=constants)
        >>> loss.backward()
        >>> constants.coefficient.round().flatten().tolist()
        [2.0, 4.0]
    """

    unbiased = True
    fitted = False  # to the present draws

    def __init__(self, blocks: Iterable[Tensor | Iterable[Tensor]], decay: float = 0.95) -> None:
        self.blocks = _checked_blocks(blocks)
        self.decay = checked_decay(decay)
        self.product: Tensor | None = None  # [G, *B, K], mean of (f - b) (s . v)^2
        self.square: Tensor | None = None  # [G, *B, K], mean of (s . v)^2

    def __repr__(self) -> str:
        """The sizes of the blocks."""
        sizes = [sum(tensor.numel() for tensor in block) for block in self.blocks]
        return f"BlockConstants(<{len(sizes)} blocks of {sizes} numbers>, {self.decay})"

    @property
    def coefficient(self) -> Tensor:
        """c ``[G, *B, K]``, the last axis 1 where the signal has no size; 0 where nothing was learned.

        Raises:
            ScorefnError: before the first update.
        """
        if self.product is None or self.square is None:
            raise ScorefnError("BlockConstants has learned nothing yet: update it with draws first.")
        return torch.where(self.square > 0, self.product / self.square, 0.0)

    def __call__(self, draws: Draws) -> Draws:
        """The draws with values of the same size, which give each block minus its constant times its score."""
        self._check(draws)
        if not draws.log_prob.requires_grad:
            return draws  # a value alone
        used = self._used(draws)
        if self.product is None:
            return draws
        c = self.coefficient.to(draws.log_prob)
        if c.shape[-1] > 1:
            c = widened(c, draws.log_prob)[..., : draws.log_prob.shape[-1]]
        sizes = [len(block) for block in used]
        apply: Any = _Corrected.apply
        corrected = apply(draws.fx, draws.log_prob, c, sizes, *chain.from_iterable(used))
        return replace(draws, fx=corrected)

    def update(self, draws: Draws) -> None:
        """Take in the draws, as they came from ``draw``, before they are differentiated."""
        self._check(draws)
        if not (torch.is_grad_enabled() and draws.log_prob.requires_grad):
            return
        score = probed_scores(type(self).__name__, draws.log_prob, self._used(draws))
        signal, weight = draws.signal(), carried(draws)
        if draws.num_blocks > 1:
            level = LeaveOneOut()(signal, draws)
            signal = signal - (level if weight is None else weight * level)
        effect = score if weight is None else weight * score
        charged = signal * score
        if signal.shape[-1] == 1:
            charged, effect = charged.sum(-1, keepdim=True), effect.sum(-1, keepdim=True)
        # Absent decisions have no score; where all are absent, both averages shrink alike.
        found = (charged * effect).mean(1), effect.square().mean(1)
        if not all(bool(mean.isfinite().all()) for mean in found):
            raise NonFiniteError(
                "BlockConstants met a score that is NaN or infinite, or whose square overflows, so nothing was "
                "updated. Look at the gradient of log_prob: x may lie at the edge of the support."
            )
        before = (self.product, self.square)
        product, square = (torch.zeros_like(score[:, 0, ..., :1]) if s is None else s.to(score) for s in before)
        product, square = _averaged(product, found[0], self.decay), _averaged(square, found[1], self.decay)
        check_moments("BlockConstants", product, square)
        self.product, self.square = product, square

    def _check(self, draws: Draws) -> None:
        if in_transform():
            raise ScorefnError(
                "BlockConstants keeps a state, which a torch.func transform or torch.compile cannot trace: leave it "
                "out there."
            )
        if draws.behaviour_log_prob is not None and not (
            type(draws.credit) is Total and draws.log_prob.shape[-1] == draws.fx.shape[-1] == 1
        ):
            raise ScorefnError(
                "BlockConstants met off-policy draws of several decisions or values, whose scores do not have mean 0 "
                "under the weight of a single value. Sample on-policy, or use LeaveOneOut() alone."
            )
        if self.product is not None:
            check_problems("BlockConstants", self.product.shape[1:-1], draws.log_prob.shape[1:-1])

    def _used(self, draws: Draws) -> list[list[Tensor]]:
        """Of each block, the tensors that log_prob was computed from."""
        known = {id(tensor) for tensor in leaves(draws.log_prob)}
        found = [[tensor for tensor in block if id(tensor) in known] for block in self.blocks]
        for number, (block, used) in enumerate(zip(self.blocks, found, strict=True)):
            if not used:
                raise ScorefnError(
                    f"log_prob does not depend on block {number} of BlockConstants, of shapes "
                    f"{[tuple(tensor.shape) for tensor in block]}: it has no score there. Give the tensors that the "
                    "distribution was built from, not copies of them, and leave out those that only f uses."
                )
        return found


def _averaged(state: Tensor, found: Tensor, decay: float) -> Tensor:
    """The decaying average, with room for decisions beyond those seen before."""
    return widened(state, found).lerp(widened(found, state), 1.0 - decay)


def _checked_blocks(blocks: Iterable[Tensor | Iterable[Tensor]]) -> list[list[Tensor]]:
    if isinstance(blocks, Tensor) or not isinstance(blocks, Iterable):
        raise ScorefnError(f"blocks must be a list of blocks, but it is a {type(blocks).__name__}: use [tensor, ...].")
    found: list[list[Tensor]] = []
    seen: dict[int, int] = {}
    for number, given in enumerate(blocks):
        block: list[Any] = [given] if not isinstance(given, Iterable) or isinstance(given, Tensor) else list(given)
        if not block:
            raise ScorefnError(f"Block {number} is empty, so it has no score: leave it out.")
        for tensor in block:
            if not (isinstance(tensor, Tensor) and tensor.is_leaf and tensor.requires_grad):
                kind = f"a {type(tensor).__name__}"
                if isinstance(tensor, Tensor):
                    kind = "a tensor that was computed from others" if tensor.requires_grad else "a tensor without grad"
                raise ScorefnError(
                    f"Block {number} contains {kind}, but the constants belong to leaf tensors that require grad: give "
                    "the parameters themselves, those that an optimiser would be given."
                )
            if id(tensor) in seen:
                raise ScorefnError(
                    f"A tensor of shape {tuple(tensor.shape)} is in block {seen[id(tensor)]} and again in block "
                    f"{number}: two constants would be subtracted from its gradient. Keep it in one."
                )
            seen[id(tensor)] = number
        found.append(block)
    if not found:
        raise ScorefnError("BlockConstants was given no blocks: give at least one tensor that log_prob depends on.")
    return found


class _Corrected(torch.autograd.Function):
    """The values as they are; on the way back, each block receives minus its constants times its scores.

    The gradient arrives through the first value, whose weight is 1 under every credit. log_prob is an input, although
    it receives nothing, so that its graph is not freed before it was used here.
    """

    @staticmethod
    def forward(
        ctx: Any, fx: Tensor, log_prob: Tensor, constants: Tensor, sizes: Sequence[int], *leaf: Tensor
    ) -> Tensor:
        ctx.save_for_backward(log_prob, constants)
        ctx.sizes, ctx.leaf = sizes, leaf
        return fx.view_as(fx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ScorefnError(
                "BlockConstants has a first derivative only, but its gradient is taken with create_graph=True, for a "
                "further one. Leave the control variate out there."
            )
        log_prob, constants = ctx.saved_tensors
        leaf = iter(ctx.leaf)
        found: list[Tensor | None] = []
        for constant, size in zip(constants, ctx.sizes, strict=True):
            block = [next(leaf) for _ in range(size)]
            cotangent = (-constant * grad[..., :1]).expand(log_prob.shape)
            found += torch.autograd.grad(log_prob, block, cotangent, retain_graph=True, allow_unused=True)
        return grad, None, None, None, *found
