"""StochasticGraph: sample and cost in ordinary PyTorch code; the gradient is the core's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from torch import Tensor
from torch._C import DisableTorchFunction

from scorefn.core import (
    Baseline,
    Credit,
    Draws,
    ScorefnError,
    check_count,
    check_support,
    dice,
    estimate,
    surrogate,
)
from scorefn.graph.assembly import Assembly
from scorefn.graph.block import Block
from scorefn.graph.checks import (
    State,
    check_cost_shape,
    check_lead,
    check_measure,
    check_name,
    check_open,
    check_parts,
    check_real,
    check_shown,
    check_uncoupled,
    checked_baseline,
    checked_declaration,
)
from scorefn.graph.dependencies import Declared, Programs, Tracked
from scorefn.graph.drawing import check_axis, coupled, drawn
from scorefn.graph.records import Cost, Path, Site, deepest, parameters, sizes

OwnBaseline: TypeAlias = Baseline | Literal["auto"] | None


class StochasticGraph:
    """N joint draws of a program that samples and pays as it runs, and the gradient of what it pays on average.

    ::

        with sf.StochasticGraph(num_samples=16) as g:
            z = g.sample("z", Bernoulli(logits=logits))  # [N, *batch, *event]
            h = g.sample(
                "h", Bernoulli(logits=net(z))
            )  # its batch shape leads with N, because z does
            g.cost("nll", nll(h))  # [N, *B]
        g.surrogate().mean().backward()

    The block is ordinary code, with loops and branches. Each site is one decision of each of B problems and each cost
    one value, so that with M_kj = 1 where cost j depends on site k::

        grad E[sum_j cost_j] = E[ sum_k (sum_j M_kj cost_j - b_k) grad log p_k + sum_j grad cost_j ]

    M is found by ``scorefn.tracking`` and never under-counted: where a value leaves the tensor graph (``if z:``,
    ``z.item()``), all that follows counts as depending on it, with an ``EscapeWarning``. As everywhere, row n of what
    is computed may depend on row n of the draws only.

    **Shapes.** B is the batch shape of the costs, the same for all; it is a leading part of the batch shape of every
    site, whose other dimensions are one joint draw. A distribution that depends on no site is drawn N times; one that
    depends on a site has its batch shape lead with N. ``given=`` says which of the two, where it cannot be told. What
    differs between the draws is a site: sample noise of the program's own by ``g.sample`` too, pathwise, and begin a
    loop with a state that all draws share.

    **Nested draws.** ``g.sample("h", dist, num_samples=4)`` draws h 4 times for each draw of what it depends on: its
    shape is ``[N, 4, *batch, *event]``, that of what depends on it leads with ``[N, 4]``, and the graph takes the
    mean over the 4. The number differs from that of the axis before it, so that none is forgotten unseen. A site that
    is nested in h has ``[N, 4, M, ...]``; two sites nested beside each other may not meet.

    **Entered again**, a graph forgets its sites and costs. With ``audit_every`` it keeps the dependency map of its
    program, which then costs nothing: one graph for a program that is the same at every step, whatever the sizes. The
    map is tracked anew after 16, 32, 64, ... runs, at last every ``audit_every``, and at once where sites or costs
    differ (program order is used for that run). What changes without showing in them, such as ``if step > 100:
    g.cost("c", f(z))`` in place of ``g.cost("c", f(y))``, is missed until then. Nothing is kept where a value left the
    tensor graph.

    Sources: Schulman, Heess, Weber & Abbeel (2015), "Gradient estimation using stochastic computation graphs", theorem
    1 and its corollary; van Krieken, Tomczak & ten Teije (2021), "Storchastic: a framework for general stochastic
    automatic differentiation", for nested draws with weights of their own.

    Args:
        num_samples: N, at least 1.
        baseline: of the sites that have none of their own: "auto" is leave-one-out where there is another draw, among
            the draws given the same parents where the site has draws of its own, otherwise among the N; None: none.
        dependencies: None: tracking. Or the user's own, trusted and free: for each site or cost the names of the sites
            that it is computed from directly; a site without an entry depends on none.
        audit_every: None: every run is tracked. A number is your word that the program is static: a graph that is
            entered again keeps its map, and tracks it anew after so many runs at most.

    Raises:
        ScorefnError: a site or cost of a name that is taken; a graph with no cost; a cost that depends on no site; a
            site or cost after the estimate was read or outside the block; an estimator downstream of another; a site
            whose layout cannot be told; or as ``Draws``.
        ShapeError: a site that does not lead with the draws of its parents, or has as many of its own; a cost of
            another batch shape than those before it; a site that lacks the batch shape of the costs.
        SupportError: a support that moves with a parameter.
        NonFiniteError: a cost or a log-probability is NaN or infinite.

    Example:
        >>> import torch
        >>> from torch.distributions import Bernoulli
        >>> from scorefn import StochasticGraph
        >>> _ = torch.manual_seed(0)
        >>> a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        >>> with StochasticGraph(num_samples=16) as g:
        ...     z = g.sample("z", Bernoulli(logits=a))
        ...     h = g.sample("h", Bernoulli(logits=b * z))
        ...     g.cost("size", z.sum(-1))
        ...     g.cost("match", (h - 1).square().sum(-1))
        >>> g.dependencies
        {'size': ('z',), 'match': ('z', 'h')}
        >>> g.surrogate().shape
        torch.Size([16])
        >>> g.surrogate().mean().backward()
        >>> g
        StochasticGraph(num_samples=16, sites=2, costs=2)

        Sites that are drawn several times for each draw of what they depend on:

        >>> with StochasticGraph(num_samples=16) as g:
        ...     z = g.sample("z", Bernoulli(logits=a))
        ...     h = g.sample("h", Bernoulli(logits=b * z), num_samples=4)
        ...     g.cost("match", (h - z[:, None]).square().sum(-1))  # [N, 4]
        >>> h.shape, g.surrogate().shape
        (torch.Size([16, 4, 3]), torch.Size([16]))
    """

    def __init__(
        self,
        num_samples: int,
        *,
        baseline: OwnBaseline = "auto",
        dependencies: Mapping[str, Sequence[str]] | None = None,
        audit_every: int | None = None,
    ) -> None:
        self.num_samples = check_count("num_samples", num_samples)
        self.baseline = checked_baseline("baseline", baseline)
        self._declared = None if dependencies is None else checked_declaration(dependencies)
        self._programs = Programs(None if audit_every is None else check_count("audit_every", audit_every))
        self._credits = dict[Any, Credit]()
        self._state: State = "new"
        self._inside = False
        self._block = Block(Declared({}), {})
        self._assembly: Assembly | None = None

    def __enter__(self) -> Self:
        if self._inside:
            raise ScorefnError(
                "This StochasticGraph is entered while its block is open, and its sites would be mixed with those of "
                "the outer block. Make another graph: with StochasticGraph(...) as inner."
            )
        sites = dict[str, Site]()
        source = self._programs.source(sites) if self._declared is None else Declared(self._declared)
        self._block, self._assembly = Block(source, sites), None
        source.open()
        self._state, self._inside = "open", True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside = False
        self._block.source.close()
        if kind is not None:
            self._state = "failed"
        elif self._state == "open":
            self._state = "closed"

    def __repr__(self) -> str:
        """As it was called, without what is left at its default, and what was sampled and paid in the last run."""
        shown = [f"num_samples={self.num_samples}"]
        shown += [] if self.baseline == "auto" else [f"baseline={self.baseline!r}"]
        shown += [] if self._declared is None else [f"dependencies={self._declared}"]
        shown += [] if self._programs.audit_every is None else [f"audit_every={self._programs.audit_every}"]
        counts = f"sites={len(self._block.sites)}, costs={len(self._block.costs)}"
        return f"StochasticGraph({', '.join([*shown, counts])})"

    # ------------------------------------------------------------------------------------------------ inside the block

    def sample(
        self,
        name: str,
        dist: Any,
        *,
        num_samples: int | None = None,
        pathwise: bool = False,
        baseline: OwnBaseline | Literal["graph"] = "graph",
        estimator: Any = None,
        given: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Draw a site; go on with what is returned.

        Args:
            name: its own; in a loop, ``f"z[{t}]"``.
            dist: a ``torch.distributions`` object, or anything with ``sample`` and ``log_prob``.
            num_samples: M draws for each draw of what dist depends on, along an axis of their own; None: one, without.
            pathwise: differentiate through the value (``rsample``) instead of scoring it.
            baseline: of this site; "graph": that of the graph. ``LeaveOneOut()`` is taken along the axis of "auto", and
                refused where there is no other draw. A baseline that several sites share sees their decisions together.
            estimator: coupled draws with weights of their own, along an axis of their own, such as ``DisARM()`` or
                ``Enumerate()``: anything with ``sample(p) -> [M, *batch, *event]``, ``surrogate(p, x, fx) -> [*B]``
                and ``weights(p, x)``, linear in fx. Its ``batch_ndim`` counts the axes of the parents' draws too; None:
                these alone.
            given: which sites' draws lead the batch shape of dist; ``()``: none. None: found by tracking.

        Returns:
            ``[N, *batch, *event]``, or ``[N, *axes, *batch, *event]`` with nested or coupled draws among the site and
            what it depends on.

        Raises:
            ScorefnError: the block is not open, a name that is taken, parts that do not go together, or a site whose
                layout cannot be told.
            ShapeError: a distribution that does not lead with the draws of its parents.
            SupportError: a scored site whose support moves with a parameter.
        """
        block = self._block
        check_open("site", name, self._state)
        check_name("site", name, block.sites, block.costs)
        check_measure(name, dist)
        if own := not (isinstance(baseline, str) and baseline == "graph"):
            checked_baseline(f"baseline of site {name!r}", baseline)
        if own or pathwise or num_samples is not None or estimator is not None:
            check_parts(name, dist, num_samples, pathwise, baseline if own else None, estimator)
        baseline = baseline if own else self.baseline
        lead = block.named(name, given)
        ndim = len(getattr(dist, "batch_shape", ())), len(getattr(dist, "event_shape", ()))
        kind = ("site", name, type(dist), ndim, num_samples is None, pathwise, type(estimator), lead)
        tensors = parameters(dist) if isinstance(block.source, Tracked) else []
        found, reached = block.behind_site(name, dist, kind, tensors, lead, self.num_samples)
        leader = deepest(f"The distribution of site {name!r}", found if lead is None else lead, block.sites)
        outer: Path | None = None if leader is None else block.sites[leader].path
        shape = (self.num_samples, *sizes(outer or ()))
        ancestors = block.with_ancestors(reached, lead)
        if estimator is not None:
            check_uncoupled(name, estimator, [block.sites[other] for other in ancestors])
        check_lead(name, dist, leader, shape)
        reading = block.source.checking if isinstance(block.source, Tracked) else nullcontext
        if not pathwise:
            with reading():
                check_support(dist)
        if estimator is None:
            raw, value, path = drawn(name, dist, shape, outer, num_samples, pathwise)
        else:
            with reading():  # what an estimator reads of dist decides between ways to one result
                raw, value, path = coupled(name, dist, shape, outer, estimator)
        if extra := len(path) >= len(shape):
            check_axis(name, path[-1].size, shape[-1])
        value, carried = block.source.drawn(name, value, tensors)
        if carried and lead is None:
            check_shown(name, dist, carried, found)
        site = Site(name, dist, raw, value, path, leader is not None, extra, baseline, estimator, pathwise)
        block.add_site(site, kind, leader, tuple(axis.site for axis in outer or ()), reached, ancestors)
        return value

    def cost(self, name: str, value: Tensor, *, given: str | Sequence[str] | None = None) -> None:
        """Register a cost, a part of what is averaged; its own sign is kept.

        Args:
            name: its own.
            value: ``[N, *B]``, or ``[N, *axes, *B]`` where it depends on nested or coupled draws; it may require grad.
            given: sites whose axes the value has, where that cannot be told; they count as influencing it.

        Raises:
            ShapeError: another shape.
            ScorefnError: it is no tensor of real numbers, or depends on no site.
        """
        block = self._block
        check_open("cost", name, self._state)
        check_name("cost", name, block.sites, block.costs)
        check_real(name, value)
        lead = block.named(name, given)
        kind = ("cost", name, value.ndim, value.dtype, lead)
        found, reached = block.behind_cost(name, value, kind, lead)
        leader = deepest(f"The cost {name!r}", found if lead is None else lead, block.sites)
        path: Path = () if leader is None else block.sites[leader].path
        if reached is not None and not reached and not lead:
            raise ScorefnError(
                f"The cost {name!r} depends on no site, so there is nothing to average: every draw has the same "
                f"value, and no score is charged with it. Add it to the loss yourself: g.surrogate().mean() + {name}."
            )
        first = next(iter(block.costs.values()), None)
        check_cost_shape(name, value, leader, (self.num_samples, *sizes(path)), first)
        block.add_cost(Cost(name, value, path, len(block.sites)), kind, leader, reached, lead)

    def log_prob(self, name: str) -> Tensor:
        """``[N, *axes, *batch]``, of the draws of a site; made once, for costs such as ``log q`` too.

        Raises:
            ScorefnError: there is no such site.
        """
        if name not in self._block.sites:
            raise ScorefnError(f"There is no site {name!r}: the sites so far are {list(self._block.sites)}.")
        return self._block.sites[name].log_prob

    # ------------------------------------------------------------------------------------------------ after the block

    @property
    def dependencies(self) -> dict[str, tuple[str, ...]]:
        """Of each cost, the sites on which it depends, both by name and in program order.

        Raises:
            ScorefnError: there is no record to read, or no cost.
        """
        return {name: tuple(sites) for name, sites in self._assembled().reached.items()}

    def draws(self) -> Draws:
        """The core's view: x by name, log_prob ``[N, *B, K]``, fx ``[N, *B, J]``, and who is charged with what.

        K counts the scored sites whose log-probability requires grad, J the costs, each along its axes of nested or
        coupled draws, weighed so that the sum over J is the estimate; then one value of 0 for each estimator, whose
        gradient is the site's.

        Raises:
            ScorefnError: no site is scored.
        """
        assembly = self._assembled()
        if assembly.draws is None:
            raise ScorefnError(
                "No site of this graph is scored (all are pathwise, coupled or without gradient), so there are no "
                "decisions for Draws. Use g.surrogate(), whose gradient goes through the values."
            )
        return assembly.draws

    def surrogate(self) -> Tensor:
        """``[N, *B]``: its value is the sum of the costs, its gradient the estimate; the mean is the caller's verb.

        No baseline is updated. See ``scorefn.surrogate``.

        Raises:
            ScorefnError: there is no record to read, or no cost.
        """
        assembly = self._assembled()
        with DisableTorchFunction():  # the block may still be open
            return assembly.plain() if assembly.draws is None else surrogate(assembly.draws, baseline=assembly.baseline)

    def dice(self) -> Tensor:
        """``[N, *B]``, right at every order of differentiation. See ``scorefn.dice``.

        Raises:
            ScorefnError: a site has an estimator, which has a first derivative only.
        """
        assembly = self._assembled()
        for site in self._block.sites.values():
            if site.estimator is not None:
                raise ScorefnError(
                    f"Site {site.name!r} has the estimator {type(site.estimator).__name__}, whose surrogate is right "
                    "for the first derivative only. Leave the estimator out where higher derivatives are taken."
                )
        with DisableTorchFunction():
            return assembly.plain() if assembly.draws is None else dice(assembly.draws, baseline=assembly.baseline)

    def expectation(self) -> Tensor:
        """``[*B]``, the mean of ``surrogate()`` over the draws; then baselines that learn are updated, once a call.

        Raises:
            ScorefnError: there is no record to read, or no cost.
        """
        assembly = self._assembled()
        with DisableTorchFunction():
            if assembly.draws is None:
                return assembly.plain().mean(0)
            return estimate(assembly.draws, None, assembly.baseline)

    def _assembled(self) -> Assembly:
        if self._assembly is not None:
            return self._assembly
        if self._state in ("new", "failed"):
            raise ScorefnError(
                "This StochasticGraph has no record to read: "
                + ("it was never entered." if self._state == "new" else "its block ended with an error.")
                + " Sample and register costs in a block first: with StochasticGraph(num_samples) as g."
            )
        block = self._block
        if not block.costs:
            raise ScorefnError(
                f"This StochasticGraph has {len(block.sites)} site(s) and no cost, so there is nothing whose gradient "
                'could be estimated. Register one in the block: g.cost("loss", value).'
            )
        reached = block.dependencies(self._programs)
        with DisableTorchFunction():
            self._assembly = Assembly(self.num_samples, block.sites, block.costs, reached, self._credits)
        if self._state == "open":
            self._state = "read"
        return self._assembly
