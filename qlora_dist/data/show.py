"""Shows a person what is trained: packed rows, or the first records of a source before any run.

python -m qlora_dist.data.show runs/artifacts/rows/legal-0-1a2b3c4d5e6f
python -m qlora_dist.data.show 'data/*.jsonl' --tokenizer FOLDER
python -m qlora_dist.data.show data/faq.csv --field instruction=frage --field response=antwort
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from qlora_dist.config.data import DomainConfig, Kind, SourceConfig
from qlora_dist.config.stages import RecordsConfig
from qlora_dist.data.encode import Encoder, tokenizer_digest
from qlora_dist.data.kinds import FIELDS, UNKNOWN, UnusableError, columns, make_record
from qlora_dist.data.record import Record, Reject
from qlora_dist.data.records import examples
from qlora_dist.data.rows import Rows, row_order
from qlora_dist.data.sources import Piece, pieces_of, read_piece
from qlora_dist.data.templates import PLAIN, ChatTemplate
from qlora_dist.errors import DataError, QloraDistError, bad_value

TRAINED, PROMPT, SPECIAL = "green", "dim", "magenta"
FIRST_EXAMPLES = 1000
SHOWN_CHARS = 4000
"""Of a longer piece of a source's record, the beginning and the end are shown."""

WHOLE_FILES = 2**62
NEEDED = "messages; or chosen, rejected; or instruction, response; or text, label; or text"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    told = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # any text can be shown anywhere
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        if (Path(told.path) / "rows.json").is_file():
            show_rows(console, Path(told.path), told.tokenizer, told.num, told.row)
        else:
            show_source(console, _source(told), told.tokenizer, told.num)
    except QloraDistError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_dist.data.show", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("path", help="a folder of packed rows, or a source: file, folder, glob, hub id, installed:NAME")
    parser.add_argument("--tokenizer", type=Path, help="the folder of the tokenizer (found by itself for a run's rows)")
    parser.add_argument("--num", type=int, default=3, help="how many rows or records are shown (3)")
    parser.add_argument("--row", type=int, help="one row by its number, instead of a random few")
    source = parser.add_argument_group("of a source", "as in domain.<name>.sources")
    source.add_argument("--kind", choices=[kind.value for kind in Kind], default="auto")
    source.add_argument(
        "--field", action="append", default=[], metavar="NAME=COLUMN", help="may be given several times"
    )
    source.add_argument("--passage-chars", type=int, default=0)
    source.add_argument("--subset", default="")
    source.add_argument("--split", default="train")
    source.add_argument("--revision", default="")
    return parser


def _source(told: argparse.Namespace) -> SourceConfig:
    if wrong := next((pair for pair in told.field if "=" not in pair), None):
        raise bad_value("--field", wrong, "NAME=COLUMN, e.g. response=answer_text")
    fields = {name: column for name, _, column in (pair.partition("=") for pair in told.field)}
    named = {name: getattr(told, name) for name in ("path", "passage_chars", "subset", "split", "revision")}
    return SourceConfig(**named, kind=Kind(told.kind), fields=fields)


def show_rows(console: Console, folder: Path, tokenizer: Path | None, num: int, row: int | None) -> None:
    """Prints packed rows segment by segment, trained tokens in green (between « and » where there is no colour).

    Raises:
        DataError: if the rows, or the tokenizer that made them, can't be found.
    """
    rows = Rows.open(folder)
    encoder = Encoder(tokenizer or find_tokenizer(folder, rows.tokenizer_sha256))
    share = float(np.asarray(rows.trained_BT).mean()) if len(rows) else 0
    console.print(f"{len(rows)} rows of {rows.row_tokens} tokens, {len(rows.segments)} segments, {share:.1%} trained")
    chosen = [row] if row is not None else sorted(row_order(len(rows), 0, 0)[:num].tolist())
    for number in chosen:
        if not 0 <= number < len(rows):
            raise DataError(f"--row {number}: expected 0 to {len(rows) - 1}.")
        tokens_T, trained_T = np.asarray(rows.tokens_BT[number]), np.asarray(rows.trained_BT[number])
        segments = rows.segments_of(number)
        for segment in segments:
            record, slots = (
                rows.records[segment["record"]],
                slice(segment["start"], segment["start"] + segment["length"]),
            )
            trained = f"{trained_T[slots].sum()} of {segment['length']} tokens trained"
            console.rule(
                f"row {number}, slots {slots.start}-{slots.stop - 1}: {record['source']}, {trained}", align="left"
            )
            console.print(painted(console, encoder, tokens_T[slots], trained_T[slots]))
        console.print(f"{rows.row_tokens - segments['length'].sum()} slots of padding", style=PROMPT)


def show_source(console: Console, source: SourceConfig, tokenizer: Path | None, num: int) -> None:
    """Prints the first records of a source as the template renders them, then kinds, columns and rejects of many."""
    domain = DomainConfig(sources=[source])
    files = [str(piece) for piece in pieces_of(0, source, "source", WHOLE_FILES)]
    encoder = Encoder(tokenizer) if tokenizer else None
    kinds: Counter[str] = Counter()
    rejects: list[Reject] = []
    for item in islice(examples(RecordsConfig(domain="shown", source=domain, files=files)), FIRST_EXAMPLES):
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        kinds[item.kind] += 1
        if kinds.total() <= num:
            console.rule(f"{item.file}:{item.line}, kind {item.kind}", align="left")
            console.print(_shown(console, item, encoder))
    console.rule(f"the first {kinds.total() + len(rejects)} examples", align="left")
    console.print(", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "no record", end="")
    console.print(f"; {len(rejects)} rejected")
    for line in read_columns(files, source):
        console.print(f"  {line}", style=PROMPT)
    for reason, number in Counter(reject.reason for reject in rejects).most_common():
        first = next(reject for reject in rejects if reject.reason == reason)
        console.print(f"  {number} x {reason}: first {first.place()}" + f" ({first.detail})" * bool(first.detail))
        if reason == UNKNOWN:
            console.print(f"    An example needs {NEEDED}. Name its columns: --field instruction=COLUMN ...")


def read_columns(files: list[str], source: SourceConfig) -> list[str]:
    """Tells, for each kind among the first examples, which column each field is read from, and which aren't used."""
    used: dict[str, dict[str, str]] = {}
    others: dict[str, set[str]] = {}
    items = (item for text in files for item in read_piece(Piece.parse(text), source))
    raws: Iterator[Any] = (item[2] for item in items if not isinstance(item, Reject))
    for raw in islice(raws, FIRST_EXAMPLES):
        if not isinstance(raw, Mapping):
            continue
        try:
            kind = make_record(raw, source.kind, source.fields).kind
        except UnusableError:
            continue
        wanted = {*FIELDS[Kind(kind)], "licence"}
        found = {name: str(column) for name, column in columns(raw, source.fields).items() if name in wanted}
        used.setdefault(kind, {}).update(found)
        others.setdefault(kind, set()).update(map(str, raw.keys() - found.values()))
    lines = []
    for kind, found in sorted(used.items()):
        unused = sorted(others[kind] - set(found.values()))
        more = f"; not used: {', '.join(unused[:8])}{' …' if len(unused) > 8 else ''}" if unused else ""
        lines.append(f"{kind}: " + ", ".join(f"{name} from {column!r}" for name, column in found.items()) + more)
    return lines


def painted(console: Console, encoder: Encoder, tokens_T: np.ndarray, trained_T: np.ndarray) -> Text:
    """Returns tokens as text: trained ones green, special ones magenta, the others dim."""
    silent_T = np.isin(tokens_T, encoder.silent_ids)
    runs = groupby(range(len(tokens_T)), key=lambda i: (bool(trained_T[i]), bool(silent_T[i])))
    pieces = []
    for (is_trained, is_special), slots in runs:
        text = encoder.tokenizer.decode([int(tokens_T[i]) for i in slots], skip_special_tokens=False)
        pieces.append((text, is_trained, is_special))
    return _joined(console, pieces)


def find_tokenizer(rows: Path, sha256: str) -> Path:
    """Returns the tokenizer that made these rows, from the same folder of artifacts.

    Raises:
        DataError: if it isn't there.
    """
    for folder in sorted((rows.resolve().parent.parent / "tokenizer").glob("*/")):
        if (folder / "tokenizer.json").is_file() and tokenizer_digest(folder) == sha256:
            return folder
    raise DataError(f"{rows}: its tokenizer isn't beside it. Name the folder with --tokenizer.")


def _shown(console: Console, record: Record, encoder: Encoder | None) -> Text:
    if encoder:
        encoded = next(encoder.encode([record]))
        return (
            Text(encoded)
            if isinstance(encoded, str)
            else painted(console, encoder, encoded.tokens_N, encoded.trained_N)
        )
    if record.text:
        return _joined(console, [(_abridged(record.text), True, False)])
    text, spans = ChatTemplate(PLAIN, (("bos_token", ""), ("eos_token", "</s>"))).conversation(record.messages)
    pieces, at = [], 0
    for span in spans:
        pieces += [(_abridged(text[at : span.start]), False, False)]
        pieces += [(_abridged(text[span.start : span.end]), True, False)]
        at = span.end
    return _joined(console, pieces)


def _abridged(text: str) -> str:
    left_out = len(text) - SHOWN_CHARS
    if left_out <= 0:
        return text
    return f"{text[: SHOWN_CHARS // 2]} … {left_out:,} characters … {text[-SHOWN_CHARS // 2 :]}"


def _joined(console: Console, pieces: list[tuple[str, bool, bool]]) -> Text:
    """Joins pieces (text, trained, special) in their colours; without colours, « and » stand around trained ones."""
    shown = Text()
    has_colour = console.color_system is not None
    for is_trained, group in _by_trained(pieces):
        shown.append("" if has_colour or not is_trained else "«")
        for text, _, is_special in group:
            style = SPECIAL if is_special else TRAINED if is_trained else PROMPT
            shown.append(text, style=f"{style} underline" if is_trained and is_special else style)
        shown.append("" if has_colour or not is_trained else "»")
    return shown


def _by_trained(pieces: list[tuple[str, bool, bool]]) -> Iterator[tuple[bool, list[tuple[str, bool, bool]]]]:
    for is_trained, group in groupby(pieces, key=lambda piece: piece[1]):
        yield is_trained, list(group)


if __name__ == "__main__":
    sys.exit(main())
