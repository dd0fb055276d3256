"""Files written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, contents: Any) -> None:
    """Writes ``contents`` beside ``path`` and moves it there, so that no reader sees half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
