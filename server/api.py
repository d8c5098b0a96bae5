"""Our own HTTP API beside Flower's, at /v1/fedchorus: jobs for operators, certificates and the roster for sites.

The guard has checked who calls. JSON in, JSON out; a model travels in pieces.

| path                          | who      | what                                                             |
|-------------------------------|----------|------------------------------------------------------------------|
| GET  federation               | both     | name, version, time: what `fedchorus doctor` compares            |
| PUT  models/HASH?at=N         | operator | a piece of an initial model from byte N on                       |
| POST jobs                     | operator | {toml, model, approvals}: submit                                 |
| GET  jobs, jobs/ID            | operator | where they stand                                                 |
| GET  jobs/ID/events?after=N   | operator | what happened                                                    |
| GET  jobs/ID/result           | operator | {toml, summary}: the resolved job, and of a finished one its summary |
| GET  jobs/ID/model?at=N       | operator | a piece of the model                                             |
| POST jobs/ID/stop, .../resume | operator |                                                                  |
| GET  sites                    | operator | who is there, who has signed the roster                          |
| POST site/certificate         | site     | {csr}: a new certificate                                         |
| POST site/roster              | site     | {signature}: its signature under the roster; the roster comes back |
| POST internal/wait, .../ring  | ServerApp | see `server.link`                                               |
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from privacy.errors import FedchorusError

PIECE = 2**23  # Bytes of a model in one call.
MOST_BODY = 2**22  # Bytes of anything else.


class Office(Protocol):
    """What answers; `server.coordinator.Coordinator`."""

    def federation(self) -> dict[str, Any]: ...
    def keep_model(self, digest: str, at: int, piece: bytes) -> dict[str, Any]: ...
    def submit(self, record: dict[str, Any], *, operator: str) -> dict[str, Any]: ...
    def jobs(self) -> list[dict[str, Any]]: ...
    def job(self, name: str) -> dict[str, Any]: ...
    def events(self, name: str, after: int) -> list[dict[str, Any]]: ...
    def result(self, name: str) -> dict[str, Any]: ...
    def model(self, name: str, at: int) -> bytes: ...
    def stop_job(self, name: str) -> dict[str, Any]: ...
    def resume_job(self, name: str) -> dict[str, Any]: ...
    def sites(self) -> dict[str, Any]: ...
    def certificate(self, site: str, csr: str, certificate_der: bytes) -> dict[str, Any]: ...
    def sign_roster(self, site: str, signature: str) -> dict[str, Any]: ...
    def metrics(self) -> str: ...
    def ring(self, sites: list[str]) -> None: ...
    async def wait(self, since: int, timeout_s: float) -> dict[str, Any]: ...


class BadCall(FedchorusError):
    """A call of this API that it does not know."""


def make_api(office: Office) -> Starlette:
    """The API as an ASGI app. Every `FedchorusError` is a 400 with its one line."""

    def route(path: str, method: str, who: str, answer: Callable[[Request], Awaitable[Any]]) -> Route:
        async def endpoint(request: Request) -> Response:
            caller = request.scope["fedchorus"]
            if not {"operator": caller.operator, "site": caller.site, "internal": caller.internal}.get(who, True):
                return JSONResponse({"error": f"this call is for {_WHO[who]}"}, 403)
            try:
                answered = await answer(request)
            except FedchorusError as error:
                return JSONResponse({"error": str(error)}, 400)
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError):
                return JSONResponse({"error": "the call is not one of this server's version; compare versions"}, 400)
            if isinstance(answered, bytes):
                return Response(answered, media_type="application/octet-stream")
            return JSONResponse(answered)

        return Route(f"/v1/fedchorus/{path}", endpoint, methods=[method])

    def name(request: Request) -> str:
        return str(request.path_params["job"])

    async def keep_model(request: Request) -> Any:
        digest, piece = request.path_params["digest"], await _body(request, PIECE)
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise BadCall("a model is named by its SHA-256")
        return await run_in_threadpool(office.keep_model, digest, _number(request, "at"), piece)

    async def submit(request: Request) -> Any:
        operator = request.scope["fedchorus"].operator
        return await run_in_threadpool(lambda record: office.submit(record, operator=operator), await _json(request))

    async def certificate(request: Request) -> Any:
        caller, record = request.scope["fedchorus"], await _json(request)
        return await run_in_threadpool(office.certificate, caller.site, str(record["csr"]), caller.certificate_der)

    async def sign_roster(request: Request) -> Any:
        site, record = request.scope["fedchorus"].site, await _json(request)
        return await run_in_threadpool(office.sign_roster, site, str(record["signature"]))

    async def wait(request: Request) -> Any:
        record = await _json(request)
        return await office.wait(int(record["since"]), float(record["timeout_s"]))

    async def ring(request: Request) -> Any:
        office.ring([str(site) for site in (await _json(request))["sites"]])
        return {}

    def simply(answer: Callable[..., Any], *arguments: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Any]]:
        async def call(request: Request) -> Any:
            return await run_in_threadpool(answer, *(argument(request) for argument in arguments))

        return call

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(office.metrics())

    return Starlette(
        routes=[
            Route("/metrics", metrics, methods=["GET"]),
            route("federation", "GET", "both", simply(office.federation)),
            route("models/{digest}", "PUT", "operator", keep_model),
            route("jobs", "POST", "operator", submit),
            route("jobs", "GET", "operator", simply(office.jobs)),
            route("jobs/{job}", "GET", "operator", simply(office.job, name)),
            route("jobs/{job}/events", "GET", "operator", simply(office.events, name, lambda r: _number(r, "after"))),
            route("jobs/{job}/result", "GET", "operator", simply(office.result, name)),
            route("jobs/{job}/model", "GET", "operator", simply(office.model, name, lambda r: _number(r, "at"))),
            route("jobs/{job}/stop", "POST", "operator", simply(office.stop_job, name)),
            route("jobs/{job}/resume", "POST", "operator", simply(office.resume_job, name)),
            route("sites", "GET", "operator", simply(office.sites)),
            route("site/certificate", "POST", "site", certificate),
            route("site/roster", "POST", "site", sign_roster),
            route("internal/wait", "POST", "internal", wait),
            route("internal/ring", "POST", "internal", ring),
        ]
    )


_WHO = {"operator": "an operator with a token", "site": "a site with its certificate", "internal": "the server itself"}


def _number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "0")
    if not re.fullmatch("[0-9]{1,15}", text):
        raise BadCall(f"{name} is not a whole number")
    return int(text)


async def _body(request: Request, most: int) -> bytes:
    parts: list[bytes] = []
    async for part in request.stream():
        parts.append(part)
        if sum(map(len, parts)) > most:
            raise BadCall(f"the body is longer than {most} bytes")
    return b"".join(parts)


async def _json(request: Request) -> dict[str, Any]:
    import json

    record = json.loads(await _body(request, MOST_BODY))
    if not isinstance(record, dict):
        raise BadCall("expected a JSON object")
    return record
