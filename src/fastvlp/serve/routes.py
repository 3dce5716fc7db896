"""The HTTP routes. They read request bodies themselves, without FastAPI, because a body may be JSON or a form."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from torch import Tensor

from fastvlp.data.tokenize import Reading
from fastvlp.search.calibration import Calibration
from fastvlp.search.embedder import mean_direction
from fastvlp.search.engines.interface import Hit
from fastvlp.serve import messages, responses
from fastvlp.serve.access import COOKIE, SESSION_S, Access
from fastvlp.serve.guard import json_response
from fastvlp.serve.limits import Refusal, bad_request
from fastvlp.serve.service import Service, picture_id, random_direction

REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": responses.Failure, "description": "The sender can correct the request"},
    "503": {
        "model": responses.Failure,
        "description": "The service is full, slow or stopping; Retry-After says when to retry",
    },
}
router = APIRouter(responses=FAILURES)


def service_of(request: Request) -> Service:
    """Returns the service that handles a request."""
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(service_of)]
KINDS = ("image/webp", "image/png", "image/jpeg")
PICTURES: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {} for kind in KINDS}}}
# Ids may contain slashes, as keys of records from sub-folders do.
ITEM, PICTURE = "/v1/items/{id:path}", "/v1/pictures/{id:path}"


def takes(kind: type[messages.RequestBody], form: dict[str, Any]) -> dict[str, Any]:
    """Describes the request body of a route for the OpenAPI document. `form`: properties of the multipart form."""
    json = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
    multipart = {"schema": {"type": "object", "properties": form}}
    content = {"application/json": json, "multipart/form-data": multipart}
    return {"requestBody": {"required": True, "content": content}}


STRING, FILE = {"type": "string"}, {"type": "string", "format": "binary"}
INPUTS_FORM = {"input": {"type": "array", "items": STRING}, "image": {"type": "array", "items": FILE}}


@router.post(
    "/v1/embeddings",
    response_model=responses.Embeddings,
    openapi_extra=takes(messages.EmbeddingsRequest, INPUTS_FORM),
    tags=["model"],
)
async def embeddings(request: Request, service: Served) -> Response:
    """Returns unit vectors of texts and pictures in one space, in the format of OpenAI's API."""
    body = await service.read(messages.EmbeddingsRequest, request)
    if body.model not in (None, service.name, service.embedder.fingerprint):
        raise Refusal(404, "model_not_found", f"{body.model}: this service serves {service.name}")
    if body.dimensions not in (None, service.embedder.width):
        raise bad_request(f"dimensions: the vectors of {service.name} have {service.embedder.width} dimensions")
    inputs = body.input if isinstance(body.input, list) else [body.input]
    service.check_count(inputs)
    texts = [value for value in inputs if isinstance(value, str)]
    images = [value.image for value in inputs if not isinstance(value, str)]
    pixels = await service.pixels(images)
    (text_rows, readings), image_rows = await asyncio.gather(service.texts(texts), service.images(pixels))
    tokens = sum(min(reading.tokens, service.embedder.max_length) for reading in readings)
    rows = {True: iter(text_rows), False: iter(image_rows)}
    vectors = [next(rows[isinstance(value, str)]) for value in inputs]
    data = [
        {"object": "embedding", "index": i, "embedding": encode_vector(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    model = {"model": service.name, "fingerprint": service.embedder.fingerprint}
    places = [i for i, value in enumerate(inputs) if isinstance(value, str)]
    return json_response({"object": "list", "data": data, **model, "usage": usage, "notes": notes(readings, places)})


def notes(readings: Sequence[Reading], places: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Returns a note for each text that was cut or has unknown words. `places`: the position of each text in the request."""
    numbered = zip(places if places is not None else range(len(readings)), readings)
    return [
        {"index": i, "cut": reading.cut or None, "unknown": reading.unknown}
        for i, reading in numbered
        if reading.cut or reading.unknown
    ]


def encode_vector(vector: np.ndarray, encoding: str) -> list[float] | str:
    """Encodes a vector as a list of numbers, or as base64 of little-endian float32, as OpenAI's API does."""
    return vector.tolist() if encoding == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def picture_pixels(service: Service, body: messages.PictureRequest | messages.SearchRequest) -> Tensor:
    """Decodes the picture of a request, or the stored picture of the item that it names."""
    if body.image is not None:
        return (await service.pixels([body.image]))[0]
    assert body.id is not None
    data = await service.picture(body.id)
    if data is None:
        raise Refusal(404, "no_picture", f"no picture of an item {body.id!r}")
    return (await service.pixels([data]))[0]


@router.post(
    "/v1/score",
    response_model=responses.Scores,
    openapi_extra=takes(messages.ScoreRequest, {"text": INPUTS_FORM["input"], "image": INPUTS_FORM["image"]}),
    tags=["model"],
)
async def score(request: Request, service: Served) -> Response:
    """Scores how well texts match pictures: by the cosine of their vectors and, if the model has learned it, by a match
    score."""
    body = await service.read(messages.ScoreRequest, request)
    if "embed" not in service.embedder.can:
        service.require("match")
    service.check_count(body.pairs)
    texts = [pair.text for pair in body.pairs]
    pixels = await asyncio.gather(*(picture_pixels(service, pair) for pair in body.pairs))
    scores: list[dict[str, float]] = [{} for _ in texts]
    if "embed" in service.embedder.can:
        (text_rows, _), image_rows = await asyncio.gather(service.texts(texts), service.images(pixels))
        for pair_scores, value in zip(scores, (text_rows * image_rows).sum(1).tolist()):
            pair_scores["similarity"] = value
    if "match" in service.embedder.can:
        for pair_scores, value in zip(scores, await service.match(pixels, texts)):
            pair_scores["match"] = value
    texts_notes = notes(await service.readings(texts))
    return json_response({"model": service.name, "scores": scores, "notes": texts_notes})


SEARCH_FORM = {
    "text": STRING,
    "image": FILE,
    "id": STRING,
    "where": STRING,
    "offset": {"type": "integer"},
    "limit": {"type": "integer"},
}


@router.post(
    "/v1/search",
    response_model=responses.SearchResults,
    openapi_extra=takes(messages.SearchRequest, SEARCH_FORM | {"rerank": {"type": "integer"}}),
    tags=["index"],
)
async def search(request: Request, service: Served) -> Response:
    """Returns one page of the items of the index, the most similar first."""
    began = time.perf_counter()
    body = await service.read(messages.SearchRequest, request)
    end = body.offset + body.limit
    if end > service.limits.results:
        raise bad_request(
            f"offset plus limit is {end}; a search returns at most {service.limits.results} results", "too_deep"
        )
    if body.rerank and body.text is None:
        raise bad_request("rerank: it needs a text to compare with the pictures")
    if body.rerank:
        service.require("match")
    vector, readings = await query_vector(service, body)
    # Pages after the re-ranked results keep the order of the index.
    reranked = body.rerank if body.offset < body.rerank else 0
    # If the query is an item's own picture, that item is left out: it would be its own first result.
    skipped = int(body.id is not None)
    hits = await service.search(vector, max(end, reranked) + skipped + 1, body.where)
    hits = [hit for hit in hits if hit.id != body.id]
    matches: dict[str, float] = {}
    if reranked and body.text is not None:
        matches = await service.match_hits(hits[:reranked], body.text)
        hits.sort(key=lambda hit: -matches.get(hit.id, float("-inf")))
    page = hits[body.offset : end]
    more = len(hits) > end and end < service.limits.results
    calibration = await service.calibration()
    by_text, by_picture = body.text is not None, body.image is not None or body.id is not None
    # Relevance is not defined for the mean direction of a text and a picture.
    used = None if by_text and by_picture else calibration
    paths = await picture_paths(service, [hit.id for hit in page])
    results = [
        hit_fields(hit, paths, used, by_text) | ({"match": matches[hit.id]} if hit.id in matches else {})
        for hit in page
    ]
    best = max((hit.score for hit in hits), default=None)
    near = None if by_picture or calibration is None or best is None else calibration.is_near(best)
    can_tell = None if by_picture or calibration is None else calibration.tells
    took = {"next_offset": end if more else None, "took_ms": round(1000 * (time.perf_counter() - began), 2)}
    page_fields = {"results": results, "offset": body.offset, "limit": body.limit}
    return json_response({**page_fields, **took, "near": near, "can_tell": can_tell, "notes": notes(readings)})


async def query_vector(service: Service, body: messages.SearchRequest) -> tuple[np.ndarray, list[Reading]]:
    """Returns the unit vector [E] to search by, and how the tokenizer reads the text. The vector is the mean direction of the
    text, picture and item in the request."""
    parts, readings = [], list[Reading]()
    if body.text is not None:
        rows, readings = await service.texts([body.text])
        parts.append(rows[0])
    if body.image is not None:
        parts.append((await service.images(await service.pixels([body.image])))[0])
    if body.id is not None:
        parts.append((await service.item(body.id)).vector)
    return mean_direction(parts), readings


def hit_fields(
    hit: Hit, paths: Mapping[str, str], calibration: Calibration | None = None, by_text: bool = False
) -> dict[str, Any]:
    """Returns the fields of a hit in a response."""
    relevance = None if calibration is None else calibration.relevance(hit.score, by_text)
    fields = {"id": hit.id, "score": hit.score, "relevance": relevance}
    return {**fields, "info": dict(hit.info), "image": paths.get(hit.id)}


async def picture_paths(service: Service, ids: Sequence[str]) -> dict[str, str]:
    """Returns the paths of the pictures of those items that have one."""
    return {id: f"/v1/pictures/{quote(id, safe='')}" for id in await service.with_pictures(ids)}


@router.get("/v1/items", response_model=responses.ItemList, tags=["index"])
async def some_items(
    service: Served,
    limit: Annotated[int, Query(ge=1, le=100)] = 24,
    seed: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> Response:
    """Returns arbitrary items, to show before a search. The same seed gives the same items; their order has no meaning."""
    hits = await service.search(random_direction(service.embedder.width, seed), limit)
    paths = await picture_paths(service, [hit.id for hit in hits])
    return json_response({"results": [hit_fields(hit, paths) for hit in hits]})


ITEM_FORM = {"image": FILE, "id": STRING, "caption": STRING, "info": STRING}


@router.post(
    "/v1/items",
    response_model=responses.Item,
    openapi_extra=takes(messages.ItemRequest, ITEM_FORM),
    status_code=201,
    tags=["index"],
)
async def add_item(request: Request, service: Served) -> Response:
    """Adds a picture to the index. Searches find it as soon as the response arrives."""
    body = await service.read(messages.ItemRequest, request)
    id = body.id or picture_id(body.image)
    info = body.info | ({"caption": body.caption} if body.caption is not None else {})
    pixels = await service.pixels([body.image])
    await service.add(id, (await service.images(pixels))[0], info, body.image)
    return json_response({"id": id, "info": info, "image": (await picture_paths(service, [id])).get(id)}, 201)


@router.delete(ITEM, response_model=responses.Deleted, tags=["index"])
async def delete_item(id: str, service: Served) -> Response:
    """Deletes an item of the index."""
    if not await service.remove(id):
        raise Refusal(404, "unknown_item", f"no item {id!r}")
    return json_response({"id": id, "deleted": True})


@router.get(PICTURE, response_class=Response, responses=PICTURES, tags=["index"])
async def item_image(id: str, service: Served) -> Response:
    """Returns the thumbnail of an item, at most 320 pixels on its longer side."""
    data = await service.picture(id)
    if data is None:
        raise Refusal(404, "no_picture", f"no picture of an item {id!r}")
    kind = "image/webp" if data[8:12] == b"WEBP" else "image/png" if data[:4] == b"\x89PNG" else "image/jpeg"
    return Response(data, media_type=kind, headers={"cache-control": "private, max-age=3600"})


@router.get(ITEM, response_model=responses.Item, tags=["index"])
async def read_item(id: str, service: Served) -> Response:
    """Returns the fields of an item."""
    item = await service.item(id)
    return json_response({"id": id, "info": item.info, "image": (await picture_paths(service, [id])).get(id)})


PICTURE_FORM = {"image": FILE, "id": STRING}


@router.post(
    "/v1/caption",
    response_model=responses.Caption,
    openapi_extra=takes(messages.CaptionRequest, PICTURE_FORM),
    tags=["model"],
)
async def caption(request: Request, service: Served) -> Response:
    """Captions a picture."""
    body = await service.read(messages.CaptionRequest, request)
    service.require("caption")
    return json_response({"model": service.name, "caption": await service.caption(await picture_pixels(service, body))})


@router.post(
    "/v1/answer",
    response_model=responses.Answer,
    openapi_extra=takes(messages.AnswerRequest, PICTURE_FORM | {"question": STRING}),
    tags=["model"],
)
async def answer(request: Request, service: Served) -> Response:
    """Answers a question about a picture."""
    body = await service.read(messages.AnswerRequest, request)
    service.require("answer")
    answered = await service.answer(await picture_pixels(service, body), body.question)
    texts_notes = notes(await service.readings([body.question]))
    return json_response({"model": service.name, "answer": answered, "notes": texts_notes})


@router.get("/v1/models", response_model=responses.Models, tags=["model"])
async def models(service: Served) -> Response:
    """Lists the model of this service, in the format of OpenAI's API."""
    return json_response({"object": "list", "data": [model_fields(service)]})


@router.get("/v1/models/{id:path}", response_model=responses.Model, tags=["model"])
async def model(id: str, service: Served) -> Response:
    """Returns the model of this service."""
    if id not in (service.name, service.embedder.fingerprint):
        raise Refusal(404, "model_not_found", f"{id}: this service serves {service.name}")
    return json_response(model_fields(service))


def model_fields(service: Service) -> dict[str, Any]:
    """Returns the description of the model in a response."""
    embedder = service.embedder
    own = {"fingerprint": embedder.fingerprint, "width": embedder.width, "can": sorted(embedder.can)}
    return {"id": service.name, "object": "model", "created": 0, "owned_by": "fastvlp", **own}


@router.get("/health", response_model=responses.Health, tags=["service"])
async def health(request: Request, service: Served) -> Response:
    """Returns what this service offers, and whether the thread that runs the model is alive."""
    state = request.app.state
    offers: dict[str, Any] = {"model": service.name, "fingerprint": service.embedder.fingerprint}
    offers |= {"width": service.embedder.width, "can": sorted(service.embedder.can)}
    offers |= {"languages": service.embedder.languages, "items": await service.count()}
    offers |= {
        "report": state.report is not None,
        "key": not state.access.allows(request.headers),
    }
    alive = service.batcher.alive
    return json_response({"status": "ok" if alive else "failed", **offers}, 200 if alive else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["service"])
async def metrics(service: Served) -> Response:
    """Returns counts and durations in the text format of Prometheus."""
    items = await service.count()
    text = service.metrics.text(waiting=service.batcher.waiting, **({} if items is None else {"items": items}))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.post("/session", response_model=responses.Status, tags=["service"])
async def session(request: Request) -> Response:
    """Sets a cookie that replaces the bearer token, for the search page: a browser loads pictures without the token."""
    access: Access = request.app.state.access
    if not access.allows(request.headers):
        raise Refusal(401, "invalid_api_key", "not a key of this service")
    response = json_response({"status": "ok"})
    if access.keys:
        secure = request.url.scheme == "https"
        response.set_cookie(
            COOKIE, access.open_session(), max_age=SESSION_S, httponly=True, samesite="strict", secure=secure
        )
    return response


@router.get("/report", include_in_schema=False)
async def report(request: Request) -> Response:
    path = request.app.state.report
    if path is None or not path.is_file():
        raise Refusal(404, "no_report", "this service has no report; start it with `vlp serve EXPORT --report FILE`")
    return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})


def body_schemas(kinds: Sequence[type[messages.RequestBody]]) -> dict[str, Any]:
    """Returns the JSON schemas of the request bodies and of their parts, by name."""
    schemas: dict[str, Any] = {}
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    return schemas
