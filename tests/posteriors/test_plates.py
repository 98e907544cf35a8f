"""PlateCredit against the dense mask found by walking from element to element."""

from itertools import product

import pytest
import torch

import scorefn as sf
from scorefn.posteriors import PlateCredit
from scorefn.posteriors.plates import Block, Plate, Step
from scorefn.posteriors.programs import Program

PLATES = [Plate("a", -1, 2), Plate("b", -2, 3), Plate("c", -1, 3)]  # a and c share a dimension: never at one site


def random_program(seed):
    """Sites with random plates; a decision or not; its own factor and some others."""
    generator = torch.Generator().manual_seed(seed)

    def flip():
        return bool(torch.rand((), generator=generator) < 0.5)

    def some_plates():
        return frozenset({PLATES[0] if flip() else PLATES[2]} if flip() else set()) | frozenset(
            {PLATES[1]} if flip() else set()
        )

    def block(start, plates, extra=1):
        extents = {plate.dim: plate.size for plate in plates}
        return Block(start, (extra, extents.get(-2, 1), extents.get(-1, 1)), plates)

    steps, K, J = [], 0, 0
    for _ in range(4):
        plates, decision = some_plates(), None
        extra = 2 if flip() else 1
        if flip() or not steps:
            decision = block(K, plates, extra)
            K += decision.size
        factors = [block(J, plates, extra)]
        J += factors[0].size
        for _ in range(int(flip()) + int(flip())):
            factors.append(block(J, some_plates()))
            J += factors[-1].size
        steps.append(Step(plates, decision, tuple(factors)))
    return Program(tuple(steps), 3), K, J


def indices(plates):
    """Every joint index of a set of plates, as {plate: index}."""
    ordered = sorted(plates)
    return [dict(zip(ordered, values, strict=True)) for values in product(*(range(plate.size) for plate in ordered))]


def elements(block):
    """Column and plate indices of each element of a block."""
    for offset, place in enumerate(product(*map(range, block.shape))):
        yield block.start + offset, {plate: place[plate.dim] for plate in block.plates}


def agree(first, second):
    return all(second[plate] == index for plate, index in first.items() if plate in second)


def dense_mask(program, K, J):
    """Decision k influences value j if a walk leads there: from site to later site, within the plates both share."""
    mask = torch.zeros(K, J, dtype=torch.bool)
    for number, step in enumerate(program.steps):
        if step.decision is None:
            continue
        for k, start in elements(step.decision):
            reached = [start]
            for later in range(number, len(program.steps)):
                site = program.steps[later]
                if later > number:
                    reached += [place for place in indices(site.plates) if any(agree(place, at) for at in reached)]
                for block in site.factors:
                    for j, place in elements(block):
                        mask[k, j] |= any(agree(place, at) for at in reached)
    return mask


@pytest.fixture(params=range(40))
def case(request):
    program, K, J = random_program(request.param)
    return PlateCredit((program,), K, J), sf.Influence(dense_mask(program, K, J)), K, J


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_equals_its_dense_twin(case):
    credit, dense, K, J = case
    torch.testing.assert_close(credit(draw(5, J)), dense(draw(5, J)))
    torch.testing.assert_close(credit.influence_adjoint(draw(5, K)), dense.influence_adjoint(draw(5, K)))
    torch.testing.assert_close(credit.predecessors(draw(5, K)), dense.predecessors(draw(5, K)))


def test_the_adjoint_is_the_adjoint(case):
    credit, _, K, J = case
    v, u = draw(5, J), draw(5, K)
    torch.testing.assert_close((credit.influence(v) * u).sum(), (v * credit.influence_adjoint(u)).sum())


def test_draws_of_different_programs():
    (first, K1, J1), (second, K2, J2) = random_program(1), random_program(2)
    K, J = max(K1, K2), max(J1, J2)
    credit = PlateCredit((first, second), K, J, which=torch.tensor([0, 1, 1, 0]))
    v, u = draw(4, J), draw(4, K)
    for row, (program, k, j) in enumerate([(first, K1, J1), (second, K2, J2), (second, K2, J2), (first, K1, J1)]):
        dense = dense_mask(program, k, j).to(v)
        padded = torch.nn.functional.pad(dense, (0, J - j, 0, K - k))
        torch.testing.assert_close(credit(v)[row], padded @ v[row])
        torch.testing.assert_close(credit.influence_adjoint(u)[row], u[row] @ padded)
        torch.testing.assert_close(credit[row : row + 1](v[row : row + 1])[0], padded @ v[row])


def test_values_of_other_draws_are_refused():
    program, K, J = random_program(0)
    credit = PlateCredit((program,), K, J)
    with pytest.raises(sf.ShapeError, match="belongs to the draws it came with"):
        credit(torch.zeros(2, J + 1))
    assert repr(credit) == f"PlateCredit({K} decisions, {J} values)"
