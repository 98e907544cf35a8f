"""The contract behind `lint-imports` can fail: a check that never does guards nothing."""

import grimp
import pytest

from tests.rooms import RoomsContract

ROWS = ["core: torch", "reducers: torch core", "posteriors: core pyro", "absent: core"]
ALLOWED = [
    ("scorefn", "scorefn.core"),
    ("scorefn.core.draws", "torch"),
    ("scorefn.core.draws", "math"),
    ("scorefn.core.draws", "scorefn.core"),
    ("scorefn.reducers.credit", "scorefn.core.draws"),
    ("scorefn.posteriors", "pyro"),
]


def check(imports):
    graph = grimp.ImportGraph()
    graph.add_module("scorefn")
    for module in ["torch", "math", "numpy", "pyro"]:
        graph.add_module(module, is_squashed=True)
    for room in ["core", "core.draws", "reducers", "reducers.credit", "posteriors"]:
        graph.add_module(f"scorefn.{room}")
    for line, (importer, imported) in enumerate(imports, start=1):
        if importer not in graph.modules:
            graph.add_module(importer)
        graph.add_import(importer=importer, imported=imported, line_number=line, line_contents="")
    options = {"package": "scorefn", "facade": "core reducers", "rooms": ROWS}
    contract = RoomsContract(name="rooms", session_options={"root_packages": ["scorefn"]}, contract_options=options)
    return contract.check(graph, verbose=False)


def test_what_the_table_allows_is_kept():
    assert check(ALLOWED).kept


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("scorefn.core.draws", "numpy"),
        ("scorefn.core.draws", "scorefn.reducers.credit"),
        ("scorefn.core.draws", "scorefn"),
        ("scorefn.reducers.credit", "pyro"),
        ("scorefn.posteriors", "torch"),
        ("scorefn.posteriors", "scorefn.reducers"),
        ("scorefn", "scorefn.posteriors"),
    ],
)
def test_any_other_import_breaks_it(importer, imported):
    result = check([*ALLOWED, (importer, imported)])
    (problem,) = result.metadata["problems"]
    assert not result.kept
    assert problem.startswith(f"{importer} imports {imported} (line {len(ALLOWED) + 1})")


def test_a_room_without_a_row_breaks_it():
    assert check([*ALLOWED, ("scorefn.drawer", "scorefn.core")]).metadata["problems"] == ["scorefn.drawer has no row"]
