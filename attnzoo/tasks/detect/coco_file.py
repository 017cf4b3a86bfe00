"""What a COCO file of detection must hold: the schema, and the place of the first value that does not fit.

Types are strict, for a file that says ``"iscrowd": "0"`` or ``"width": null`` fails late in the libraries that read it,
or changes what they count. What is not named here may be there as well.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from attnzoo.errors import DataError, short

_STRICT = ConfigDict(strict=True, extra="allow")
Flag = Literal[0, 1]
Text = Annotated[str, Field(min_length=1)]


@with_config(_STRICT)
class Image(TypedDict):
    """An image: its number, file and size in pixels."""

    id: int
    file_name: Text
    width: PositiveInt
    height: PositiveInt


@with_config(_STRICT)
class Annotation(TypedDict):
    """A box: x, y, width and height in pixels from 0, its area, and whether it is a crowd region or to be ignored."""

    id: PositiveInt
    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    area: FiniteFloat
    iscrowd: Flag
    ignore: NotRequired[Flag | bool]


@with_config(_STRICT)
class Category(TypedDict):
    """A class of boxes."""

    id: int
    name: Text


@with_config(_STRICT)
class CocoFile(TypedDict):
    """The file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[CocoFile]:
    return TypeAdapter(CocoFile)


def parse(text: bytes, file: Path) -> dict[str, Any]:
    """Read a COCO file's text.

    Raises
    ------
    DataError
        If it is no JSON, or a value does not fit; names the place of the first such.
    """
    try:
        return dict(_adapter().validate_json(text))
    except ValidationError as error:
        found = error.errors(include_url=False)
        first, place = found[0], ".".join(map(str, found[0]["loc"]))
        if first["type"] == "json_invalid":
            raise DataError(f"annotations {file} are broken: {first['msg']}") from error
        if len(first["loc"]) < 2:
            raise DataError(f"{file} is not a COCO file: it has no list {place or 'images'!r}") from error
        value = "" if first["type"] == "missing" else f", not {short(first['input'])}"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        zero = "; pycocotools takes the id 0 for none" if first["loc"][-1] == "id" and first["input"] == 0 else ""
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise DataError(f"{file}: {place}: {message}{value}{zero}{more}") from error
