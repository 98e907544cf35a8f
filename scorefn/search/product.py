"""Search over mixed spaces: one strategy for each part, and one ranking for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.search.points import Numbers
from scorefn.search.progress import Progress
from scorefn.search.ranking import Ranking
from scorefn.search.saved_state import check_saved
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy
from scorefn.search.strategy_result import StrategyResult
from scorefn.search.trust_region import discrete_limits


class ProductSearch(Strategy):
    """Minimise over a product of spaces: a point is one part of each, drawn independently by the block of that part.

    The search distribution is the product of those of the blocks, and its score-function gradient therefore that of
    each block, with the utilities of the common f: every block learns from the same ranks, by its own rule::

        x = {name: x_name},   p(x) = prod_name p_name(x_name),   grad E u = (grad_name E u)

    Wherever a strategy has a point, this one has a dict with an entry for each block.

    Blocks being drawn independently, a dependence between them cannot be learnt: where the best value of one coordinate
    moves with another one, put both into one block. And what one block draws is noise to the others. The default margin
    of a discrete block, ``min(1/D, 0.27)``, is one flip a point in each; in a product let all of them have about
    ``margin = 0.3/n``, n the discrete coordinates of all blocks together, so that three points of four have none.

    Args:
        blocks: strategies that have not been told anything yet, with a common popsize. They serve as distributions: the
            account, and what stops the search, are the product's own, and limits given to a block are refused. Give
            each a seed of its own: equal ones are refused.
        limits: as for ``CategoricalSearch``.

    Raises:
        ScorefnError: no blocks, blocks of different popsize or equal seeds, one that was used before or made with a
            limit of its own, or the same one twice; a limit that makes no sense.

    Example:
        >>> from scorefn.search import CSANES, CategoricalSearch, ProductSearch
        >>> blocks = {
        ...     "x": CSANES([3.0, -2.0], 1.0, popsize=10, seed=0),
        ...     "kind": CategoricalSearch([3], popsize=10, seed=1),
        ... }
        >>> strategy = ProductSearch(blocks, ftarget=1e-8)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, x["x"].square().sum(1) + (x["kind"][:, 0] - 2) ** 2)
        >>> strategy.result.best_x["kind"]
        tensor([2])
    """

    method = "product"
    fits_products = False  # its points are dicts
    open_entries = frozenset({"blocks"})  # each block checks its own

    def __init__(self, blocks: Mapping[str, Strategy], **limits: float | None) -> None:
        if not isinstance(blocks, Mapping) or not blocks:
            raise ScorefnError(f"blocks must be strategies by name, at least one, but they are {blocks!r}.")
        for name, block in blocks.items():
            if not isinstance(block, Strategy) or not block.fits_products:
                raise ScorefnError(
                    f"The block {name!r} is {type(block).__name__}, which cannot be a part of a product: use a "
                    "strategy of points [N, D] with a fixed popsize, such as CSANES or CategoricalSearch."
                )
            if block.result.iterations:
                raise ScorefnError(f"The block {name!r} was told something before: make a new one for the product.")
        sizes = {name: block.popsize for name, block in blocks.items()}
        if len(set(sizes.values())) > 1:
            raise ScorefnError(
                f"The blocks have the popsizes {sizes}, but every point has a part of each: give all the same, for "
                f"instance popsize={max(sizes.values())}."
            )
        if len({id(block) for block in blocks.values()}) < len(blocks):
            raise ScorefnError(
                "The same strategy stands for two blocks, which would then not be independent: make two."
            )
        drawn: dict[bytes, str] = {}
        for name, block in blocks.items():
            other = drawn.setdefault(block.random_state().cpu().numpy().tobytes(), name)
            if other != name:
                raise ScorefnError(
                    f"The blocks {other!r} and {name!r} would draw from the same random numbers, their generators "
                    "being in one state, and would then not be independent: give each a seed of its own."
                )
        if len({block.sigma.device for block in blocks.values()}) > 1:
            raise ScorefnError("The blocks live on different devices: make all of them on one.")
        own = Limits.of_options(discrete_limits(limits), "ProductSearch", ())
        for name, block in blocks.items():
            _check_no_limits(name, block._limits, own)
        self._blocks = dict(blocks)
        sigma0 = torch.cat([block.sigma for block in blocks.values()])
        super().__init__(
            {},
            settings={},
            shape=(next(iter(sizes.values())), len(sigma0)),
            sigma0=sigma0,
            seed=0,
            limits=own,
        )

    @property
    def blocks(self) -> dict[str, Strategy]:
        """The strategies of the parts, by name: their distributions and rates; their own account stays empty."""
        return dict(self._blocks)

    @property
    def mean(self) -> Any:
        """By name ``[D_name]``, the point to recommend."""
        return {name: block.mean for name, block in self._blocks.items()}

    @property
    def sigma(self) -> Any:
        """By name ``[D_name]``, the standard deviations."""
        return {name: block.sigma for name, block in self._blocks.items()}

    @property
    def result(self) -> StrategyResult:
        """Where the search stands; mean, sigma and best_x are dicts by name, of copies."""
        progress = self._progress
        mean = {name: block.mean.detach().clone() for name, block in self._blocks.items()}
        best: Any = None
        if progress.best_x is not None:
            parts = self._parts(progress.best_x)
            best = {name: part.to(mean[name].dtype, copy=True) for name, part in parts.items()}
        sigma = {name: block.sigma.detach().clone() for name, block in self._blocks.items()}
        return StrategyResult(
            mean=cast(Any, mean),
            sigma=cast(Any, sigma),
            best_x=best,
            best_f=progress.best_f,
            evaluations=progress.evaluations,
            iterations=progress.iterations,
            failed=progress.failed,
            stop=self.stop,
        )

    @torch.no_grad()
    def ask(self) -> Any:
        """Points to evaluate, by name ``[N, D_name]`` as the block draws them, a fresh sample with each call."""
        return {name: block.ask() for name, block in self._blocks.items()}

    def tell(self, x: Any, f: Numbers) -> None:
        """Learn from a generation.

        Args:
            x: by name ``[N, D_name]``, the points that were evaluated, in any order, the same for all parts.
            f: ``[N]``, their values; NaN or infinity for a failure.

        Raises:
            ScorefnError: x does not have exactly the parts that were asked, or one that its block refuses.
            ShapeError: a part is not ``[N, D_name]`` or f is not ``[N]``.
            NonFiniteError: as for a single strategy. No block has then learnt anything.
        """
        super().tell(x, f)

    def told(self, x: Any) -> Tensor:
        """The parts side by side, ``[N, D]`` in float64, each checked by its block."""
        if not isinstance(x, Mapping) or set(x) != set(self._blocks):
            raise ScorefnError(
                f"x must have the parts {list(self._blocks)} by name, but it has "
                f"{list(x) if isinstance(x, Mapping) else type(x).__name__}: pass what ask returned."
            )
        return torch.cat([block.told(x[name]) for name, block in self._blocks.items()], 1)

    def sampled(self) -> Tensor:
        """``[N, D]``, the parts side by side."""
        return torch.cat([block.sampled() for block in self._blocks.values()], 1)

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """What each block learns from the common ranking."""
        parts = self._parts(points)
        return {name: block.learnt(parts[name], ranking) for name, block in self._blocks.items()}

    def adopt(self, state: State) -> None:
        """Hand each block what it has learnt."""
        for name, part in state.items():
            self._blocks[name].adopt(part)

    def state_dict(self) -> dict[str, Any]:
        """The states of the blocks by name, and the account: tensors and plain numbers, as ``torch.save`` has them."""
        return {
            "strategy": type(self).__name__,
            "blocks": {name: block.state_dict() for name, block in self._blocks.items()},
            "sigma0": self._sigma0.clone(),
            "progress": self._progress.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ScorefnError where ``load_state_dict`` cannot take a state."""
        own = self.state_dict()
        check_saved(state, own, {}, ("progress", "sigma0"), self.open_entries)
        for name, block in self._blocks.items():
            try:
                block.check_state(state["blocks"][name])
            except ScorefnError as error:
                raise ScorefnError(f"The block {name!r} cannot take its part of the state. {error}") from error
        check_saved(state, own, {}, ("progress",), self.open_entries)  # sigma0 after the blocks, which can be named
        sizes = {name: block["popsize"] for name, block in state["blocks"].items()}
        if len(set(sizes.values())) > 1:
            raise ScorefnError(f"The state's blocks have the popsizes {sizes}: they are not from one search.")
        Progress.of_state(state["progress"], self._sigma0.device, self.dimension)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the run then equals an uninterrupted one to the bit, also between ask and tell.

        Raises:
            ScorefnError: the state is of another strategy or of other blocks, or is incomplete or damaged; the block
                is named, and nothing is changed.
        """
        self.check_state(state)
        for name, block in self._blocks.items():
            block.load_state_dict(state["blocks"][name])
        device = self._sigma0.device
        self._sigma0 = state["sigma0"].to(device).clone()
        self._shape = (next(iter(self._blocks.values())).popsize, self.dimension)
        self._progress = Progress.of_state(state["progress"], device, self.dimension)
        self._stop = self._fired() if self._progress.iterations else {}

    def _parts(self, points: Tensor) -> dict[str, Tensor]:
        """Split the last axis, ``[..., D]``, by name."""
        widths = [block.dimension for block in self._blocks.values()]
        return dict(zip(self._blocks, points.split(widths, -1), strict=True))

    @torch.no_grad()
    def _fired(self) -> dict[str, float]:
        mean = torch.cat([block.continuous_mean.double() for block in self._blocks.values()])
        sigma = torch.cat([block.sigma for block in self._blocks.values()])
        return self._limits.fired(self._progress, mean, sigma, self._sigma0, self.popsize)


def _check_no_limits(name: str, limits: Limits, own: Limits) -> None:
    """Refuse a block whose limits would be ignored; those that are defaults, or the product's too, do no harm."""
    usual = (Limits(), Limits.of_options(discrete_limits({}), "", ()), own)
    for entry in fields(Limits):
        value = getattr(limits, entry.name)
        if all(value != getattr(other, entry.name) for other in usual):
            raise ScorefnError(
                f"The block {name!r} was made with {entry.name}={value!r}, which would be ignored: a block serves as a "
                "distribution, and what stops the search is the product's own. Leave it out there, and say "
                f"ProductSearch(blocks, {entry.name}={value!r})."
            )
