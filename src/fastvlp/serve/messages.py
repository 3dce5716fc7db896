"""The bodies of requests. The same fields come as JSON, with pictures in base64, or as a multipart form, with pictures as files
and nested values as JSON."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import from_json

from fastvlp.search.checks import MOST_CONDITIONS
from fastvlp.serve.limits import bad_request


def picture_bytes(value: Any) -> Any:
    """Decodes base64 or a data URL; a form's file is bytes already. Nothing is ever fetched or opened."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("a picture is a string of base64, or a file of a multipart form")
    head, _, tail = value.partition(",") if value.startswith("data:") else ("", "", value)
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
Scalars = Annotated[list[Scalar], Field(min_length=1, max_length=64)]
Where = Annotated[dict[Name, Scalar | Scalars], Field(max_length=MOST_CONDITIONS)]
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


class RequestBody(BaseModel):
    """A request that comes as JSON or as a form."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_form(cls, form: Form) -> dict[str, Any]:
        """Returns the fields of a multipart form in the shape that `model_validate` reads."""
        fields: dict[str, Any] = {}
        for name, value in form:
            if name in fields:
                raise bad_request(f"{name}: given twice")
            fields[name] = parse_json(name, value) if name in NESTED else value
        return fields


class Image(RequestBody):
    """A picture in place of a text."""

    image: Encoded


class EmbeddingsRequest(RequestBody):
    """OpenAI's request, in which a picture may stand wherever a text may."""

    input: Text | Image | Annotated[list[Text | Image], Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    @classmethod
    def from_form(cls, form: Form) -> dict[str, Any]:
        """Takes `input` fields and `image` files, in the order of the form."""
        inputs = [{"image": value} if name == "image" else value for name, value in form if name in ("input", "image")]
        return {"input": inputs} | super().from_form([item for item in form if item[0] not in ("input", "image")])


class PictureRequest(RequestBody):
    """A picture, either sent along or an item's of the index."""

    image: Encoded | None = None
    id: Id | None = None

    @model_validator(mode="after")
    def check_picture(self) -> PictureRequest:
        if (self.image is None) == (self.id is None):
            raise ValueError("give either image or id")
        return self


class Pair(PictureRequest):
    """A picture and a text."""

    text: Text


class ScoreRequest(RequestBody):
    """Pairs to score."""

    pairs: Annotated[list[Pair], Field(min_length=1)]

    @classmethod
    def from_form(cls, form: Form) -> dict[str, Any]:
        """Takes as many `text` fields as `image` files, or one of either."""
        texts, images = ([value for name, value in form if name == key] for key in ("text", "image"))
        if {name for name, _ in form} - {"text", "image"}:
            raise bad_request("a form of pairs has the fields text and image, nothing else")
        most = max(len(texts), len(images))
        if not texts or not images or {len(texts), len(images)} - {1, most}:
            raise bad_request(f"{len(texts)} texts and {len(images)} images do not make pairs")
        texts, images = (part * most if len(part) == 1 else part for part in (texts, images))
        return {"pairs": [{"text": text, "image": image} for text, image in zip(texts, images)]}


class SearchRequest(RequestBody):
    """A search by a text, a picture, or the mean of both. `id`: search by the picture of this item, which is left out of the
    results. `where`: fields that the items must have, each with its value or one of a list. `rerank`: how many of the best
    results the model scores again by reading text and picture together, where it can."""

    text: Text | None = None
    image: Encoded | None = None
    id: Id | None = None
    where: Where | None = None
    offset: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    limit: Annotated[int, Field(ge=1, le=1_000)] = 24
    rerank: Annotated[int, Field(ge=0, le=256)] = 0

    @model_validator(mode="after")
    def check_query(self) -> SearchRequest:
        if self.text is None and self.image is None and self.id is None:
            raise ValueError("give a text, an image, an id, or a text beside one of those")
        if self.image is not None and self.id is not None:
            raise ValueError("give either image or id")
        return self


class CaptionRequest(PictureRequest):
    """A picture to caption."""


class AnswerRequest(PictureRequest):
    """A question about a picture."""

    question: Text


class ItemRequest(RequestBody):
    """An item to add. `id`: by default a hash of the picture. An item of this id that the index has already is replaced."""

    image: Encoded
    id: Id | None = None
    caption: Annotated[str, Printable] | None = None
    info: Annotated[dict[Name, Scalar], Field(max_length=64)] = {}


def parse_json(name: str, value: str | bytes) -> Any:
    """Parses JSON without NaN or infinity. Raises Refusal for anything else, and for what is nested deeply."""
    try:
        return from_json(value, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{name}: not JSON ({error})") from error
