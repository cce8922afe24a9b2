"""Trace files: JSONL, plain or gzip; every mistake names the file, the line and the field."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

GZIP_MAGIC = b"\x1f\x8b"


class TraceError(ValueError):
    """A trace file that cannot be used; the message names the file, the line and the field."""


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", object) of each non-blank line; gzip is told by its first bytes."""
    try:
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            yield where, _parse(line, where)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error})") from error


def show(value: object) -> str:
    """Type and shortened JSON of a value, for messages."""
    text = json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers; a damaged gzip stream is named with the line it hits."""
    number = 0
    with path.open("rb") as raw:
        packed = raw.peek(2)[:2] == GZIP_MAGIC  # a pipe cannot go back
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
        except EOFError as error:
            raise TraceError(
                f"{path}, line {number + 1}: the gzip stream ends early (truncated file)"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(
                f"{path}, line {number + 1}: the gzip stream is damaged ({error})"
            ) from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise TraceError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise TraceError(f"{where}: expected a JSON object, got {show(record)}")
    return record
