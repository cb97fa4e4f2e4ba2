"""Writing files that a killed program must not leave half written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make `path`, and its folder, of what write(file) writes: as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode()))
