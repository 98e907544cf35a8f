"""Baselines fitted to the other draws of the same batch: the best constant, and a regression on features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Draws, LeaveOneOut, NonFiniteError, ScorefnError, ShapeError, in_transform
from scorefn.core.checks import no_part
from scorefn.core.representation import called
from scorefn.reducers.checks import checked_ridge
from scorefn.reducers.cross_fitting import carried, cross_fit, others


@dataclass(frozen=True)
class OptimalConstant:
    """The constant of least variance, from the other draws: leave-one-out, weighted by squared scores.

    With ``s_jk`` the score of decision k of draw j and v a vector of random signs::

        b_ik = sum_j f_jk w_jk / sum_j w_jk,    w_jk = (s_jk . v)^2,    j in i's group outside i's block

    which tends to ``E[f |s|^2] / E[|s|^2]``. It is unbiased because neither draw i nor its scores enter. All ``s . v``
    together cost two backward passes through log_prob, none through f: g = grad sum_jk c_jk log_prob_jk is linear in c,
    and <g, v> is differentiated in c. Where the signal has no size (``Total``), the decisions are one and their scores
    are summed. Off-policy, b is carried by W, and ``f w / w`` becomes ``f W w / W^2 w``. Where all weights are 0, it is
    leave-one-out. It gains from about 50 draws on where f is large where scores are large (18 becomes 14 for the square
    of a standard normal about 1), and next to nothing where a score sums many coordinates: measure before you pay.

    A constant for each decision leaves out what decisions that share parameters could do for each other; ``shared``
    takes one constant for all of them, and the best one for their sum: ``sum_j T_j S_j / sum_j S_j^2``, with
    ``S_j = sum_k s_jk . v`` and ``T_j = sum_k f_jk s_jk . v``. ``BlockConstants`` has one for each block of parameters.

    Sources: Weaver & Tao (2001), "The optimal reward baseline for gradient-based reinforcement learning"; Peters &
    Schaal (2008), "Reinforcement learning of motor skills with policy gradients", section 3.2.

    Args:
        shared: one constant for all decisions of a draw.

    Raises:
        ScorefnError: all draws lie in one block; log_prob cannot be differentiated twice; inside ``torch.func``.

    Example:
        >>> import torch, scorefn as sf
        >>> _ = torch.manual_seed(0)
        >>> p = torch.distributions.Normal(torch.ones((), requires_grad=True), 1.0)
        >>> draws = sf.draw(p, torch.square, 20_000)
        >>> b = sf.OptimalConstant()(draws.signal(), draws)
        >>> bool((b - 4).abs().max() < 0.3)  # E[x^2 (x - 1)^2] = 4, where E x^2 = 2
        True
        >>> score = draws.x[:, None] - 1
        >>> noise = [((draws.fx - c) * score).var() for c in (b, 2.0)]  # 14 and 18
        >>> bool(noise[0] < 0.85 * noise[1])
        True
    """

    shared: bool = False
    unbiased = True
    fitted = True

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``, or a last axis of 1 where the decisions share the constant."""
        _refuse_one_block(self, draws)
        plain = LeaveOneOut()(signal, draws)
        if not draws.log_prob.requires_grad:
            return plain  # a value alone: there is no score, and no gradient to improve
        score = probed_scores("OptimalConstant", draws.log_prob, [leaves(draws.log_prob)])[0]
        weight = carried(draws)
        effect = score if weight is None else weight * score
        charged = signal * score
        if self.shared or signal.shape[-1] == 1:
            charged, effect = charged.sum(-1, keepdim=True), effect.sum(-1, keepdim=True)
        best = others(charged * effect, draws) / others(effect.square(), draws)
        fallback = plain.mean(-1, keepdim=True) if plain.shape[-1] > best.shape[-1] else plain
        return torch.where(best.isfinite(), best, fallback)


def probed_scores(name: str, log_prob: Tensor, blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """``s . v`` of each decision in each block of parameters, ``[G, N, *B, K]``, v being one vector of random signs.

    Args:
        name: of the reducer, for its refusals.
        log_prob: ``[N, *B, K]``.
        blocks: leaves that log_prob was computed from.

    Raises:
        ScorefnError: log_prob cannot be differentiated twice, or not any more; inside ``torch.func``.
    """
    if in_transform():
        raise ScorefnError(
            f"{name} differentiates log_prob itself, which it cannot do inside a torch.func transform or "
            "torch.compile: use LeaveOneOut() there."
        )
    parameters = [parameter for block in blocks for parameter in block]
    with torch.enable_grad():
        c = torch.zeros_like(log_prob, requires_grad=True)
        try:
            gradient = torch.autograd.grad(log_prob, parameters, c, create_graph=True, materialize_grads=True)
            along = iter([(g * v).sum() for g, v in zip(gradient, _signs(parameters), strict=True)])
            totals = [torch.stack(list(islice(along, len(block)))).sum() for block in blocks]
            scores = [
                torch.autograd.grad(total, c, retain_graph=number < len(totals))[0]
                for number, total in enumerate(totals, 1)
            ]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "second time" in str(error):
                raise ScorefnError(
                    f"{name} differentiates log_prob, but a backward pass has freed its graph: build the distribution "
                    "anew in every step, and update what learns before backward."
                ) from error
            raise ScorefnError(
                f"{name} differentiates log_prob twice, but an operation behind it does not allow that "
                f"({str(error).splitlines()[0][:150]}). Use LeaveOneOut(), or write that operation differentiably."
            ) from error
    return torch.stack(scores).detach()


def _signs(parameters: list[Tensor]) -> list[Tensor]:
    return [torch.randint_like(parameter, 2).mul_(2).sub_(1).detach() for parameter in parameters]


def leaves(log_prob: Tensor) -> list[Tensor]:
    """The tensors that log_prob was computed from and that require grad."""
    if log_prob.grad_fn is None:
        return [log_prob]
    found: dict[int, Tensor] = {}
    seen: set[Any] = {log_prob.grad_fn}
    stack: list[Any] = [log_prob.grad_fn]
    while stack:
        node = stack.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found[id(variable)] = variable
        fresh = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
        seen.update(fresh)
        stack += fresh
    return list(found.values())


class RegressionBaseline:
    """A linear value function, fitted anew to the other blocks of each batch: no state and no learning rate.

    ``b_ik = a_i + c_i . phi_ik`` with ``a_i, c_i`` the ridge regression of the signal on the features over all present
    decisions of the draws outside i's block, of all groups; the problems B have coefficients of their own. It is
    unbiased as long as the features of decision k do not contain decision k or what follows from it: the coefficients
    come from other draws. Without features that vary it is leave-one-out. The coefficients are shared by the decisions:
    give the time as a feature where values depend on it. With hardly more rows than features, raise ``ridge``.

    Sources: Duan, Chen, Houthooft, Schulman & Abbeel (2016), "Benchmarking deep reinforcement learning for continuous
    control", for linear features in place of a network; leaving out the own block is what makes the fit exact.

    Args:
        features: ``Draws -> [N, *B, K, F]``; None: the adapter's ``draws.context``, never the draw itself.
        ridge: damping of each coefficient, relative to the sum of squares of its feature.

    Raises:
        ScorefnError: features that cannot be called, a ridge that is no positive number, no features and no context, or
            all draws lie in one block.
        ShapeError: the features are not ``[N, *B, K, F]``.
        NonFiniteError: a feature of a decision that is present is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> seen = torch.arange(4.0).reshape(4, 1, 1)  # before the decision
        >>> log_prob = torch.zeros(4, 1, requires_grad=True)
        >>> draws = sf.Draws(torch.arange(4), log_prob, 5 + 2 * seen[..., 0], context=seen)
        >>> baseline = sf.RegressionBaseline(ridge=1e-6)
        >>> baseline(draws.signal(), draws).T.round(decimals=3)  # each from the three others
        tensor([[ 5.,  7.,  9., 11.]])
    """

    unbiased = True
    fitted = True

    def __init__(self, features: Callable[[Draws], Tensor] | None = None, *, ridge: float = 0.01) -> None:
        if features is not None and (isinstance(features, type) or not callable(features)):
            use = "give a function of the draws that returns [N, *B, K, F], or None for the context that they carry."
            raise no_part("features", features, use)
        self.features, self.ridge = features, checked_ridge(ridge)

    def __repr__(self) -> str:
        """As it was called."""
        return called(self, features=self.features, ridge=self.ridge)

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        _refuse_one_block(self, draws)
        full = draws.log_prob.shape
        phi = self._features(signal, draws)
        present = torch.ones(full, dtype=torch.bool, device=signal.device) if draws.mask is None else draws.mask
        weight = carried(draws)
        weight = present.to(signal) if weight is None else torch.where(present, weight, 0.0)
        phi = torch.where(present.unsqueeze(-1), phi, 0.0)
        if not in_transform() and not bool((finite := phi.isfinite()).all()):
            raise NonFiniteError(
                f"A feature of RegressionBaseline is {phi[~finite][0].item()}: it would make every coefficient NaN. "
                "Features must be finite wherever a decision is present."
            )
        # A common shift of the features changes the digits of the sums and nothing else.
        phi = phi - phi.sum((0, -2), keepdim=True) / present.sum((0, -1), keepdim=True).clamp(min=1).unsqueeze(-1)
        level, slope = cross_fit(phi, signal.expand(full), weight, draws, ridge=self.ridge, across_groups=True)
        return level.unsqueeze(-1) + (phi @ slope.unsqueeze(-1)).squeeze(-1)

    def _features(self, signal: Tensor, draws: Draws) -> Tensor:
        features = draws.context if self.features is None else self.features(draws)
        if features is None:
            raise ScorefnError(
                "RegressionBaseline has no features: these draws carry no context, and a regression on the draw itself "
                "would be biased. Pass features=, a function of what was known before each decision."
            )
        full = tuple(draws.log_prob.shape)
        if not isinstance(features, Tensor) or features.ndim != len(full) + 1 or features.shape[:-1] != full:
            kind = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ShapeError(
                f"The features of RegressionBaseline are {kind}, but each of the decisions [N, *B, K] = {full} has a "
                f"vector of them: give a tensor [N, *B, K, F] = {(*full, 'F')}, for instance by .unsqueeze(-1) or "
                f".flatten({len(full)})."
            )
        return features.detach().to(signal)


def _refuse_one_block(baseline: object, draws: Draws) -> None:
    if draws.num_blocks < 2:
        raise ScorefnError(
            f"{type(baseline).__name__} needs two blocks of draws or more, but the {len(draws)} draw(s) form "
            f"{draws.num_blocks}: there is no other draw to learn from. Raise num_samples, or use baseline=None."
        )
