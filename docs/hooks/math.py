"""Formulas become MathML while the site is built: browsers draw it themselves, without scripts or a network.

Understands ``$...$`` and ``$$...$$`` of the pages and ``:math:`` and ``.. math::`` of the docstrings.
"""

import html
import re
import textwrap
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

INLINE_ROLE = re.compile(r":math:`([^`]+)`")
DIRECTIVE = re.compile(r"^([ ]*)\.\. math::[ ]*(.*(?:\n(?:\1[ ]+\S.*|[ ]*(?=\n\1[ ]+\S)))*)", re.MULTILINE)
DRAWN = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


class DocstringMath(Preprocessor):
    """Rewrites the two spellings of docstrings to the dollars of the pages."""

    def run(self, lines: list[str]) -> list[str]:
        text = DIRECTIVE.sub(self._display, "\n".join(lines))
        return INLINE_ROLE.sub(r"$\1$", text).split("\n")

    @staticmethod
    def _display(match: re.Match[str]) -> str:
        indent, formula = match[1], textwrap.dedent(match[2]).strip()
        return f"\n{indent}$$\n{textwrap.indent(formula, indent)}\n{indent}$$\n"


class DocstringMathExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.preprocessors.register(DocstringMath(md), "docstring-math", 100)


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(DocstringMathExtension())
    return config


def on_page_content(content: str, **_: Any) -> str:
    def draw(match: re.Match[str]) -> str:
        if match[1] != "div":
            return convert(html.unescape(match[2]).strip(), display="inline")
        formula = convert(html.unescape(match[2]).strip(), display="block")
        return f'<div style="overflow-x: auto; overflow-y: hidden">{formula}</div>'  # on a phone it scrolls by itself

    return DRAWN.sub(draw, content)
