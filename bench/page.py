"""The report as one HTML file: no scripts, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from . import plots, targets, units
from .harness import Row
from .result import Report, ceiling, fastest_baseline, gflops, note_lines, relative, target_lines

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --panel: #ffffff; --ink: #1c2024;
  --soft: #5b646d; --rule: #dfe2e2; --accent: #0f6a73; --warm: #b4541a; --bad: #a32020;
  --grid: #e8eaea; --roof: #6a4fa3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --panel: #1b1f23; --ink: #e6e9eb; --soft: #9aa5ae; --rule: #2e353b;
    --accent: #4fb3bd; --warm: #e0894f; --bad: #ff8a80; --grid: #272d32; --roof: #b59cf0; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .75rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0 0 .15rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; }
.lead, .small { color: var(--soft); }
.small { font-size: .85rem; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; }
th, td { padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.big { font-size: 1.15rem; font-weight: 650; color: var(--accent); white-space: nowrap; }
.big.slower { color: var(--warm); }
.panel { background: var(--panel); border: 1px solid var(--rule); border-radius: 10px;
  padding: 1rem 1.25rem; }
.summary { margin-top: 1.5rem; padding: .5rem 1.25rem; }
.notice { border-left: 4px solid var(--warm); margin: 1.25rem 0 0; }
.notice.refused { border-left-color: var(--bad); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr));
  gap: .7rem 1.5rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts .wide { grid-column: 1 / -1; }
.operator { margin-bottom: 1rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem 2rem;
  align-items: start; margin-top: .75rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; max-width: 480px; }
svg text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .note, svg .case, svg .roof { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
svg .note, svg .tick { fill: var(--soft); font-size: 10.5px; }
svg .case { font-weight: 600; }
svg .value { font-weight: 600; }
svg .roof { fill: var(--roof); font-size: 10.5px; }
svg .bar { fill: var(--accent); }
svg .bar.slower { fill: var(--warm); }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; }
svg .equal { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 3 2; }
svg .grid { stroke: var(--grid); }
svg .ceiling { stroke: var(--roof); stroke-width: 1.8; fill: none; }
svg .dot { fill: var(--accent); stroke: var(--panel); stroke-width: 1.5; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.rows { font-size: .85rem; min-width: 1180px; }
.rows th { white-space: nowrap; }
.rows td.shape { white-space: nowrap; }
.rows li { white-space: nowrap; }
.rows ul { list-style: none; margin: 0; padding: 0; }
.slow { color: var(--warm); }
.bad { color: var(--bad); }
@media (max-width: 760px) { .pair { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 620px) {
  main { padding: 1.5rem 1rem 3rem; }
  .panel { padding: .9rem 1rem; }
  .panel.operator { padding: .9rem .6rem; }
  .facts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  svg text { font-size: 13px; }
  svg .note, svg .tick, svg .roof { font-size: 12px; }
  .summary thead { position: absolute; clip-path: inset(50%); }
  .summary tr { display: grid; grid-template-columns: 1fr auto; gap: 0 1rem; padding: .6rem 0;
    border-bottom: 1px solid var(--rule); }
  .summary tr:last-child { border-bottom: 0; }
  .summary td { border: 0; padding: 0; text-align: left; }
  .summary .ratio { grid-column: 2; grid-row: 1; text-align: right; }
  .summary .what { grid-column: 1; grid-row: 1; }
  .summary .against { grid-column: 1 / -1; }
  .summary .extra { grid-column: 1 / -1; color: var(--soft); font-size: .85rem; }
  .summary .extra::before { content: attr(data-label) " "; }
}
"""


def _tag(name: str, content: str, css: str = "", **attributes: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    chosen = f' class="{css}"' if css else ""
    return f"<{name}{chosen}{more}>{content}</{name}>"


def _summary(rows: Sequence[Row]) -> str:
    head = (
        "<tr><th>Operator</th><th class=number>Speed</th><th>against the fastest baseline</th>"
        "<th class=number>Time</th><th class=number>Ceiling</th></tr>"
    )
    body = "".join(_tag("tr", _headline(row)) for row in rows if row.headline)
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return _tag("div", table, "panel summary")


def _headline(row: Row) -> str:
    words = f"{escape(row.headline)}<br>{_tag('span', escape(plots.describe(row)), 'small')}"
    what = _tag("td", words, "what")
    if row.seconds is None:
        refused = _tag("td", _tag("span", "refused", "bad"), "ratio number")
        return what + refused + f'<td class="against bad" colspan="3">{escape(row.refused)}</td>'
    baseline = fastest_baseline(row)
    ratio, against, css = units.NONE, "no baseline ran", "big"
    if baseline is not None:
        name, spread = baseline
        ratio = units.times(spread.median)
        against = f"{name} [{spread.low:.2f} to {spread.high:.2f}]"
        css += " slower" if spread.median < 1 else ""
    return (
        what
        + _tag("td", _tag("span", ratio, css), "ratio number")
        + _tag("td", escape(against), "against")
        + _tag("td", units.seconds(row.seconds.median), "extra number", data_label="Time")
        + _tag("td", ceiling(row), "extra number", data_label="Ceiling")
    )


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    items = (
        _tag("div", f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>", _width(value))
        for name, value in pairs
    )
    return _tag("dl", "".join(items), "facts")


def _width(value: str) -> str:
    return "wide" if len(value) > 34 else ""


def _operators(report: Report) -> str:
    timed = [row for row in report.rows if row.seconds is not None and not row.call_cost]
    sections = []
    for name in dict.fromkeys(row.operator for row in timed):
        rows = [row for row in timed if row.operator == name]
        served = ", ".join(sorted({row.backend for row in rows}))
        figures = "".join(
            _tag("figure", figure)
            for figure in (
                plots.ratio_bars(name, rows),
                plots.roofline(name, rows, report.ceilings),
            )
        )
        heading = f"<h3><code>{escape(name)}</code></h3>"
        words = _tag("p", f"Served by {escape(served)}.", "small")
        sections.append(
            _tag("section", heading + words + _tag("div", figures, "pair"), "panel operator")
        )
    return "".join(sections)


def _call_costs(report: Report) -> str:
    rows = [row for row in report.rows if row.call_cost and row.seconds is not None]
    if not rows:
        return ""
    trivial = [
        row.seconds.median * spread.median
        for row in rows
        for spread in row.speedups.values()
        if row.seconds is not None
    ]
    words = "The public function on one token and small widths, without gradient."
    if trivial:
        cheapest = units.seconds(min(trivial))
        words += f" The cheapest call of PyTorch, <code>x.mul(1)</code>, took {cheapest}."
    return (
        "<h2>Cost of a call</h2>"
        + _tag("p", words)
        + _tag("div", _tag("figure", plots.call_bars(rows)), "panel")
    )


def _ratios(row: Row) -> str:
    items = [
        _tag("li", escape(words), "slow" * (spread.median < 1))
        for words, spread in zip(relative(row), row.speedups.values(), strict=True)
    ]
    items += [
        _tag("li", f"{escape(name)}: does not run ({escape(why[:80])})", "small")
        for name, why in row.skipped.items()
    ]
    return _tag("ul", "".join(items))


def _saved(row: Row) -> str:
    if row.saved is None:
        return units.NONE
    lines = [units.size(row.saved)]
    lines += [
        f"{units.size(nbytes)}: {escape(name)}" for name, nbytes in row.baseline_saved.items()
    ]
    return _tag("ul", "".join(_tag("li", line) for line in lines))


def _all_rows(rows: Sequence[Row]) -> str:
    head = "".join(
        f"<th{' class=number' if number else ''}>{name}</th>"
        for name, number in (
            ("Operator", False),
            ("Shape", False),
            ("Data", False),
            ("Backend", False),
            ("Time", True),
            ("IQR", True),
            ("GFLOP/s", True),
            ("GB/s", True),
            ("Ceiling", True),
            ("Speed relative to", False),
            ("Kept for backward", False),
        )
    )
    body = "".join(_tag("tr", _cells(row)) for row in rows)
    table = f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return (
        f'<div class="panel scroll" tabindex="0" role="region" aria-label="All rows">{table}</div>'
    )


def _cells(row: Row) -> str:
    scaled = "<br>" + _tag("span", escape(row.scaled), "small") if row.scaled else ""
    cells = [
        _tag("td", f"<code>{escape(row.operator)}</code>"),
        _tag("td", escape(row.label) + scaled, "shape"),
        _tag("td", "call cost" if row.call_cost else escape(row.dtype)),
        _tag("td", escape(row.backend)),
    ]
    if row.seconds is None:
        cells.append(f'<td colspan="7" class="bad">refused: {escape(row.refused)}</td>')
        return "".join(cells)
    rates = (gflops(row), units.NONE if row.call_cost else units.giga(row.byte_rate))
    cells += [
        _tag("td", units.seconds(row.seconds.median), "number"),
        _tag("td", units.percent(row.seconds.relative), "number"),
        *(_tag("td", rate, "number") for rate in rates),
        _tag("td", ceiling(row), "number"),
        _tag("td", _ratios(row)),
        _tag("td", _saved(row)),
    ]
    return "".join(cells)


def _targets(report: Report) -> str:
    lines = target_lines(report.rows)
    if not lines:
        return ""
    head = "".join(_tag("th", name) for name in ("Case", *targets.HEAD))
    body = "".join(
        _tag("tr", "".join(_tag("td", escape(cell)) for cell in cells[:-1])
             + _tag("td", cells[-1], "bad" * (cells[-1] == "missed")))
        for cells in lines
    )  # fmt: skip
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    panel = 'class="panel scroll" tabindex="0" role="region" aria-label="Targets"'
    return f"<h2>Targets</h2><div {panel}>{table}</div>"


def _notes(report: Report) -> str:
    lines = note_lines(report.rows)
    if not lines:
        return ""
    body = "".join(
        _tag("tr", "".join(_tag("td", escape(cell)) for cell in cells)) for cells in lines
    )
    head = _tag("th", "Case") + _tag("th", "Counted or checked")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    panel = 'class="panel scroll" tabindex="0" role="region" aria-label="Notes"'
    return f"<h2>Notes</h2><div {panel}>{table}</div>"


def _notices(report: Report) -> str:
    refused = [row for row in report.rows if row.refused]
    found = ""
    if refused:
        items = "".join(
            f"<li><code>{escape(row.operator)}</code>, {escape(plots.describe(row))}: "
            f"{escape(row.refused)}</li>"
            for row in refused
        )
        words = "<strong>Refused: the result was wrong, so no time is given.</strong>"
        found += _tag("div", f"{words}<ul>{items}</ul>", "panel notice refused")
    if report.notices:
        words = "".join(_tag("p", escape(notice)) for notice in report.notices)
        found += _tag("div", words, "panel notice")
    return found


def render(report: Report) -> str:
    """The whole page."""
    method = "".join(_tag("p", escape(words)) for words in report.method)
    body = (
        f"<h1>{escape(report.title)}</h1>"
        f'<p class="lead">{escape(report.subtitle)}</p>'
        + _notices(report)
        + _summary(report.rows)
        + "<h2>Measured on</h2>"
        + _tag("div", _facts([*report.facts.items(), *report.ceiling_facts()]), "panel")
        + "<h2>Operators</h2>"
        + _tag(
            "p",
            "For each, the speed relative to its baselines (longer is faster), then its "
            "rate against what this machine reached in the same run. Letters mark the shapes.",
            "lead",
        )
        + _operators(report)
        + _targets(report)
        + _notes(report)
        + _call_costs(report)
        + "<h2>All rows</h2>"
        + _all_rows(report.rows)
        + "<h2>Method</h2>"
        + method
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
