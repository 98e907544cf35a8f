"""From the record of a graph to Draws: columns, weights, credit and baselines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Baseline, Credit, Draws, LeaveOneOut, NonFiniteError, ScorefnError, ShapeError
from scorefn.graph.credit import Siblings, block, credit, together
from scorefn.graph.drawing import of_parents
from scorefn.graph.records import Cost, Site, columns, place, shared, sizes, weighted, width

_MOST_CREDITS = 64


class Assembly:
    """One record, assembled.

    Args:
        num_samples: N.
        sites: in program order.
        costs: likewise, at least one.
        reached: of each cost, the sites on which it depends, in program order.
        credits: those that were made before, by what they were made of.

    Attributes:
        draws: None where no site is scored.
        baseline: of all sites.
        reached: by name.
    """

    def __init__(
        self,
        num_samples: int,
        sites: Mapping[str, Site],
        costs: Mapping[str, Cost],
        reached: Sequence[Collection[str]],
        credits: dict[Any, Credit],
    ) -> None:
        self._num_samples = num_samples
        self._costs = list(costs.values())
        self._batch = self._costs[0].batch
        self.reached = dict(zip(costs, reached, strict=True))
        scores = [(site, log_prob) for site in sites.values() if (log_prob := self._score(site)) is not None]
        like = scores[0][1] if scores else None
        values = self._values(like)
        for site in sites.values():
            if site.estimator is not None:
                lead = len(site.path) if site.led else 0
                self._check_batch(site, tuple(getattr(site.dist, "batch_shape", ())[lead:]))
                values.append(self._joint(site))
        self.fx = values[0] if len(values) == 1 else torch.cat(values, -1)
        self.draws: Draws | None = None
        self.baseline: Baseline | None = None
        if like is None:
            self._check_alone(sites)
            return
        log_prob = like if len(scores) == 1 else torch.cat([score for _, score in scores], -1)
        x = {name: site.value.detach() for name, site in sites.items()}
        scored = [site for site, _ in scores]
        self.draws = Draws(x, log_prob, self.fx, self._credit(scored, like, credits))
        self.baseline = self._baseline(scored, log_prob.shape[-1])

    def plain(self) -> Tensor:
        """The sum of the costs ``[N, *B]`` of a graph without scores."""
        return self.fx.sum(-1)

    def _score(self, site: Site) -> Tensor | None:
        """The log-probability ``[N, *B, K of the site]``; None: it has no score."""
        if not site.scored:
            return None
        log_prob = site.log_prob
        if torch.is_grad_enabled() and not log_prob.requires_grad:
            return None
        self._check_batch(site, tuple(log_prob.shape[1 + len(site.path) :]))
        kept = 1 + len(site.path) + len(self._batch)
        if log_prob.ndim > kept:
            log_prob = (log_prob if log_prob.ndim == kept + 1 else log_prob.flatten(kept)).sum(-1)
        return columns(log_prob, site.path)

    def _check_batch(self, site: Site, found: tuple[int, ...]) -> None:
        """Every site has a draw of its own for each problem."""
        if found[: len(self._batch)] != tuple(self._batch):
            raise ShapeError(
                f"Site {site.name!r} has batch shape {found}, but the costs, such as {self._costs[0].name!r}, have "
                f"{tuple(self._batch)}, and each of these independent problems needs its own draw: B must be a leading "
                "part of the batch shape of every site. If the problems share the site, they are one problem: sum "
                "the costs over them, for instance value.sum(-1)."
            )

    def _values(self, like: Tensor | None) -> list[Tensor]:
        """The costs, weighed, ``[N, *B, J of the cost]``."""
        values = list[Tensor]()
        for cost in self._costs:
            value = cost.read()
            if not value.dtype.is_floating_point:
                value = value.to(torch.get_default_dtype() if like is None else like.dtype)
            if cost.path:
                value = weighted(value, cost.path, 0, len(self._batch))
            values.append(columns(value, cost.path))
        return values

    def _joint(self, site: Site) -> Tensor:
        """The estimator's surrogate, less its value, ``[N, *B, columns of the outer axes]``: charged to nobody."""
        outer, depth = site.path[:-1], len(site.path)
        ndim, total = len(self._batch), None
        for cost in self._costs:
            if site.name not in self.reached[cost.name]:
                continue
            if cost.path[:depth] != site.path:
                raise ShapeError(
                    f"The cost {cost.name!r} depends on the coupled draws of site {site.name!r}, but has no value for "
                    f"each of them: its shape {tuple(cost.value.shape)} must begin with "
                    f"{(self._num_samples, *sizes(site.path))}. Keep that axis: the graph takes the weighted mean."
                )
            value = cost.value.detach()
            if len(cost.path) > depth:
                value = weighted(value, cost.path, depth, ndim).sum(tuple(range(depth + 1, len(cost.path) + 1)))
            total = value if total is None else total + value
        if total is None:  # a site that nothing depends on
            return self._costs[0].value.new_zeros(self._num_samples, *self._batch, 1)
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError(
                f"The costs that depend on site {site.name!r} are NaN or infinite at one of its coupled draws, which "
                "would make the whole gradient NaN. Bound them."
            )
        if not total.dtype.is_floating_point:
            total = total.to(torch.get_default_dtype())
        if site.led:
            dist = of_parents(site.dist, depth, site.estimator)
            found = site.estimator.surrogate(dist, site.raw, total.movedim(depth, 0))
        else:
            found = torch.stack(
                [site.estimator.surrogate(site.dist, x, fx) for x, fx in zip(site.raw, total, strict=True)]
            )
        wanted = (self._num_samples, *sizes(outer), *self._batch)
        if tuple(found.shape) != wanted:
            raise ShapeError(
                f"{type(site.estimator).__name__} returned a surrogate of shape {tuple(found.shape)} for site "
                f"{site.name!r}, but it must return one number per problem, {wanted}."
            )
        return columns(weighted(found - found.detach(), outer, 0, ndim), outer)

    def _credit(self, sites: list[Site], like: Tensor, credits: dict[Any, Credit]) -> Credit:
        """Made once for the same axes and dependencies."""
        key = (
            *[(site.name, place(site.path)) for site in sites],
            *[(tuple(self.reached[cost.name]), place(cost.path)) for cost in self._costs],
            (self.fx.shape[-1], like.dtype, like.device),
        )
        if torch.is_inference_mode_enabled():  # what is made there may not be used elsewhere
            return credit(self._mask(sites).to(like.device, like.dtype))
        if (found := credits.get(key)) is None:
            if len(credits) >= _MOST_CREDITS:
                credits.clear()
            found = credits[key] = credit(self._mask(sites).to(like.device, like.dtype))
        return found

    def _mask(self, sites: list[Site]) -> Tensor:
        """``[K, J]``, of numbers 0 and 1."""
        rows, extra = list[Tensor](), self.fx.shape[-1] - sum(width(cost.path) for cost in self._costs)
        for site in sites:
            row = [
                block(site.path, cost.path)
                if site.name in self.reached[cost.name]
                else torch.zeros(width(site.path), width(cost.path))
                for cost in self._costs
            ]
            rows.append(torch.cat([*row, torch.zeros(width(site.path), extra)], -1))
        return torch.cat(rows)

    def _baseline(self, sites: list[Site], decisions: int) -> Baseline | None:
        parts, start = list[tuple[int, int, Baseline]](), 0
        for site in sites:
            size = width(site.path)
            if (baseline := self._of(site)) is not None:
                parts.append((start, size, baseline))
            start += size
        return together(parts, decisions)

    def _of(self, site: Site) -> Baseline | None:
        """The baseline of one site, leave-one-out along the axis that its siblings lie on."""
        baseline = site.baseline
        if baseline is None or not (isinstance(baseline, str) or type(baseline) is LeaveOneOut):
            return baseline
        costs = [cost for cost in self._costs if site.name in self.reached[cost.name]] if site.path else []
        for at in reversed(range(len(site.path))):
            apart = all(shared(site.path, cost.path) > at for cost in costs)
            if apart and site.path[at].size > 1 and not site.path[at].coupled:
                return Siblings(site.path, at)
        elsewhere = isinstance(baseline, LeaveOneOut) and baseline.process_group is not None  # draws of other processes
        if self._num_samples > 1 or elsewhere:
            return LeaveOneOut() if isinstance(baseline, str) else baseline
        if isinstance(baseline, str):
            return None
        raise ScorefnError(
            f"LeaveOneOut at site {site.name!r} needs another draw, but num_samples is 1 and the site has no other "
            'draws given the same parents. Raise num_samples, or use baseline="auto" or None.'
        )

    def _check_alone(self, sites: Mapping[str, Site]) -> None:
        """Without scores the costs themselves have to give the gradient."""
        if not bool(torch.isfinite(self.fx).all()):
            raise NonFiniteError("A cost of this graph is NaN or infinite, which would make the whole gradient NaN.")
        if torch.is_grad_enabled() and not self.fx.requires_grad:
            raise ScorefnError(
                f"Neither a cost nor the log-probability of a site ({', '.join(sites) or 'there is none'}) requires "
                "grad, so the gradient would silently be zero. Build the distributions from parameters that require "
                "grad; for the value alone, call this under torch.no_grad()."
            )
