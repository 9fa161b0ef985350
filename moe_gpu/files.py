"""Files written whole or not at all, and the folders that measured tables and results go to."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace `path` with `content`, or leave it untouched if anything fails; an OSError names `path`."""
    path = Path(path)
    try:
        _replace(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_directory() -> Path:
    """Where measured tables and calibrations are kept: MOE_GPU_CACHE, by default ~/.cache/moe_gpu; not made here."""
    return Path(os.environ.get("MOE_GPU_CACHE") or os.path.expanduser("~/.cache/moe_gpu"))


def writable_directory(path: str | Path) -> Path:
    """The folder, made if need be, in which a file could be written just now; ValueError where none can."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}; choose another --output-dir") from error
    return path


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Within, no other process enters this for the folder; ValueError where one has. The lock ends with the process."""
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # not a Unix: no such lock
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {directory}; choose another --output-dir") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def device_cache_path(folder: str, device_name: str) -> Path:
    """The user's file about a GPU model, as `tiles/h200.json`."""
    return cache_directory() / folder / device_file_name(device_name)


def device_file_name(device_name: str) -> str:
    """`h200.json` for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).removeprefix("nvidia-").strip("-") + ".json"
