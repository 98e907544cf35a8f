"""Contenders: factories of ``Work``, a module per library or kind of work, each in its own process."""
