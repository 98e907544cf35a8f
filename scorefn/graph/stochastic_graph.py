"""StochasticGraph: sample and cost in ordinary PyTorch code; the gradient is the core's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from scorefn.graph.checks import (
    check_cost_shape,
    check_lead,
    check_measure,
    check_parts,
    check_told,
    checked_baseline,
)
from scorefn.graph.dependencies import Declared, Kept, Layout, Programs, Source, Tracked, Unknown
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
        if dependencies is not None and (
            not isinstance(dependencies, Mapping) or any(isinstance(names, str) for names in dependencies.values())
        ):
            raise ScorefnError(
                f"dependencies must map each site or cost to a sequence of names, but it is {dependencies!r}. Write "
                'dependencies={"h": ["z"], "nll": ["h"]}, or leave it out to have them tracked.'
            )
        self._declared = None if dependencies is None else dict(dependencies)
        self._programs = Programs(None if audit_every is None else check_count("audit_every", audit_every))
        self._source: Source = Tracked()
        self._credits = dict[Any, Credit]()
        self._state: Literal["new", "open", "read", "closed", "failed"] = "new"
        self._begin()

    def _begin(self) -> None:
        self._sites = dict[str, Site]()
        self._costs = dict[str, Cost]()
        self._reached = dict[str, dict[str, None]]()  # of each site: on which its distribution depends
        self._charged = list[Collection[str] | None]()  # of each cost
        self._signature = list[Any]()
        self._layouts = list[tuple[Any, Layout]]()
        self._assembly: Assembly | None = None
        self._inside = False

    def __enter__(self) -> Self:
        if self._inside:
            raise ScorefnError(
                "This StochasticGraph is entered while its block is open, and its sites would be mixed with those of "
                "the outer block. Make another graph: with StochasticGraph(...) as inner."
            )
        self._begin()
        self._source = self._programs.source(self._sites) if self._declared is None else Declared(self._declared)
        self._source.open()
        self._state, self._inside = "open", True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside = False
        self._source.close()
        if kind is not None:
            self._state = "failed"
        elif self._state == "open":
            self._state = "closed"

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
        """
        self._check("site", name)
        check_measure(name, dist)
        if own := not (isinstance(baseline, str) and baseline == "graph"):
            checked_baseline(f"baseline of site {name!r}", baseline)
        if own or pathwise or num_samples is not None or estimator is not None:
            check_parts(name, dist, num_samples, pathwise, baseline if own else None, estimator)
        baseline = baseline if own else self.baseline
        lead = None if given is None else self._names_of(name, given)
        ndim = len(getattr(dist, "batch_shape", ())), len(getattr(dist, "event_shape", ()))
        kind = ("site", name, type(dist), ndim, num_samples is None, pathwise, type(estimator), lead)
        tensors = parameters(dist) if isinstance(self._source, Tracked) else []
        found, reached = self._found(name, kind, tensors, lead)
        if lead is None and isinstance(self._source, Tracked):
            check_told(self.num_samples, name, dist, found, reached)
        leader = deepest(f"The distribution of site {name!r}", found if lead is None else lead, self._sites)
        outer: Path | None = None if leader is None else self._sites[leader].path
        shape = (self.num_samples, *sizes(outer or ()))
        ancestors = self._with_ancestors(reached, lead)
        if estimator is not None:
            for other in ancestors:
                if self._sites[other].estimator is not None:
                    raise ScorefnError(
                        f"Site {name!r} has the estimator {type(estimator).__name__} and depends on site {other!r}, "
                        f"whose draws are coupled by {type(self._sites[other].estimator).__name__}: an estimator needs "
                        "draws of one and the same distribution. Leave the estimator of one of them out."
                    )
        check_lead(name, dist, leader, shape)
        if not pathwise:
            if isinstance(self._source, Tracked):
                with self._source.checking():
                    check_support(dist)
            else:
                check_support(dist)
        if estimator is None:
            raw, value, path = drawn(name, dist, shape, outer, num_samples, pathwise)
        else:
            raw, value, path = coupled(name, dist, shape, outer, estimator)
        if extra := len(path) >= len(shape):
            check_axis(name, path[-1].size, shape[-1])
        value, carried = self._source.drawn(name, value, tensors)
        if carried and (strangers := [other for other in carried if other not in found and lead is None]):
            raise ScorefnError(
                f"The draws of site {name!r} depend on site {strangers[0]!r}, which does not show in the tensors of "
                f"its {type(dist).__name__}, so that its layout cannot be told. Pass given={strangers[0]!r}."
            )
        self._sites[name] = Site(name, dist, raw, value, path, leader is not None, extra, baseline, estimator, pathwise)
        self._reached[name] = ancestors
        self._signature.append(kind)
        axes = tuple(axis.site for axis in outer or ())
        self._layouts.append((kind, Layout(leader, axes, frozenset(reached))))
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
        self._check("cost", name)
        if not isinstance(value, Tensor) or value.is_complex():
            what = f"complex ({value.dtype})" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ScorefnError(
                f"The cost {name!r} is {what}, but it must be a tensor of one real number per draw, [N, *B], by which "
                "its dependencies can be followed. Use torch.stack, or the real part."
            )
        lead = None if given is None else self._names_of(name, given)
        grown = None if value.grad_fn is None else type(value.grad_fn).__name__
        kind = ("cost", name, value.ndim, value.dtype, lead)
        found, reached = self._found(name, kind, [value], lead, cost=True)
        leader = deepest(f"The cost {name!r}", found if lead is None else lead, self._sites)
        path: Path = () if leader is None else self._sites[leader].path
        if reached is not None and not reached and not lead:
            raise ScorefnError(
                f"The cost {name!r} depends on no site, so there is nothing to average: every draw has the same "
                f"value, and no score is charged with it. Add it to the loss yourself: g.surrogate().mean() + {name}."
            )
        first = next(iter(self._costs.values()), None)
        check_cost_shape(name, value, leader, (self.num_samples, *sizes(path)), first)
        self._costs[name] = Cost(name, value, path, len(self._sites))
        self._charged.append(None if reached is None else self._with_ancestors(reached, lead))
        self._signature.append((kind, grown))
        self._layouts.append((kind, Layout(leader, tuple(axis.site for axis in path), frozenset(reached or ()))))

    def log_prob(self, name: str) -> Tensor:
        """``[N, *axes, *batch]``, of the draws of a site; made once, for costs such as ``log q`` too."""
        if name not in self._sites:
            raise ScorefnError(f"There is no site {name!r}: the sites so far are {list(self._sites)}.")
        return self._sites[name].log_prob

    # ------------------------------------------------------------------------------------------------ after the block

    @property
    def dependencies(self) -> dict[str, tuple[str, ...]]:
        """Of each cost, the sites on which it depends."""
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
        for site in self._sites.values():
            if site.estimator is not None:
                raise ScorefnError(
                    f"Site {site.name!r} has the estimator {type(site.estimator).__name__}, whose surrogate is right "
                    "for the first derivative only. Leave the estimator out where higher derivatives are taken."
                )
        with DisableTorchFunction():
            return assembly.plain() if assembly.draws is None else dice(assembly.draws, baseline=assembly.baseline)

    def expectation(self) -> Tensor:
        """``[*B]``, the mean of ``surrogate()`` over the draws; then baselines that learn are updated, once a call."""
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
        if not self._costs:
            raise ScorefnError(
                f"This StochasticGraph has {len(self._sites)} site(s) and no cost, so there is nothing whose gradient "
                'could be estimated. Register one in the block: g.cost("loss", value).'
            )
        reached = self._dependencies()
        with DisableTorchFunction():
            self._assembly = Assembly(self.num_samples, self._sites, self._costs, reached, self._credits)
        if self._state == "open":
            self._state = "read"
        return self._assembly

    def _dependencies(self) -> list[Collection[str]]:
        """Of each cost, from wherever they are known."""
        signature, charged = tuple(self._signature), list[Collection[str]]()
        kept = self._programs.known(signature) if isinstance(self._source, Kept) else None
        for place, (cost, found) in enumerate(zip(self._costs.values(), self._charged, strict=True)):
            if found is None:
                found = list(self._sites)[: cost.before] if kept is None else kept[place]
            charged.append({name: None for name in self._sites if name in found})
        if isinstance(self._source, Tracked):
            self._programs.learn(signature, self._layouts, charged, self._source.escaped)
        return charged

    # ------------------------------------------------------------------------------------------------ what is refused

    def _check(self, noun: str, name: Any) -> None:
        if self._state != "open":
            why = {
                "new": "it was not entered",
                "read": "its estimate was read, and what comes later would be missing in it",
                "closed": "its block has ended",
                "failed": "its block ended with an error",
            }[self._state]
            raise ScorefnError(
                f"The {noun} {name!r} comes too late or too early for this StochasticGraph: {why}. Sample and register "
                "costs inside the block, before surrogate(); enter the graph again for the next step."
            )
        if not isinstance(name, str):
            raise ScorefnError(f"A {noun} is known by its name, a string, but {name!r} was given.")
        if name in self._sites or name in self._costs:
            taken = "site" if name in self._sites else "cost"
            raise ScorefnError(
                f"The name {name!r} is taken by a {taken} of this graph, and the two could not be told apart. Give "
                f"each its own name, for instance f'{name}[{{t}}]' in a loop."
            )

    def _names_of(self, name: str, given: str | Sequence[str]) -> tuple[str, ...]:
        names = (given,) if isinstance(given, str) else tuple(given)
        if unknown := [other for other in names if other not in self._sites]:
            raise ScorefnError(
                f"{name!r} is said to be given {unknown[0]!r}, but there is no site of this name: the sites so far are "
                f"{list(self._sites)}. Correct the name or the order."
            )
        return names

    def _with_ancestors(self, reached: Collection[str], lead: tuple[str, ...] | None) -> dict[str, None]:
        """Ancestors are among those that were found already, but not among those that were given."""
        found = dict.fromkeys(reached)
        for name in lead or ():
            found |= {**self._reached[name], name: None}
        return found

    def _found(
        self, name: str, kind: Any, tensors: list[Tensor], lead: tuple[str, ...] | None, cost: bool = False
    ) -> tuple[Collection[str], Any]:
        """Sites that lead the shape and sites on which it depends."""
        try:
            if cost:
                return self._source.cost(name, tensors[0], kind)
            return self._source.site(name, tensors, kind)
        except Unknown:
            if lead is not None:
                return lead, None if cost else list(self._sites)
            raise ScorefnError(
                f"This StochasticGraph was entered again and keeps the dependency map of its program, but {name!r} was "
                "not there before in this form, so that its layout is not known. Use another StochasticGraph for "
                f"another program, a new one for each run of a program that changes, or say given= for {name!r}."
            ) from None
