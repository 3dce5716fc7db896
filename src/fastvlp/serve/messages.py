"""What requests and answers hold. The same fields come as JSON, with pictures in base64, or as a multipart form, with
pictures as files and nested values as JSON."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from fastvlp.serve.limits import Refusal, refuse


def picture_bytes(said: Any) -> Any:
    """The bytes of base64 or of a data URL; a form's file has them already. Nothing is ever fetched or opened."""
    if isinstance(said, bytes):
        return said
    if not isinstance(said, str):
        raise ValueError("a picture is a string of base64, or a file of a multipart form")
    head, _, tail = said.partition(",") if said.startswith("data:") else ("", "", said)
    if "://" in tail[:16]:
        raise ValueError("URLs are not read; send the picture itself, in base64")
    if head and not head.endswith(";base64"):
        raise ValueError("a data URL of a picture has to be base64")
    try:
        return base64.b64decode("".join(tail.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64 ({error})") from error


Printable = StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")
Text = Annotated[str, StringConstraints(min_length=1)]
Id = Annotated[str, Printable]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
Scalar = Annotated[str, Printable] | bool | Whole | float
Where = dict[Name, Scalar | Annotated[list[Scalar], Field(min_length=1, max_length=64)]]
Encoded = Annotated[
    bytes,
    Field(min_length=1),
    BeforeValidator(picture_bytes),
    WithJsonSchema(
        {"type": "string", "format": "byte", "contentEncoding": "base64", "description": "base64, or a data URL of it"}
    ),
]
Form = Sequence[tuple[str, str | bytes]]
NESTED = ("where", "info")


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def of_form(cls, form: Form) -> dict[str, Any]:
        """The fields of a multipart form as `model_validate` reads them."""
        fields: dict[str, Any] = {}
        for name, value in form:
            if name in fields:
                raise refuse(f"{name}: given twice")
            fields[name] = parsed(name, value) if name in NESTED else value
        return fields


class Image(Message):
    image: Encoded


class EmbeddingsRequest(Message):
    """OpenAI's request, in which a picture may stand wherever a text may."""

    input: Text | Image | Annotated[list[Text | Image], Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    @classmethod
    def of_form(cls, form: Form) -> dict[str, Any]:
        """`input` fields and `image` files, in the order of the form."""
        inputs = [{"image": value} if name == "image" else value for name, value in form if name in ("input", "image")]
        return {"input": inputs} | super().of_form([item for item in form if item[0] not in ("input", "image")])


class Depicted(Message):
    """A picture, sent along or one of the index."""

    image: Encoded | None = None
    id: Id | None = None

    @model_validator(mode="after")
    def one(self) -> Depicted:
        if (self.image is None) == (self.id is None):
            raise ValueError("give either image or id")
        return self


class Pair(Depicted):
    text: Text


class ScoreRequest(Message):
    pairs: Annotated[list[Pair], Field(min_length=1)]

    @classmethod
    def of_form(cls, form: Form) -> dict[str, Any]:
        """As many `text` fields as `image` files, or one of either."""
        texts, images = ([value for name, value in form if name == key] for key in ("text", "image"))
        if {name for name, _ in form} - {"text", "image"}:
            raise refuse("a form of pairs has the fields text and image, nothing else")
        most = max(len(texts), len(images))
        if not texts or not images or {len(texts), len(images)} - {1, most}:
            raise refuse(f"{len(texts)} texts and {len(images)} images do not make pairs")
        texts, images = (part * most if len(part) == 1 else part for part in (texts, images))
        return {"pairs": [{"text": text, "image": image} for text, image in zip(texts, images)]}


class SearchRequest(Message):
    """By a text, a picture, or the mean of both; `id`: by a picture of the index, which is left out of what is found.
    `where`: only items whose info has all of these values, or one of a list. `rerank`: how many of the best the model reads
    once more, text beside picture, where it can."""

    text: Text | None = None
    image: Encoded | None = None
    id: Id | None = None
    where: Where | None = None
    offset: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    limit: Annotated[int, Field(ge=1, le=1_000)] = 24
    rerank: Annotated[int, Field(ge=0, le=256)] = 0

    @model_validator(mode="after")
    def something(self) -> SearchRequest:
        if self.text is None and self.image is None and self.id is None:
            raise ValueError("give a text, an image, an id, or a text beside one of those")
        if self.image is not None and self.id is not None:
            raise ValueError("give either image or id")
        return self


class CaptionRequest(Depicted):
    pass


class AnswerRequest(Depicted):
    question: Text


class ItemRequest(Message):
    """`id`: by default a hash of the picture. One that the index has already gets the new picture."""

    image: Encoded
    id: Id | None = None
    caption: Annotated[str, Printable] | None = None
    info: dict[Name, Scalar] = {}


def parsed(name: str, value: str | bytes) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise refuse(f"{name}: not JSON") from error


M = TypeVar("M", bound=Message)


async def read(kind: type[M], request: Request, most_parts: int) -> M:
    """The request's body. Raises Refusal with what is wrong, and where."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media == "multipart/form-data":
            return kind.model_validate(kind.of_form(await _form(request, most_parts)))
        if media and media != "application/json":
            raise Refusal(415, "unsupported_media_type", f"{media}: send application/json or multipart/form-data")
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise refuse(_first(error)) from error


def _first(error: ValidationError) -> str:
    """Of a choice of types, what is wrong with the one that fits best: the deepest error."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    worst = max(errors, key=lambda e: len(e["loc"]))
    # Names of fields and places in lists; not those of the types that were tried.
    where = ".".join(str(part) for part in worst["loc"] if re.fullmatch("[a-z_]+|[0-9]+", str(part)))
    what = worst["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


async def _form(request: Request, most_parts: int) -> list[tuple[str, str | bytes]]:
    try:
        async with request.form(max_files=most_parts, max_fields=most_parts + 8) as form:
            return [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
    except MultiPartException as error:
        raise refuse(f"malformed multipart form: {error.message}") from error
    except (ValueError, KeyError, LookupError) as error:
        raise refuse(f"malformed multipart form ({error})") from error
