"""Fisher information in closed form or from the draws, and natural gradients.

``fisher_information`` for the families of its table, ``register_fisher`` for others; ``natural_gradient`` in the
parameters of a distribution, or in any tensors by a solver.
"""

import scorefn.fisher.families  # noqa: F401 - registers the closed forms
from scorefn.fisher.information import FisherInformation, FisherMatrix, fisher_information, register_fisher
from scorefn.fisher.natural import natural_gradient
from scorefn.fisher.solvers import ConjugateGradients, DenseSolve, FisherSolver, Scores, Woodbury

__all__ = [
    "ConjugateGradients",
    "DenseSolve",
    "FisherInformation",
    "FisherMatrix",
    "FisherSolver",
    "Scores",
    "Woodbury",
    "fisher_information",
    "natural_gradient",
    "register_fisher",
]
