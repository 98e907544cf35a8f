"""Couplings: how the draws of a plain measure share randomness."""

from scorefn.core import Independent

__all__ = ["Independent"]
