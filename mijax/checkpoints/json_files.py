"""Reading the JSON files of a model's folder."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file, which may be missing.

    Returns:
        The object; an empty one where there is no such file.

    Raises:
        ValueError: where the file is not valid JSON, or holds something else than an object.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, given {type(content).__name__}")
    return content


def required_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that must exist.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it does not hold an object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    return read_object(path)
