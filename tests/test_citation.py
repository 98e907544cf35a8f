"""What `cite` names: the facts agree with the docstrings, every source is used, and the entries are BibTeX."""

import importlib
import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import scorefn as sf
from scorefn.citation.bibliography import bibliography, read
from scorefn.citation.sources import METHODS, SETTINGS, SOURCES

ROOMS = ["core", "diagnostics", "estimators", "fisher", "graph", "posteriors", "reducers", "search", "shaping"]
ROOMS += ["scale", "tracking", "trajectories"]
YEAR = re.compile(r"(?<=[(, ])((?:19|20)\d\d)(?=[),;])")
QUOTED = re.compile(r'(?:(?:19|20)\d\d\)?[,;]?|3rd ed\.,?) "([^"]+)"')
NEEDED = {
    "article": {"journal", "volume"},
    "book": {"publisher"},
    "incollection": {"booktitle", "publisher"},
    "inproceedings": {"booktitle"},
    "misc": set(),
    "software": {"version"},
    "techreport": {"institution", "number"},
}


def public_objects():
    """Room and name of all that a user may cite, and the object."""
    for room in ROOMS:
        module = importlib.import_module(f"scorefn.{room}")
        for name in getattr(module, "__all__", [name for name in SOURCES if name.startswith(f"{room}.")]):
            thing = getattr(module, name.rpartition(".")[2])
            if inspect.isclass(thing) or inspect.isfunction(thing):
                home = f"{thing.__module__}..".split(".")[1]
                yield f"{home}.{thing.__qualname__}", thing


OBJECTS = dict(public_objects())


def text(thing):
    """A docstring in one line, without its example."""
    return " ".join((inspect.getdoc(thing) or "").split()).partition(" Example: ")[0] if thing else ""


def plain(title):
    return re.sub(r"[^a-z0-9]+", " ", title.lower()).strip()


def test_every_name_of_the_table_is_public():
    assert set(SOURCES) | SETTINGS | set(METHODS.values()) <= set(OBJECTS)


@pytest.mark.parametrize("name", [name for name, thing in OBJECTS.items() if YEAR.search(text(thing))])
def test_a_docstring_that_names_a_source_has_it_in_the_bibliography(name):
    said = text(OBJECTS[name])
    sources = [bibliography()[key] for key in SOURCES.get(name, ())]
    assert set(YEAR.findall(said)) <= {source["year"] for source in sources}
    for title in QUOTED.findall(said):
        assert any(plain(source["title"]).startswith(plain(title)) for source in sources), title


@pytest.mark.parametrize("name", SOURCES)
def test_the_sources_of_a_name_are_those_of_its_docstring(name):
    said = text(OBJECTS[name])
    for other in re.findall(r"``(\w+)``", said):  # "those of ``CSANES``"
        said += text(OBJECTS.get(f"{name.partition('.')[0]}.{other}"))
    for key in SOURCES[name]:
        source = bibliography()[key]
        assert source.authors[0].partition(",")[0] in said or source["title"].partition(":")[0] in said, key
        assert source["year"] in said or source["title"] in said, key


def test_every_source_is_used_and_none_is_missing():
    assert {key for keys in SOURCES.values() for key in keys} == set(bibliography())


def test_keys_are_unique_across_the_files():
    folder = Path(sf.__file__).parent / "citation"
    entries = [entry for file in sorted(folder.glob("*.bib")) for entry in read(file.read_text(encoding="utf-8"))]
    keys = [entry.key for entry in entries]
    assert len(keys) == len(set(keys))
    written = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.bib"))
    assert len(keys) == written.count("\n@")  # no entry escapes the reader


def parsed(bibtex):
    """An entry by the grammar of BibTeX rather than by our layout: braces are matched, and commas part the fields."""
    kind, key, rest = re.fullmatch(r"@(\w+)\{([^\s,{}]+),(.*)\}", bibtex, flags=re.DOTALL).groups()
    fields = {}
    while rest.strip():
        name, rest = re.fullmatch(r"\s*(\w+)\s*=\s*(\{.*)", rest, flags=re.DOTALL).groups()
        depth, end = 1, 0
        while depth:
            end += 1
            depth += (rest[end] == "{") - (rest[end] == "}")
        assert name not in fields
        fields[name] = rest[1:end]
        rest = re.fullmatch(r"\s*,?(.*)", rest[end + 1 :], flags=re.DOTALL)[1]
    return kind, key, fields


@pytest.mark.parametrize("key", [*bibliography(), "scorefn"])
def test_every_entry_is_valid(key):
    entry = bibliography().get(key) or sf.cite().references[0]
    kind, parsed_key, fields = parsed(entry.bibtex)
    assert (kind, parsed_key) == (entry.kind, key)
    assert NEEDED[kind] | {"author", "title", "year"} <= set(fields)
    assert re.fullmatch(r"(19|20)\d\d", fields["year"])
    assert int(fields["year"]) <= 2026
    assert re.fullmatch(r"\{.+\}", fields["title"])
    assert not re.search(r"(?<!\\)[&%$#_]", "".join(fields.values()))
    groups = {"others", "OpenAI Dota Team", "Student", "The scorefn authors"}
    assert all("," in author or author in groups for author in entry.authors)
    if "eprint" in fields:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", fields["eprint"])
        assert fields["archivePrefix"] == "arXiv"
    if key != "scorefn":
        assert fields["year"] in key


def keys(*used):
    return [reference.key for reference in sf.cite(*used).references]


def test_the_list_reads_well():
    assert str(sf.cite(sf.LeaveOneOut)) == (
        "* Wouter Kool, Herke van Hoof and Max Welling (2019). Buy 4 REINFORCE samples, get a baseline for free! ICLR "
        "workshop Deep Reinforcement Learning Meets Structured Prediction."
    )
    assert str(bibliography()["cochran1977sampling"]) == (
        "William G. Cochran (1977). Sampling techniques. Wiley, 3rd edition."
    )
    assert str(bibliography()["hansen2001completely"]).endswith(
        "Evolutionary Computation 9. doi:10.1162/106365601750190398."
    )
    assert str(bibliography()["yu2025dapo"]).startswith("Qiying Yu et al. (2025). DAPO: ")


def test_classes_functions_and_objects_have_the_same_sources():
    assert keys(sf.Total) == keys(sf.Total()) == ["williams1992simple"]
    assert keys(sf.surrogate) == ["williams1992simple", "schulman2015gradient", "mnih2014neural"]


def test_several_objects_name_each_source_once_in_their_order():
    assert keys(sf.trajectories.rloo, sf.LeaveOneOut()) == ["kool2019buy", "ahmadian2024back"]
    assert sf.cite(sf.LeaveOneOut(), sf.Total()).bibtex.count("@") == 2


def test_an_object_names_the_sources_of_its_parts():
    loss = sf.posteriors.ScoreFunctionELBO(num_particles=4, baseline=sf.AdaptiveRaoBlackwell())
    assert keys(loss)[: len(keys(type(loss)))] == keys(type(loss))
    assert "glynn2002some" in keys(loss)
    assert "glynn2002some" not in keys(type(loss))


def test_a_subclass_of_ones_own_has_the_sources_of_what_it_extends():
    class Mine(sf.MovingAverage):
        pass

    assert keys(Mine) == keys(Mine()) == keys(sf.MovingAverage)


def test_a_partial_object_is_looked_through():
    used = partial(sf.expectation, num_samples=4, baseline=sf.LeaveOneOut())
    assert keys(used) == keys(sf.expectation, sf.LeaveOneOut()) == ["williams1992simple", "kool2019buy"]
    assert keys(partial(used, coupling=sf.Antithetic())) == [*keys(used), *keys(sf.Antithetic)]
    assert keys(partial(torch.sum, sf.LeaveOneOut())) == keys(sf.LeaveOneOut)
    with pytest.raises(sf.ScorefnError, match="as argument 0"):
        sf.cite(partial(torch.sum, 1))


def test_the_three_verbs_have_one_source_in_common():
    for verb in (sf.expectation, sf.draw, sf.surrogate):
        assert keys(verb)[0] == "williams1992simple"


def strategies():
    found = {name: getattr(sf.search, name) for name in sf.search.__all__}
    return {name: thing for name, thing in found.items() if isinstance(getattr(thing, "method", None), str)}


def test_every_strategy_is_known_by_the_name_of_its_method():
    known = {thing.method: f"search.{name}" for name, thing in strategies().items() if f"search.{name}" in SOURCES}
    assert known == METHODS
    assert set(strategies()) - {name.partition(".")[2] for name in METHODS.values()} == {"ProductSearch"}


@pytest.mark.parametrize("method", ["csanes", "rank_one", "separable", "snes", "xnes", "pgpe", "coordinates"])
def test_a_result_names_the_sources_of_its_method(method):
    kind = next(thing for thing in strategies().values() if thing.method == method)
    found = sf.search.minimize(lambda x: (x**2).sum(), [1.0, 2.0], 0.5, method=method, seed=0, maxiter=2)
    assert keys(found) == keys(kind)


def test_a_result_of_ones_own_method_names_the_library():
    class Mine(sf.search.SNES):
        method = "mine"

    found = sf.search.minimize(lambda x: (x**2).sum(), [1.0, 2.0], 0.5, method=Mine, seed=0, maxiter=2)
    assert keys(found) == ["scorefn"]


def test_minimize_names_what_auto_chooses_among():
    among = {sf.search.chosen(dimension)[0] for dimension in (2, 1000, 20_000)}
    assert set(keys(sf.search.minimize)) == set(keys(*[kind for kind in strategies().values() if kind.method in among]))


def test_a_limit_is_no_method():
    assert keys(sf.search.Limits(maxiter=9)) == keys(sf.search.Limits) == ["hansen2019pycma"]
    assert keys(sf.search.SNES([0.0], 1.0, maxiter=9)) == keys(sf.search.SNES)
    assert keys(sf.search.CSANES([0.0], 1.0)) == keys(sf.search.CSANES)


def test_what_it_prints_in_a_session_is_short():
    assert repr(sf.cite(sf.trajectories.rloo)) == "<Citation of 2: kool2019buy, ahmadian2024back>"
    every = repr(sf.cite(sf.search.CSANES, sf.DisARM, sf.Sobol))
    assert every.startswith("<Citation of 11: glasmachers2010exponential, ")
    assert every.endswith(", dong2020disarm, ... 5 more>")


def test_parts_that_hold_each_other_end():
    average = sf.MovingAverage()
    average.self = [average, {"other": sf.Total()}]
    assert keys(average) == [*keys(sf.MovingAverage)]


def test_without_a_source_the_library_is_named():
    facts = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    for citation in (sf.cite(), sf.cite(sf.Draws)):
        (reference,) = citation.references
        assert reference.key == "scorefn"
        assert f"\nversion: {reference['version']}\n" in facts
        assert f"name: {reference['author']}\n" in facts
        assert f"\ntitle: {reference['title'].partition(':')[0]}\n" in facts
        assert str(citation) == (
            f"* The scorefn authors (2026). scorefn: score-function gradient estimators for PyTorch. version "
            f"{sf.__version__}."
        )


@pytest.mark.parametrize("thing", [torch.nn.Linear(1, 1), torch.sum, "LeaveOneOut", None, sf.search, int])
def test_what_is_not_ours_is_refused(thing):
    with pytest.raises(sf.ScorefnError, match=r"as argument 1, which is no class, function or object of scorefn"):
        sf.cite(sf.LeaveOneOut(), thing)
