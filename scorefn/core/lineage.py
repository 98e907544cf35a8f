"""What a subclass inherits from a registered family: its rule, unless the subclass changes what the rule is about."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch.distributions import Distribution

_SAME_DISTRIBUTION = frozenset(
    (  # their overrides compute the same in another way, or give another pathwise gradient
        "torch.distributions.one_hot_categorical.OneHotCategoricalStraightThrough",
        "pyro.distributions.torch.Binomial",
        "pyro.distributions.torch.Categorical",
        "pyro.distributions.torch.Geometric",
        "pyro.distributions.torch.Poisson",
        "pyro.distributions.avf_mvn.AVFMultivariateNormal",
        "pyro.distributions.extended.ExtendedBinomial",
        "pyro.distributions.nanmasked.NanMaskedMultivariateNormal",
        "pyro.distributions.nanmasked.NanMaskedNormal",
        "pyro.distributions.omt_mvn.OMTMultivariateNormal",
    )
)


def nearest(cls: type, known: Container[type], methods: Sequence[str]) -> tuple[type | None, str]:
    """The first class in the method resolution order that is known or that defines one of the methods.

    Args:
        cls: where the search begins.
        known: the families that have a rule.
        methods: an override of one of them makes another distribution of a family.

    Returns:
        The class, and the method it defines, empty where it is known; None where the search ends at ``Distribution``.

    Example:
        >>> import torch, scorefn as sf
        >>> from torch.distributions import Normal
        >>> class Named(Normal):
        ...     '''A normal distribution under another name.'''
        >>> class Rounded(Normal):
        ...     def sample(self, shape=torch.Size()):
        ...         return super().sample(shape).round()
        >>> sf.core.nearest(Named, {Normal}, ["sample"])
        (<class 'torch.distributions.normal.Normal'>, '')
        >>> sf.core.nearest(Rounded, {Normal}, ["sample"])[1]
        'sample'
    """
    for parent in cls.__mro__:
        if parent in known:
            return parent, ""
        if parent is Distribution:
            break
        if f"{parent.__module__}.{parent.__qualname__}" not in _SAME_DISTRIBUTION:
            for method in methods:
                if method in vars(parent):
                    return parent, method
    return None, ""


def overridden(cls: type, known: Container[type], methods: Sequence[str], noun: str) -> str:
    """Why the rule of a registered parent is not that of cls: a sentence; empty where it inherits from none.

    Example:
        >>> import torch, scorefn as sf
        >>> from torch.distributions import Normal
        >>> class Rounded(Normal):
        ...     def sample(self, shape=torch.Size()):
        ...         return super().sample(shape).round()
        >>> print(sf.core.overridden(Rounded, {Normal}, ["sample"], "quantile"))
        Rounded inherits from Normal, whose quantile is known, but Rounded overrides sample, so that it may be another
        distribution, and that quantile silently wrong.
    """
    parent = next((parent for parent in cls.__mro__ if parent in known), None)
    by, method = nearest(cls, known, methods)
    if parent is None or by is None or not method:
        return ""
    return (
        f"{cls.__name__} inherits from {parent.__name__}, whose {noun} is known, but {by.__name__} overrides {method}, "
        f"so that it may be another distribution, and that {noun} silently wrong."
    )
