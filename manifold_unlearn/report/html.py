"""One self-contained HTML file of results: no network, no script, nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from manifold_unlearn import artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAMPLE_FIELDS = {"prompt": "Prompt", "answer": "Answer", "before": "Before", "after": "After"}
_DOTS_PER_INCH = 180
_NOTHING = "–"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a page may load: nothing."""
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --muted: #5f5f5f; --page: #ffffff;
  --rule: #d9d9d9; --band: #f5f6f7; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --muted: #a6a6a6; --page: #15181b;
  --rule: #3a3f44; --band: #1e2226; --accent: #6cc0f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { border-bottom: 3px solid var(--accent); padding-bottom: 1rem; margin-bottom: 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.5rem 0 .75rem; }
p { max-width: 44rem; margin: .75rem 0; white-space: pre-line; }
.subtitle { color: var(--muted); font-size: 1.05rem; margin: .4rem 0 0; }
h1, h2, p { overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--rule); border-radius: .4rem; }
figcaption, caption { color: var(--muted); font-size: .92rem; text-align: left; }
figcaption { margin-top: .5rem; max-width: 44rem; }
caption { padding-bottom: .5rem; }
.scroll { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; min-width: 50%; font-size: .95rem; }
th, td { padding: .45rem .8rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
thead th { border-bottom: 2px solid var(--muted); vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.samples { width: 100%; table-layout: fixed; }
.samples th, .samples td { white-space: pre-wrap; overflow-wrap: anywhere; }
.samples tbody tr:nth-child(odd) { background: var(--band); }
.newline, .nothing { color: var(--muted); }
details { margin: 1.25rem 0; border: 1px solid var(--rule); border-radius: .4rem; }
summary { cursor: pointer; padding: .55rem .8rem; font-weight: 500; }
pre { margin: 0; padding: .8rem; background: var(--band); font-size: .85rem; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 42rem) {
  .samples, .samples :is(caption, tbody, tr, th, td) { display: block; }
  .samples thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
    overflow: hidden; }
  .samples th, .samples td { border: 0; }
  .samples tr { border-bottom: 1px solid var(--rule); padding: .4rem 0; }
  .samples [data-label]::before { content: attr(data-label); display: block;
    color: var(--muted); font-size: .8rem; font-weight: 400; }
}
@media print {
  :root { --ink: #000; --muted: #444; --page: #fff; --rule: #bbb; --band: #fff;
    --accent: #0072b2; }
  main { max-width: none; padding: 0; }
  figure, tr, h2 { break-inside: avoid; }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


class Report:
    r"""Page of results built block by block; every method that adds one returns the report.

    Text is plain: markup in it, whoever wrote it, is shown and never interpreted.

    Parameters
    ----------
    title : str
    subtitle : str

    Raises
    ------
    ValueError
        An empty title.

    Examples
    --------
    >>> page = Report("Rivers forgotten", "small model, two layers")
    >>> page = page.heading("Result").table(["set", "kept"], [["forget", 0.04], ["retain", 0.987]])
    >>> "<td class=\"number\">0.987</td>" in page.to_html()
    True
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = _required(title, "title of the report")
        self.subtitle = subtitle
        self._blocks: list[str] = []

    def heading(self, text: str) -> Self:
        """Begin a section."""
        return self._add(f"<h2>{escape(_required(text, 'heading'))}</h2>")

    def paragraph(self, text: str) -> Self:
        """Add a paragraph; line breaks in it stand."""
        return self._add(f"<p>{escape(text)}</p>")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = ""
    ) -> Self:
        """Add a table whose first column heads the rows.

        Parameters
        ----------
        columns : sequence of str
        rows : sequence of sequence
            Floats are shown to three significant digits; None and NaN as a dash.
        caption : str

        Raises
        ------
        ValueError
            No columns, or a row of another length.
        """
        if not columns:
            raise ValueError("columns is empty; name at least one column.")
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(
                    f"row {index} has {len(row)} cells; the table has {len(columns)} columns "
                    f"{list(columns)}. Give one cell a column."
                )
        numeric = [
            bool(rows) and all(_is_number(row[place]) for row in rows)
            for place in range(len(columns))
        ]
        head = "".join(
            f'<th scope="col"{_number_class(number)}>{escape(str(name))}</th>'
            for name, number in zip(columns, numeric, strict=True)
        )
        body = "\n".join(_table_row(row, numeric) for row in rows)
        if not rows:
            body = f'<tr><td colspan="{len(columns)}" class="nothing">No rows</td></tr>'
        return self._add(_table(head, body, caption))

    def figure(self, figure: Figure, caption: str, *, alt: str) -> Self:
        """Add a picture with its caption.

        Parameters
        ----------
        figure : matplotlib.figure.Figure
            Drawn at once: later changes to it do not show.
        caption : str
        alt : str
            What the picture shows, for those who do not see it.

        Raises
        ------
        ValueError
            An empty ``alt``.
        """
        described = escape(_required(alt, "alt text of the figure"))
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=_DOTS_PER_INCH)
        data = base64.b64encode(drawn.getvalue()).decode("ascii")
        width = round(96 * figure.get_figwidth())
        note = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return self._add(
            f'<figure>\n<img width="{width}" alt="{described}" src="data:image/png;base64,{data}">'
            f"{note}\n</figure>"
        )

    def samples(self, rows: Sequence[Mapping[str, Any]], *, caption: str = "") -> Self:
        """Add prompts with what the model says before and after the edit.

        Parameters
        ----------
        rows : sequence of mapping
            Each with "prompt", "answer" (the expected one), "before" and "after" (generated text).
            Line breaks are marked.
        caption : str

        Raises
        ------
        ValueError
            A row lacks one of the four.
        """
        for index, row in enumerate(rows):
            if missing := [field for field in _SAMPLE_FIELDS if field not in row]:
                raise ValueError(
                    f"sample {index} lacks {missing}; each needs {list(_SAMPLE_FIELDS)}."
                )
        head = "".join(f'<th scope="col">{label}</th>' for label in _SAMPLE_FIELDS.values())
        body = "\n".join(_sample_row(row) for row in rows)
        if not rows:
            body = f'<tr><td colspan="{len(_SAMPLE_FIELDS)}" class="nothing">No samples</td></tr>'
        return self._add(_table(head, body, caption, "samples"))

    def details(self, summary: str, text: str) -> Self:
        """Add preformatted ``text`` behind ``summary``, folded until it is clicked."""
        label = escape(_required(summary, "summary of the details"))
        return self._add(
            f"<details>\n<summary>{label}</summary>\n<pre>{escape(text)}</pre>\n</details>"
        )

    def to_html(self) -> str:
        """Whole page as text."""
        title = escape(self.title)
        subtitle = f'\n<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        blocks = "\n".join(self._blocks)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<header>\n<h1>{title}</h1>{subtitle}\n</header>\n{blocks}\n"
            "</main>\n</body>\n</html>\n"
        )

    def save(self, path: str | Path) -> None:
        """Write the page to ``path`` atomically: a failure leaves the old file as it was.

        Raises
        ------
        IsADirectoryError
            ``path`` is a directory.
        """
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a directory; give the path of an HTML file.")
        artifact.write_text(path, self.to_html())

    def _add(self, block: str) -> Self:
        self._blocks.append(block)
        return self


def _required(text: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the {what} is {text!r}; give a text that is not empty.")
    return text


def escape(text: str) -> str:
    """``text`` safe between tags and in quotes; what HTML cannot hold as a visible stand-in."""
    text = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
    return html.escape(_CONTROL.sub(_picture, text.replace("\r\n", "\n")))


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def _generated(text: Any) -> str:
    text = str(text)
    if not text:
        return '<span class="nothing">(nothing)</span>'
    return escape(text).replace("\n", '<span class="newline" aria-hidden="true">↵</span>\n')


def _sample_row(row: Mapping[str, Any]) -> str:
    cells = []
    for field, label in _SAMPLE_FIELDS.items():
        tag, scope = ("th", ' scope="row"') if field == "prompt" else ("td", "")
        cells.append(
            f'<{tag}{scope} class="{field}" data-label="{label}" dir="auto">'
            f"{_generated(row[field])}</{tag}>"
        )
    return f"<tr>{''.join(cells)}</tr>"


def _table(head: str, body: str, caption: str, kind: str = "") -> str:
    title = f"\n<caption>{escape(caption)}</caption>" if caption else ""
    css_class = f' class="{kind}"' if kind else ""
    name = escape(caption or "Table")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">\n'
        f"<table{css_class}>{title}\n<thead>\n<tr>{head}</tr>\n</thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _table_row(row: Sequence[Any], numeric: Sequence[bool]) -> str:
    cells = []
    for place, (value, number) in enumerate(zip(row, numeric, strict=True)):
        tag, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
        cells.append(f"<{tag}{scope}{_number_class(number)}>{escape(shown(value))}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _number_class(number: bool) -> str:
    return ' class="number"' if number else ""


def _is_number(value: Any) -> bool:
    value = _scalar(value)
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def shown(value: Any) -> str:
    """A value as tables show it: three significant digits, None and NaN as a dash."""
    value = _scalar(value)
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}".replace("-", "\N{MINUS SIGN}")
    if isinstance(value, Real):
        return _real(float(value))
    return str(value)


def _real(value: float) -> str:
    if math.isnan(value):
        return _NOTHING
    if math.isinf(value):
        text = "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"
    elif value == 0:
        text = "0"
    elif abs(value) >= 999.5:
        text = f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2e}"
    elif abs(value) < 1e-3:
        text = f"{value:.2e}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return text.replace("-", "\N{MINUS SIGN}")
