"""The page of `sluice delta describe --html`: where a delta's bytes went, as a picture and a table.

One HTML file that needs nothing else and may be opened by anyone: styles and the little script that sorts
the table are inside, and its own policy lets nothing else run or load. Without JavaScript only sorting is
missing. Names come from model files, which may come from anyone: every text is escaped, and control and
direction marks are replaced. Pure: regions in, text out. Sizes add up: a row stands for what no region
accounts for.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fleet.cli import tables
from fleet.cli.session import plain
from fleet.cli.treemap import Rectangle, treemap

MAX_TILES = 60  # in the picture; the cheapest regions share one
MAX_NAME = 400  # characters of a name that the page shows
WIDTH, HEIGHT = 960, 460
_CHARACTER, _LINE = 8, 15  # width of a bold character and height of a line in a tile, in the picture's units
_LEAST_LABEL = 5  # characters; what is left of a name that is cut shorter tells nothing
_BETWEEN, _CONTAINER = "(between tensors)", "(header and framing)"

_COLOURS = (
    9  # for what writes bytes, the costliest first; the last is shared. Two ways have one of their own:
)
_OWN = {"copy": "wc", "container": "wo"}


@dataclass(frozen=True)
class Entry:
    """One row: a region, or what belongs to none. Sizes in bytes; elements 0 where there is no tensor."""

    name: str
    base_name: str
    way: str
    dtype: str
    shape: str
    elements: int
    length: int
    coded: int

    @property
    def bits(self) -> float | None:
        """Bits of the delta for each weight."""
        return 8 * self.coded / self.elements if self.elements else None


@dataclass(frozen=True)
class Way:
    """What writes bytes: an instruction and its predictor. Sizes in bytes, of the target and of the delta."""

    name: str
    length: int
    coded: int


def entries(delta_size: int, regions: Sequence[dict[str, Any]]) -> list[Entry]:
    """The rows of a delta, costliest first; their coded bytes add up to its size.

    Args:
        delta_size: bytes.
        regions: as fleet.cli.documents.region gives them.
    """
    found = [
        Entry(
            _clean(region["name"]) or _BETWEEN,
            _clean(region["base_name"]),
            _way(region["instruction"], region["predictor"]),
            region["dtype"],
            "×".join(map(str, region["shape"])),  # noqa: RUF001 - a shape is written with it
            math.prod(region["shape"]) if region["dtype"] else 0,
            region["target_length"],
            region["coded_bytes"],
        )
        for region in regions
    ]
    rest = delta_size - sum(entry.coded for entry in found)
    if rest:
        found.append(Entry(_CONTAINER, "", "container", "", "", 0, 0, rest))
    return sorted(found, key=lambda entry: (-entry.coded, -entry.length))


def page(title: str, delta_size: int, target_size: int, regions: Sequence[dict[str, Any]]) -> str:
    """The HTML document.

    Args:
        title: which files, for the heading.
        delta_size: bytes.
        target_size: bytes.
        regions: as fleet.cli.documents.region gives them.
    """
    rows = entries(delta_size, regions)
    part = tables.share(delta_size, target_size)
    times = f", {target_size / delta_size:,.1f} times smaller" if delta_size else ""
    lead = f"{tables.size(delta_size)} write {tables.size(target_size)}: {part or '-'}{times}."
    ways = _by_way(rows)
    colours = _colours(ways)
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}: anatomy of a delta</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body>\n<main>\n"
        f"<h1>{_text(title)}</h1>\n<p class=lead>{_text(lead)}</p>\n"
        f"<h2>Where the bytes went</h2>\n{_picture(rows, delta_size, colours)}\n"
        f"<h2>By what writes them</h2>\n{_ways(ways, delta_size, target_size, colours)}\n"
        f"<h2>Every region</h2>\n{_table(rows, delta_size, target_size)}\n"
        f"</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _way(instruction: str, predictor: str) -> str:
    return "copy" if instruction == "copy" else " ".join(filter(None, (instruction, predictor)))


def _clean(name: str) -> str:
    """A name without what could steer a reader, and of bearable length."""
    shown = plain(name)
    return shown if len(shown) <= MAX_NAME else f"{shown[:MAX_NAME]}…"


def _text(text: str) -> str:
    return escape(plain(text))


def _colours(ways: Sequence[Way]) -> dict[str, str]:
    """The class of each way's colour."""
    others = [way.name for way in ways if way.name not in _OWN]
    return _OWN | {name: f"w{min(index, _COLOURS - 1)}" for index, name in enumerate(others)}


def _by_way(rows: Sequence[Entry]) -> list[Way]:
    """The ways that write bytes, costliest first."""
    names = dict.fromkeys(row.way for row in rows)
    ways = [
        Way(
            name,
            sum(row.length for row in rows if row.way == name),
            sum(row.coded for row in rows if row.way == name),
        )
        for name in names
    ]
    return sorted(ways, key=lambda way: (-way.coded, -way.length))


def _picture(rows: Sequence[Entry], delta_size: int, colours: dict[str, str]) -> str:
    costly = [row for row in rows if row.coded > 0]
    if not costly:
        return "<p>The delta has no bytes to show.</p>"
    # A tile needs some area to be seen: what is too cheap shares the last one.
    shown = [row for row in costly[:MAX_TILES] if row.coded * 2500 >= delta_size]
    others = costly[len(shown) :]
    tiles = [(row.name, row.coded, row.way) for row in shown]
    if others:
        tiles.append((f"{len(others)} more", sum(row.coded for row in others), "others"))
    tiles.sort(key=lambda tile: -tile[1])
    places = treemap([tile[1] for tile in tiles], Rectangle(0, 0, WIDTH, HEIGHT))
    drawn = "\n".join(
        _tile(name, coded, way, place, delta_size, colours.get(way, "wo"))
        for (name, coded, way), place in zip(tiles, places, strict=True)
    )
    largest = ", ".join(f"{row.name} {tables.share(row.coded, delta_size)}" for row in costly[:5])
    alternative = f"A treemap of {len(costly)} regions by bytes of the delta. The largest: {largest}."
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="mt md">'
        f'<title id="mt">Bytes of the delta, by region</title><desc id="md">{_text(alternative)}</desc>\n'
        f"{drawn}\n</svg>"
    )


def _tile(name: str, coded: int, way: str, place: Rectangle, delta_size: int, colour: str) -> str:
    figures = f"{tables.size(coded)}, {tables.share(coded, delta_size)}"
    width, height = max(0.0, place.width - 2), max(0.0, place.height - 2)
    x, y = place.x + 1, place.y + 1
    parts = [
        f"<g><title>{_text(f'{name}: {figures} ({way})')}</title>",
        f'<rect class="{colour}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3"/>',
    ]
    lines = _label(name, figures, int((width - 12) / _CHARACTER), int((height - 6) / _LINE))
    for index, (text, kind) in enumerate(lines):
        at = y + 16 + _LINE * index
        parts.append(f'<text class="{kind}" x="{x + 7:.1f}" y="{at:.1f}">{_text(text)}</text>')
    return "".join([*parts, "</g>"])


def _label(name: str, figures: str, columns: int, rows: int) -> list[tuple[str, str]]:
    """The lines that a tile has room for: the name, broken where it has joints, and its figures."""
    if columns < 6 or rows < 1:
        return []
    lines = [""]
    for joint in re.split(r"(?<=[._/: ])(?![._/: ])", name):
        rest = joint
        if len(rest) > columns or len(lines[-1]) == 1:  # it is broken anyway: no mark stands alone
            rest = lines.pop() + rest
            lines.append("")
        elif lines[-1] and len(lines[-1]) + len(rest) > columns:
            lines.append("")
        while len(rest) > columns:
            lines[-1:] = [rest[:columns], ""]
            rest = rest[columns:]
        lines[-1] += rest
    lines = [text for text in lines if text]
    room = max(1, rows - 1)
    if len(lines) > room:  # the end of a name tells more than its beginning
        lines = [f"…{lines[-room][1:]}", *lines[len(lines) - room + 1 :]]
        if sum(map(len, lines)) < _LEAST_LABEL:
            return []
    shown = [(text, "b") for text in lines]
    return [*shown, (figures, "s")] if len(figures) <= columns and len(lines) < rows else shown


def _ways(ways: Sequence[Way], delta_size: int, target_size: int, colours: dict[str, str]) -> str:
    """Two bars that share a legend: of which bytes the target is, and of which the delta."""
    bars = []
    for y, name, whole in ((0, "target", target_size), (34, "delta", delta_size)):
        x = 70.0
        bars.append(f'<text class="d" x="0" y="{y + 18}">{name}</text>')
        for way in ways:
            count = way.length if name == "target" else way.coded
            width = (WIDTH - 70) * count / whole if whole else 0.0
            if width <= 0:
                continue
            note = f"{way.name}: {tables.size(count)}, {tables.share(count, whole)} of the {name}"
            bars.append(
                f'<rect class="{colours[way.name]}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="26">'
                f"<title>{_text(note)}</title></rect>"
            )
            x += width
    legend = "".join(
        f'<tr><td><svg class="key" viewBox="0 0 12 12" aria-hidden="true"><rect class="{colours[way.name]}" '
        f'width="12" height="12" rx="3"/></svg> {_text(way.name)}<td class=n>{tables.size(way.length)}'
        f"<td class=n>{tables.share(way.length, target_size)}<td class=n>{tables.size(way.coded)}"
        f"<td class=n>{tables.share(way.coded, delta_size)}"
        for way in ways
    )
    alternative = (
        "Two bars: bytes of the target, and of the delta, by what writes them. The table has the figures."
    )
    heads = "".join(f"<th scope=col class=n>{name}" for name in ("target", "share", "delta", "share"))
    return (
        f'<svg viewBox="0 0 {WIDTH} 70" role="img" aria-label="{alternative}">{"".join(bars)}</svg>\n'
        f"<div class=scroll><table><thead><tr><th scope=col>written by{heads}</thead>"
        f"<tbody>{legend}</tbody></table></div>"
    )


def _table(rows: Sequence[Entry], delta_size: int, target_size: int) -> str:
    heads = (
        ("region", ""),
        ("from the base's", ""),
        ("written by", ""),
        ("type", ""),
        ("shape", ""),
        ("size", "n"),
        ("coded", "n"),
        ("bits a weight", "n"),
        ("share", "n"),
    )
    head = "".join(f"<th scope=col class='{kind}'>{name}</th>" for name, kind in heads)
    body = "\n".join(_row(row, delta_size) for row in rows)
    coded = sum(row.coded for row in rows)
    return (
        "<div class=scroll><table id=regions><caption>Costliest first. Sizes in bytes; choose a heading to "
        f"sort.</caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        f"<tfoot><tr><th scope=row>in all<td><td><td><td><td class=n>{target_size:,}<td class=n>{coded:,}<td>"
        "<td class=n>100 %</tfoot></table></div>"
    )


def _row(row: Entry, delta_size: int) -> str:
    bits, known = ("", -1.0) if row.bits is None else (f"{row.bits:.2f}", row.bits)
    share = 100 * row.coded / delta_size if delta_size else 0.0
    moved = row.base_name if row.base_name != row.name else "the same"
    return (
        f"<tr><th scope=row>{_text(row.name)}</th><td>{_text(moved)}</td>"
        f"<td class=k>{_text(row.way)}</td><td class=k>{_text(row.dtype)}</td>"
        f"<td class=k>{_text(row.shape)}</td>"
        f"<td class=n data-v={row.length}>{row.length:,}</td>"
        f"<td class=n data-v={row.coded}>{row.coded:,}</td>"
        f"<td class=n data-v={known:.6f}>{bits}</td>"
        f"<td class=n data-v={share:.6f}>{share:.1f} %</td></tr>"
    )


_STYLE = """
:root{--ink:#1b1f24;--dim:#5b6570;--line:#dfe3e8;--back:#fff;--band:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebee;--dim:#a3adb8;--line:#323940;--back:#15181c;--band:#1c2126}}
*{box-sizing:border-box}
body{margin:0;font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back)}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:30px 0 10px}
.lead{font-size:17px;margin:6px 0 0;color:var(--dim)}
svg{display:block;width:100%;height:auto}
svg text{font:600 12px system-ui,sans-serif;fill:#fff}
svg .s{font-weight:400}
svg .d{font-weight:400;font-size:14px;fill:var(--dim)}
@media(max-width:700px){svg .d{font-size:20px}}
.key{display:inline-block;width:12px;height:12px;vertical-align:-1px;margin-right:4px}
.wc{fill:#3f6b52}.w0{fill:#1f63b5}.w1{fill:#7a3fa0}.w2{fill:#9a4a12}.w3{fill:#0d7378}.w4{fill:#a3303f}
.w5{fill:#5a5f1a}.w6{fill:#8a2f72}.w7{fill:#3d4fa8}.w8{fill:#6d4c33}.wo{fill:#5d6670}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}
#regions{width:100%}
caption{text-align:left;color:var(--dim);padding-bottom:6px}
th,td{padding:4px 12px 4px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--dim);font-weight:600;white-space:nowrap}
tbody th{font-weight:400;overflow-wrap:anywhere;min-width:180px}
#regions tbody tr:nth-child(even){background:var(--band)}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td,tbody th{overflow-wrap:anywhere}
.k{white-space:nowrap}
thead button{all:unset;cursor:pointer}
thead button:focus-visible{outline:2px solid currentColor;outline-offset:2px}
th[aria-sort=ascending] button:after{content:" \\2191"}
th[aria-sort=descending] button:after{content:" \\2193"}
"""

_SCRIPT = """
const table=document.getElementById("regions"),body=table.tBodies[0],heads=[...table.tHead.rows[0].cells];
const value=(row,i)=>row.cells[i].dataset.v===undefined?row.cells[i].textContent:+row.cells[i].dataset.v;
heads.forEach((head,i)=>{
const button=document.createElement("button");button.type="button";button.textContent=head.textContent;
head.replaceChildren(button);
button.onclick=()=>{
const down=head.getAttribute("aria-sort")!=="descending"&&head.className==="n"
||head.getAttribute("aria-sort")==="ascending";
heads.forEach(other=>other.removeAttribute("aria-sort"));
head.setAttribute("aria-sort",down?"descending":"ascending");
const rows=[...body.rows].sort((a,b)=>{const x=value(a,i),y=value(b,i);
return (typeof x==="number"?x-y:x.localeCompare(y))*(down?-1:1)});
body.append(...rows)}});
"""
