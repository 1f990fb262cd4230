"""Reads a configuration: a TOML file or the name of a shipped one, and `--section.key value` after it."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .keys import Config, Section


class ConfigError(Exception):
    """What is wrong with a configuration, in words for its author."""


def shipped() -> list[str]:
    """Names of the configurations in the package."""
    return sorted(
        path.name.removesuffix(".toml")
        for path in resources.files("prime_train.config.recipes").iterdir()
        if path.name.endswith(".toml")
    )


def sections() -> dict[str, type[Section]]:
    """Sections by name, in order."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (with the nearest known one), a wrong value.
    """
    values = _read(name)
    for section, key, value in _pairs(overrides):
        _refuse_unknown(section, key)
        values.setdefault(section, {})[key] = value
    for section, keys in values.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"{section} must stand in a section, such as [run]")
        for key in keys:
            _refuse_unknown(section, key)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(e) for e in error.errors())) from None


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        try:
            return tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
    if name in shipped():
        return tomllib.loads(resources.files("prime_train.config.recipes").joinpath(f"{name}.toml").read_text())
    raise ConfigError(f"no file {name}, and no shipped configuration of that name: {', '.join(shipped())}")


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str, Any]]:
    """`--section.key value` and `--section.key=value`."""
    pairs = []
    words = list(overrides)
    while words:
        word = words.pop(0)
        name, separate, value = word.removeprefix("--").partition("=")
        section, dot, key = name.partition(".")
        if not word.startswith("--") or not dot:
            raise ConfigError(f"expected --section.key value, found {word}")
        if not separate:
            if not words:
                raise ConfigError(f"{word} needs a value")
            value = words.pop(0)
        pairs.append((section, key, _parsed(section, key, value)))
    return pairs


def _parsed(section: str, key: str, value: str) -> Any:
    """A value of the command line: `none` for a key that may be left out, `a,b` for one that has several values."""
    default = _keys(section)[key].default if section in Config.model_fields and key in _keys(section) else ""
    if isinstance(default, tuple):
        return [word for word in value.split(",") if word and word != "none"]
    return None if value == "none" and default is None else value


def _keys(section: str) -> dict[str, FieldInfo]:
    """A section's keys, by name."""
    return sections()[section].model_fields


def _refuse_unknown(section: str, key: str) -> None:
    if section not in Config.model_fields:
        raise ConfigError(f"no section {section!r}{_nearest(section, list(Config.model_fields))}")
    keys = list(_keys(section))
    if key not in keys:
        raise ConfigError(f"no key {section}.{key}{_nearest(key, keys, section)}")


def _nearest(name: str, known: list[str], section: str = "") -> str:
    found = difflib.get_close_matches(name, known, n=1)
    if found:
        return f"; did you mean {section}{'.' if section else ''}{found[0]}?"
    return f"; known are {', '.join(known)}"


def _explained(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] == "value_error":
        return message
    return f"{place}: {message}, got {json.dumps(error['input'], default=str)}"
