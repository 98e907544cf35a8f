"""The pages know the library: every public name stands in the API pages, with an example, its errors and its source."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import scorefn

ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md"))}
ROOMS = ["diagnostics", "posteriors", "scale", "search", "tracking", "trajectories"]  # each a name of scorefn
PARTS = ["citation", "core", "estimators", "fisher", "graph", "reducers", "shaping"]  # shown by scorefn itself
EVERYWHERE = ["", *PARTS, *ROOMS]

# The type aliases, which are no objects of their own that could hold a docstring: a comment in the source, shown by
# autodata, says what each is.
ALIASES = {"scorefn.core.Integrand", "scorefn.core.PyTree"}

# Public names that are no method of the literature, and so name no source. What is not listed names one, with a year.
NO_SOURCE = {
    "contracts of the library": """
        core.Baseline core.ControlVariate core.Coupling core.Credit core.Measure core.StatefulBaseline
        core.StructuredMeasure fisher.FisherSolver search.Bounds search.Restarts search.Strategy tracking.Ledger
        """,
    "what was drawn, and the plumbing around it": """
        core.Draws core.estimate core.evaluate core.in_transform core.is_stateful
        core.joint_log_prob core.nearest core.overridden fisher.Scores fisher.fisher_information
        reducers.register_quantile reducers.register_statistics fisher.register_fisher
        """,
    "errors, warnings and checks": """
        core.LostRankError core.NonFiniteError core.ScorefnError core.ShapeError core.SupportError core.check_count
        core.check_detached core.check_support core.refuse_two_fits tracking.EscapeWarning
        core.DependencyWarning core.EvaluationWarning core.ScorefnWarning
        """,
    "elementary: the definition itself, or textbook algebra": """
        core.Independent estimators.Enumerate fisher.DenseSolve fisher.FisherMatrix diagnostics.exact_expectation
        diagnostics.exact_gradient diagnostics.value_gradients diagnostics.sample_gradients search.check_translation
        search.check_scale search.check_monotone_transform search.check_neutral_selection search.check_score_mean
        trajectories.Raw trajectories.returns trajectories.rewards trajectories.mean_entropy
        trajectories.mean_kl_divergence trajectories.explained_variance trajectories.clip_fraction trajectories.rollout
        """,
    "distributions and policies, as torch has them": """
        trajectories.BernoulliPolicy trajectories.CategoricalPolicy trajectories.GaussianPolicy
        trajectories.MultiCategorical trajectories.MultiCategoricalPolicy trajectories.RecurrentPolicy
        trajectories.SegmentDistribution
        """,
    "what a function or method returns": """
        diagnostics.Candidate diagnostics.Comparison
        diagnostics.Estimation diagnostics.Finding diagnostics.GradientStatistics diagnostics.ProblemNoise
        diagnostics.Recommendation diagnostics.Shortlist diagnostics.SplitHalves diagnostics.UnbiasedReport
        posteriors.Bound posteriors.Evidence posteriors.FitReport posteriors.PSIS posteriors.SignalToNoise
        search.Arm search.History search.SearchResult search.StrategyResult tracking.AuditReport tracking.Escape
        trajectories.Bias trajectories.Objective trajectories.PolicyChange trajectories.Sequences trajectories.Streams
        trajectories.Trajectories trajectories.VTrace
        """,
    "engineering: work, processes, files, meters, and drivers of methods that name their own source": """
        show_versions core.World scale.Checkpoint scale.RayExecutor scale.SeedRecord scale.WorkRecord
        scale.Workers
        scale.all_reduce_gradients scale.gather_over_ranks scale.log_scalars scale.one_thread scale.read_state
        scale.shared_denominator scale.sum_over_ranks scale.write_atomically
        diagnostics.allocate diagnostics.assert_unbiased diagnostics.audit diagnostics.check_unbiased
        diagnostics.cost_split diagnostics.evaluations diagnostics.expectation_per_problem
        diagnostics.gradient_statistics diagnostics.seconds diagnostics.shortlist
        posteriors.bound posteriors.diagnose posteriors.evidence posteriors.site_gradients posteriors.signal_to_noise
        search.Evaluator search.ProductSearch search.chosen search.minimize search.run search.run_asynchronously
        trajectories.gradient_noise trajectories.objective trajectories.read_meters
        """,
}


def module_of(room: str):
    return importlib.import_module(f"scorefn.{room}".rstrip("."))


def public_names(room: str) -> dict[str, object]:
    """The public names of a room and what they are, without the rooms themselves."""
    module = module_of(room)
    names = [name for name in module.__all__ if name not in ROOMS and not name.startswith("_")]
    return {f"{module.__name__}.{name}": getattr(module, name) for name in names}


def everything_public() -> dict[str, object]:
    return {path: found for room in EVERYWHERE for path, found in public_names(room).items()}


def resolve(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def directives() -> dict[str, list[str]]:
    """What the pages document, and the members that each entry shows."""
    found = {}
    for text in PAGES.values():
        for path, options in re.findall(r"^\.\. auto\w+:: (\S+)\n((?:   :.*\n)*)", text, flags=re.MULTILINE):
            members = re.search(r"^   :members:(.*)$", options, flags=re.MULTILINE)
            found[path] = found.get(path, []) + ([] if members is None else members[1].replace(",", " ").split())
    return found


def room_of(found: object, path: str) -> str:
    """The room in which an object is defined, ``core`` for ``scorefn.Draws``; empty: in none."""
    home = getattr(found, "__module__", None) or path.rpartition(".")[0]
    home = home if home.startswith("scorefn.") else path.rpartition(".")[0]
    room = home.split(".")[1] if "." in home else ""
    return room if room in EVERYWHERE else ""


def each_once(room: str) -> dict[str, object]:
    """What is defined in a room and public anywhere, as ``room.name``."""
    return {
        f"{room}.{path.rpartition('.')[2]}".lstrip("."): found
        for path, found in everything_public().items()
        if path not in ALIASES and room_of(found, path) == room
    }


def source_tree(found: object) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(found)))
    except (OSError, TypeError):
        return None


def refuses(node: ast.AST, helpers: dict[str, ast.AST]) -> bool:
    """Whether a body raises something, or calls a function of its module that does or one that is named after it."""
    for part in ast.walk(node):
        if isinstance(part, ast.Raise) and part.exc is not None:
            raised = part.exc.func if isinstance(part.exc, ast.Call) else part.exc
            if getattr(raised, "id", "") not in ("NotImplementedError", "AssertionError", "AttributeError", "KeyError"):
                return True
        if isinstance(part, ast.Call):
            called = getattr(part.func, "id", getattr(part.func, "attr", "")).lstrip("_")
            if re.match(r"(check|checked|refuse)_", called):
                return True
            name = getattr(part.func, "id", "")
            if name.startswith("_") and name in helpers and refuses(helpers[name], {}):
                return True
    return False


def is_error(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, BaseException)


def without_raises(found: object) -> bool:
    """Whether an object refuses bad input and neither its docstring nor that of the method says so."""
    doc = inspect.getdoc(found) or ""
    if "Raises:" in doc or is_error(found) or (tree := source_tree(found)) is None:
        return False
    body = tree.body[0]
    module = source_tree(inspect.getmodule(found))
    helpers = {part.name: part for part in getattr(module, "body", []) if isinstance(part, ast.FunctionDef)}
    if isinstance(body, ast.FunctionDef):
        return refuses(body, helpers)
    methods = [part for part in body.body if isinstance(part, ast.FunctionDef)]
    asked = ("__init__", "__post_init__", "__call__", "__getitem__")
    public = [method for method in methods if not method.name.startswith("_") or method.name in asked]
    return any(refuses(method, helpers) and "Raises:" not in (ast.get_docstring(method) or "") for method in public)


def no_source() -> set[str]:
    return {name for names in NO_SOURCE.values() for name in names.split()}


@pytest.mark.parametrize("room", EVERYWHERE)
def test_every_public_name_is_documented(room):
    listed = directives()
    shown = {id(resolve(path)) for path in listed if path not in ALIASES}
    missing = [path for path, found in public_names(room).items() if path not in listed and id(found) not in shown]
    assert not missing, "\n" + "\n".join(missing)


def test_nothing_else_is_documented():
    assert not set(directives()) - set(everything_public())


@pytest.mark.parametrize("room", EVERYWHERE)
def test_every_public_name_has_an_example(room):
    missing = [name for name, found in each_once(room).items() if ">>> " not in (found.__doc__ or "")]
    assert not missing, "\n" + "\n".join(missing)


@pytest.mark.parametrize("room", EVERYWHERE)
def test_every_public_name_that_refuses_says_what_it_raises(room):
    missing = [name for name, found in each_once(room).items() if without_raises(found)]
    assert not missing, "\n" + "\n".join(missing)


@pytest.mark.parametrize("room", EVERYWHERE)
def test_every_method_of_the_literature_names_its_source(room):
    exempt, names = no_source(), each_once(room)
    sourced = {name for name, found in names.items() if re.search(r"\b(1[789]|20)\d\d\b", found.__doc__ or "")}
    missing = [name for name in names if name not in exempt | sourced]
    assert not missing, "\n" + "\n".join(missing)
    assert not exempt & sourced, "exempt, and yet with a source"
    assert not [name for name in exempt if name.partition(".")[0] == room and name not in names], (
        "exempt, and not there"
    )


@pytest.mark.parametrize("room", EVERYWHERE)
def test_every_shown_member_has_a_docstring(room):
    missing = []
    for path, members in directives().items():
        found = resolve(path)
        if not isinstance(found, type) or room_of(found, path) != room:
            continue
        fields = getattr(found, "__dataclass_fields__", {})
        for member in members or [name for name in vars(found) if not name.startswith("_") and name not in fields]:
            if member not in fields and not inspect.getdoc(getattr(found, member, None)):
                missing.append(f"{path}.{member}")
    assert not missing, "\n" + "\n".join(missing)


def test_the_checks_can_fail():
    def silent(n):
        if n < 1:
            raise ValueError(n)

    def calls(n):
        check_count("n", n)  # noqa: F821

    def explains(n):
        """Count.

        Raises:
            ValueError: n is below 1.
        """
        if n < 1:
            raise ValueError(n)

    def harmless(n):
        return n

    assert [without_raises(f) for f in (silent, calls, explains, harmless)] == [True, True, False, False]


def test_the_version_is_that_of_the_citation():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {scorefn.__version__}\n" in citation
