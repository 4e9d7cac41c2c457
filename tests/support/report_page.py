"""A page of results read back: its cells, its addresses, and every number against the file that it names."""

import functools
import json
import math
import re
import statistics
from html.parser import HTMLParser
from urllib.parse import unquote


class Cells(HTMLParser):
    """Text and attributes of every table cell and provenance entry, and every address on the page."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.addresses, self._open = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [
            values[name] for name in ("src", "href", "xlink:href", "action", "data") if name in values
        ]
        if tag in ("td", "dd"):
            self._open = (tag, values, [])

    def handle_data(self, data):
        if self._open:
            self._open[2].append(data)

    def handle_endtag(self, tag):
        if self._open and tag == self._open[0]:
            self.cells.append((tag, self._open[1], "".join(self._open[2])))
            self._open = None


@functools.lru_cache(maxsize=32)
def content_of(file, _changed):
    text = file.read_text()
    if file.suffix == ".jsonl":
        return {(line := json.loads(one))["name"]: line for one in text.splitlines()}
    return json.loads(text)


def value_at(source, root):
    """The value that ``file#pointer`` names, read anew and without the report's own code."""
    file, pointer = source.split("#")
    value = content_of(root / unquote(file), (root / unquote(file)).stat().st_mtime_ns)
    for step in pointer.split("/")[1:]:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def expected_text(attributes, root):
    values = [value_at(source, root) for source in attributes["data-source"].split()]
    rule, spec = attributes["data-rule"], attributes["data-spec"]
    texts = [f"{value:{spec}}" for value in values]
    if rule == "set":
        text = ", ".join(sorted(set(texts), key=texts.index))
    elif rule == "sum":
        text = f"{math.fsum(values):{spec}}" if isinstance(values[0], float) else f"{sum(values):{spec}}"
    elif rule == "mean":
        text = f"{math.fsum(values) / len(values):{spec}} ± {statistics.stdev(values):{spec}}"
    else:
        (text,) = texts
    return attributes.get("data-prefix", "") + text


def check_page(page, root):
    """All cells against their files; returns how many numbers there were."""
    parsed, numbers = Cells(page), 0
    for tag, attributes, text in parsed.cells:
        if "data-source" in attributes:
            numbers += 1
            assert text == expected_text(attributes, root), attributes["data-source"]
        elif tag == "td":
            assert not re.search(r"\d", text), f"the cell {text!r} names no source"
    for address in parsed.addresses:
        assert address.startswith(("#", "data:")), address
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest", page)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    return numbers
