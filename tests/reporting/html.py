"""A page as the tests look at it: its elements, its tables and its text."""

import base64
from html.parser import HTMLParser

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """elements: (tag, attributes). tables: caption to rows of texts. text: all that is shown, styles left out.
    drawn: the sources of the images."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.words, self.style = [], {}, [], ""
        self._open, self._rows, self._cell = [], None, None
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"
        sources = [src.partition(",")[2] for src in self.attributes("src")]
        self.drawn = "".join(base64.b64decode(source).decode() for source in sources)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "img":
            self.words.append(dict(attrs)["alt"])
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = self.tables[dict(attrs)["aria-label"]] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data):
        if self._open[-1:] == ["style"]:
            self.style += data
            return
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]
