"""The error tree: every refusal says the fact, the reason and the repair.

ScorefnError (a ValueError)
├── ShapeError       two shapes that do not belong together
├── SupportError     a support that moves with a parameter that requires grad
├── NonFiniteError   NaN or infinite values, with the draws named
└── LostRankError    another process of a torch.distributed group is gone
"""


class ScorefnError(ValueError):
    """Base of every error that scorefn raises itself; a ``ValueError``."""


class ShapeError(ScorefnError):
    """Shapes that do not belong together; scorefn never repairs them by broadcasting."""


class SupportError(ScorefnError):
    """The support of the distribution moves with a parameter, so the identity does not hold."""


class NonFiniteError(ScorefnError):
    """A value, a log-probability or an importance weight is NaN or infinite."""


class LostRankError(ScorefnError):
    """Another process of a ``torch.distributed`` group ended or does not answer: the job cannot go on without it."""
