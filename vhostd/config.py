"""The configuration file of `vhostd serve`: TOML, strict, every key with a default.

    state_dir = "/var/lib/vhostd"      # pools and attachments known to this daemon
    runtime_dir = "/run/vhostd"        # sockets
    checkpoint_interval_s = 300

    [engine]
    workers = 1                        # threads that serve disks
    cpus = [2, 3]                      # where to pin them; default: not pinned
    poll_us = 32                       # how long a worker polls before it sleeps
    map_cache = "256M"
    staging_dir = "/dev/shm/vhostd"    # tmpfs: acknowledged writes on their way to the device
    staging = "32M"                    # of it, a volume that is open
    direct = true                      # direct I/O to the devices
    checkpoint_log = "256M"            # log between checkpoints; recovery time follows it
    reclaim = "256M"                   # dead space given back a second, at most, a volume; 0: none

    [api]
    socket = "/run/vhostd/vhostd.sock"
    mode = "0600"
    group = "vhostd"

    [exports]
    mode = "0660"                      # of the sockets front-ends connect to
    owner = "libvirt-qemu"
    group = "kvm"

    [log]
    level = "info"
    format = "auto"                    # auto (json unless a terminal), json, human

`VHOSTD_STATE_DIR`, `VHOSTD_RUNTIME_DIR` and `VHOSTD_SOCKET` in the environment win over the file.
An unknown key is an error that names it. Pure but for reading the file; any thread.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from vhostd.errors import DeviceError, NotFoundError, UsageError
from vhostd.storage.sizes import format_size, parse_size

__all__ = [
    "DEFAULT_QUEUES",
    "DEFAULT_RUNTIME_DIR",
    "DEFAULT_STATE_DIR",
    "MAX_QUEUES",
    "ApiConfig",
    "Config",
    "EngineConfig",
    "ExportsConfig",
    "LogConfig",
    "default_api_socket",
    "load_config",
    "parse_config",
]

MAX_QUEUES = 64
DEFAULT_QUEUES = 64
"""QEMU refuses a back-end with fewer queues than the guest has CPUs, and an idle queue is free."""

DEFAULT_STATE_DIR = "/var/lib/vhostd"
DEFAULT_RUNTIME_DIR = "/run/vhostd"
API_SOCKET_NAME = "vhostd.sock"

Size = int | str
Mode = Annotated[str, Meta(pattern="^0?[0-7]{3}$")]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "human"]


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the engine is started with. Sizes: a number of bytes, or as in `256M`."""

    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    cpus: list[Annotated[int, Meta(ge=0)]] | None = None
    poll_us: Annotated[int, Meta(ge=0, le=1_000_000)] = 32
    map_cache: Size = 256 << 20
    staging_dir: str = "/dev/shm/vhostd"  # noqa: S108 -- not a temporary file: it must be a tmpfs
    staging: Size = 32 << 20
    direct: bool = True
    checkpoint_log: Size = 256 << 20
    reclaim: Size = 256 << 20

    @property
    def map_cache_bytes(self) -> int:
        return _size(self.map_cache)

    @property
    def staging_bytes(self) -> int:
        return _size(self.staging)

    @property
    def checkpoint_log_bytes(self) -> int:
        return _size(self.checkpoint_log)

    @property
    def reclaim_bytes_per_second(self) -> int:
        return _size(self.reclaim)


class ApiConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The JSON-RPC socket. Who can open it can do everything to all pools."""

    socket: str | None = None
    mode: Mode = "0600"
    group: str | None = None


class ExportsConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sockets that front-ends connect to."""

    mode: Mode = "0660"
    owner: str | None = None
    group: str | None = None


class LogConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What goes to stderr."""

    level: LogLevel = "info"
    format: LogFormat = "auto"


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    state_dir: str = DEFAULT_STATE_DIR
    runtime_dir: str = DEFAULT_RUNTIME_DIR
    checkpoint_interval_s: Annotated[float, Meta(gt=0)] = 300.0
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()
    exports: ExportsConfig = ExportsConfig()
    log: LogConfig = LogConfig()

    @property
    def api_socket(self) -> Path:
        """Where the JSON-RPC socket is."""
        return Path(self.api.socket or Path(self.runtime_dir) / API_SOCKET_NAME)


def load_config(path: Path | None, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration of `path`; the defaults without one.

    Raises:
        NotFoundError, DeviceError: the file cannot be read.
        UsageError: it is not TOML, or a key is unknown or has a value that is not possible.
    """
    if path is None:
        return parse_config("", "the defaults", environment)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(
            f"configuration {path} does not exist; check the path given with --config"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"configuration {path} is not UTF-8: {error}; save it as UTF-8") from error
    except OSError as error:
        raise DeviceError(
            f"configuration {path} cannot be read: {error.strerror}; check its permissions"
        ) from error
    return parse_config(text, str(path), environment)


def parse_config(text: str, name: str, environment: Mapping[str, str]) -> Config:
    """The configuration in `text`, which messages call `name`. Errors as for `load_config`."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"configuration {name} is not TOML: {error}; correct it") from error
    for key in ("state_dir", "runtime_dir"):
        if value := environment.get(f"VHOSTD_{key.upper()}"):
            values[key] = value
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise UsageError(f"configuration {name}: {_explain(str(error))}") from error
    if value := environment.get("VHOSTD_SOCKET"):
        config = msgspec.structs.replace(
            config, api=msgspec.structs.replace(config.api, socket=value)
        )
    _check(config, name)
    return config


def default_api_socket(environment: Mapping[str, str] = os.environ) -> Path:
    """Where clients look for the daemon when nobody tells them."""
    if value := environment.get("VHOSTD_SOCKET"):
        return Path(value)
    return Path(environment.get("VHOSTD_RUNTIME_DIR", DEFAULT_RUNTIME_DIR)) / API_SOCKET_NAME


def _explain(message: str) -> str:
    """msgspec's message in words of the file: which key, and what about it."""
    reason, _, where = message.partition(" - at `$")
    table = where.rstrip("`").lstrip(".")
    unknown = re.search(r"unknown field `([^`]*)`", reason)
    if unknown:
        key = f"{table}.{unknown[1]}" if table else unknown[1]
        return f"key {key!r} is not known; correct its spelling or remove it"
    return f"key {table!r}: {reason[:1].lower()}{reason[1:]}; correct its value"


def _size(size: Size) -> int:
    return size if isinstance(size, int) else parse_size(size)


# Key, lowest, highest, and whether only powers of 2 are possible.
_SIZE_LIMITS: tuple[tuple[str, int, int, bool], ...] = (
    ("map_cache", 1 << 20, 1 << 40, False),
    ("staging", 8 << 20, 1 << 30, True),
    ("checkpoint_log", 1 << 20, 1 << 40, False),
    ("reclaim", 0, 1 << 40, False),
)


def _check(config: Config, name: str) -> None:
    for key, lowest, highest, power in _SIZE_LIMITS:
        try:
            size = _size(getattr(config.engine, key))
        except UsageError as error:
            raise UsageError(f"configuration {name}: key 'engine.{key}': {error}") from error
        if not lowest <= size <= highest or (power and size & (size - 1)):
            raise UsageError(
                f"configuration {name}: key 'engine.{key}': {format_size(size)} is not possible; "
                f"choose {'a power of 2 ' if power else ''}from {format_size(lowest)} to "
                f"{format_size(highest)}"
            )
    for key in ("state_dir", "runtime_dir"):
        if not Path(getattr(config, key)).is_absolute():
            raise UsageError(
                f"configuration {name}: key {key!r}: {getattr(config, key)!r} is not an absolute "
                "path; begin it with a slash"
            )
    cpus = config.engine.cpus
    if cpus is not None and len(cpus) != config.engine.workers:
        raise UsageError(
            f"configuration {name}: key 'engine.cpus' names {len(cpus)} CPUs for "
            f"{config.engine.workers} workers; name one for each worker"
        )
