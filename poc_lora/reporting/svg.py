"""matplotlib figures as bytes that depend on nothing but the figure: SVG for a page, SVG and PNG for a file."""

import contextlib
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from poc_lora.reporting.palette import LIGHT

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name with $ in it is a name
    "svg.fonttype": "none",  # text stays text
    "svg.image_inline": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.edgecolor": LIGHT["rule"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.minor.visible": False,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "legend.borderaxespad": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
}
NOTHING = {"Date": None, "Creator": None, "Format": None, "Type": None}  # metadata that would tell when, or by what
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
ROLES = {colour: role for role, colour in LIGHT.items()}


@contextlib.contextmanager
def drawing(salt: str = "poc_lora") -> Iterator[None]:
    """Within the block matplotlib draws in our style, whatever the user's own settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE | {"svg.hashsalt": salt})
        yield


def inline_svg(figure: Figure, *, name: str, title: str, description: str) -> Markup:
    """The figure as an element for HTML: coloured by the page's roles, in its font, with a title and a description.

    It has no style attributes, so that a strict content security policy leaves it as it is; its ids start with `name`.
    """
    root = _tree(_saved(figure, name), name)
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    root.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "stroke-linejoin": "round",
    }
    for tag, text in (("desc", description), ("title", title)):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)
    for element in root.iter():
        _restyle(element)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704  (serialised, so escaped, by ElementTree)


def svg_file(figure: Figure, *, title: str, description: str) -> bytes:
    """The figure as a file of its own, in the light colours on white."""
    text = _saved(figure, "figure", facecolor=LIGHT["page"])
    head, found, rest = text.partition('version="1.1">')
    told = f"<title>{Markup.escape(title)}</title><desc>{Markup.escape(description)}</desc>"
    return "".join((head.replace("<svg ", '<svg role="img" '), found, told, rest)).encode()


def png_file(figure: Figure) -> bytes:
    """The figure as PNG, in the light colours on white."""
    out = io.BytesIO()
    with drawing():
        figure.savefig(out, format="png", dpi=200, facecolor=LIGHT["page"], metadata={"Software": None})
    return out.getvalue()


def _saved(figure: Figure, salt: str, facecolor: str = "none") -> str:
    out = io.StringIO()
    with drawing(salt):
        figure.savefig(out, format="svg", metadata=NOTHING, facecolor=facecolor)
    return out.getvalue()


def _tree(text: str, prefix: str) -> ET.Element:
    """The SVG without namespaces, metadata, style sheet and ids that nothing refers to."""
    root = ET.fromstring(text)  # noqa: S314  (written by matplotlib)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', text))
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{prefix}-{own}")
        if LINK in element.attrib:
            element.set("href", element.attrib.pop(LINK).replace("#", f"#{prefix}-"))
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{prefix}-"))
        element.tail = None
        if element.tag not in ("text", "tspan"):
            element.text = None
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
    return root


def _restyle(element: ET.Element) -> None:
    """Attributes for the style, and classes for the colours that have a role."""
    classes = []
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key in ("fill", "stroke") and value in ROLES:
            classes.append(f"{key}-{ROLES[value]}")
        elif key and key != "font-family":  # the page's
            element.set(key, value)
    if classes:
        element.set("class", " ".join(classes))
