"""Long texts for language models: plain prose out of a book, CPython's own help or a file, cut into windows."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from attnzoo import assets
from attnzoo.errors import ConfigError

_BLOCKS = "address article blockquote body dd div dl dt h1 h2 h3 h4 h5 h6 html li ol p section td th tr ul"
_VOID = "area base br col embed hr img input link meta source track wbr"
_LEFT_OUT = "aside footer head nav pre script style table"
BLOCKS, VOID, LEFT_OUT = (frozenset(names.split()) for names in (_BLOCKS, _VOID, _LEFT_OUT))
MENUS = frozenset({"banner", "docnav", "footer", "legalnotice", "toc"})  # classes and ids, as DocBook's HTML names them
BOOKS = {"debian_handbook": "index.html", "debian_reference": "index.en.html"}  # their first pages
TOPICS = "pydoc_topics"


@dataclass(frozen=True)
class Text:
    """A text and what identifies it: `sha256` is of `text` itself, in UTF-8, after all cleaning."""

    name: str
    text: str
    sha256: str


@dataclass(frozen=True)
class Window:
    """`ids` are tokens of a text from token `start` on, after what the tokenizer puts before any text."""

    start: int
    ids: tuple[int, ...]


def load_text(name: str) -> Text:
    """Read a text: a book, the help topics of the running CPython, or the UTF-8 file at a path.

    ``debian_handbook`` is The Debian Administrator's Handbook (English prose), ``debian_reference`` Debian Reference
    (prose among shell commands), ``pydoc_topics`` dense and technical, and another text in another version.

    Raises `ConfigError` if there is neither such a text nor such a file, or the file is not UTF-8; `AssetError` if the
    book cannot be fetched.
    """
    if name in TEXTS:
        text = TEXTS[name]()
    else:
        check_text_name(name)
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the text file {name!r} cannot be read as UTF-8: {error}") from error
    return Text(Path(name).name, text, hashlib.sha256(text.encode()).hexdigest())


def check_text_name(name: str) -> None:
    """Raise `ConfigError` unless `load_text` would know where to look."""
    if name not in TEXTS and not Path(name).expanduser().is_file():
        raise ConfigError(f"there is no text and no file {name!r}; texts: {', '.join(TEXTS)}; or give a file's path")


def windows(text: Text, tokenizer: Any, *, count: int, tokens: int, seed: int) -> list[Window]:
    """Cut `count` windows of exactly `tokens` tokens out of a text; none overlaps another.

    The text is cut into as many equal windows as it holds, beginning at an offset drawn with the seed, and the seed
    then draws among them: the first k windows of a larger `count` are the k windows of a smaller one.

    Raises `ConfigError` if the text does not hold that many windows.
    """
    before = tuple(tokenizer("").input_ids)  # a beginning-of-text token, where the tokenizer adds one
    size = tokens - len(before)
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False).input_ids
    slots = len(ids) // size if size > 0 else 0
    if count > slots:
        raise ConfigError(
            f"{text.name} has {len(ids):,} tokens, which is {slots} windows of {tokens:,}, fewer than the {count} "
            "asked for; ask for fewer or shorter windows, or give a longer text"
        )
    draw = random.Random(f"windows {seed}")
    offset = draw.randrange(len(ids) - slots * size + 1)
    order = draw.sample(range(slots), slots)[:count]
    starts = [offset + slot * size for slot in order]
    return [Window(start, (*before, *ids[start : start + size])) for start in starts]


def html_paragraphs(html: str) -> list[str]:
    """Give the paragraphs of a page, one string each; menus, tables, code blocks and scripts are left out."""
    parser = _Paragraphs()
    parser.feed(html)
    parser.close()
    return parser.finish()


def book_pages(folder: Path, start: str = "index.html") -> list[Path]:
    """Give the pages of a book in the order of reading, as its own ``<link rel="next">`` tell it, without `start`.

    Raises `ConfigError` if a page that is linked to is not there.
    """
    pages: list[Path] = []
    seen = {start}
    here = start
    while (here := _next_page(folder / here)) and here not in seen:
        seen.add(here)
        pages.append(folder / here)
    return pages


def _next_page(page: Path) -> str:
    try:
        html = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"a page of the book cannot be read: {error}") from error
    for link in re.findall(r"<link\b[^>]*>", html):
        attributes = dict(re.findall(r'([\w:-]+)="([^"]*)"', link))
        if attributes.get("rel") == "next":
            return str(attributes.get("href", "")).partition("#")[0]
    return ""


def _book(name: str, start: str) -> str:
    folder = assets.get(name)
    pages = book_pages(folder, start)
    if not pages:
        raise ConfigError(f"{folder} does not hold the book's pages; remove that folder and run again")
    return "\n\n".join(part for page in pages for part in html_paragraphs(page.read_text(encoding="utf-8"))) + "\n"


def _pydoc_topics() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[key].strip() for key in sorted(topics.topics)) + "\n"


TEXTS: dict[str, Callable[[], str]] = {name: partial(_book, name, start) for name, start in BOOKS.items()}
TEXTS[TOPICS] = _pydoc_topics


class _Paragraphs(HTMLParser):
    """Gathers the text between the starts and ends of block elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._found: list[str] = []
        self._line: list[str] = []
        self._open: list[str] = []
        self._left_out_at: int | None = None  # how many elements were open where the part that is left out began

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag in BLOCKS or tag == "br":
            self._break() if tag in BLOCKS else self._line.append(" ")
        if tag in VOID:
            return
        words = {word for key, value in attrs if key in ("class", "id") for word in (value or "").split()}
        if self._left_out_at is None and (tag in LEFT_OUT or words & MENUS or (tag == "p" and "title" in words)):
            self._break()
            self._left_out_at = len(self._open)
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or tag not in self._open:
            return
        while self._open.pop() != tag:  # elements that nobody closed end here too
            pass
        if self._left_out_at is not None and len(self._open) <= self._left_out_at:
            self._left_out_at = None
        if tag in BLOCKS:
            self._break()

    def handle_data(self, data: str) -> None:
        if self._left_out_at is None:
            self._line.append(data)

    def finish(self) -> list[str]:
        self._break()
        return self._found

    def _break(self) -> None:
        line = " ".join("".join(self._line).split())
        self._line.clear()
        if line:
            self._found.append(line)
