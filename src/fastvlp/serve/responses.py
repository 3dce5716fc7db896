"""What answers hold, for the OpenAPI document: the routes write them straight to JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Embedding(Answer):
    """`embedding`: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    """OpenAI's shape. `fingerprint`: of the model's weights, which an index is stamped with."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    fingerprint: str
    usage: Usage


class Score(Answer):
    """`similarity`: cosine of the vectors. `match`: by the model that reads both, the logit of a pair less that of none or the
    text's mean log-likelihood: larger is better, comparable for one text or one picture."""

    similarity: float | None = None
    match: float | None = None


class Scores(Answer):
    model: str
    scores: list[Score]


class Item(Answer):
    """`image`: where its picture is."""

    id: str
    info: dict[str, Any]
    image: str


class Hit(Item):
    score: float
    match: float | None = None


class Some(Answer):
    results: list[Hit]


class Found(Some):
    """`next_offset`: null at the end."""

    offset: int
    limit: int
    next_offset: int | None
    took_ms: float


class Deleted(Answer):
    id: str
    deleted: Literal[True]


class Caption(Answer):
    model: str
    caption: str


class Reply(Answer):
    model: str
    answer: str


class Status(Answer):
    status: Literal["ok", "failed"]


class Health(Status):
    """`can`: embed, match, caption, answer. `languages`: of the captions that the model was trained on. `items`: of the
    index; null while it does not say. `key`: whether one is asked for, and did not come."""

    model: str
    fingerprint: str
    width: int
    can: list[str]
    languages: list[Literal["en", "zh"]]
    items: int | None
    report: bool
    key: bool


class Failure(Answer):
    """OpenAI's shape of errors."""

    class Error(Answer):
        message: str
        type: str
        code: str

    error: Error
