"""Dashboard of features: one self-contained HTML file, no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manifold_unlearn import artifact
from manifold_unlearn.dictionary.cards import FeatureCard, Quantile
from manifold_unlearn.dictionary.contexts import Context
from manifold_unlearn.report.html import POLICY, STYLE, escape, shown

_LEVELS = 9
_SHOWN = 5  # contexts in sight, the others are folded
_FEATURE_STYLE = """
main { max-width: 76rem; }
.index td:nth-child(2) { overflow-wrap: anywhere; min-width: 14rem; }
.index td a { color: inherit; }
.index tbody tr:nth-child(odd) { background: var(--band); }
article { border-top: 2px solid var(--rule); padding: .5rem 0 1.5rem; content-visibility: auto;
  contain-intrinsic-size: auto 40rem; }
article h2 { margin: 1rem 0 .25rem; }
article h2 a { color: inherit; text-decoration: none; }
h3 { font-size: .95rem; margin: .9rem 0 .35rem; color: var(--muted); font-weight: 600; }
.label { color: var(--accent); font-weight: 500; }
.figures { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .3rem 0 .4rem; padding: 0;
  font-size: .92rem; list-style: none; }
.figures span { color: var(--muted); }
.panels { display: grid; grid-template-columns: 19rem 1fr; gap: 0 2rem; }
.panels > div { min-width: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg path { fill: var(--accent); }
svg .low { fill: #d55e00; }
svg line { stroke: var(--muted); stroke-width: 1; }
svg text { fill: var(--muted); font-size: 11px; }
.effects { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; }
.effects ol { margin: 0; padding: 0; list-style: none; font-size: .85rem; }
.effects li { display: flex; justify-content: space-between; gap: .5rem; }
.effects code, .contexts { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
.effects code { overflow-wrap: anywhere; white-space: pre-wrap; }
.contexts { margin: 0; padding: 0; list-style: none; font-size: .84rem; line-height: 1.75; }
.contexts li { display: grid; grid-template-columns: 3.6rem 1fr; gap: .7rem;
  border-bottom: 1px solid var(--rule); }
.contexts b { font-weight: 400; text-align: right; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.contexts p { margin: 0; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; }
.contexts i { font-style: normal; border-radius: .2rem; padding: .08rem 0; }
.contexts .at { text-decoration: underline; text-decoration-thickness: 2px;
  text-underline-offset: 3px; }
article details { margin: .5rem 0; border: 0; }
article summary { padding: .2rem 0; font-size: .9rem; color: var(--muted); }
@media (max-width: 60rem) { .panels { grid-template-columns: 1fr; } }
"""


def _shades() -> str:
    """Backgrounds of tokens by how strongly the latent fires there; of another hue below zero."""
    rules = []
    for name, ink in (("a", "230,159,0"), ("n", "86,180,233")):
        for level in range(1, _LEVELS + 1):
            opacity = 0.12 + 0.73 * level / _LEVELS
            rules.append(f".{name}{level} {{ background: rgba({ink},{opacity:.2f}); }}")
    return "\n".join(rules)


class FeatureDashboard:
    r"""Features of a dictionary on one page: labels, histograms, logit effects, contexts.

    Text is plain: markup in tokens and labels is shown and never interpreted. A page of several
    hundred features opens at once, for a browser draws only what is in sight.

    Parameters
    ----------
    cards : sequence of FeatureCard
        In the order in which they are shown.
    title : str
    subtitle : str

    Raises
    ------
    ValueError
        No card, one latent twice, or an empty title.
    """

    def __init__(self, cards: Sequence[FeatureCard], title: str, subtitle: str = "") -> None:
        self.cards = list(cards)
        numbers = [card.latent for card in self.cards]
        if not self.cards:
            raise ValueError("cards is empty; give at least one feature.")
        if len(set(numbers)) < len(numbers):
            raise ValueError("cards holds a latent twice; give each feature once.")
        if not title.strip():
            raise ValueError(
                f"the title of the dashboard is {title!r}; give one that is not empty."
            )
        self.title, self.subtitle = title, subtitle

    def to_html(self) -> str:
        """Whole page as text."""
        title = escape(self.title)
        subtitle = f'\n<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        features = "\n".join(_feature(card) for card in self.cards)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}{_FEATURE_STYLE}{_shades()}</style>\n</head>\n"
            f"<body>\n<main>\n<header>\n<h1>{title}</h1>{subtitle}\n</header>\n"
            f"{_legend(self.cards)}\n{_index(self.cards)}\n{features}\n</main>\n</body>\n</html>\n"
        )

    def save(self, path: str | Path) -> None:
        """Write the page to ``path`` atomically: a failure leaves the old file as it was."""
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a directory; give the path of an HTML file.")
        artifact.write_text(path, self.to_html())


def _legend(cards: Sequence[FeatureCard]) -> str:
    scale = "".join(f'<i class="a{level}">&nbsp;&nbsp;</i>' for level in range(1, _LEVELS + 1))
    first = cards[0]
    return (
        f"<p>{len(cards)} features over {first.n_tokens:,} tokens of {first.n_texts:,} texts. "
        "Each token is shaded by the activation there, as a share of the feature's largest "
        f'activation: <span class="contexts">{scale}</span>. Underlined: the token that the '
        "context was chosen for. Effects are of a unit of activation on the logits, directly.</p>"
    )


def _index(cards: Sequence[FeatureCard]) -> str:
    names = list(dict.fromkeys(name for card in cards for name in card.figures))
    head = "".join(
        f'<th scope="col" class="number">{escape(name)}</th>'
        for name in ["Fires, %", "Largest", *names]
    )
    rows = []
    for card in cards:
        values = [100 * card.frequency, card.act_max, *(card.figures.get(n) for n in names)]
        cells = "".join(f'<td class="number">{escape(shown(value))}</td>' for value in values)
        rows.append(
            f'<tr><th scope="row" class="number"><a href="#f{card.latent}">{card.latent}</a></th>'
            f"<td>{_label(card)}</td>{cells}</tr>"
        )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Features">\n'
        '<table class="index">\n<thead>\n<tr><th scope="col" class="number">Latent</th>'
        f'<th scope="col">Label</th>{head}</tr>\n</thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def _label(card: FeatureCard) -> str:
    if not card.label:
        return '<span class="nothing">none</span>'
    return f'<span class="label">{escape(card.label)}</span>'


def _feature(card: FeatureCard) -> str:
    numbers = {
        "fires on": f"{shown(100 * card.frequency)} % ({card.count:,} tokens)",
        "largest": shown(card.act_max),
        "mean where it fires": shown(card.mean),
    } | {name: shown(value) for name, value in card.figures.items()}
    items = "".join(
        f"<li><span>{escape(name)}</span> {escape(value)}</li>" for name, value in numbers.items()
    )
    left = ["<h3>Activations</h3>", _activations(card)]
    if card.raised:
        left += ["<h3>Logits raised and lowered</h3>", _effects(card), _logits(card)]
    if card.correlated:
        alike = ", ".join(f"{n} ({shown(pearson)})" for n, pearson, _ in card.correlated)
        left += ["<h3>Fires with (correlation)</h3>", f"<p>{escape(alike)}</p>"]
    return (
        f'<article id="f{card.latent}">\n<h2><a href="#f{card.latent}">Latent {card.latent}</a> '
        f'· {_label(card)}</h2>\n<ul class="figures">{items}</ul>\n<div class="panels">\n<div>'
        + "\n".join(left)
        + "</div>\n<div>"
        + _strongest(card)
        + "".join(_quantile(part, card.act_max) for part in card.quantiles)
        + "</div>\n</div>\n</article>"
    )


def _strongest(card: FeatureCard) -> str:
    if not card.strongest:
        return '<p class="nothing">Fires nowhere in these texts.</p>'
    in_sight = _contexts(card.strongest[:_SHOWN], card.act_max)
    more = card.strongest[_SHOWN:]
    folded = (
        f"<details>\n<summary>{len(more)} more of the strongest</summary>\n"
        f"{_contexts(more, card.act_max)}\n</details>"
        if more
        else ""
    )
    return f"<h3>Strongest</h3>\n{in_sight}\n{folded}"


def _quantile(part: Quantile, largest: float) -> str:
    return (
        f"<details>\n<summary>{shown(part.low)} to {shown(part.high)}: "
        f"{shown(100 * part.share)} % of where it fires</summary>\n"
        f"{_contexts(part.contexts, largest)}\n</details>"
    )


def _contexts(contexts: Sequence[Context], largest: float) -> str:
    rows = []
    for context in contexts:
        pieces = "".join(
            _token(token, value, largest, place == context.at)
            for place, (token, value) in enumerate(zip(context.tokens, context.values, strict=True))
        )
        where = f"text {context.text}, token {context.position}"
        value = escape(shown(context.value))
        rows.append(f'<li><b title="{where}">{value}</b><p dir="auto">{pieces}</p></li>')
    return f'<ol class="contexts">\n{"".join(rows)}\n</ol>'


def _token(token: str, value: float, largest: float, at: bool) -> str:
    text = escape(token).replace("\n", "↵")
    level = 0 if not largest else min(int(np.ceil(_LEVELS * abs(value) / largest)), _LEVELS)
    names = ([f"{'a' if value > 0 else 'n'}{level}"] if level else []) + (["at"] if at else [])
    if not names:
        return text
    return f'<i class="{" ".join(names)}" title="{escape(shown(value))}">{text}</i>'


def _effects(card: FeatureCard) -> str:
    lists = []
    for side in (card.raised, card.lowered):
        items = "".join(
            f"<li><code>{_piece(token)}</code><span>{escape(shown(value))}</span></li>"
            for token, value in side
        )
        lists.append(f"<ol>{items}</ol>")
    return f'<div class="effects">{"".join(lists)}</div>'


def _piece(token: str) -> str:
    """A token by itself, its spaces and line ends marked."""
    return escape(token).replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")


def _activations(card: FeatureCard) -> str:
    if not card.count:
        return '<p class="nothing">None</p>'
    n_bins = len(card.histogram)
    last = min(int(card.act_max / card.upper * n_bins) + 1, n_bins)
    edges = np.linspace(0, card.upper * last / n_bins, last + 1)
    return _bars(card.histogram[:last], edges, "Activations where it fires")


def _logits(card: FeatureCard) -> str:
    if not len(card.logit_histogram):
        return ""
    return _bars(card.logit_histogram, card.logit_edges, "Effects on all tokens")


def _bars(counts: np.ndarray, edges: np.ndarray, name: str) -> str:
    """Histogram as a drawing 300 wide; what lies below 0 in another color, 0 marked."""
    width, height = 300.0, 70.0
    low, high = float(edges[0]), float(edges[-1])
    x = (edges - low) / max(high - low, 1e-30) * width
    tall = np.sqrt(counts / max(counts.max(), 1)) * height
    parts = {"low": "", "high": ""}
    for left, right, end, size in zip(x, x[1:], edges[1:], tall, strict=False):
        if size > 0:
            side = "low" if end <= 0 else "high"
            parts[side] += (
                f"M{left:.1f} {height:.0f}V{height - max(size, 1):.1f}"
                f"H{max(right - 0.6, left + 0.6):.1f}V{height:.0f}Z"
            )
    ink = {"low": "#d55e00", "high": "#0072b2"}  # for readers without style sheets
    paths = "".join(
        f'<path class="{side}" fill="{ink[side]}" d="{d}"/>' for side, d in parts.items() if d
    )
    zero = ""
    if low < 0 < high:
        at = -low / (high - low) * width
        zero = f'<text x="{at:.0f}" y="84" text-anchor="middle">0</text>'
    return (
        f'<svg viewBox="0 0 {width:.0f} 88" role="img" aria-label="{escape(name)}">'
        f'{paths}<line x1="0" y1="{height:.0f}" x2="{width:.0f}" y2="{height:.0f}"/>'
        f'<text x="0" y="84">{escape(shown(low))}</text>{zero}'
        f'<text x="{width:.0f}" y="84" text-anchor="end">{escape(shown(high))}</text></svg>'
    )
