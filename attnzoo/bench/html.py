"""Pages: one template for all, one file that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


@dataclass(frozen=True)
class Section:
    """A part of a page: HTML (a `Table.html`, `plots`, `pictures` or several) under a heading and a note in plain text.

    What is `folded` is shown by a click alone.
    """

    body: str
    title: str = ""
    note: str = ""
    folded: bool = False


def page(
    title: str,
    sections: Iterable[Section | None],
    *,
    filters: Mapping[str, Sequence[str]] | None = None,
    verdict: str = "",
    facts: Mapping[str, str] | None = None,
    warning: str = "",
    config: str | None = None,
) -> str:
    """Give a page; sections that are None or empty are left out.

    `verdict` is what was found, in a sentence, `facts` what was run where, by name, `warning` what a reader must know
    before trusting the figures. Of all elements that have the attribute ``data-NAME`` of a filter, those without
    its choice among their words are hidden, without a script; choices are words without quotes, and that of all parts
    comes by itself; `config`, as text, is shown folded at the end.
    """
    shown = [one for one in sections if one is not None and (one.body or one.note)]
    if config is not None:
        shown.append(Section(f"<pre>{escape(config)}</pre>", "Config", folded=True))
    about = {"title": title, "verdict": verdict, "facts": facts or {}, "warning": warning}
    return _template("page").render(about, sections=shown, filters=filters or {}) + "\n"


def fragment(name: str, **values: object) -> str:
    """Give the body of a section out of a template of its own beside the page's."""
    return _template(name).render(values)


def plots(drawn: Iterable[tuple[str, str]]) -> str:
    """Figures side by side, each a caption and an SVG; those without a picture are left out."""
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in drawn if svg
    )
    return f'<div class="plots">{figures}</div>' if figures else ""


def pictures(shown: Iterable[tuple[str, bytes, str]], width: int) -> str:
    """Images with captions in a grid, whose columns are at least `width` pixels wide.

    Of each are given its name, its content as PNG or JPEG (empty where it could not be read), and its caption.
    """
    figures = ""
    for name, content, caption in shown:
        kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
        address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        image = f'<img src="{address}" alt="{escape(name)}" title="{escape(name)}">' if content else ""
        lines = "<br>".join(escape(line) for line in caption.splitlines())
        figures += f"<figure>{image}<figcaption>{lines}</figcaption></figure>\n"
    return f'<div class="pictures" style="--picture: {width}px">{figures}</div>' if figures else ""


@cache
def _template(name: str) -> Template:
    loader = PackageLoader("attnzoo.bench", ".")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(f"{name}.html.jinja")
