"""Pyro's ``infer={"baseline": {...}}``: baselines that a guide gives to its own sites.

A baseline must not know the value of its site. So it is evaluated where the site's statement is reached, before the
value is drawn: what does not exist yet cannot be read. What was handed over is compared again when the guide is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import Baseline, Draws, NonFiniteError, ScorefnError, ShapeError, is_stateful

KEYS = ("nn_baseline", "nn_baseline_input", "use_decaying_avg_baseline", "baseline_beta", "baseline_value")
AVERAGE = "__baseline_avg_downstream_cost_"  # the param that Pyro keeps a site's decaying average in


@dataclass(frozen=True)
class Hint:
    """What a site's hint said when the site was reached.

    Args:
        site: its name.
        predicted: the value of ``nn_baseline`` or ``baseline_value``, with its gradient; None: neither.
        decay: of the decaying average; None: not asked for.
    """

    site: str
    predicted: Tensor | None
    decay: float | None

    def columns(self, shape: tuple[int, ...], num_together: int) -> Tensor | None:
        """The prediction as ``[N or 1, size]``, for decisions of one particle of this shape.

        Raises:
            ShapeError: it is of another shape: nothing is repaired by broadcasting.
        """
        if (value := self.predicted) is None:
            return None
        if num_together > 1 and value.shape == (num_together, *shape):
            return value.reshape(num_together, -1)
        if _stripped(value.shape) == _stripped(shape):
            return value.reshape(1, -1)
        asked = f"{_stripped(shape)}"
        if num_together > 1:
            asked += f", or {(num_together, *shape)} with the particles first"
        raise ShapeError(
            f'The baseline of site "{self.site}" has shape {tuple(value.shape)}, but it is subtracted from a '
            f"downstream cost of shape {asked}: one number for each plate element. Reduce it to that shape, for "
            "instance a network's last axis by .squeeze(-1)."
        )


def _stripped(shape: Sequence[int]) -> tuple[int, ...]:
    """Without leading ones, as Pyro shapes a downstream cost."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


class HintReader(Messenger):  # type: ignore[misc]
    """Reads the hint of each guide site before the site has a value."""

    def __init__(self, audited: set[tuple[str, int]]) -> None:
        super().__init__()
        self.audited = audited
        self.hints: dict[str, Hint] = {}
        self._given: dict[str, list[Any]] = {}
        self._again: dict[str, tuple[Callable[[], Any], Tensor]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        options = msg["infer"].get("baseline")
        if options is None or msg["name"] in self.hints:
            return
        if not isinstance(options, dict):
            raise ScorefnError(
                f'Site "{msg["name"]}" has infer={{"baseline": {options!r}}}, but it must be a dict, as its options '
                f'({", ".join(KEYS)}) have names: for instance infer={{"baseline": {{"use_decaying_avg_baseline": '
                "True}}."
            )
        if options:
            self.hints[msg["name"]] = self._read(msg["name"], options)

    def _read(self, site: str, options: dict[str, Any]) -> Hint:
        if unknown := sorted(set(options) - set(KEYS)):
            raise ScorefnError(
                f'Site "{site}" has infer={{"baseline": ...}} with unknown option(s) {", ".join(unknown)}; the known '
                f"ones are {', '.join(KEYS)}."
            )
        net, value = options.get("nn_baseline"), options.get("baseline_value")
        if net is not None and value is not None:
            raise ScorefnError(
                f'Site "{site}" has both nn_baseline and baseline_value in infer={{"baseline": ...}}, and there is no '
                "telling which one to subtract. Give one of them."
            )
        if net is not None and options.get("nn_baseline_input") is None:
            raise ScorefnError(
                f'Site "{site}" has nn_baseline but no nn_baseline_input in infer={{"baseline": ...}}, so there is '
                "nothing to evaluate it on. Give what it reads, such as data and earlier sites; for a value that is "
                "computed already, use baseline_value."
            )
        decay = None
        if options.get("use_decaying_avg_baseline"):
            decay = options.get("baseline_beta", 0.9)
            if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
                raise ScorefnError(
                    f'Site "{site}" has baseline_beta={decay!r} in infer={{"baseline": ...}}, the share of its average '
                    "that a step keeps: use a number in [0, 1)."
                )
        if not torch.is_grad_enabled():
            return Hint(site, None, decay)  # a value alone needs no baseline
        self._given[site] = _fingerprint(options)
        if net is not None:
            value = self._evaluate(site, net, options.get("nn_baseline_input"))
        if value is not None and not isinstance(value, Tensor):
            raise ScorefnError(
                f'The baseline of site "{site}" is a {type(value).__name__}, but one number for each plate element is '
                "subtracted: it must be a tensor."
            )
        if value is not None and not bool(torch.isfinite(value.detach()).all()):
            raise NonFiniteError(
                f'The baseline of site "{site}" is NaN or infinite, which would make the whole gradient NaN. Nothing '
                "was updated. Look at what it was fitted to."
            )
        return Hint(site, value, decay)

    def _evaluate(self, site: str, net: Any, features: Any) -> Any:
        features = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, features)
        if (site, id(net)) not in self.audited:
            state = torch.get_rng_state()
            self._again[site] = (lambda: _replayed(net, features, state)), state
        try:
            return net(features)
        except Exception as error:
            error.add_note(
                f'scorefn evaluates the baseline of site "{site}" where the site is reached, before its value is drawn.'
            )
            raise

    def close(self, sites: dict[str, Any]) -> None:
        """Attach the hints to the guide's sites; refuse one that has changed since its site was reached.

        Raises:
            ScorefnError: the baseline knows its own site, or something that came after it.
        """
        for name, hint in self.hints.items():
            if (site := sites.get(name)) is None:
                continue
            site["scorefn_baseline"] = hint
            changed = name in self._given and _fingerprint(site["infer"]["baseline"]) != self._given[name]
            if not changed and name in self._again and hint.predicted is not None:
                again = self._again[name][0]()
                changed = again.shape != hint.predicted.shape or not torch.equal(again, hint.predicted.detach())
            if changed:
                raise ScorefnError(
                    f'The baseline of site "{name}" was another one after the site was sampled than before: it reads '
                    "the value of its own site, or something made from it, and the estimate would be biased. Give it "
                    "inputs that exist before the site, such as data and earlier sites."
                )
            if name in self._again:
                self.audited.add((name, id(site["infer"]["baseline"].get("nn_baseline"))))


def _fingerprint(options: dict[str, Any]) -> list[Any]:
    """What tells whether the options, or a tensor among them, were changed in between."""
    leaves = pytree.tree_leaves([options.get(key) for key in KEYS])
    versions = [leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0 for leaf in leaves]
    return [sorted(options), [id(leaf) for leaf in leaves], versions]


def _replayed(net: Any, features: Any, state: Tensor) -> Tensor:
    """The network once more, from the same random state, leaving no trace of it."""
    buffers = [(b, b.clone()) for b in net.buffers()] if isinstance(net, nn.Module) else []
    now = torch.get_rng_state()
    try:
        torch.set_rng_state(state)
        with torch.no_grad(), pyro.poutine.block():
            value: Tensor = net(features)
    finally:
        torch.set_rng_state(now)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return value


@dataclass(frozen=True)
class HintedColumns:
    """The hint of one site for all particles of an estimate.

    Args:
        site: its name.
        start: its first column.
        shape: of one particle's decisions.
        rows: ``[N]`` bool, the particles that carry the hint.
        predicted: ``[N, size]``, zeros elsewhere; None: no prediction.
        decay: of the decaying average; None: none.
    """

    site: str
    start: int
    shape: tuple[int, ...]
    rows: Tensor
    predicted: Tensor | None
    decay: float | None

    def of(self, v: Tensor) -> Tensor:
        """This site's columns ``[N, size]`` of ``[N, K]``."""
        size = 1
        for extent in self.shape:
            size *= extent
        return v[:, self.start : self.start + size]

    def average(self, like: Tensor) -> Tensor:
        """The site's decaying average of past signals, ``[size]``; 0 before the first."""
        store = pyro.get_param_store()
        if AVERAGE + self.site not in store:
            return like.new_zeros(like.shape[-1])
        stored = store[AVERAGE + self.site].detach()
        while stored.ndim > len(self.shape):  # Pyro keeps one for each particle that runs in a batch
            stored = stored.mean(0)
        return _fitted(stored, self.shape).reshape(-1).to(like)

    def update(self, signal: Tensor) -> None:
        """``average <- beta average + (1 - beta) mean over particles of signal``, stored as Pyro does."""
        if self.decay is None:
            return
        store, name = pyro.get_param_store(), AVERAGE + self.site
        batch = self.of(signal)[self.rows].mean(0).reshape(self.shape)
        if name not in store:
            store[name] = signal.new_zeros(_stripped(self.shape))
        leaf = store[name].unconstrained()
        with torch.no_grad():
            leaf.mul_(self.decay).add_(_fitted(batch, tuple(leaf.shape)).to(leaf), alpha=1 - self.decay)


def _fitted(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """v in this shape; axes of another extent (a ragged minibatch, whose indices mean nothing) get their mean."""
    while v.ndim > len(shape):
        v = v.mean(0)
    v = v.reshape((1,) * (len(shape) - v.ndim) + tuple(v.shape))
    other = [dim for dim, (a, b) in enumerate(zip(v.shape, shape, strict=True)) if a != b]
    return (v.mean(other, keepdim=True) if other else v).expand(shape)


class Hinted:
    """The baseline of one estimate: a site's hint where it has one, otherwise the loss's own baseline.

    Args:
        hints: of all sites that have one.
        rest: the loss's own baseline.
    """

    unbiased = True

    def __init__(self, hints: Sequence[HintedColumns], rest: Baseline | None) -> None:
        self.hints, self.rest = hints, rest
        self.squared_error: Tensor | None = None  # mean over particles, after ``update``; its gradient fits the nets

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, K] -> [N, K]``."""
        full = draws.log_prob.shape
        value = signal.new_zeros(full) if self.rest is None else self.rest(signal, draws).expand(full)
        value = value.clone()
        for hint in self.hints:
            own = hint.of(value)
            own[hint.rows] = self._prediction(hint, own).detach()[hint.rows].to(own)
        return value

    def update(self, signal: Tensor, draws: Draws) -> None:
        """The squared error against the averages as they were read; then these are moved."""
        if self.rest is not None and is_stateful(self.rest):
            self.rest.update(signal, draws)
        signal = signal.expand(draws.log_prob.shape)
        for hint in self.hints:
            if hint.predicted is not None and hint.predicted.requires_grad:
                own = hint.of(signal)
                error = (own - self._prediction(hint, own))[hint.rows].square().sum() / len(own)
                self.squared_error = error if self.squared_error is None else self.squared_error + error
        for hint in self.hints:
            hint.update(signal)

    def _prediction(self, hint: HintedColumns, like: Tensor) -> Tensor:
        """``[N, size]``, with its gradient."""
        value = torch.zeros_like(like) if hint.predicted is None else hint.predicted
        return value if hint.decay is None else value + hint.average(like)


def refuse_shared(hints: Sequence[HintedColumns], bound: Sequence[Tensor | None]) -> None:
    """Refuse a baseline with a parameter from which log p or log q was computed: fitting it would move the bound."""
    predictions = [hint for hint in hints if hint.predicted is not None and hint.predicted.grad_fn is not None]
    if not predictions:
        return
    others = set().union(*(_leaves(tensor) for tensor in bound if tensor is not None))
    for hint in predictions:
        assert hint.predicted is not None
        if _leaves(hint.predicted) & others:
            raise ScorefnError(
                f'The baseline of site "{hint.site}" shares a parameter with guide or model: its squared error would '
                "move the bound that is being differentiated. Give it parameters of its own, and detach what it reads."
            )


def _leaves(tensor: Tensor) -> set[int]:
    """Identities of the leaves that a tensor was computed from."""
    seen, found, stack = set[Any](), set[int](), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        stack += [parent for parent, _ in node.next_functions]
    return found
