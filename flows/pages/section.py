"""What a page is made of: sections, each a heading, charts and the table behind them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

Rows = list[dict[str, Any]]


def plain(value: Any) -> str:
    return "–" if value is None else str(value)


def digits(places: int, scale: float = 1.0) -> Callable[[Any], str]:
    """A text of the number times scale: '1,234.5'."""
    return lambda value: "–" if value is None else f"{value * scale:,.{places}f}"


def yes(value: Any) -> str:
    return "–" if value is None else "yes" if value else "no"


@dataclass(frozen=True)
class Column:
    """name: the key of a row and the head of the CSV; text: what people read."""

    name: str
    title: str
    text: Callable[[Any], str] = plain
    number: bool = True


def words(name: str, title: str) -> Column:
    return Column(name, title, number=False)


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification that takes its data from the rows of the section, under the name 'rows'."""

    spec: dict[str, Any]
    caption: str = ""
    wide: bool = True  # takes the whole width of the page


@dataclass
class Section:
    """missing: why there is nothing to show, in place of charts and table."""

    id: str
    title: str
    lead: str = ""
    columns: Sequence[Column] = ()
    rows: Rows = field(default_factory=list)
    charts: Sequence[Chart] = ()
    missing: str | None = None
    open: bool = False  # the table shows without being asked for
    legend: Sequence[tuple[str, str]] = ()  # (class of its colour, label)

    @property
    def data(self) -> dict[str, Any]:
        """The rows for JSON, names once; JSON has no NaN."""
        names = list(self.rows[0]) if self.rows else []
        return {"names": names, "rows": [[_finite(row[name]) for name in names] for row in self.rows]}

    @property
    def body(self) -> Markup:
        """The lines of the table. Made here, not in the template: the heat map has thousands of cells."""
        kinds = [(column.name, column.text, ' class="number"' if column.number else "") for column in self.columns]
        lines = (
            f'<tr data-row="{place}">'
            + "".join(f"<td{kind}>{escape(text(row[name]))}</td>" for name, text, kind in kinds)
            + "</tr>"
            for place, row in enumerate(self.rows)
        )
        return Markup("\n".join(lines))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ask(connection: Any, query: str, *values: Any) -> Rows:
    """The rows of a query as dicts."""
    result = connection.execute(query, list(values))
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
