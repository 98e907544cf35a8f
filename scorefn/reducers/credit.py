"""Credits: which value is charged to which decision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Credit, ScorefnError, ShapeError, Total, in_transform
from scorefn.core.representation import representation
from scorefn.reducers.recurrence import linear_recurrence

__all__ = ["Influence", "RewardToGo", "Total"]


def check_fraction(name: str, value: float) -> None:
    """Raise ScorefnError unless the value is a number in [0, 1]."""
    if not hasattr(value, "__float__"):
        raise ScorefnError(f"{name} must be a number in [0, 1], but it is {value!r}.")
    if not 0.0 <= value <= 1.0:
        raise ScorefnError(f"{name} must lie in [0, 1], but it is {value}.")


@dataclass(frozen=True, eq=False)
class Influence(Credit):
    """The dense definition: ``credit(v)_k = sum_j mask[k, j] v_j``.

    The oracle of each faster credit. Sources: Schulman, Heess, Weber & Abbeel (2015), theorem 1 (a value is charged
    to the decisions it depends on).

    Args:
        mask: ``[K, J]`` bool; True where decision k (in topological order) influences value j, False where value j does
            not depend on it in any way.

    Raises:
        ScorefnError: mask is no tensor, or not bool.
        ShapeError: mask has not two dimensions, or does not fit the values or decisions it meets.

    Example:
        >>> import torch, scorefn as sf
        >>> mask = torch.tensor([[True, True, True], [False, True, False]])  # [K, J]
        >>> sf.Influence(mask)(torch.tensor([[1.0, 10.0, 100.0]]))
        tensor([[111.,  10.]])
    """

    mask: Tensor

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check the mask."""
        if not isinstance(self.mask, Tensor):
            raise ScorefnError(
                f"The influence mask must be a bool tensor [K, J], but it is a {type(self.mask).__name__}: give "
                "torch.tensor(mask, dtype=torch.bool)."
            )
        if self.mask.ndim != 2:
            raise ShapeError(f"The influence mask must be [K, J], but it has shape {tuple(self.mask.shape)}.")
        if self.mask.dtype != torch.bool:
            raise ScorefnError(
                f"The influence mask must be bool, but it is {self.mask.dtype}: a weight is no influence."
            )

    def check(self, decisions: int, values: int) -> None:
        """The mask must be ``[K, J]``."""
        if (decisions, values) != self.mask.shape:
            raise ShapeError(
                f"Influence has a mask of shape {tuple(self.mask.shape)}, but the draws have K = {decisions} decisions "
                f"and J = {values} values: give one row per decision and one column per value."
            )

    def _weights(self, like: Tensor) -> Tensor:
        """The mask as numbers beside a tensor: kept, because the conversion costs more than a small product."""
        if in_transform() or torch.is_inference_mode_enabled() or self.mask.is_inference():
            return self.mask.to(like)  # what is made there may not be used elsewhere
        kept: dict[Any, tuple[int, Tensor]] = self.__dict__.setdefault("_kept", {})
        key, version = (like.dtype, like.device), self.mask._version
        if (found := kept.get(key)) is None or found[0] != version:  # a mask may be changed in place
            found = kept[key] = version, self.mask.to(like.device, like.dtype)
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was kept."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def influence(self, v: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, K]``."""
        return v @ self._weights(v).T

    def influence_adjoint(self, u: Tensor) -> Tensor:
        """``[N, *B, K] -> [N, *B, J]``."""
        return u @ self._weights(u)

    def predecessors(self, log_prob: Tensor) -> Tensor:
        """Decisions whose influence strictly contains k's, and earlier ones with the same influence."""
        mask = self._weights(log_prob)
        contains = (mask @ mask.T) == mask.sum(1)  # [i, k]: i influences every value that k does
        earlier = torch.ones_like(contains).triu(1)
        before = contains & (~contains.T | earlier)
        return log_prob @ before.to(log_prob)


@dataclass(frozen=True, eq=False)
class RewardToGo(Credit):
    """Decision t is charged with the values from t on: ``credit(v)_t = sum_{j >= t} discount^j v_j``.

    With ``visitation_discount`` this is the exact gradient of the discounted return ``sum_j discount^j v_j``. Without,
    it is divided by ``discount^t``: the usual update, which is *not* the gradient of that return (nor of any function:
    Nota & Thomas, 2020, "Is the policy gradient a gradient?") and can point the other way. Sources: Sutton, McAllester,
    Singh & Mansour (2000); Baxter & Bartlett (2001).

    Args:
        discount: in [0, 1].
        visitation_discount: keep the factor ``discount^t`` of each decision.
        done: ``[N, *B, T]`` bool, True at the last step of an episode, where the scan is cut and discounting starts
            afresh; None: the adapter's, or one episode a draw.

    Raises:
        ScorefnError: a discount outside [0, 1], or ``done`` is no bool tensor.
        ShapeError: as many values as decisions are needed, and ``done`` of the same shape.

    Example:
        >>> import torch, scorefn as sf
        >>> rewards = torch.tensor([[1.0, 10.0, 100.0]])
        >>> sf.RewardToGo()(rewards)
        tensor([[111., 110., 100.]])
        >>> sf.RewardToGo(0.5)(rewards)  # of 1 + 10/2 + 100/4
        tensor([[31., 30., 25.]])
        >>> sf.RewardToGo(0.5, visitation_discount=False)(rewards)  # a gradient of nothing
        tensor([[ 31.,  60., 100.]])
    """

    discount: float = 1.0
    visitation_discount: bool = True
    done: Tensor | None = None

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check the discount."""
        check_fraction("discount", self.discount)
        if self.done is not None and getattr(self.done, "dtype", None) != torch.bool:
            found = self.done.dtype if isinstance(self.done, Tensor) else type(self.done).__name__
            raise ScorefnError(f"done must be a tensor of bool, one flag per step, but it is {found}.")

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether this is the gradient of the discounted return."""
        return self.visitation_discount or self.discount == 1.0

    def value_weight(self, v: Tensor) -> Tensor | None:
        """``discount^j``, counted from the start of each episode."""
        return None if self.discount == 1.0 else self.discount ** self._age(v)

    def decision_weight(self, v: Tensor) -> Tensor | None:
        """``discount^-t`` without the visitation discount; infinite past the first step at discount 0."""
        return None if self.unbiased else self.discount ** -self._age(v)

    def check(self, decisions: int, values: int) -> None:
        """One value per decision is needed."""
        if decisions != values:
            raise ShapeError(
                f"RewardToGo charges the value of each step to the decisions up to it, but there are {decisions} "
                f"decisions and {values} values: let f return one value per step, or use Total()."
            )

    def influence(self, v: Tensor) -> Tensor:
        """``sum_{j >= t} v_j`` within the episode."""
        return linear_recurrence(v, self._continues(v, 1.0), reverse=True, dim=-1)

    def influence_adjoint(self, u: Tensor) -> Tensor:
        """``sum_{t <= j} u_t`` within the episode."""
        return linear_recurrence(u, self._delayed(self._continues(u, 1.0)), dim=-1)

    def predecessors(self, log_prob: Tensor) -> Tensor:
        """All earlier decisions of the episode."""
        return self.influence_adjoint(log_prob) - log_prob

    def uninfluenced(self, v: Tensor) -> Tensor:
        """``sum_{j < t} v_j``, of this episode and those before it.

        Values of later episodes are not charged to a decision, but they depend on it: the sooner its episode ends, the
        more of them there are in a row of fixed length. The own value is never added, not even to be subtracted.
        """
        return torch.cat([torch.zeros_like(v[..., :1]), v[..., :-1]], -1).cumsum(-1)

    def __call__(self, v: Tensor) -> Tensor:
        """One scan with the discount inside, which never forms ``discount^-t``: it would overflow."""
        to_go = linear_recurrence(v, self._continues(v, self.discount), reverse=True, dim=-1)
        return self.discount ** self._age(v) * to_go if self.visitation_discount and self.discount != 1.0 else to_go

    def bind(self, native: Credit) -> Credit:
        """Take the ends of episodes from the adapter's own credit."""
        return replace(self, done=native.done) if self.done is None and isinstance(native, RewardToGo) else self

    def __getitem__(self, index: Any) -> Credit:
        """The credit of some of the draws."""
        return self if self.done is None else replace(self, done=self.done[index])

    def _continues(self, v: Tensor, decay: float) -> Tensor | float:
        if self.done is None:
            return decay
        if self.done.shape != v.shape:
            raise ShapeError(
                f"RewardToGo has done {tuple(self.done.shape)} but met values or decisions {tuple(v.shape)}: one value "
                "and one flag are needed per step, [N, *B, T]."
            )
        return (~self.done).to(v) * decay

    def _delayed(self, continues: Tensor | float) -> Tensor | float:
        """The link t -> t+1, stored where the forward scan reads it."""
        return continues.roll(1, -1) if isinstance(continues, Tensor) else continues

    def _age(self, v: Tensor) -> Tensor:
        """Steps since the start of the episode."""
        if self.done is None:
            return torch.arange(v.shape[-1], dtype=v.dtype, device=v.device)
        return linear_recurrence(torch.ones_like(v), self._delayed(self._continues(v, 1.0)), dim=-1) - 1
