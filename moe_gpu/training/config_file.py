"""TrainConfig from a JSON or YAML file and from NAME=VALUE: what cannot be is refused by field, value and limit."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from moe_gpu.extras import require
from moe_gpu.training.config import WHAT, TrainConfig

CONFIG_FILE = "config.json"


def read_config(
    path: str | Path, base: TrainConfig | None = None, changes: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The run that a file asks for; fields that it leaves out are `base`'s, by default TrainConfig's own.

    changes: fields that replace the file's. Read as `.json`, or as `.yaml` and `.yml` (extra `train`; tags that build
    objects are refused).
    Raises ValueError in one line naming the file, the field, the value and the limit.
    """
    path = Path(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"config file {path} must end in .json, .yaml or .yml; rename it")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read config file {path}: {error.strerror}; give a readable file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path} is not text (byte {error.start}); give JSON or YAML") from error
    values = _parse_json(path, text) if path.suffix == ".json" else _parse_yaml(path, text)
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} holds {type(values).__name__}, not fields; write NAME: VALUE lines")
    try:
        return with_fields(base or TrainConfig(), {**values, **(changes or {})})
    except ValueError as error:
        raise ValueError(f"config file {path}: {error}") from error


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config file {path}:{error.lineno}: not JSON ({error.msg}); correct that line") from error


def _parse_yaml(path: Path, text: str) -> Any:
    yaml = require("yaml", "train", "a YAML config (JSON does not) needs")
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise ValueError(f"config file {path}{where}: not YAML ({problem}); correct that line") from error


def assignments(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a mapping; ValueError for one without `=`."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not NAME=VALUE; write for example learning_rate=1e-3")
        values[name.strip()] = value.strip()
    return values


def with_fields(base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`base` with some fields changed; text is read as the field's type. ValueError for an unknown field or value."""
    kinds = {field.name: str(field.type) for field in fields(TrainConfig)}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1)
            hint = f"did you mean {near[0]}?" if near else "`moe-gpu train --print-config` lists all"
            raise ValueError(f"unknown field {name!r} (value {value!r}); {hint}")
    return replace(base, **{name: _read(name, kinds[name], value) for name, value in values.items()})


def _read(name: str, kind: str, value: Any) -> Any:
    """A field's value; also from text, as YAML's 1e-3 and the command line give numbers. TrainConfig checks limits."""
    if name == "data":
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list | tuple):
            raise ValueError(f"data={value!r} must be a list of files")
        return tuple(paths)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= sys.float_info.max else value
    if not isinstance(value, str) or kind == "str":
        return value
    try:
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()]
        return int(value) if kind == "int" else float(value)
    except (KeyError, ValueError):
        wanted = {"bool": "true or false", "int": "an integer"}.get(kind, "a number")
        raise ValueError(f"{name}={value!r} must be {wanted}") from None


def config_reference() -> str:
    """A Markdown table of every field, its default and what it decides, as docs/training.md holds it."""
    defaults = TrainConfig().to_json()
    rows = [f"| `{name}` | `{json.dumps(defaults[name])}` | {what} |" for name, what in WHAT.items()]
    return "\n".join(["| field | default | decides |", "| --- | --- | --- |", *rows])
