"""Pieces of a self-contained HTML page: the document with its policy and style sheet, sections, tables, notices.

The page loads nothing and runs nothing, and its own Content-Security-Policy holds it to that: only the one style sheet
whose hash it names applies. Text is escaped by `charts.element`.
"""

import base64
import hashlib
from collections.abc import Collection, Mapping, Sequence

from simulations.charts import CHART_STYLE, Markup, element

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --panel: #f4f7f8; --ink: #15222c; --soft: #55636f; --rule: #dde4e8;
  --accent: #0b6078; --bar: #82939e; --warn: #b4400d; --warn-paper: #fdf3ec;
  --k0: #c2570a; --k1: #00795a; --k2: #9a4c9c; --k3: #846600; --k4: #5b656e; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #10171d; --panel: #18222a; --ink: #e8eef2;
  --soft: #a3b1bc; --rule: #2b3843; --accent: #62c3dc; --bar: #647888; --warn: #f29a63; --warn-paper: #2a1c13;
  --k0: #f08d49; --k1: #35c79d; --k2: #dc9ade; --k3: #d9b23f; --k4: #b3bdc6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1136px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 40px; }
.brand { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; margin: 0; font-weight: 650; }
.brand svg { width: 30px; height: 24px; stroke: var(--accent); stroke-width: 2.5; stroke-linecap: round; }
.brand em { font-weight: 400; color: var(--soft); }
h1 { margin: 56px 0 8px; font-size: clamp(2rem, 6vw, 3rem); line-height: 1.1; letter-spacing: -0.025em;
  overflow-wrap: anywhere; }
.lede { margin: 0 0 32px; font-size: 1.125rem; color: var(--soft); } .lede strong { color: var(--warn); }
section { margin: 72px 0 0; padding-top: 28px; border-top: 1px solid var(--rule); }
section:first-child { margin-top: 40px; }
h2 { margin: 0 0 20px; font-size: 1.5rem; line-height: 1.25; letter-spacing: -0.015em; }
p { max-width: 68ch; }
.columns { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 36px 40px; align-items: start; }
.columns + .columns { margin-top: 40px; }
.figures { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 24px 40px; margin: 0 0 44px; }
.figures dt { color: var(--soft); }
.figures dd { margin: 0; font-size: 2.75rem; line-height: 1.2; font-weight: 600; letter-spacing: -0.03em; }
.figures .first { color: var(--accent); }
.figures .note { font-size: 0.9375rem; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); margin: 0; }
.facts dt, .facts dd { margin: 0; padding: 7px 24px 7px 0; border-bottom: 1px solid var(--rule); }
.facts dt { color: var(--soft); } .facts dd { overflow-wrap: anywhere; padding-right: 0; }
dd, td, .chart { font-variant-numeric: tabular-nums; }
figure { margin: 0; } figcaption, caption { font-weight: 600; text-align: left; padding-bottom: 10px; }
.scroll { overflow-x: auto; margin-top: 36px; }
table { width: 100%; border-collapse: collapse; font-size: 0.9375rem; }
th, td { padding: 8px 20px 8px 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule);
  unicode-bidi: isolate; }
thead th { color: var(--soft); font-weight: 500; } tbody th { font-weight: 500; min-width: 7rem; white-space: normal;
  overflow-wrap: anywhere; } td:last-child { white-space: normal; min-width: 9rem; }
.n { text-align: right; } td.n:last-child { min-width: 0; } .most > * { font-weight: 700; }
tr > :last-child { padding-right: 0; }
.notice { margin: 0 0 28px; padding: 16px 20px; border-left: 4px solid var(--warn); background: var(--warn-paper); }
.notice p { margin: 0; } .notice strong { color: var(--warn); }
details { margin-top: 32px; } details .scroll { margin-top: 16px; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
code, pre { font: 0.875em/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 16px 0 0; padding: 20px; overflow-x: auto; background: var(--panel); }
p code { padding: 2px 6px; background: var(--panel); overflow-wrap: anywhere; }
footer { margin-top: 72px; padding-top: 20px; padding-bottom: 48px; color: var(--soft); font-size: 0.875rem; }
footer p { max-width: none; margin: 0 0 4px; }
@media screen and (max-width: 760px) { header, main, footer { padding-left: 18px; padding-right: 18px; }
  .columns, .figures { grid-template-columns: minmax(0, 1fr); } .figures { gap: 16px; } section { margin-top: 52px; } }
@media print { body { font-size: 10pt; } table { font-size: 8.5pt; } section { margin-top: 28px; }
  section:first-child { margin-top: 0; } h2 { break-after: avoid; } figure, tr, .notice, .facts { break-inside: avoid; }
  .scroll, pre { overflow: visible; } pre, thead th { white-space: pre-wrap; } th, td { padding-right: 10px; } }
@media print { details::details-content { content-visibility: visible; block-size: auto; } }
"""


def document(title: str, body: Markup) -> str:
    """The whole page around `body`."""
    style = Markup(PAGE_STYLE + CHART_STYLE)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", style),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en-GB") + "\n"


def section(ident: str, title: str, *parts: Markup) -> Markup:
    heading = element("h2", title, id=f"{ident}-heading")
    return element("section", heading, *parts, aria_labelledby=f"{ident}-heading")


def columns(*parts: Markup) -> Markup:
    return element("div", *parts, class_="columns")


def captioned(caption: str, chart: Markup) -> Markup:
    return element("figure", element("figcaption", caption), chart)


def facts(facts: Mapping[str, object]) -> Markup:
    known = [(label, fact) for label, fact in facts.items() if fact is not None]
    return element("dl", *(part for k, v in known for part in (element("dt", k), element("dd", v))), class_="facts")


def notice(title: str, text: str) -> Markup:
    return element("div", element("p", element("strong", title), " ", text), class_="notice", role="note")


def details(title: str, body: Markup) -> Markup:
    return element("details", element("summary", title), body)


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Collection[int] = (0,),
    bold: Sequence[bool] = (),
) -> Markup:
    """Build a table that scrolls sideways where it must; the columns outside `words` are numbers and align right."""
    kinds = [None if i in words else "n" for i in range(len(heads))]
    top = (element("th", head, scope="col", class_=kind) for head, kind in zip(heads, kinds, strict=True))
    body = []
    for i, row in enumerate(rows):
        cells = (element("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True))
        name = element("th", row[0], scope="row")
        body.append(element("tr", name, *cells, class_="most" if i < len(bold) and bold[i] else None))
    parts = element("caption", caption), element("thead", element("tr", *top)), element("tbody", *body)
    return element("div", element("table", *parts), class_="scroll", role="region", aria_label=caption, tabindex=0)
