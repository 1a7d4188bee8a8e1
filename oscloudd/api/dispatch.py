"""One JSON text in, one JSON text out: jsonrpcserver between our codec and our methods.

Turns every error into its code, words and kind; an exception nobody expected becomes an incident
number, and its text stays in the log.
"""

import asyncio
import difflib
import logging
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import msgspec
from jsonrpcserver import Error, Result, Success
from jsonrpcserver.async_main import dispatch_to_serializable

from oscloudd.api.caller import Caller
from oscloudd.api.event_stream import EventStream
from oscloudd.api.methods import METHODS, Method
from oscloudd.api.params import convert_params
from oscloudd.cloud.cloud import Cloud
from oscloudd.errors import (
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    CloudError,
    InternalError,
)

_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()
# One is read while another is put into words; a log on a slow disk may hold up a third.
_LISTS_AT_ONCE = 3


class Dispatcher:
    """Answers requests for one cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self.event_stream = EventStream(cloud.events)
        lists = asyncio.Semaphore(_LISTS_AT_ONCE)
        self._methods = {
            name: _bind(name, method, cloud, lists if method.is_list else nullcontext())
            for name, method in METHODS.items()
        }

    async def answer(self, request: bytes, caller: Caller) -> bytes | None:
        """Give the answer to one request, or None to a notification."""
        response = await dispatch_to_serializable(
            request,
            self._methods,
            context=caller,
            deserializer=msgspec.json.decode,
            validator=_validate,
        )
        if not isinstance(response, dict):
            return None
        if "error" in response:
            response["error"] = _in_our_words(response["error"], request)
        return _encoder.encode(response)


def error_answer(failure: CloudError) -> bytes:
    """Give an error that answers no request in particular."""
    error = {"code": failure.code, "message": failure.message, "data": failure.as_data()}
    return _encoder.encode({"jsonrpc": "2.0", "error": error, "id": None})


def _bind(
    name: str, method: Method, cloud: Cloud, turn: AbstractAsyncContextManager[None]
) -> Callable[..., Any]:
    async def call(caller: Caller, /, *positional: Any, **params: Any) -> Result:
        try:
            if positional:
                return Error(-32602, f"{name}: parameters are named, never positional", _kind())
            checked = convert_params(name, params, method.shape)
            async with turn:
                return Success(await method.handler(cloud, checked, caller))
        except CloudError as error:
            return Error(error.code, error.message, error.as_data())
        except Exception:
            # jsonrpcserver would send the exception's text to the caller.
            incident = secrets.token_hex(4)
            _log.exception("incident %s in %s", incident, name)
            failure = InternalError(
                f"something unexpected happened (incident {incident})",
                hint=f"the daemon's log has the story: look for {incident}",
                incident=incident,
            )
            return Error(failure.code, failure.message, failure.as_data())

    return call


def _kind() -> dict[str, str]:
    return {"kind": "invalid_argument"}


def _validate(request: Any) -> Any:
    """Judge the shape of a request; a batch is refused, as its members would run all at once."""
    if not isinstance(request, dict):
        raise ValueError("a request is one object; batches are not taken")
    good = (
        request.get("jsonrpc") == "2.0"
        and isinstance(request.get("method"), str)
        and isinstance(request.get("params", {}), (dict, list))
        and isinstance(request.get("id"), (str, int, float, type(None)))
        and request.keys() <= {"jsonrpc", "method", "params", "id"}
    )
    if not good:
        raise ValueError('a request has "jsonrpc": "2.0", "method", "params" and "id"')
    return request


def _in_our_words(error: dict[str, Any], request: bytes) -> dict[str, Any]:
    """Give jsonrpcserver's own errors a sentence and a kind like all others."""
    if isinstance(error.get("data"), dict) and "kind" in error["data"]:
        return error
    code = error["code"]
    if code == METHOD_NOT_FOUND:
        method = msgspec.json.decode(request)["method"]
        near = difflib.get_close_matches(method, METHODS, 1)
        hint = f"did you mean {near[0]}?" if near else "see: oscloudctl --help"
        message, kind = f"there is no method {method[:80]!r}", "method_not_found"
        return {"code": code, "message": message, "data": {"kind": kind, "hint": hint}}
    if code in (PARSE_ERROR, INVALID_REQUEST):
        kind = "parse_error" if code == PARSE_ERROR else "invalid_request"
        what = "this line is no JSON" if code == PARSE_ERROR else "this is no JSON-RPC 2.0 request"
        return {
            "code": code,
            "message": f"{what}: {error.get('data')}"[:300],
            "data": {"kind": kind},
        }
    return {"code": code, "message": str(error["message"]), "data": {"kind": "invalid_argument"}}
