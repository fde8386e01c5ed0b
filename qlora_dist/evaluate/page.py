"""What a report is made of: sections of tables and figures, shown the same in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Figure = dict[str, Any]
"""A plotly figure as plain JSON values: `data` and `layout`."""

JUDGED = {"passed", "forgets little enough"}
"""Columns whose yes is good and whose no is bad; elsewhere they are but an answer."""

MAX_SHOWN = 600
"""Characters of one cell; what is longer is cut with an ellipsis."""


@dataclass(slots=True)
class Table:
    """A caption, column names and rows of anything that `shown` can show.

    `of` names the figure of these numbers; a `folded` table shows its caption alone, until it is unfolded.
    """

    caption: str
    columns: list[str]
    rows: list[list[Any]]
    of: str = ""
    folded: bool = False

    def cells(self) -> list[list[str]]:
        """Returns the rows as text."""
        return [[shown(value) for value in row] for row in self.rows]

    def is_judged(self, column: int) -> bool:
        """Says whether a column's yes is good news, and its no bad."""
        return self.columns[column] in JUDGED

    def is_number(self, column: int) -> bool:
        """Says whether a column holds numbers alone, and so is set flush right."""
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


@dataclass(slots=True)
class Section:
    """One heading of the report; a figure never stands without a table of the same numbers."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    code: str = ""
    notes: list[str] = field(default_factory=list)
    folded: bool = False

    def draw(self, name: str, figure: Figure, table: Table) -> None:
        """Adds a figure, and the table of the same numbers."""
        self.figures.append((name, figure))
        self.tables.append(replace(table, of=name))

    def tables_of(self, figure: str = "") -> list[Table]:
        """Returns the tables of a figure; those of none, without a name."""
        return [table for table in self.tables if table.of == figure]

    @property
    def anchor(self) -> str:
        """The fragment that links to it."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def shown(value: Any) -> str:
    """Returns a value as a person wants to read it: four digits, thousands apart, lists joined, marks kept."""
    if hasattr(value, "parts"):
        return value  # type: ignore[no-any-return]
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return _cut(", ".join(f"{k} {shown(v)}" for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return _cut(", ".join(shown(v) for v in value))
    return _cut(str(value))


def is_scalar(value: Any) -> bool:
    """Says whether a value fits a table's cell as it is."""
    return value is None or isinstance(value, (str, int, float, bool))


def union_table(caption: str, first: str, named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Table]:
    """Returns one table of several mappings (none if they hold no scalar): a row each, a column a key that has any."""
    told = [(k, v) for _, values in named for k, v in values.items() if is_scalar(v)]
    filled = {k for k, v in told if v is not None and v != ""}
    columns = [k for k in dict.fromkeys(k for k, _ in told) if k in filled]
    if not columns:
        return []
    rows = [[name, *(v if is_scalar(v := values.get(c)) else None for c in columns)] for name, values in named]
    return [Table(caption, [first, *columns], rows)]


def map_table(figure: Figure) -> Table:
    """Returns the table of a heat map: its rows and columns as it draws them."""
    (cells,), layout = figure["data"], figure["layout"]
    corner = " / ".join(t for axis in ("yaxis", "xaxis") if (t := layout[axis]["title"]["text"]))
    rows = [[name, *values] for name, values in zip(cells["y"], cells["z"], strict=True)]
    return Table(layout["title"]["text"], [corner, *cells["x"]], rows)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
