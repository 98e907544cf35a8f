"""One worker per library: see the package's docstring for the protocol."""
