"""The sources of the methods: what to cite for what was used."""

from scorefn.citation.bibliography import Reference
from scorefn.citation.citation import Citation, cite

__all__ = ["Citation", "Reference", "cite"]
