"""A request's parameters: a bounded body, JSON or form-encoded."""

import asyncio
import json
from typing import Any
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

MAX_BODY_BYTES = 1 << 20

# A body of one MiB takes less on any line; slower is somebody holding the connection.
BODY_TIMEOUT_SECONDS = 30.0

_FORM = "application/x-www-form-urlencoded"


async def read_parameters(request: Request) -> dict[str, Any]:
    """Give the parameters in a request's body; an empty body has none.

    Raises HTTPException 413 for a body that is too long, 408 for one that does not come, 400 for
    one that can't be read.
    """
    text = await _read_text(request)
    # `curl -d '{…}'` sends JSON and calls it a form.
    if request.headers.get("content-type", "").startswith(_FORM) and text.strip()[:1] != "{":
        return dict(parse_qsl(text))
    return parse_object(text)


def parse_object(text: str) -> dict[str, Any]:
    """Read a JSON object; raise HTTPException 400 for anything else."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error
    if not isinstance(value, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return value


async def _read_text(request: Request) -> str:
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_long()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_long()
        return body.decode()
    except TimeoutError as error:
        raise HTTPException(408, "the body did not arrive") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the body was cut off") from error
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the body is not UTF-8") from error


def _too_long() -> HTTPException:
    message = f"the body is longer than {MAX_BODY_BYTES} bytes"
    return HTTPException(413, message, headers={"Connection": "close"})
