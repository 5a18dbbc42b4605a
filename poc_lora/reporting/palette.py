"""The colours of the page and its figures, by role, for light and for dark."""

LIGHT = {
    "page": "#ffffff",
    "panel": "#f3f5f8",
    "rule": "#d3d9e0",  # lines that only help the eye
    "ink": "#1b2027",
    "muted": "#55606d",
    "merge": "#0a58a8",
    "adapter": "#7d8896",
    "base": "#6b4f3a",
    "best": "#a64b00",
    "ensemble": "#17753a",
    "violet": "#7a45d0",
    "pink": "#b82f83",
    "teal": "#0b727c",
}
DARK = {
    "page": "#12161b",
    "panel": "#1b2128",
    "rule": "#3a444f",
    "ink": "#e7eaef",
    "muted": "#a7b1bd",
    "merge": "#6fb4ff",
    "adapter": "#8590a0",
    "base": "#d3ab8b",
    "best": "#f3a35f",
    "ensemble": "#62d08c",
    "violet": "#c09cff",
    "pink": "#ff8fca",
    "teal": "#52cbd6",
}
TEXT = ("ink", "muted", "merge")  # roles that words are set in
SERIES = ("merge", "best", "ensemble", "violet", "pink", "teal")  # for lines that are told apart by a legend
LINES = (*SERIES, "adapter", "base")  # roles that data are drawn in


def stylesheet() -> str:
    """CSS: a variable for each role, dark where the screen is, and classes that fill or stroke with it."""
    light, dark = ("".join(f"--{role}:{colour};" for role, colour in theme.items()) for theme in (LIGHT, DARK))
    classes = "".join(f".fill-{role}{{fill:var(--{role})}}.stroke-{role}{{stroke:var(--{role})}}\n" for role in LIGHT)
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n{classes}"
