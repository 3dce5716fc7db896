"""Reading the body of a request, in a thread of its own: nothing that a sender can send keeps the event loop from others.

What a body may hold is counted before anything is built from it. A megabyte of JSON can be half a million values, each of which
costs a hundred bytes to hold and several errors to refuse.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from fastvlp.serve.limits import Limits, Refusal, bad_request
from fastvlp.serve.messages import RequestBody, parse_json

# The most values of a mapping, and of everything that a body holds.
FIELDS, VALUES = 256, 10_000
M = TypeVar("M", bound=RequestBody)


async def read_body(kind: type[M], request: Request, limits: Limits, executor: Executor) -> M:
    """Reads the body of a request. Raises Refusal that says what is wrong, and in which field."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "multipart/form-data":
        read = _read_form
    elif media and media != "application/json":
        raise Refusal(415, "unsupported_media_type", f"{media}: send application/json or multipart/form-data")
    else:
        read = _read_json
    body = await request.body()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, read, kind, body, request, limits)


def _read_json(kind: type[M], body: bytes, request: Request, limits: Limits) -> M:
    # Texts may be full of commas.
    most = VALUES + limits.inputs * limits.characters
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        raise bad_request(f"more than {most} values; {VALUES} are allowed in a request", "too_many")
    value = parse_json("the body", body)
    check_lengths(value, limits)
    return _validated(kind, value)


def check_lengths(value: Any, limits: Limits) -> None:
    """Raises Refusal if a list or a mapping is longer than any that is allowed, or all of them together."""
    total, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, list | dict):
            continue
        total += len(part)
        if isinstance(part, list) and len(part) > max(limits.inputs, 64):
            raise bad_request(f"{len(part)} inputs; {limits.inputs} are allowed in a request", "too_many")
        if isinstance(part, dict) and len(part) > FIELDS:
            raise bad_request(f"{len(part)} fields; {FIELDS} are allowed", "too_many")
        if total > VALUES:
            raise bad_request(f"more than {VALUES} values in a request", "too_many")
        waiting += part if isinstance(part, list) else part.values()


def _validated(kind: type[M], value: Any) -> M:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise bad_request(_describe(error)) from None


def _describe(error: ValidationError) -> str:
    """Describes the deepest error: of a choice of types, it is of the one that fits best."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    worst = max(errors, key=lambda e: len(e["loc"]))
    # Names of fields and places in lists; not those of the types that were tried.
    where = ".".join(str(part) for part in worst["loc"] if re.fullmatch("[a-z_]+|[0-9]+", str(part)))
    what = worst["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def _read_form(kind: type[M], body: bytes, request: Request, limits: Limits) -> M:
    # Starlette's parser is asynchronous, and waits for nothing here.
    form = asyncio.run(_form(body, request, limits))
    fields = kind.from_form(form)
    check_lengths({name: value for name, value in fields.items() if isinstance(value, Mapping)}, limits)
    return _validated(kind, fields)


async def _form(body: bytes, request: Request, limits: Limits) -> list[tuple[str, str | bytes]]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        whole = Request(request.scope, receive)
        async with whole.form(max_files=limits.inputs, max_fields=limits.inputs + 8) as form:
            return [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
    except MultiPartException as error:
        raise bad_request(f"malformed multipart form: {error.message}") from error
    except (ValueError, KeyError, LookupError) as error:
        raise bad_request(f"malformed multipart form ({error})") from error
