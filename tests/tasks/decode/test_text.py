import hashlib
import itertools

import pytest

from attnzoo.errors import ConfigError
from attnzoo.tasks.decode.text import Text, book_pages, html_paragraphs, load_text, windows

PAGE = """<?xml version="1.0"?><html><head><title>no</title><link rel="next" href="{next}" /></head><body>
<ul class="docnav top"><li>Next</li></ul><div class="toc"><p>Contents</p></div><h1>A &amp; B</h1>
<div class="para">One <em>two</em>
   three<a id="x"></a>.</div><p class="title">box</p><pre>code</pre>tail<p>Open<p>Four<br/>five</p>
<script>x < y</script></body></html>"""


def test_paragraphs_are_the_prose_of_a_page_and_nothing_else():
    assert html_paragraphs(PAGE) == ["A & B", "One two three.", "tail", "Open", "Four five"]


def test_pages_come_in_the_order_of_their_links(tmp_path):
    for name, following in (("index", "b.html"), ("b", "a.html#here"), ("a", "b.html")):
        (tmp_path / f"{name}.html").write_text(PAGE.replace("{next}", following))
    assert [page.name for page in book_pages(tmp_path)] == ["b.html", "a.html"]
    (tmp_path / "a.html").unlink()
    with pytest.raises(ConfigError, match="page of the book"):
        book_pages(tmp_path)


def test_a_book_is_read_from_its_first_page_on(tmp_path, monkeypatch):
    for name, following in (("index.en", "one.html"), ("one", "two.html"), ("two", "two.html")):
        (tmp_path / f"{name}.html").write_text(PAGE.replace("{next}", following).replace("tail", name))
    monkeypatch.setattr("attnzoo.assets.get", {"debian_reference": tmp_path}.__getitem__)
    found = load_text("debian_reference").text.split("\n\n")
    assert [found.index(word) for word in ("one", "two")] == [2, 7]
    assert "index.en" not in found
    (tmp_path / "one.html").unlink()
    with pytest.raises(ConfigError, match="page of the book"):
        load_text("debian_reference")


def test_windows_are_whole_distinct_and_drawn_by_the_seed(text, tokenizer):
    many = windows(text, tokenizer, count=20, tokens=100, seed=3)
    ids = tokenizer(text.text).input_ids
    assert all(list(w.ids) == ids[w.start : w.start + 100] and len(w.ids) == 100 for w in many)
    starts = sorted(w.start for w in many)
    assert all(b - a >= 100 for a, b in itertools.pairwise(starts))
    assert windows(text, tokenizer, count=5, tokens=100, seed=3) == many[:5]
    assert windows(text, tokenizer, count=20, tokens=100, seed=4) != many


def test_a_beginning_token_is_part_of_the_window(text, tokenizer):
    def with_start(string, add_special_tokens=True, **options):
        made = tokenizer(string, **options)
        made["input_ids"] = [7] * add_special_tokens + made.input_ids
        return made

    (window,) = windows(text, with_start, count=1, tokens=50, seed=0)
    assert window.ids[0] == 7
    assert list(window.ids[1:]) == tokenizer(text.text).input_ids[window.start : window.start + 49]


def test_a_text_too_short_is_refused_with_figures(tokenizer):
    with pytest.raises(ConfigError, match=r"12 tokens, which is 2 windows of 5, fewer than the 3"):
        windows(Text("t", "abcdefghijkl", ""), tokenizer, count=3, tokens=5, seed=0)


def test_a_text_is_known_by_its_hash(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("häy", encoding="utf-8")
    assert load_text(str(path)).sha256 == hashlib.sha256("häy".encode()).hexdigest()
    topics = load_text("pydoc_topics")
    assert "assert" in topics.text
    assert topics == load_text("pydoc_topics")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_text(str(path))
    with pytest.raises(ConfigError, match="debian_handbook"):
        load_text("no such")
