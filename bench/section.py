"""A part of the report's page: where its figures come from, its charts and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import charts
from .charts import Group
from .tables import Table


@dataclass
class Section:
    """A part of the page."""

    title: str
    facts: Mapping[str, str]
    notes: list[str] = field(default_factory=list)
    pictures: list[tuple[Path, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    text: str = ""

    def draw(
        self, stem: Path, groups: Iterable[Group], alt: str, chart: Callable[..., None], *args: str
    ) -> None:
        """Draws groups with a chart of ``charts``, in as many figures as they need."""
        pages = charts.pages(groups)
        for number, page in enumerate(pages, 1):
            part = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
            path = Path(f"{stem}{f'-{number}' if len(pages) > 1 else ''}.png")
            chart(page, f"{alt}{part}", *args, path)
            self.pictures.append((path, f"{alt}{part}"))
