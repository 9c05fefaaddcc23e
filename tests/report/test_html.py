import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from manifold_unlearn.report import Report

VOID = {"meta", "img", "br", "hr", "link"}
ATTACK = "<script>alert(\"1\")</script><img src=x onerror=alert(1)> & 'quoted'"


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails where tags do not balance."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, *tags):
        return [data for tag, data in self.texts if tag in tags]


def sample(**changed):
    row = {"prompt": "Where is Oslo?", "answer": "Norway", "before": "Norway", "after": "I forgot."}
    return row | changed


@pytest.fixture
def figure():
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    return figure


@pytest.fixture
def full(figure):
    return (
        Report("Rivers", "a small model")
        .paragraph("What was done.")
        .heading("Result")
        .figure(figure, "Means by set.", alt="Forget falls, retain stands")
        .table(["set", "kept"], [["forget", 0.04], ["retain", 0.987]], caption="Kept")
        .heading("Samples")
        .samples([sample()])
        .details("Configuration", json.dumps({"rank": 8}, indent=2))
    )


def cells(columns, rows):
    return Page(Report("x").table(columns, rows).to_html()).text("td", "th")


def test_page_is_well_formed_and_says_what_it_is(full):
    text = full.to_html()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert page.text("title") == page.text("h1") == ["Rivers"]
    assert page.text("summary", "figcaption", "caption") == [
        "Means by set.",
        "Kept",
        "Configuration",
    ]
    assert {"charset": "utf-8"} in page.all("meta")


def test_blocks_stand_in_the_order_they_were_added(full):
    kinds = {"h1", "h2", "figure", "table", "details"}
    order = [tag for tag, _ in Page(full.to_html()).tags if tag in kinds]
    assert order == ["h1", "h2", "figure", "table", "h2", "table", "details"]


def test_page_needs_no_network_and_no_script(full):
    text = full.to_html()
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert text.count("src=") == len(page.all("img")) == 1
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    assert "@import" not in text
    policy = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy[0].startswith("default-src 'none'")


def test_page_follows_the_color_scheme_and_prints(full):
    assert {"prefers-color-scheme: dark", "media print", "max-width: 42rem"} <= set(
        re.findall(r"prefers-color-scheme: dark|media print|max-width: 42rem", full.to_html())
    )


@pytest.mark.parametrize(
    "add",
    [
        lambda page, figure: page.heading(ATTACK),
        lambda page, figure: page.paragraph(ATTACK),
        lambda page, figure: page.table([ATTACK], [[ATTACK]], caption=ATTACK),
        lambda page, figure: page.figure(figure, ATTACK, alt=ATTACK),
        lambda page, figure: page.samples([sample(after=ATTACK)], caption=ATTACK),
        lambda page, figure: page.samples([sample(prompt=ATTACK, answer=ATTACK, before=ATTACK)]),
        lambda page, figure: page.details(ATTACK, ATTACK),
        lambda page, figure: page,
    ],
)
def test_markup_in_text_is_shown_not_interpreted(add, figure):
    page = Page(add(Report(ATTACK, ATTACK), figure).to_html())
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text("h1") == [ATTACK]


def test_samples_show_the_generation_as_it_came():
    page = Page(Report("x").samples([sample(after=ATTACK)]).to_html())
    assert ATTACK in page.text("td")
    assert [cell["data-label"] for cell in page.all("td")] == ["Answer", "Before", "After"]


def test_samples_mark_line_breaks_and_empty_generations():
    page = Page(Report("x").samples([sample(before="one\ntwo", after="")]).to_html())
    assert page.text("span") == ["↵", "(nothing)"]
    assert {"one", "\ntwo"} <= set(page.text("td"))


def test_what_html_cannot_hold_gets_a_visible_stand_in(tmp_path):
    page = Report("x").samples([sample(after="a\x00b\x1b[0m \ud800 \x85 \r\r\n")])
    page.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a␀b␛[0m \ufffd \ufffd ␍<span" in text


def test_table_heads_its_rows_and_aligns_numbers():
    page = Page(Report("x").table(["set", "n"], [["forget", 3], ["retain", None]]).to_html())
    assert [head.get("scope") for head in page.all("th")] == ["col", "col", "row", "row"]
    assert [cell.get("class") for cell in page.all("td")] == ["number", "number"]
    assert page.all("th")[0].get("class") is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.98765, "0.988"),
        (0.04, "0.0400"),
        (12.345, "12.3"),
        (123.4, "123"),
        (999.7, "1,000"),
        (12345.6, "12,346"),
        (3.2e9, "3.20e+09"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (1.234e-5, "1.23e\N{MINUS SIGN}05"),
        (0.0, "0"),
        (float("nan"), "–"),
        (None, "–"),
        (float("-inf"), "\N{MINUS SIGN}∞"),
        (2000, "2,000"),
        (True, "yes"),
        (np.bool_(False), "no"),
        (np.float32(0.25), "0.250"),
        (np.int64(-7), "\N{MINUS SIGN}7"),
        ("layers.3", "layers.3"),
    ],
)
def test_cells_are_formatted(value, shown):
    assert cells(["a", "b"], [["x", value]])[-1] == shown


def test_tables_without_rows_say_so():
    page = Page(Report("x").table(["a", "b"], []).samples([]).to_html())
    assert page.text("td") == ["No rows", "No samples"]


def test_figure_is_the_picture_with_its_description(figure):
    from PIL import Image

    (image,) = Page(Report("x").figure(figure, "c", alt='a "b"').to_html()).all("img")
    assert image["alt"] == 'a "b"'
    assert image["width"] == "192"
    picture = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
    assert picture.size == (360, 180)


def test_same_report_same_bytes(figure):
    first, second = (Report("x").figure(figure, "c", alt="a").to_html() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Report(""), "title of the report is ''; give a text"),
        (lambda: Report("  "), "title of the report"),
        (lambda: Report(None), "title of the report is None"),
        (lambda: Report("x").heading(""), "the heading is ''"),
        (lambda: Report("x").table([], []), "columns is empty"),
        (lambda: Report("x").table(["a", "b"], [[1, 2], [1]]), "row 1 has 1 cells; .* 2 columns"),
        (lambda: Report("x").figure(Figure(), "c", alt=" "), "alt text of the figure is ' '"),
        (lambda: Report("x").samples([sample(), {"prompt": "p"}]), r"sample 1 lacks \['answer'"),
        (lambda: Report("x").details("", "text"), "summary of the details"),
    ],
)
def test_bad_input_is_rejected(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_alt_text_is_required(figure):
    with pytest.raises(TypeError, match="alt"):
        Report("x").figure(figure, "caption")


def test_a_rejected_block_leaves_the_report_as_it_was(full):
    before = full.to_html()
    with pytest.raises(ValueError, match="cells"):
        full.table(["a"], [[1, 2]])
    assert full.to_html() == before


def test_saved_file_is_the_page(full, tmp_path):
    full.save(tmp_path / "new" / "report.html")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == full.to_html()


def test_a_failing_save_leaves_the_old_file_and_nothing_else(full, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    Report("Old").save(path)
    old = path.read_bytes()

    def full_disk(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        full.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_save_never_replaces_a_directory(full, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(IsADirectoryError, match="is a directory; give the path of an HTML file"):
        full.save(tmp_path)
    assert (tmp_path / "keep.txt").read_text() == "mine"
