"""The warnings: one tree, said once, at the line of the user's that they are about.

ScorefnWarning (a UserWarning)
├── DependencyWarning    dependencies between decisions and values were wrong, or cannot be told
├── EvaluationWarning    evaluations of a search failed, and count as NaN
└── EscapeWarning        a decision left the tensor graph (in ``scorefn.tracking``)
"""

import sys
import warnings

BETWEEN = {"contextlib", "pyro", "torch", __name__.partition(".")[0]}


class ScorefnWarning(UserWarning):
    """Base of every warning that scorefn gives itself; a ``UserWarning``.

    Example:
        >>> import warnings, scorefn as sf
        >>> warnings.filterwarnings("error", category=sf.ScorefnWarning)  # stop at the first one
        >>> warnings.filterwarnings("default", category=sf.ScorefnWarning)
    """


class DependencyWarning(ScorefnWarning):
    """Which value depends on which decision was found to be otherwise than it was, or cannot be told.

    Credit is wider from then on, which is right, with more variance than it needs; where the text says so, earlier
    gradients may have been biased. Given once for each loss or graph and each cause.

    Example:
        >>> import warnings, torch, scorefn as sf
        >>> coin = torch.distributions.Bernoulli(logits=torch.zeros((), requires_grad=True))
        >>> graph = sf.StochasticGraph(4, audit_every=1)  # our word that the program stays the same
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for step in range(3):
        ...         with graph:
        ...             z, w = graph.sample("z", coin), graph.sample("w", coin)
        ...             graph.cost("c", w if step else z)  # not the same
        ...         _ = graph.surrogate()
        >>> [warning.category.__name__ for warning in caught]
        ['DependencyWarning']
    """


class EvaluationWarning(ScorefnWarning, RuntimeWarning):
    """Evaluations over workers failed as often as they were tried: they are NaN, and rank last.

    Given once for each search, with the first failure and its traceback.

    Example:
        >>> import warnings, scorefn as sf
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> def fun(x):
        ...     return 1 / max(round(x[0]), 0)  # fails for x below 1/2
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     result = sf.search.minimize(
        ...         fun, [1.0], 1.0, seed=0, maxfevals=40, executor=lambda: ThreadPoolExecutor(1)
        ...     )
        >>> [warning.category.__name__ for warning in caught], result.failed > 0
        (['EvaluationWarning'], True)
    """


def warn(message: str, category: type[ScorefnWarning]) -> None:
    """Warn at the innermost line that is neither ours nor of a library that stands between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
