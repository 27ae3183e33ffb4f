"""Reading JSON objects from files that somebody else may have written, moved or cut short."""

import json
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.base import ConfigError


def read_json_object(path: Path, *, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        remedy: what to do if it cannot be used, as the last clause of the message.

    Raises:
        ConfigError: if the file is missing, cannot be read, is not JSON, or holds another value
            than an object; the message names the path and the fault.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: does not exist; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: got {type(value).__name__}, expected a JSON object; {remedy}")
    return value
