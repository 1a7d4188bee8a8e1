"""The shim's routes: each reads its parameters, calls the daemon in a thread, answers JSON."""

import asyncio
from collections.abc import Awaitable, Callable

import anyio.to_thread
from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from oscloudctl.client import Client
from oscloudctl.http import legacy
from oscloudctl.http.answers import answer_failure, answer_json
from oscloudctl.http.bodies import read_parameters
from oscloudctl.http.guard import Guard
from oscloudd.errors import CloudError, DaemonUnreachableError

WELCOME = "Welcome to OS Cloud!\n"

# Creates take minutes: apart from the quick calls, so that these never wait for a thread.
QUICK_THREADS = 16
LONG_THREADS = 48

Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(socket_path: str, *, listen_host: str) -> Starlette:
    """Give the application that serves the daemon on `socket_path`."""
    quick, long = CapacityLimiter(QUICK_THREADS), CapacityLimiter(LONG_THREADS)

    def route(operation: legacy.Operation, method: str, limiter: CapacityLimiter) -> Route:
        endpoint = _build_endpoint(operation, socket_path, limiter)
        return Route(f"/{operation.__name__}", endpoint, methods=[method])

    return Starlette(
        routes=[
            Route("/", _welcome, methods=["GET"]),
            route(legacy.vm_list, "GET", quick),
            route(legacy.vm_info, "POST", quick),
            route(legacy.vm_create, "POST", long),
            route(legacy.vm_start, "POST", long),
            route(legacy.vm_stop, "POST", long),
        ],
        middleware=[Middleware(Guard, listen_host=listen_host)],
        exception_handlers={HTTPException: _answer_http_error, Exception: _answer_fault},
    )


def _build_endpoint(
    operation: legacy.Operation, socket_path: str, limiter: CapacityLimiter
) -> Endpoint:
    def call(client: Client, body: legacy.Body) -> Response:
        try:
            with client:
                return answer_json(operation(client, body))
        except DaemonUnreachableError as error:
            return answer_failure(error.http_status, error.message)
        except CloudError as error:
            # The original's clients look for "status" in an answer that is always 200.
            return answer_failure(200, legacy.describe_error(error))

    async def endpoint(request: Request) -> Response:
        body, client = await read_parameters(request), Client(socket_path)
        try:
            return await anyio.to_thread.run_sync(
                call, client, body, abandon_on_cancel=True, limiter=limiter
            )
        except asyncio.CancelledError:
            # We are stopping, and the interpreter waits for its threads.
            client.abort()
            raise

    return endpoint


async def _welcome(_request: Request) -> Response:
    return PlainTextResponse(WELCOME)


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return answer_failure(error.status_code, error.detail, error.headers)


async def _answer_fault(_request: Request, _error: Exception) -> Response:
    return answer_failure(500, "the HTTP shim failed; its log says why")
