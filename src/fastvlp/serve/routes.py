"""What can be asked over HTTP. Every body is read by hand, because it may be JSON or a multipart form."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from torch import Tensor

from fastvlp.search.embedder import mean_direction
from fastvlp.serve import messages as m
from fastvlp.serve import responses as a
from fastvlp.serve.guard import COOKIE, given_key, known_key, reply
from fastvlp.serve.limits import Refusal, refuse
from fastvlp.serve.service import Service, picture_id, sample_direction

REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": a.Failure, "description": "What the sender can mend"},
    "503": {"model": a.Failure, "description": "Full, slow or stopping; Retry-After says when to try again"},
}
router = APIRouter(responses=FAILURES)


def of_request(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(of_request)]
KINDS = ("image/webp", "image/png", "image/jpeg")
PICTURES: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {} for kind in KINDS}}}
# Ids may hold slashes, as keys of records from sub-folders do.
ITEM, PICTURE = "/v1/items/{id:path}", "/v1/pictures/{id:path}"


def takes(kind: type[m.Message], form: dict[str, Any]) -> dict[str, Any]:
    """The request body of a route for the OpenAPI document. `form`: properties of the multipart form that are not those of
    the JSON."""
    json = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
    multipart = {"schema": {"type": "object", "properties": form}}
    content = {"application/json": json, "multipart/form-data": multipart}
    return {"requestBody": {"required": True, "content": content}}


STRING, FILE = {"type": "string"}, {"type": "string", "format": "binary"}
MANY = {"input": {"type": "array", "items": STRING}, "image": {"type": "array", "items": FILE}}


@router.post(
    "/v1/embeddings", response_model=a.Embeddings, openapi_extra=takes(m.EmbeddingsRequest, MANY), tags=["model"]
)
async def embeddings(request: Request, served: Served) -> Response:
    """Unit vectors of texts and pictures, in one space. OpenAI's shape."""
    asked = await m.read(m.EmbeddingsRequest, request, served.limits.inputs)
    if asked.model not in (None, served.name, served.embedder.fingerprint):
        raise Refusal(404, "model_not_found", f"{asked.model}: this service has {served.name}")
    if asked.dimensions not in (None, served.embedder.width):
        raise refuse(f"dimensions: the vectors of {served.name} have {served.embedder.width}")
    inputs = asked.input if isinstance(asked.input, list) else [asked.input]
    served.few(inputs)
    texts = [value for value in inputs if isinstance(value, str)]
    images = [value.image for value in inputs if not isinstance(value, str)]
    pixels = await served.pixels(images)
    (text_rows, tokens), image_rows = await asyncio.gather(served.texts(texts), served.images(pixels))
    rows = {True: iter(text_rows), False: iter(image_rows)}
    vectors = [next(rows[isinstance(value, str)]) for value in inputs]
    data = [
        {"object": "embedding", "index": i, "embedding": shown(vector, asked.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    model = {"model": served.name, "fingerprint": served.embedder.fingerprint}
    return reply({"object": "list", "data": data, **model, "usage": usage})


def shown(vector: np.ndarray, encoding: str) -> list[float] | str:
    """base64 holds little-endian float32, as OpenAI's does."""
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def depicted(served: Service, asked: m.Depicted | m.SearchRequest) -> Tensor:
    """The pixels of a picture that was sent or that the index kept."""
    if asked.image is not None:
        return (await served.pixels([asked.image]))[0]
    assert asked.id is not None
    data = await served.picture(asked.id)
    if data is None:
        raise Refusal(404, "no_picture", f"no picture of an item {asked.id!r}")
    return (await served.pixels([data]))[0]


@router.post(
    "/v1/score",
    response_model=a.Scores,
    openapi_extra=takes(m.ScoreRequest, {"text": MANY["input"], "image": MANY["image"]}),
    tags=["model"],
)
async def score(request: Request, served: Served) -> Response:
    """How well texts and pictures fit: the cosine of their vectors, and what the model says that reads both, where it can."""
    asked = await m.read(m.ScoreRequest, request, served.limits.inputs)
    if "embed" not in served.embedder.can:
        served.need("match")
    served.few(asked.pairs)
    texts = [pair.text for pair in asked.pairs]
    pixels = await asyncio.gather(*(depicted(served, pair) for pair in asked.pairs))
    scores: list[dict[str, float]] = [{} for _ in texts]
    if "embed" in served.embedder.can:
        (text_rows, _), image_rows = await asyncio.gather(served.texts(texts), served.images(pixels))
        for found, value in zip(scores, (text_rows * image_rows).sum(1).tolist()):
            found["similarity"] = value
    if "match" in served.embedder.can:
        for found, value in zip(scores, await served.match(pixels, texts)):
            found["match"] = value
    return reply({"model": served.name, "scores": scores})


SEARCHED = {
    "text": STRING,
    "image": FILE,
    "id": STRING,
    "where": STRING,
    "offset": {"type": "integer"},
    "limit": {"type": "integer"},
}


@router.post(
    "/v1/search",
    response_model=a.Found,
    openapi_extra=takes(m.SearchRequest, SEARCHED | {"rerank": {"type": "integer"}}),
    tags=["index"],
)
async def search(request: Request, served: Served) -> Response:
    """Items of the index, the most similar first; by pages."""
    began = time.perf_counter()
    asked = await m.read(m.SearchRequest, request, 1)
    end = asked.offset + asked.limit
    if end > served.limits.results:
        raise refuse(f"offset and limit reach {end}; a search goes {served.limits.results} deep", "too_deep")
    if asked.rerank and asked.text is None:
        raise refuse("rerank: a text is needed to read beside the pictures")
    if asked.rerank:
        served.need("match")
    vector = await sought(served, asked)
    # Of the pages after those that are read once more, the order is the index's.
    read = asked.rerank if asked.offset < asked.rerank else 0
    # An item that is sought by its own vector is left out: it would be the first of its own results.
    skipped = int(asked.id is not None)
    hits = await served.search(vector, max(end, read) + skipped + 1, asked.where)
    hits = [hit for hit in hits if hit.id != asked.id]
    matches: dict[str, float] = {}
    if read and asked.text is not None:
        matches = await served.matches(hits[:read], asked.text)
        hits.sort(key=lambda hit: -matches.get(hit.id, float("-inf")))
    page = hits[asked.offset : end]
    more = len(hits) > end and end < served.limits.results
    results = [told(served, hit) | ({"match": matches[hit.id]} if hit.id in matches else {}) for hit in page]
    took = {"next_offset": end if more else None, "took_ms": round(1000 * (time.perf_counter() - began), 2)}
    return reply({"results": results, "offset": asked.offset, "limit": asked.limit, **took})


async def sought(served: Service, asked: m.SearchRequest) -> np.ndarray:
    """The unit vector to search by."""
    parts = []
    if asked.text is not None:
        parts.append((await served.texts([asked.text]))[0][0])
    if asked.image is not None:
        parts.append((await served.images(await served.pixels([asked.image])))[0])
    if asked.id is not None:
        parts.append((await served.item(asked.id)).vector)
    return mean_direction(parts)


def told(served: Service, hit: Any) -> dict[str, Any]:
    return {"id": hit.id, "score": hit.score, "info": dict(hit.info), "image": picture_of(hit.id)}


def picture_of(id: str) -> str:
    return f"/v1/pictures/{quote(id, safe='')}"


@router.get("/v1/items", response_model=a.Some, tags=["index"])
async def some_items(
    served: Served,
    limit: Annotated[int, Query(ge=1, le=100)] = 24,
    seed: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> Response:
    """Some items, for a first look: the same for the same seed, in no order that means anything."""
    hits = await served.search(sample_direction(served.embedder.width, seed), limit)
    return reply({"results": [told(served, hit) for hit in hits]})


FIELDS = {"image": FILE, "id": STRING, "caption": STRING, "info": STRING}


@router.post(
    "/v1/items", response_model=a.Item, openapi_extra=takes(m.ItemRequest, FIELDS), status_code=201, tags=["index"]
)
async def add_item(request: Request, served: Served) -> Response:
    """Adds a picture to the index; when the answer comes, it is found."""
    asked = await m.read(m.ItemRequest, request, 1)
    id = asked.id or picture_id(asked.image)
    info = asked.info | ({"caption": asked.caption} if asked.caption is not None else {})
    pixels = await served.pixels([asked.image])
    await served.add(id, (await served.images(pixels))[0], info, asked.image)
    return reply({"id": id, "info": info, "image": picture_of(id)}, 201)


@router.delete(ITEM, response_model=a.Deleted, tags=["index"])
async def delete_item(id: str, served: Served) -> Response:
    """Takes an item out of the index."""
    if not await served.remove(id):
        raise Refusal(404, "unknown_item", f"no item {id!r}")
    return reply({"id": id, "deleted": True})


@router.get(PICTURE, response_class=Response, responses=PICTURES, tags=["index"])
async def item_image(id: str, served: Served) -> Response:
    """The picture of an item as the index keeps it, of at most 320 pixels."""
    data = await served.picture(id)
    if data is None:
        raise Refusal(404, "no_picture", f"no picture of an item {id!r}")
    kind = "image/webp" if data[8:12] == b"WEBP" else "image/png" if data[:4] == b"\x89PNG" else "image/jpeg"
    return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})


@router.get(ITEM, response_model=a.Item, tags=["index"])
async def item(id: str, served: Served) -> Response:
    """What the index has of an item, but for its vector."""
    found = await served.item(id)
    return reply({"id": id, "info": found.info, "image": picture_of(id)})


SHOWN = {"image": FILE, "id": STRING}


@router.post("/v1/caption", response_model=a.Caption, openapi_extra=takes(m.CaptionRequest, SHOWN), tags=["model"])
async def caption(request: Request, served: Served) -> Response:
    """What the model says of a picture."""
    asked = await m.read(m.CaptionRequest, request, 1)
    served.need("caption")
    return reply({"model": served.name, "caption": await served.caption(await depicted(served, asked))})


@router.post(
    "/v1/answer",
    response_model=a.Reply,
    openapi_extra=takes(m.AnswerRequest, SHOWN | {"question": STRING}),
    tags=["model"],
)
async def answer(request: Request, served: Served) -> Response:
    """What the model answers to a question about a picture."""
    asked = await m.read(m.AnswerRequest, request, 1)
    served.need("answer")
    return reply({"model": served.name, "answer": await served.answer(await depicted(served, asked), asked.question)})


@router.get("/health", response_model=a.Health, tags=["service"])
async def health(request: Request, served: Served) -> Response:
    """What is served, and whether the model's thread lives."""
    state = request.app.state
    facts: dict[str, Any] = {"model": served.name, "fingerprint": served.embedder.fingerprint}
    facts |= {"width": served.embedder.width, "can": sorted(served.embedder.can)}
    facts |= {"languages": served.embedder.languages, "items": await served.count()}
    facts |= {
        "report": state.report is not None,
        "key": bool(state.keys) and not known_key(request.headers, state.keys),
    }
    alive = served.batcher.alive
    return reply({"status": "ok" if alive else "failed", **facts}, 200 if alive else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["service"])
async def metrics(served: Served) -> PlainTextResponse:
    """Prometheus' text format."""
    items = await served.count()
    text = served.metrics.text(waiting=served.batcher.waiting, **({} if items is None else {"items": items}))
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


@router.post("/session", response_model=a.Status, tags=["service"])
async def session(request: Request) -> Response:
    """A cookie for the page instead of the key that comes as a bearer token: a browser's pictures carry no token."""
    keys = request.app.state.keys
    if keys and not known_key(request.headers, keys):
        raise Refusal(401, "invalid_api_key", "not a key of this service")
    answered = reply({"status": "ok"})
    if keys:
        key, secure = quote(given_key(request.headers), safe=""), request.url.scheme == "https"
        answered.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure)
    return answered


@router.get("/report", include_in_schema=False)
async def report(request: Request) -> Response:
    path = request.app.state.report
    if path is None or not path.is_file():
        raise Refusal(404, "no_report", "this service has no report; start it with `vlp serve EXPORT --report FILE`")
    return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})


def names(kinds: Sequence[type[m.Message]]) -> dict[str, Any]:
    """JSON schemas of the request bodies and what they hold, by name."""
    found: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[kind.__name__] = schema
    return found
