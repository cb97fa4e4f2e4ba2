"""Files that a killed program must not leave half written, and that one with other settings must not go on with."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4


class DataError(ValueError):
    """The data cannot be used; the message names the place at fault."""


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that then takes its place as a whole or, where that fails, not at all.

    Of several programs that write the same file at once, the last to finish decides what it holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    write_whole(path, lambda file: file.write((json.dumps(content, indent=indent) + "\n").encode()))


def refuse_changes(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises DataError where a setting now has another value than that with which the file was made."""
    changed = [key for key, value in now.items() if was.get(key) != value]
    if changed:
        was, now = ({key: settings.get(key) for key in changed} for settings in (was, now))
        raise DataError(f"{path} was made with {was}, this run asks for {now}; name another folder")
