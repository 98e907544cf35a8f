"""Policies with a memory: a recurrent core whose state is carried along each stream and reset between episodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from scorefn.core import PyTree, ScorefnError, ShapeError


class RecurrentPolicy(nn.Module):
    """A policy that remembers: ``h_t = core(encoder(o_t), h_(t-1))``, ``a_t ~ head(features of h_t)``.

    In a rollout it is called step by step, ``policy(observations [N, *obs], state) -> (distribution, new state)``,
    and the state of a stream becomes the initial one where an episode starts. To be scored it is ``unrolled`` over
    ``[N, T]`` at once, with the same numbers.

    **Truncated back-propagation.** The state that enters a segment is a constant: it is detached, whoever passes it.
    The score is that of ``p(a_t | o_s .. o_t, h_(s-1))``, exact through time from the segment's first step s (or the
    start of the episode, where that is later) up to t. What an episode that began before s owes to the parameters by
    way of the carried state, ``d log p(a_t) / d h_(s-1)`` times ``d h_(s-1) / d parameters``, is dropped, so that the
    gradient from segments that begin in the middle of an episode is biased, the less the sooner the core forgets. Whole
    episodes have no such bias.

    Args:
        core: one step of the recurrence, ``(features [N, F], state) -> state``: nn.GRUCell, nn.LSTMCell, nn.RNNCell, or
            a module of the user's own with a method ``initial_state(num_streams)``, where learned initial states have
            their place. A state is a tensor ``[N, ...]``, or a pytree of them, of which the head sees the first.
        head: ``features [*batch, H] -> Distribution`` of batch shape ``[*batch]``: any policy. Its ``act`` and
            ``executed`` are used where it has them.
        encoder: ``[M, *obs] -> [M, F]``, ahead of the core; the place for ObservationNormalization. None: the
            observations themselves.

    Raises:
        ScorefnError: the core works through whole sequences (nn.GRU), or has no initial state.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from scorefn.trajectories import CategoricalPolicy, RecurrentPolicy
        >>> policy = RecurrentPolicy(nn.GRUCell(4, 8), CategoricalPolicy(nn.Linear(8, 2)))
        >>> distribution, state = policy(torch.zeros(3, 4), policy.initial_state(3))
        >>> distribution.batch_shape, state.shape
        (torch.Size([3]), torch.Size([3, 8]))
        >>> starts = torch.zeros(3, 5, dtype=torch.bool)
        >>> policy.unrolled(torch.zeros(3, 5, 4), starts, state).batch_shape
        torch.Size([3, 5])
    """

    def __init__(self, core: nn.Module, head: nn.Module, *, encoder: nn.Module | None = None) -> None:
        super().__init__()
        name = type(core).__name__
        if isinstance(core, nn.RNNBase):
            raise ScorefnError(
                f"{name} works through whole sequences, within which no state can be reset where an episode starts: "
                f"use one step of it, nn.{name}Cell."
            )
        if not isinstance(core, nn.RNNCellBase) and not hasattr(core, "initial_state"):
            raise ScorefnError(
                f"{name} has no initial state: use nn.GRUCell, nn.LSTMCell or nn.RNNCell, or give it a method "
                "initial_state(num_streams) that returns tensors with leading num_streams."
            )
        self.core, self.head, self.encoder = core, head, encoder

    def initial_state(self, num_streams: int) -> PyTree:
        """The state before the first step of an episode, ``[num_streams, ...]`` in every leaf: 0 for torch's cells."""
        core: Any = self.core
        if hasattr(core, "initial_state"):
            return core.initial_state(num_streams)
        zeros = core.weight_hh.new_zeros(num_streams, core.hidden_size)
        return (zeros, zeros) if isinstance(core, nn.LSTMCell) else zeros

    def forward(self, observations: PyTree, state: PyTree) -> tuple[Distribution, PyTree]:
        """One step: the distribution of the actions, batch shape ``[N]``, and the new state.

        Args:
            observations: ``[N, *obs]``.
            state: the state after the step before, or ``initial_state(N)``.
        """
        state = self.core(self._encoded(observations), state)
        return self.head(_features(state)), state

    @torch.no_grad()
    def act(self, observations: PyTree, state: PyTree) -> tuple[Tensor, PyTree]:
        """One step: a draw of the actions, ``[N, *act]``, and the new state; by the head's ``act`` where it has one."""
        state = self.core(self._encoded(observations), state)
        features = _features(state)
        act = getattr(self.head, "act", None)
        return (self.head(features).sample() if act is None else act(features)), state

    def executed(self, actions: Tensor) -> Tensor:
        """What the environment is given: as the head says, otherwise the actions themselves."""
        executed = getattr(self.head, "executed", None)
        given: Tensor = actions if executed is None else executed(actions)
        return given

    def unrolled(self, observations: PyTree, starts: Tensor, state: PyTree = None) -> Distribution:
        """All steps of a segment: their distribution, batch shape ``[N, T]``, differentiable through time.

        Encoder and head see all steps in one call; only the core works through them one after another.

        Args:
            observations: ``[N, T, *obs]``.
            starts: ``[N, T]`` bool, where the state is reset before the step.
            state: the state that enters the first column, ``[N, ...]``; detached. None: the initial one.

        Raises:
            ShapeError: starts is not ``[N, T]``, or observations or state do not belong to it.
            ScorefnError: starts is not bool.
        """
        _check_unrolled(observations, starts, state)
        count, steps = starts.shape
        initial = self.initial_state(count)
        state = initial if state is None else pytree.tree_map(_detached, state)
        flat = pytree.tree_map(lambda leaf: leaf.flatten(0, 1), observations)
        encoded = self._encoded(flat).unflatten(0, (count, steps))
        some_start = starts.any(0).tolist()
        features = []
        for t in range(steps):
            if some_start[t]:
                state = _reset(state, starts[:, t], initial)
            state = self.core(encoded[:, t], state)
            features.append(_features(state))
        distribution: Distribution = self.head(torch.stack(features, 1))
        return distribution

    def _encoded(self, observations: PyTree) -> Tensor:
        encoded: Tensor = observations if self.encoder is None else self.encoder(observations)
        return encoded


def _features(state: PyTree) -> Tensor:
    """What the head sees of a state: the output of a GRU or LSTM cell."""
    features: Tensor = pytree.tree_leaves(state)[0]
    return features


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _reset(state: PyTree, starts: Tensor, initial: PyTree) -> PyTree:
    """The initial state in streams where starts ``[N]``, the carried one elsewhere."""

    def reset(carried: Tensor, first: Tensor) -> Tensor:
        return torch.where(starts.reshape(-1, *[1] * (carried.ndim - 1)), first, carried)

    return pytree.tree_map(reset, state, initial)


def _check_unrolled(observations: PyTree, starts: Tensor, state: PyTree) -> None:
    """Refuse starts that are no bool ``[N, T]``, and observations and states that do not lead with these."""
    if starts.dtype != torch.bool:
        raise ScorefnError(f"starts is {starts.dtype}, but it must be torch.bool: True where an episode starts.")
    if starts.ndim != 2 or 0 in starts.shape:
        raise ShapeError(f"starts must be [N, T] with N and T at least 1, but its shape is {tuple(starts.shape)}.")
    for noun, tree, wanted in (("observations", observations, starts.shape), ("state", state, starts.shape[:1])):
        for leaf in filter(torch.is_tensor, pytree.tree_leaves(tree)):
            if leaf.shape[: len(wanted)] != wanted:
                raise ShapeError(
                    f"A tensor of the {noun} has shape {tuple(leaf.shape)}, but beside starts [N, T] = "
                    f"{tuple(starts.shape)} it must lead with {tuple(wanted)}."
                )
