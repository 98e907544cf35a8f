"""A Sphinx extension: formulas become MathML while the pages are built, so that no reader needs a script or a network.

`latex2mathml` converts; what it leaves to the reader's browser is mended here: commands that it does not know are
refused, named operators get the spaces that TeX sets, relations become operators, alphabets become their own
characters (browsers ignore `mathvariant`), columns are aligned by style (browsers ignore `columnalign`).
"""

import re
import unicodedata
from html import escape
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.locale import _
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
SUBSTITUTIONS = [
    (r"\\(begin|end)\{(?:align(?:ed)?|gather(?:ed)?|eqnarray)\*?\}", r"\\\1{split}"),
    (r"\\mathrm\{([A-Za-z])\}", r"\\text{\1}"),
    (r"\\arg(?![A-Za-z])", r"\\operatorname{arg}"),
]
ENVIRONMENTS = {"array", "bmatrix", "cases", "matrix", "pmatrix", "smallmatrix", "split", "vmatrix"}
DELIMITERS = {r"\{": "{", r"\}": "}", r"\|": "‖", r"\lVert": "‖", r"\rVert": "‖", r"\lvert": "|", r"\rvert": "|"}
LETTERS = "∞∂∅"  # of the category of operators, and yet the names of things
LIMITS = {"max", "min", "sup", "inf", "lim", "argmax", "argmin"}
SCRIPTED = {"msub", "msup", "msubsup", "munder", "mover", "munderover"}
THIN = "0.167em"


class FormulaError(ValueError):
    """A formula that cannot be shown."""


def mathml(formula: str, display: bool = False) -> str:
    """The formula as a `<math>` element."""
    depth = 0
    for brace in re.findall(r"(?<!\\)(?:\\\\)*([{}])", formula):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth:
        raise FormulaError("its braces do not match")
    source = formula.strip()
    if display and r"\\" in source and r"\begin" not in source:
        source = rf"\begin{{split}}{source}\end{{split}}"
    for pattern, replacement in SUBSTITUTIONS:
        source = re.sub(pattern, replacement, source)
    if unknown := set(re.findall(r"\\begin\{([^}]*)\}", source)) - ENVIRONMENTS:
        raise FormulaError(f"latex2mathml does not know the environment {min(unknown)}")
    try:
        root = ElementTree.fromstring(convert(source, display="block" if display else "inline"))
    except ElementTree.ParseError as error:
        raise FormulaError("an & stands outside of an alignment") from error
    except Exception as error:  # latex2mathml has a dozen kinds without a common base
        raise FormulaError(f"latex2mathml says {type(error).__name__}") from error
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{NAMESPACE}}}")
    for element in list(root.iter()):
        _mend(element, display)
    for element in list(root.iter()):
        _space_names(element)
    root.set("xmlns", NAMESPACE)
    return ElementTree.tostring(root, encoding="unicode")


def _mend(element: ElementTree.Element, display: bool) -> None:
    text = element.text or ""
    if element.tag == "mo" and text in DELIMITERS:
        element.text = DELIMITERS[text]
    elif "\\" in text:
        raise FormulaError(f"latex2mathml does not know {text.strip()}")
    elif element.tag == "mi" and text.lstrip(".").isdigit():  # .5, read as a name
        element.tag = "mn"
    elif element.tag == "mi" and text == "~":
        element.tag, element.text = "mo", "∼"
    elif element.tag == "mi" and len(text) == 1 and unicodedata.category(text) == "Sm" and text not in LETTERS:
        element.tag = "mo"
    elif element.tag == "mo" and (text.isalpha() or (text and text in LETTERS)):
        element.tag, element.attrib = "mi", {}
    if element.tag == "msub" and display and (element[0].text or "") in LIMITS:
        element.tag = "munder"
    if element.get("width") == "negativethinmathspace":
        element.set("width", f"-{THIN}")
    variant = element.get("mathvariant", "normal")
    if variant != "normal":
        del element.attrib["mathvariant"]
        element.text = "".join(_in_alphabet(letter, variant) for letter in text)
    if element.tag == "mtable":
        tight = element.attrib.pop("columnspacing", "").startswith("0em")
        for cell in element.iter("mtd"):
            side = f"text-align: {cell.attrib.pop('columnalign', 'center')}"
            cell.set("style", side + ("; padding-left: 0; padding-right: 0" if tight else ""))


def _in_alphabet(letter: str, variant: str) -> str:
    """The letter's own character in an alphabet, such as MATHEMATICAL BOLD ITALIC SMALL THETA."""
    name = unicodedata.name(letter).replace("LATIN ", "").replace("GREEK ", "").replace("LETTER ", "")
    alphabet = variant.upper().replace("BOLD-ITALIC", "BOLD ITALIC")
    for candidate in (f"MATHEMATICAL {alphabet} {name}", f"{alphabet} {name}", f"MATHEMATICAL BOLD {name}"):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            continue
    return letter


def _space_names(row: ElementTree.Element) -> None:
    """A thin space about a named operator, as TeX sets it: `log p`, but `log(p)`."""
    if row.tag not in {"math", "mrow", "mtd", "mstyle", "msqrt"}:
        return
    children = list(row)
    spaced: list[ElementTree.Element] = []
    for position, child in enumerate(children):
        if _is_name(child) and spaced and _is_operand(spaced[-1]):
            spaced.append(ElementTree.Element("mspace", {"width": THIN}))
        spaced.append(child)
        following = children[position + 1] if position + 1 < len(children) else None
        if _is_name(child) and following is not None and following.tag not in {"mo", "mspace"}:
            spaced.append(ElementTree.Element("mspace", {"width": THIN}))
    for child in children:
        row.remove(child)
    row.extend(spaced)


def _is_name(element: ElementTree.Element) -> bool:
    base = element[0] if element.tag in SCRIPTED and len(element) else element
    return base.tag == "mi" and len(base.text or "") > 1


def _is_operand(element: ElementTree.Element) -> bool:
    return element.tag not in {"mo", "mspace"} or element.text in {")", "]", "}", "∇"}


def _converted(node: nodes.math | nodes.math_block, display: bool) -> str:
    try:
        return mathml(node.astext(), display)
    except FormulaError as error:
        logger.warning("the formula %s cannot be shown: %s", node.astext(), error, location=node, type="mathml")
        return f"<code>{escape(node.astext())}</code>"


def visit_math(self, node: nodes.math) -> None:
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate nohighlight"))
    self.body.append(_converted(node, display=False) + "</span>")
    raise nodes.SkipNode


def visit_displaymath(self, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, _("Link to this equation"))
        self.body.append("</span>")
    self.body.append(_converted(node, display=True) + "</div>\n")
    raise nodes.SkipNode


def setup(app) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
