"""The engine behind ``python -m applications.benchmarks``: rows of contenders that take turns, each library at home.

- ``row``: what a row is: work, contenders, what is read off.
- ``work``, ``worker``, ``room``: a contender at work in a process of its own, asked over a pipe.
- ``turns``: contenders of a row in turn, after all are shown to compute the same.
- ``measures``: figures and ratios with their intervals.
- ``record``: what is kept, and the comparison with what was recorded.
- ``page``, ``picture``: pages and plots, made from the record alone.
"""
