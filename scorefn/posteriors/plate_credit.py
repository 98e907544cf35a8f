"""PlateCredit: which factor of the ELBO is charged to which element of which guide site.

A program is the guide's sites in the order in which they are sampled. A factor has a *level*, the last site that can
have reached it: for -log q the site itself, for log p the last guide site among the latents that the model has met by
then. Two rules then decide, and neither looks at values:

* order: a decision is charged with the factors whose level is not before its own site;
* plates: within a plate that both share, only at its own index, unless a site outside that plate was sampled in
  between: such a site may have read every index and passed it on.

Where it is known on which sites a factor depends (``Program.reach``), both rules are applied to those alone.

Blocks that keep the same plates apart are summed together: a credit costs a few tensor operations for each set of
plates, however many sites there are, and no mask between single elements is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Credit, ShapeError
from scorefn.posteriors.plate_sums import summed_terms
from scorefn.posteriors.plates import Block, assembled
from scorefn.posteriors.programs import Program


@dataclass(frozen=True, eq=False, repr=False)
class PlateCredit(Credit):
    """Program order and plates: the native credit of a guide (see the module).

    It assumes what a plate declares: that its elements do not read one another, neither inside the plate nor by a
    computation without a site between two entries of it. Give ``Total()`` for a program that breaks this; all else is
    charged rather than dropped. Sources: Schulman, Heess, Weber & Abbeel (2015), theorem 1; Ranganath, Gerrish & Blei
    (2014), section 3.1, for the Rao-Blackwellisation.

    Args:
        programs: the different programs among the draws (one, unless control flow depends on draws).
        num_decisions: K.
        num_values: J.
        which: ``[N]``, the program of each draw; None: the first.

    Raises:
        ShapeError: values or log-probabilities of other draws than those it came with.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from scorefn.posteriors import ScoreFunctionELBO
        >>> def model():
        ...     with pyro.plate("data", 3):
        ...         z = pyro.sample("z", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.0, 1.0, 2.0]))
        >>> def guide():
        ...     with pyro.plate("data", 3):
        ...         pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(3))))
        >>> pyro.clear_param_store()
        >>> draws = ScoreFunctionELBO(2).draws(model, guide)
        >>> draws.credit
        PlateCredit(3 decisions, 9 values)
        >>> draws.credit(
        ...     torch.ones(1, 9)
        ... )  # each z is charged with its own log p(z), log p(x | z) and -log q(z)
        tensor([[3., 3., 3.]])
    """

    programs: tuple[Program, ...]
    num_decisions: int
    num_values: int
    which: Tensor | None = None

    def __repr__(self) -> str:
        """Short, for messages."""
        return f"PlateCredit({self.num_decisions} decisions, {self.num_values} values)"

    def influence(self, v: Tensor) -> Tensor:
        """``[N, *B, J] -> [N, *B, K]``."""
        self._check(v, self.num_values, "values")
        return self._by_program(v, lambda program, v: summed_terms(program.influence, v, self.num_decisions))

    def influence_adjoint(self, u: Tensor) -> Tensor:
        """``[N, *B, K] -> [N, *B, J]``."""
        self._check(u, self.num_decisions, "decisions")
        return self._by_program(
            u, lambda program, u: summed_terms([term.adjoint for term in program.influence], u, self.num_values)
        )

    def predecessors(self, log_prob: Tensor) -> Tensor:
        """Decisions whose influence strictly contains k's, and earlier ones with the same influence."""
        self._check(log_prob, self.num_decisions, "decisions")
        return self._by_program(log_prob, _predecessors)

    def __getitem__(self, index: Any) -> PlateCredit:
        """The credit of some of the draws."""
        return self if self.which is None else replace(self, which=self.which[index])

    def _check(self, v: Tensor, columns: int, noun: str) -> None:
        if v.shape[-1] != columns:
            raise ShapeError(f"{self!r} met {v.shape[-1]} {noun}: it belongs to the draws it came with.")

    def _by_program(self, v: Tensor, summed: Callable[[Program, Tensor], Tensor]) -> Tensor:
        if self.which is None:
            return summed(self.programs[0], v)
        rows = [(self.which == index).nonzero().flatten() for index in range(len(self.programs))]
        parts = [summed(program, v[row]) for program, row in zip(self.programs, rows, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]


def _predecessors(program: Program, log_prob: Tensor) -> Tensor:
    columns = log_prob.shape[-1]
    before, own = summed_terms(program.before, log_prob, columns), dict[int, Tensor]()
    for step in program.steps:
        if (block := step.decision) is not None:
            value = log_prob.narrow(-1, block.start, block.size).reshape(*log_prob.shape[:-1], *block.shape)
            own[block.start] = _earlier(value, block).reshape(*log_prob.shape[:-1], block.size)
    return before + assembled(own, log_prob, columns)


def _earlier(own: Tensor, block: Block) -> Tensor:
    """Sum over the earlier elements of the same site and of the same plate indices: they have the same influence."""
    kept = {plate.dim for plate in block.plates}
    depth = len(block.shape)
    free = [dim for dim in range(-depth, 0) if dim not in kept and block.shape[dim] != 1]
    if not free:
        return torch.zeros_like(own)
    last = list(range(-len(free), 0))
    moved = own.movedim(free, last)
    flat = moved.flatten(-len(free))
    return (flat.cumsum(-1) - flat).reshape(moved.shape).movedim(last, free)
