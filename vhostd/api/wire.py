"""JSON-RPC 2.0 over a unix stream socket: one message a line.

A message is a JSON object or a batch (array) on one line that ends with a newline; JSON has no
newline outside of strings, and inside it is escaped. Requests are at most 1 MiB, a batch has at
most 100 of them, parameters are named. What both ends share stands here; `server` and `client` use
it. Pure; any thread.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vhostd.errors import VhostdError

__all__ = [
    "INVALID_REQUEST",
    "MAX_BATCH",
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_BYTES",
    "METHOD_NOT_FOUND",
    "PARSE_ERROR",
    "MalformedRequestError",
    "Request",
    "error_object",
    "error_reply",
    "parse_request",
]

MAX_REQUEST_BYTES = 1 << 20
MAX_REPLY_BYTES = 64 << 20
MAX_BATCH = 100

# JSON-RPC 2.0, 5.1; the codes of errors that vhostd itself means are in `vhostd.errors`.
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601


class MalformedRequestError(Exception):
    """A message is JSON and no request."""


class Request(msgspec.Struct, frozen=True):
    """A request that is well-formed; `id` is UNSET for a notification."""

    method: str
    params: dict[str, Any]
    id: str | int | msgspec.UnsetType | None = msgspec.UNSET


def parse_request(message: object) -> Request:
    """Checks one request.

    Raises:
        MalformedRequestError: it is not one, and why.
    """
    if not isinstance(message, dict):
        raise MalformedRequestError("a request is a JSON object")
    if message.get("jsonrpc") != "2.0":
        raise MalformedRequestError('the member "jsonrpc" must be "2.0"')
    unknown = set(message) - {"jsonrpc", "method", "params", "id"}
    if unknown:
        raise MalformedRequestError(f"the member {sorted(unknown)[0]!r} is not part of JSON-RPC")
    method = message.get("method")
    if not isinstance(method, str):
        raise MalformedRequestError('the member "method" must be a string')
    params = message.get("params", {})
    if not isinstance(params, dict):
        raise MalformedRequestError('the member "params" must be an object: parameters are named')
    request_id = message.get("id", msgspec.UNSET)
    if isinstance(request_id, bool) or not isinstance(
        request_id, (str, int, type(None), msgspec.UnsetType)
    ):
        raise MalformedRequestError('the member "id" must be a string, a whole number or null')
    return Request(method, params, request_id)


def error_object(error: VhostdError) -> dict[str, Any]:
    """The JSON-RPC error of an error that vhostd means to report."""
    return {"code": error.rpc_code, "message": str(error), "data": {"kind": error.kind}}


def error_reply(request_id: object, error: dict[str, Any]) -> dict[str, Any]:
    """The reply that carries an error."""
    return {"jsonrpc": "2.0", "error": error, "id": request_id}
