"""What a stochastic graph refuses."""

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, Uniform

import scorefn as sf
from tests.graph.programs import logits

COIN = Bernoulli(logits=torch.zeros(3, requires_grad=True))


def program(body, N=4, **kwargs):
    with sf.StochasticGraph(N, **kwargs) as g:
        body(g)
    return g.surrogate()


def z_and(rest, dist=COIN, **site):
    def body(g):
        rest(g, g.sample("z", dist, **site))

    return body


REFUSALS = {
    "taken by a site": z_and(lambda g, z: g.sample("z", COIN)),
    "taken by a cost": z_and(lambda g, z: (g.cost("c", z.sum(-1)), g.cost("c", z.sum(-1)))),
    "and no cost": z_and(lambda g, z: None),
    "depends on no site": z_and(lambda g, z: g.cost("c", torch.zeros(4))),
    r"known by its name, a string, but 3": lambda g: g.sample(3, COIN),
    r"shape \(4, 3\) after \[4\]\), but the cost 'c' has \(\)": z_and(
        lambda g, z: (g.cost("c", z.sum(-1)), g.cost("d", z))
    ),
    r"shape \(\), but it must be \[4\]": z_and(lambda g, z: g.cost("c", z.sum())),
    r"has batch shape \(\), but the costs, such as 'c', have \(3,\)": z_and(
        lambda g, z: g.cost("c", z.unsqueeze(-1).expand(4, 3)), Bernoulli(logits=torch.zeros((), requires_grad=True))
    ),
    r"begins with \(4,\). But its batch shape is \(3,\)": z_and(lambda g, z: g.sample("h", Bernoulli(logits=z.sum(0)))),
    "is a list, but it must be a tensor": z_and(lambda g, z: g.cost("c", [z.sum(-1)])),
    r"is complex \(torch.complex64\)": z_and(lambda g, z: g.cost("c", z.sum(-1) * 1j)),
    "no rsample": lambda g: g.sample("z", COIN, pathwise=True),
    "is not a measure": lambda g: g.sample("z", torch.zeros(3)),
    "num_samples of site 'z' must be an integer": lambda g: g.sample("z", COIN, num_samples=0),
    "is no estimator": lambda g: g.sample("z", COIN, estimator="DisARM"),
    "Enumerate is a class": lambda g: g.sample("z", COIN, estimator=sf.Enumerate),
    "has num_samples=2 and the estimator DisARM": lambda g: g.sample("z", COIN, estimator=sf.DisARM(), num_samples=2),
    "drawn by an estimator": lambda g: g.sample("z", COIN, estimator=sf.DisARM(), baseline=sf.Constant(0.0)),
    "is pathwise and has no score": lambda g: g.sample(
        "z", Normal(torch.zeros(3), 1.0), pathwise=True, baseline=sf.Constant(0.0)
    ),
    r"'h' has the estimator Enumerate and depends on site 'z', whose draws are coupled by DisARM": z_and(
        lambda g, z: g.sample("h", Bernoulli(logits=z), estimator=sf.Enumerate()), estimator=sf.DisARM()
    ),
    r"must begin with \(4, 2\). Keep that axis": z_and(
        lambda g, z: g.cost("c", z.sum((1, 2)), given=()), estimator=sf.DisARM()
    ),
    "draws more than values": lambda g: g.sample("z", COIN, estimator=sf.REBAR()),
    "given 'k', but there is no site": z_and(lambda g, z: g.sample("h", COIN, given="k")),
    'baseline of site .z. must be a baseline object, None or "auto"': lambda g: g.sample("z", COIN, baseline="loo"),
    "changed in place after they were sampled": z_and(lambda g, z: g.cost("c", z.zero_().sum(-1))),
    "'k' and 'h', whose draws lie along axes of their own beside each other": z_and(
        lambda g, z: g.cost(
            "c",
            g.sample("h", COIN, num_samples=2).sum((1, 2)) * g.sample("k", COIN, num_samples=3).sum((1, 2)) * z.sum(-1),
        )
    ),
    "a cost .c. was changed|The cost 'c' was changed in place": z_and(
        lambda g, z: (g.cost("c", c := z.sum(-1)), c.add_(1.0))
    ),
    r"Neither a cost nor the log-probability of a site \(z\) requires grad": z_and(
        lambda g, z: g.cost("c", z.sum(-1)), Bernoulli(logits=torch.zeros(3))
    ),
    "The support of Uniform moves": lambda g: g.sample("z", Uniform(torch.zeros((), requires_grad=True), 1.0)),
    "There is no site 'q'": lambda g: g.log_prob("q"),
    "f is nan at 4 of 4 draws": z_and(lambda g, z: g.cost("c", z.sum(-1) * torch.nan)),
    "NaN or infinite at one of its coupled draws": z_and(
        lambda g, z: g.cost("c", z.sum(-1) * torch.nan), Independent(COIN, 1), estimator=sf.DisARM()
    ),
    "A cost of this graph is NaN": z_and(
        lambda g, z: g.cost("c", z * torch.nan), Normal(torch.zeros((), requires_grad=True), 1.0), pathwise=True
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(sf.ScorefnError, match=message):
        program(REFUSALS[message])


def test_use_at_the_wrong_time():
    g = sf.StochasticGraph(4)
    with pytest.raises(sf.ScorefnError, match="it was not entered"):
        g.sample("z", COIN)
    with pytest.raises(sf.ScorefnError, match="it was never entered"):
        g.surrogate()
    with g:
        g.cost("c", g.sample("z", COIN).sum(-1))
        with pytest.raises(sf.ScorefnError, match="is entered while its block is open"):
            g.__enter__()
    g.surrogate()
    with pytest.raises(sf.ScorefnError, match="its block has ended"):
        g.cost("d", torch.zeros(4))
    with pytest.raises(RuntimeError), g:
        raise RuntimeError
    with pytest.raises(sf.ScorefnError, match="its block ended with an error"):
        g.surrogate()
    with g:  # afterwards it is as before
        g.cost("c", g.sample("z", COIN).sum(-1))
    assert g.surrogate().shape == (4,)


def test_dice_with_an_estimator_is_refused():
    with sf.StochasticGraph(3) as g:
        g.cost("c", g.sample("z", Independent(COIN, 1), estimator=sf.DisARM()).sum(-1))
    with pytest.raises(
        sf.ScorefnError, match="Site 'z' has the estimator DisARM, whose surrogate is right for the first"
    ):
        g.dice()


def test_leave_one_out_without_another_draw_is_refused():
    with pytest.raises(sf.ScorefnError, match="LeaveOneOut at site 'z' needs another draw"):
        program(z_and(lambda g, z: g.cost("c", z.sum(-1)), baseline=sf.LeaveOneOut()), N=1)


@pytest.mark.filterwarnings("ignore::scorefn.tracking.EscapeWarning")
def test_a_layout_that_python_chose_is_not_guessed():
    def body(given):
        def run(g):
            z = g.sample("z", Bernoulli(logits=logits(1)[0]))
            rows = [logits(1)[0] if each.item() else logits(1, seed=1)[0] for each in z]
            g.cost("c", g.sample("h", Bernoulli(logits=torch.stack(rows)), given=given) * 1.0)

        return run

    with pytest.raises(
        sf.ScorefnError, match="was chosen by Python after 'z' left .* cannot be told .* given='z' if so"
    ):
        program(body(None))
    assert program(body("z")).shape == (4,)


def test_a_hidden_parameter_is_told_by_the_draws():
    class Hidden:
        def __init__(self, p):
            self.sample, self.log_prob = p.sample, p.log_prob

    with pytest.raises(sf.ScorefnError, match="depend on site 'z', which does not show in the tensors of its Hidden"):
        program(z_and(lambda g, z: g.sample("h", Hidden(Bernoulli(logits=z)))))
    shape = program(
        z_and(lambda g, z: g.cost("c", g.sample("h", Hidden(Bernoulli(logits=z)), given="z").sum(-1)))
    ).shape
    assert shape == (4,)


def test_a_new_site_of_a_kept_program_has_to_tell_its_layout():
    g = sf.StochasticGraph(4, audit_every=1000)
    for _ in range(2):
        with g:
            g.cost("c", g.sample("z", COIN).sum(-1))
        g.surrogate()
    with pytest.raises(sf.ScorefnError, match="keeps the dependency map of its program, but 'h' was not there"), g:
        g.sample("h", COIN)
