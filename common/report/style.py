"""How pages look: colours in light and dark, and the style sheet."""

from __future__ import annotations

# Okabe and Ito's, which are told apart with colour blindness too, made darker where a line would
# have less than 3 : 1 of contrast with the page, and a lighter set of the same hues for the dark
SERIES = {
    "#0072b2": "#4aa6ea",
    "#b84500": "#ff7f32",
    "#00a078": "#2fd39c",
    "#c77fb0": "#f0b4d3",
    "#9a9300": "#f5e050",
    "#4b9be0": "#2f6fc0",
    "#4a2c18": "#a8714a",
    "#6c757d": "#8b949d",
}
INK, SOFT, AXIS, GRID, PAPER = "#1d2329", "#5b6570", "#7d868f", "#e3e6ea", "#fefefe"
_PARTS = {
    "ink": (INK, "#e6e9ec"),
    "soft": (SOFT, "#a3adb7"),
    "axis": (AXIS, "#7e8892"),
    "grid": (GRID, "#2d343b"),
    "paper": (PAPER, "#15191d"),
    "card": ("#f3f6f8", "#20262c"),
    "line": ("#d9dde2", "#3a424a"),
    "accent": ("#0b5c8e", "#7fc0ea"),
    "warn": ("#b07000", "#e6a63c"),
}

# what a figure paints in these colours follows the page into the dark
VARIABLES = {
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES)},
    **{light: f"var(--{name})" for name, (light, _) in list(_PARTS.items())[:5]},
}


def _scheme(which: int) -> str:
    named = {f"series-{i}": pair for i, pair in enumerate(SERIES.items())} | _PARTS
    return " ".join(f"--{name}: {pair[which]};" for name, pair in named.items())


CSS = (
    f"""
:root {{ color-scheme: light dark; {_scheme(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_scheme(1)} }} }}
@media print {{ :root {{ color-scheme: light; {_scheme(0)} }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; }
h1 { font-size: clamp(1.35rem, 1rem + 2vw, 2rem); line-height: 1.2; margin: 0 0 .9rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
p, li { max-width: 46rem; }
p, ul { margin: .6rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
a { color: var(--accent); }
.kind { margin: 0 0 .2rem; color: var(--soft); font-size: .85rem; font-weight: 600;
  letter-spacing: .06em; text-transform: uppercase; }
.outcome { max-width: 54rem; padding: .8rem 1rem; background: var(--card);
  border-left: 4px solid var(--accent); border-radius: 4px; }
.outcome p, .outcome ul { margin: .3rem 0; }
.verdict { font-size: 1.15rem; line-height: 1.4; font-weight: 600; }
.caution { max-width: 54rem; margin: .6rem 0; padding: .5rem 1rem; font-size: .95rem;
  border-left: 4px solid var(--warn); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, max-content));
  gap: .5rem 2rem; margin: 1.1rem 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
nav { display: flex; gap: .4rem 1.1rem; margin: 1.4rem 0 0; padding: .5rem 0; overflow-x: auto;
  border-top: 1px solid var(--line); font-size: .92rem; white-space: nowrap; }
nav a { text-decoration: none; padding: .25rem 0; }
nav a:hover { text-decoration: underline; }
nav + section h2 { margin-top: 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem;
  max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: .34rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.label { text-align: left; font-weight: 600; }
th.label span { display: inline-block; width: max-content; max-width: min(22rem, 40vw);
  overflow-wrap: anywhere; }
tbody th.again { color: var(--soft); font-weight: 400; }
th:first-child { padding-left: 0; position: sticky; left: 0;
  background: var(--paper); }
tbody tr:hover > * { background: var(--card); }
table.words td, table.words th { text-align: left; white-space: normal; vertical-align: top; }
table.words td { overflow-wrap: anywhere; min-width: 9rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); padding: .3rem 0; }
pre { margin: .6rem 0; padding: .6rem .8rem; background: var(--card); border-radius: 4px;
  white-space: pre-wrap; font-size: .85rem; line-height: 1.45; }
.figures, .panels { display: grid; gap: 1.4rem 1.8rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.figures > figure { min-width: 0; }
figure { margin: 1rem 0; }
.figures > figure { margin: 0; }
figure.one > .panels { display: block; }
figure.wide { grid-column: 1 / -1; }
.panel { min-width: 0; }
.panel .title { margin: 0 0 .2rem; font-weight: 600; font-size: .95rem; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; max-width: 46rem; }
.picture img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
@media (min-width: 48rem) { nav { flex-wrap: wrap; }
  .four > .panels { grid-template-columns: repeat(2, minmax(0, 30rem)); } }
@media print { main { max-width: none; padding: 0; } nav { display: none; }
  figure, tr, .caution, .outcome { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll, .plot { overflow: visible; } th:first-child { position: static; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
)
