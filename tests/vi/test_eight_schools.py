"""Eight schools: what it says is exact is."""

import pyro
import pytest
import torch

from applications.gradients import flat
from applications.vi import eight_schools
from applications.vi.fitting import arrival
from tests.vi.bounds import bound_by_draws


def test_eight_schools_agree_with_known_integrals():
    found = eight_schools.exact(eight_schools.load())
    assert abs(found.log_evidence + 31.311347352) < 1e-8
    assert abs(found.optimum + 31.5985) < 0.0014
    assert abs(found.moments["mu"][0] - 4.396821) < 1e-6
    assert abs(found.moments["tau"][0] - 3.597705) < 1e-6
    theta = [6.211884, 4.940178, 3.927004, 4.757098, 3.615477, 4.042613, 6.296724, 4.854253]
    assert all(abs(found.moments[f"theta {j + 1}"][0] - value) < 1e-6 for j, value in enumerate(theta))


def test_eight_schools_bound_is_that_of_its_programs():
    net = eight_schools.EightSchools(eight_schools.load())
    net.to_optimum()
    found = bound_by_draws(net, 50_000, seed=0)
    assert abs(found.value - net.exact_bound()) < 4 * found.standard_error
    parameters = list(net.parameters.parameters())
    assert flat(torch.autograd.grad(net.exact_bound(), parameters)).abs().max() < 1e-6


@pytest.mark.parametrize(("pathwise", "decisions"), [(False, 10), (True, 0)])
def test_eight_schools_pathwise_has_no_decisions(pathwise, decisions):
    net = eight_schools.EightSchools(eight_schools.load(), pathwise=pathwise)
    trace = pyro.poutine.trace(net.guide).get_trace()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and site["name"] != "schools"]
    assert sum(site["value"].numel() for site in sites if not site["fn"].has_rsample) == decisions


def test_eight_schools_fit_rises_towards_the_optimum():
    fitted = eight_schools.fit(0, 60, learning_rate=0.1)
    assert fitted.curve[-1].gap < fitted.curve[0].gap / 2
    assert all(point.gap > 0 for point in fitted.curve)
    assert arrival(fitted.curve, 1e-9) is None


def test_eight_schools_compares_without_a_trace_in_the_store():
    rows = eight_schools.compare(3, 4, warm=1)
    assert len(rows) == 14
    assert len(pyro.get_param_store()) == 0
