"""One HTML file that needs no other: style inside, pictures as data."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .section import Section
from .tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 68rem;
  margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.25rem; margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.2rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; font-size: 0.9rem; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 0.83rem/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; background: #f6f6f6; padding: 0.8rem; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.4rem 0 1.4rem; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 0.15rem 0.6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.scroll { overflow-x: auto; }
summary { cursor: pointer; }
"""


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in table.lines
    )
    return (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _picture(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _section(number: int, name: str, section: Section) -> str:
    facts = "".join(
        f"<dt>{escape(key)}</dt><dd>{_code(value) if key == 'Command' else escape(value)}</dd>\n"
        for key, value in section.facts.items()
    )
    parts = [
        f'<h2 id="s{number}">{escape(section.title)}: {_code(name)}</h2>',
        f"<dl>{facts}</dl>",
        *(f"<p>{escape(note)}</p>" for note in section.notes),
        *(_picture(path, alt) for path, alt in section.pictures),
    ]
    if section.tables or section.text:
        text = f"<pre>{escape(section.text)}</pre>" if section.text else ""
        tables = "\n".join(map(_table, section.tables))
        shown = "" if section.pictures else " open"
        parts.append(f"<details{shown}><summary>Every figure</summary>\n{text}{tables}</details>")
    return "\n".join(parts)


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _entry(number: int, name: str, section: Section) -> str:
    """Of the contents: sections of one title are told apart by file and machine."""
    machine = escape(section.facts.get("Machine", ""))
    link = f'<a href="#s{number}">{escape(section.title)}: {escape(name)}</a>'
    return f"<li>{link}{machine and f'<br><small>{machine}</small>'}</li>"


def page(sections: Sequence[tuple[str, Section]], left_out: Mapping[str, str], command: str) -> str:
    """The page; every section comes with the name of its file."""
    contents = "\n".join(_entry(number, *section) for number, section in enumerate(sections))
    bodies = "\n".join(_section(number, name, part) for number, (name, part) in enumerate(sections))
    reasons = "\n".join(f"<li>{_code(name)}: {escape(why)}</li>" for name, why in left_out.items())
    rest = f"<h2>Files that are left out</h2>\n<ul>{reasons}</ul>" if left_out else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fused_optim: measured results</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>fused_optim: measured results</h1>
<p>Written by {_code(command)}. Every section names the file, the machine, the versions, the commit and the
command that it comes from. Ratios below 1 mean that fused_optim takes less time; they are of medians over
the rounds that both took, and the thin lines on them are the quartiles of the ratios within rounds: a ratio
outside of its quartiles means that the machine changed its pace. Medians, in ms, stand beside them.</p>
<ol>
{contents}
</ol>
{bodies}
{rest}
</body>
</html>
"""
