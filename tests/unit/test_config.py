"""The configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostd.config import default_api_socket, load_config, parse_config
from vhostd.errors import NotFoundError, UsageError


def test_empty_file_is_the_defaults() -> None:
    config = parse_config("", "x.toml", {})
    assert config.state_dir == "/var/lib/vhostd"
    assert config.api_socket == Path("/run/vhostd/vhostd.sock")
    assert config.engine.staging_bytes == 32 << 20


def test_sizes_are_numbers_or_words() -> None:
    text = '[engine]\nmap_cache = "1G"\nstaging = 16777216\n'
    config = parse_config(text, "x.toml", {})
    assert (config.engine.map_cache_bytes, config.engine.staging_bytes) == (1 << 30, 16 << 20)


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("colour = 1", "'colour'", "not known"),
        ("[engine]\nwrokers = 2", "'engine.wrokers'", "not known"),
        ("[engine]\nworkers = 0", "'engine.workers'", ">= 1"),
        ("[engine]\nworkers = '2'", "'engine.workers'", "int"),
        ("[engine]\nstaging = '1X'", "'engine.staging'", "not a size"),
        ("[engine]\nstaging = '33M'", "'engine.staging'", "power of 2"),
        ("[engine]\nstaging = 4096", "'engine.staging'", "from 8M"),
        ("[engine]\ncpus = [1, 2]", "'engine.cpus'", "2 CPUs for 1 workers"),
        ("[log]\nlevel = 'loud'", "'log.level'", "invalid enum"),
        ("[api]\nmode = '0999'", "'api.mode'", "regex"),
        ("state_dir = 'here'", "'state_dir'", "absolute"),
        ("checkpoint_interval_s = 0", "'checkpoint_interval_s'", "> 0"),
        ("x = ", "TOML", "correct"),
    ],
)
def test_wrong_key_or_value_is_named_with_its_file(text: str, key: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(text, "/etc/x.toml", {})
    message = str(caught.value)
    assert "/etc/x.toml" in message
    assert key in message
    assert reason in message


def test_environment_wins_over_the_file() -> None:
    environment = {
        "VHOSTD_STATE_DIR": "/s",
        "VHOSTD_RUNTIME_DIR": "/r",
        "VHOSTD_SOCKET": "/x.sock",
    }
    config = parse_config("state_dir = '/file'", "x.toml", environment)
    assert (config.state_dir, config.runtime_dir) == ("/s", "/r")
    assert config.api_socket == Path("/x.sock")
    assert default_api_socket(environment) == Path("/x.sock")


def test_client_and_daemon_look_at_the_same_socket() -> None:
    for environment in ({}, {"VHOSTD_RUNTIME_DIR": "/r"}, {"VHOSTD_SOCKET": "/s.sock"}):
        config = parse_config("", "x.toml", environment)
        assert config.api_socket == default_api_socket(environment)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        load_config(tmp_path / "nowhere", {})


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_config(path, {})


def test_the_example_in_the_documentation_is_valid() -> None:
    import vhostd.config

    lines = (vhostd.config.__doc__ or "").split("\n\n", 1)[1].splitlines()
    example = "\n".join(line[4:] for line in lines if line.startswith("    "))
    assert "[engine]" in example
    parse_config(example.replace("workers = 1", "workers = 2"), "the example", {})
