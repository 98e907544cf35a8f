"""Pages need no network: formulas become MathML while the pages are built, and the check of built pages can fail."""

import importlib.util
import io
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("sphinx")

from sphinx.application import Sphinx

from tests import offline

DOCS = Path(__file__).parents[1] / "docs"
PAGE = r"""
# A page

Inline $\nabla \log p_\theta$ and displayed, with a label:

$$
\nabla\, \mathbb{E}[f] = \mathbb{E}\bigl[ f\, \nabla \log p \bigr]
$$ (score)

See {eq}`score`, {math}`x^2`, and two lines:

$$
a &= b \\
  &= c
$$
"""


@pytest.fixture(scope="module")
def mathml():
    specification = importlib.util.spec_from_file_location("mathml_of_the_pages", DOCS / "mathml.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def build(source, folder, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    folder.joinpath("index.md").write_text(source, encoding="utf-8")
    settings = {"extensions": ["mathml", "myst_parser"], "myst_enable_extensions": ["dollarmath"]}
    said = io.StringIO()
    paths = [folder, None, folder / "html", folder / "trees"]
    app = Sphinx(*paths, "html", confoverrides=settings, status=None, warning=said, warningiserror=True)
    app.build()
    return app.statuscode, said.getvalue(), folder / "html"


def test_a_built_page_shows_its_formulas_without_a_network(tmp_path, monkeypatch):
    status, said, built = build(PAGE, tmp_path, monkeypatch)
    html = (built / "index.html").read_text(encoding="utf-8")
    assert (status, said) == (0, "")
    assert html.count("<math ") == 4
    assert html.count('display="block"') == 2
    assert html.count("<mtr>") == 2  # the lines of the last formula
    assert '<span class="eqno">(1)' in html
    assert 'href="#equation-score"' in html
    assert "mathjax.js" not in html
    assert list(offline.faults(built)) == []


def test_a_formula_that_cannot_be_shown_fails_the_build(tmp_path, monkeypatch):
    status, said, _ = build(r"# A page" "\n\n" r"Here: $\frobnicate x$.", tmp_path, monkeypatch)
    assert status != 0
    assert r"the formula \frobnicate x cannot be shown: latex2mathml does not know \frobnicate" in said
    assert "index.md:3" in said


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (r"\frac{1}{2", "its braces do not match"),
        (r"a}{b", "its braces do not match"),
        (r"a & b", "an & stands outside of an alignment"),
        (r"x_1_2", "DoubleSubscriptsError"),
        (r"\begin{nonsense} a \end{nonsense}", "latex2mathml does not know the environment nonsense"),
    ],
)
def test_what_cannot_be_shown_is_refused(mathml, formula, reason):
    with pytest.raises(mathml.FormulaError, match=reason):
        mathml.mathml(formula)


def shown(element):
    """Tags and texts, the way a formula reads."""
    return "".join(part.strip() if part.strip() else part for part in element.itertext())


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (r"\operatorname{stop}(u)", "stop(u)"),
        (r"\bigl\{ a \bigr\}", "{a}"),
        (r"\bigl\lVert x \bigr\rVert", "‖x‖"),
        (r"x \sim p", "x∼p"),
        (r"\mathbb E_x \boldsymbol{\theta} \mathbf{1}", "𝔼x𝜽𝟏"),
        (r"\arg\max_x f", "argmaxxf"),
        (r"\begin{cases} 1 & x > 0 \\ 0 & \text{otherwise} \end{cases}", "{1x>00otherwise"),
        (r"\begin{aligned} a &= b \\ &= c \end{aligned}", "a=b=c"),
    ],
)
@pytest.mark.parametrize("display", [False, True])
def test_a_formula_reads_as_it_was_written(mathml, formula, text, display):
    assert shown(ElementTree.fromstring(mathml.mathml(formula, display))) == text


def test_a_named_operator_stands_apart_from_its_operand(mathml):
    assert '<mi>log</mi><mspace width="0.167em" /><mi>p</mi>' in mathml.mathml(r"\log p")
    assert '<mi>log</mi><mo stretchy="false">(</mo>' in mathml.mathml(r"\log(p)")
    assert '<mn>3</mn><mspace width="0.167em" /><mi>log</mi>' in mathml.mathml(r"3 \log(p)")


def test_relations_are_operators_numbers_are_numbers_and_columns_are_aligned_by_style(mathml):
    assert "<mo>∼</mo>" in mathml.mathml(r"x \sim p")
    assert mathml.mathml("x = .5").endswith("<mo>=</mo><mn>.5</mn></mrow></math>")
    assert '<mtd style="text-align: left"><mn>1</mn>' in mathml.mathml(r"\begin{cases} 1 \\ 2 \end{cases}")


LOADS = [
    '<script src="https://cdn.example/mathjax.js"></script>',
    '<link rel="stylesheet" href="//fonts.example/css">',
    '<img src="http://example.org/a.png">',
    '<source srcset="https://example.org/a.png 2x">',
    "<style>@import url('https://fonts.example/css');</style>",
    '<p style="background: url(https://example.org/a.png)">text</p>',
    '<script>import("https://cdn.example/module.js")</script>',
    r'<span class="math notranslate">\(x\)</span>',
]


@pytest.mark.parametrize("markup", LOADS)
def test_what_a_page_loads_from_elsewhere_is_found(tmp_path, markup, capsys):
    (tmp_path / "page.html").write_text(f"<html><body>{markup}</body></html>", encoding="utf-8")
    assert offline.main(tmp_path) == 1
    assert capsys.readouterr().err.startswith("page.html: ")


def test_a_style_sheet_that_loads_from_elsewhere_is_found(tmp_path):
    (tmp_path / "page.html").write_text('<a href="https://example.org">a link is no load</a>', encoding="utf-8")
    assert offline.main(tmp_path) == 0
    (tmp_path / "style.css").write_text('@import "https://fonts.example/css";', encoding="utf-8")
    assert list(offline.faults(tmp_path)) == ["style.css: https://fonts.example/css"]


def test_no_page_is_a_fault(tmp_path):
    assert list(offline.faults(tmp_path)) == [f"{tmp_path}: no page"]
