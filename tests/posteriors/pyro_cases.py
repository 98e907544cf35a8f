"""Data, and the comparison with enumeration."""

from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors.enumeration import distance, exact_gradient, expected_gradient
from tests.posteriors.problems import number

EXACT = 1e-10
DATA = number([-0.5, 2.0])


# --------------------------------------------------------------------------------------------------------- valid models


def exact_enough(problem, num_particles=1, **options):
    options.setdefault("vectorize_particles", problem.batched)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=problem.nesting, **options)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT
