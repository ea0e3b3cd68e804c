"""docs/json-rpc.md lists what there is, with its parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from vhostd.api.methods import Methods
from vhostd.daemon import Daemon

DOCUMENT = Path(__file__).parents[3] / "docs" / "json-rpc.md"


def documented() -> dict[str, set[str]]:
    text = DOCUMENT.read_text().split("## Methods")[1]
    rows = re.findall(r"^\| `([a-z.]+)` \|([^|]*)\|", text, flags=re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)[^`]*`", parameters)) for name, parameters in rows}


def test_documentation_lists_all_methods_and_their_parameters() -> None:
    class NoDaemon:
        def __getattr__(self, name: str) -> Any:
            return None

    methods = Methods(cast(Daemon, NoDaemon()))
    real = {name: set(methods._table[name][0].__struct_encode_fields__) for name in methods.names()}
    assert documented() == real
