"""What `import scorefn` loads, how long it takes, and what it shows."""

import inspect
import json
import subprocess
import sys
from functools import cache
from statistics import median

import pytest

import scorefn as sf

ADAPTERS = ("diagnostics", "posteriors", "scale", "search", "trajectories")
FOREIGN = ("gymnasium", "pyro", "matplotlib", "scipy", "pandas", "sklearn", "jax", "ray")
PROGRAM = """
import json, sys, time
{prelude}
before, start = set(sys.modules), time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def after(statement, prelude="import torch"):
    """CPU seconds of the statement, and the modules that it loads, in a fresh interpreter."""
    program = PROGRAM.format(prelude=prelude, statement=statement)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    seconds, modules = json.loads(run.stdout.splitlines()[-1])
    return seconds, modules


@cache
def imported():
    """One import of scorefn on top of torch, shared by the tests."""
    return after("import scorefn")


def foreign(modules):
    return sorted({name.split(".")[0] for name in modules} & set(FOREIGN))


def adapters(modules):
    return sorted({room for name in modules for room in ADAPTERS if name.split(".")[:2] == ["scorefn", room]})


def test_importing_loads_no_other_library():
    assert foreign(imported()[1]) == []


def test_importing_loads_no_adapter():
    modules = imported()[1]
    assert "scorefn.core.draws" in modules
    assert adapters(modules) == []


def test_the_check_above_can_fail():
    pytest.importorskip("gymnasium")
    _, modules = after("import gymnasium", prelude="")
    assert foreign(modules) == ["gymnasium"]
    assert foreign(["torch.nn", "pyro.infer", "pyrolite"]) == ["pyro"]
    assert adapters(["scorefn.core", "scorefn.search.snes", "scorefn.searching"]) == ["search"]


def test_importing_takes_little_time():
    """CPU seconds on top of torch: of one import, or where the machine was busy the median of five."""
    first = imported()[0]
    assert first <= 0.15 or median([first, *(after("import scorefn")[0] for _ in range(4))]) <= 0.15


def test_the_public_names_are_sorted_and_complete():
    acronyms_first = sorted(sf.__all__, key=lambda name: (not name.isupper(), name))  # as ruff sorts them
    assert sf.__all__ == acronyms_first
    assert len(set(sf.__all__)) == len(sf.__all__)
    loaded = {
        name
        for name, thing in vars(sf).items()
        if not name.startswith("_") and not inspect.ismodule(thing) and name not in ("import_module", "ModuleType")
    }
    assert loaded <= set(sf.__all__)
    for name in sf.__all__:
        assert getattr(sf, name) is not None
    assert set(sf.__all__) <= set(dir(sf))


@pytest.mark.parametrize("room", ["core", "reducers", "diagnostics"])
def test_the_names_of_a_room_are_sorted_and_exist(room):
    module = __import__(f"scorefn.{room}", fromlist=["_"])
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)


def objects():
    for room in ("", ".core", ".reducers", ".diagnostics"):
        module = __import__(f"scorefn{room}", fromlist=["_"])
        for name in module.__all__:
            if name not in ADAPTERS:
                yield f"scorefn{room}.{name}", getattr(module, name)


@pytest.mark.parametrize("thing", [pytest.param(thing, id=name) for name, thing in objects()])
def test_every_public_object_says_what_it_is(thing):
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return  # a type alias: its docstring stands in the source only
    text = inspect.getdoc(thing)
    assert text
    assert not text.startswith(f"{thing.__name__}(")  # the signature that dataclass writes where nobody wrote anything
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            if not name.startswith("_") and inspect.isfunction(member):
                assert inspect.getdoc(member), name


@pytest.mark.parametrize("room", ADAPTERS)
def test_rooms_load_with_their_first_use(room):
    assert getattr(sf, room).__name__ == f"scorefn.{room}"
    assert room in dir(sf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="reinforce"):
        _ = sf.reinforce
    assert not hasattr(sf, "numpy")


def test_errors_form_one_tree_of_value_errors():
    import scorefn.core.errors as errors

    own = [thing for thing in vars(errors).values() if inspect.isclass(thing)]
    assert sf.ScorefnError in own
    assert len(own) >= 4
    for error in own:
        assert issubclass(error, sf.ScorefnError)
        assert issubclass(error, ValueError)
        assert getattr(sf, error.__name__) is error
