"""The bodies of answers, for the OpenAPI document. The routes write the same fields straight to JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Note(ResponseBody):
    """A note on a text that was cut, or has words that the tokenizer does not know. `index`: position of the text or input.
    `cut`: the end of the text that was not read."""

    index: int
    cut: str | None
    unknown: list[str]


class Embedding(ResponseBody):
    """One vector. `embedding`: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(ResponseBody):
    prompt_tokens: int
    total_tokens: int


class Embeddings(ResponseBody):
    """Vectors in OpenAI's shape. `fingerprint`: of the export; an index is stamped with it."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    fingerprint: str
    usage: Usage
    notes: list[Note]


class Score(ResponseBody):
    """A score of how well a text matches a picture. `similarity`: cosine of their vectors. `match`: from layers that read
    both together, the logit for a match less the one against it, or the text's mean log-likelihood. Larger is better; values
    can be compared for one text or one picture."""

    similarity: float | None = None
    match: float | None = None


class Scores(ResponseBody):
    model: str
    scores: list[Score]
    notes: list[Note]


class Item(ResponseBody):
    """An item of the index. `image`: the path of its picture; null if it has none."""

    id: str
    info: dict[str, Any]
    image: str | None


class Hit(Item):
    """`score`: cosine. `relevance`: the same between that of pairs at random, 0, and that of pictures with their own captions
    (or with themselves, where a picture was searched by), 1; null where the index does not know these."""

    score: float
    relevance: float | None
    match: float | None = None


class ItemList(ResponseBody):
    results: list[Hit]


class SearchResults(ItemList):
    """One page of results. `next_offset`: of the next page; null at the end. `near`: whether the best result is as near to the
    text as 19 of 20 captions are to their own pictures; null where the index does not know this, where the model cannot tell,
    or where a picture was searched by. `can_tell`: false where more than one in twenty random pictures are as near to a caption
    as that; null where the index does not know this, or where a picture was searched by."""

    offset: int
    limit: int
    next_offset: int | None
    near: bool | None
    can_tell: bool | None
    took_ms: float
    notes: list[Note]


class Deleted(ResponseBody):
    id: str
    deleted: Literal[True]


class Caption(ResponseBody):
    model: str
    caption: str


class Answer(ResponseBody):
    model: str
    answer: str
    notes: list[Note]


class Model(ResponseBody):
    """The model, in OpenAI's shape. `created`: 0, nobody knows when."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fingerprint: str
    width: int
    can: list[str]


class Models(ResponseBody):
    object: Literal["list"]
    data: list[Model]


class Status(ResponseBody):
    status: Literal["ok", "failed"]


class Health(Status):
    """The state of the service. `can`: of embed, match, caption and answer. `languages`: of the captions in training. `items`:
    how many the index has; null while it does not answer. `key`: whether a key is needed that did not come."""

    model: str
    fingerprint: str
    width: int
    can: list[str]
    languages: list[Literal["en", "zh"]]
    items: int | None
    report: bool
    key: bool


class Failure(ResponseBody):
    """An error, in OpenAI's shape."""

    class Error(ResponseBody):
        message: str
        type: str
        code: str

    error: Error
