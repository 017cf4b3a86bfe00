"""Strict configs: YAML without silent overwrites, dotted overrides, and all that is wrong in one error."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from attnzoo import files
from attnzoo.errors import ConfigError
from attnzoo.imports import import_modules

CONFIG_VERSION = 1
NOT_HASHED = frozenset({"task", "output", "fresh"})
Seed = Annotated[int, Field(ge=0)]
M = TypeVar("M", bound=BaseModel)
# YAML 1.1 takes a number with an exponent for text unless it has both a point and a sign
EXPONENT = re.compile(r"^[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)[eE][-+]?[0-9]+$")
DEVICES = r"^(cpu|cuda(:\d+)?)$"
NAMES = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
PATTERNS = {
    DEVICES: "must be cpu, cuda, or cuda:N",
    NAMES: "must begin with a letter or digit and go on with these and . _ -",
}
BRANCH = re.compile(r"constrained-\w+|(dict|list|tuple|function-\w+)\[.*\]")  # which type of several pydantic tried
PLAIN = {"tuple_type": "must be a list", "list_type": "must be a list", "dict_type": "must be a mapping",
         "model_type": "must be a mapping"}  # fmt: skip


Dtype = Literal["float32", "bfloat16", "float16"]


def digest(content: Any) -> str:
    """16 hex digits that stand for plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Section(BaseModel):
    """A part of the config: unknown keys are refused and values cannot change later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    """What every config has: a name, where it runs, the seed of what is random, and where it writes.

    What is written follows from `identity`: `output` and `fresh` are not part of it. A task's config adds its keys, and
    `problems` that the schema cannot find. `task` is the task's name in `attnzoo.tasks`.
    """

    task: str

    name: Annotated[str, Field(pattern=NAMES)]
    device: Annotated[str, Field(pattern=DEVICES)] = "cpu"
    threads: PositiveInt | None = None
    seed: Seed = 0
    imports: Annotated[
        tuple[str, ...],
        Field(description="modules to import first, for the methods that they register; of the working directory, too"),
    ] = ()
    output: Path | None = None
    fresh: bool = Field(default=False, description="set earlier records of the folder aside")

    @property
    def used_device(self) -> str:
        """The device that is measured on."""
        return self.device

    @property
    def folder(self) -> Path:
        """Where records and the page go."""
        return self.output if self.output is not None else Path("runs") / self.name

    def check_folder(self, *inside: str) -> None:
        """Check, before any work, that the folder and those `inside` can be written into.

        Raises `ConfigError` if one is a file, or cannot be written into; see `attnzoo.files.check_folder`.
        """
        for name in ("", *inside):
            files.check_folder(self.folder, "output", name)

    @property
    def hash(self) -> str:
        """16 hex digits over the `identity`."""
        return digest(self.identity())

    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on, defaults and overrides included."""
        content = {"config_version": CONFIG_VERSION, **self.model_dump(mode="json", exclude=set(NOT_HASHED))}
        drop_defaults(content, {"imports": []})
        return content

    def to_yaml(self) -> str:
        """The whole config, defaults and overrides included, as YAML that `load` reads back."""
        return str(yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True))

    def plain(self) -> dict[str, Any]:
        """The whole config but for where it writes, as plain data."""
        content = self.model_dump(mode="json", exclude={"output", "fresh"})
        drop_defaults(content, {"imports": []})
        return content

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What is wrong with plain data besides what the schema finds, such as what the registry refuses."""
        return []

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML config, apply overrides, as `read_yaml` does, and check it.

        Raises `ConfigError` with every problem of file and overrides that could be found, one per line.
        """
        return cls.check(without_stale_labels(read_yaml(path, overrides), read_yaml(path), overrides), str(path))

    @classmethod
    def check(cls, data: Mapping[str, Any], source: str = "config") -> Self:
        """Import the modules that plain data name in `imports`, then check the data against the schema and `problems`.

        Raises `ConfigError` if a module cannot be imported, or with every problem, one per line.
        """
        import_listed(data)
        return validated(cls, data, cls.problems(data), source)


def import_listed(data: Mapping[str, Any]) -> None:
    """Import the modules that a config names in `imports`; what is no list of names is left to the schema.

    Raises `ConfigError` if one cannot be imported.
    """
    named = data.get("imports")
    if isinstance(named, (list, tuple)):
        import_modules([name for name in named if isinstance(name, str)])


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, and apply ``key=value`` overrides.

    Raises `ConfigError` if the file cannot be read, is not YAML or no mapping, or an override does not fit.

    These are ``dotted.key=value``, the value in YAML; numbers reach into lists, as in
    ``attentions.0.options.degree=3``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r} is not UTF-8 text, so not YAML ({error})") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got {type(data).__name__}")
    for override in overrides:
        keys, value = parse_override(override)
        _set(data, keys, value, override)
    return data


def validated(model: type[M], data: Mapping[str, Any], more: Iterable[str], source: str) -> M:
    """Check plain data against a schema.

    Raises `ConfigError` with every problem, one per line.

    `more` are problems that the caller has found besides, `source` what to call the config in the message.
    """
    problems: list[str] = []
    config = None
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        problems += _explained(error, model)
    problems += more
    if problems or config is None:
        count = f"{len(problems)} error{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))
    return config


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=value`` into its keys and its value, read as YAML.

    Raises `ConfigError` if there is no ``=``, a key is empty, or the value is not YAML.
    """
    dotted, equals, raw = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r} must read key=value, with dots between nested keys")
    try:
        return keys, yaml.load(raw, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error


def without_stale_labels(data: dict[str, Any], before: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Leave out the labels of attentions that tell what overrides have changed, unless the label was overridden, too.

    A row must not be called by what it was before: ``keydiff 1024`` of another budget, ``h2o`` of another method. A
    label that tells nothing of it stays, for other keys may name the row by it. `before` are the data of the file.
    """
    paths = [parse_override(override)[0] for override in overrides]
    for path in paths:
        if "attentions" not in path:
            continue
        at = path.index("attentions") + 2  # after the index
        if path[at : at + 1] not in (["name"], ["options"]) or [*path[:at], "label"] in paths:
            continue
        now, was = (_entry(content, path[:at]) for content in (data, before))
        if isinstance(now, dict) and isinstance(was, Mapping) and _tells_what_changed(str(was.get("label")), was, now):
            now.pop("label", None)
    return data


def _entry(data: Any, path: Sequence[str]) -> Any:
    """What is at a path; None if nothing is."""
    for key in path:
        if isinstance(data, list):
            data = data[int(key)] if int(key) < len(data) else None
        else:
            data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _tells_what_changed(label: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a label tells the name of before, an option that has changed, or the value that it had."""
    if was.get("name") != now.get("name") and _mentions(label, was.get("name")):
        return True
    old, new = (flat(options) if isinstance(options := row.get("options"), Mapping) else {} for row in (was, now))
    for key in old.keys() | new.keys():
        value = old.get(key)
        if value == new.get(key):
            continue
        in_words = isinstance(value, bool) and label != was.get("name")  # as "h2o as sums" tells normalize=False
        if in_words or _mentions(label, key.rpartition(".")[2]) or (key in old and _mentions(label, value)):
            return True
    return False


def _mentions(label: str, value: Any) -> bool:
    """Whether a label has a value, or a word, that is no part of a longer one."""
    return re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w]|[.]\d)", label) is not None


def refuse_twins(labels: list[str]) -> None:
    """Raise `ValueError` where two rows have the same label."""
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"labels must differ, but {twice} stand for more than one row; set `label`")


def renamed(data: Any, **names: str) -> Any:
    """Take keys by their names of before, each given as ``old="new"``; `ValueError` where a section has both."""
    for old, new in names.items():
        if isinstance(data, Mapping) and old in data:
            if new in data:
                raise ValueError(f"{old} is called {new} now: give {new} alone")
            data = {new if key == old else key: value for key, value in data.items()}
    return data


def drop_defaults(content: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Take keys out where they say what holds without them."""
    for key, value in later.items():
        if content[key] == value:
            del content[key]


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not a silent overwrite, and 1e-4 a number, not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            if isinstance(key, (str, int, float)):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def _set(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Put `value` at the path `keys`, making mappings on the way where there is nothing yet."""
    here: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdecimal() or int(key) > len(here):
                path = ".".join(keys[:depth])
                raise ConfigError(
                    f"override {override!r}: {path} is a list of {len(here)}; {key!r} is not an index: "
                    f"{len(here)} adds to its end"
                )
            slot: Any = int(key)
            if slot == len(here):
                here.append(None if last else {})
        elif isinstance(here, dict):
            slot = next((known for known in here if str(known) == key), key)
        else:
            path = ".".join(keys[:depth])
            raise ConfigError(f"override {override!r}: {path} is {here!r} and has no keys inside")
        if last:
            here[slot] = value
            return
        if isinstance(here, dict) and here.get(slot) is None:
            here[slot] = {}
        here = here[slot]


def _location(detail: Any) -> list[str | int]:
    """Where in the config an error is, without the marks that pydantic puts in between."""
    return [
        part for part in detail["loc"] if part != "[key]" and not (isinstance(part, str) and BRANCH.fullmatch(part))
    ]


def _explained(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each place where something is wrong, not for a section or list inside which that is.

    Where a value may be of several types, there is a reason for each of them: a line has them all.
    """
    found: dict[tuple[str | int, ...], list[str]] = {}
    for detail in error.errors():
        found.setdefault(tuple(_location(detail)), []).append(_explain(detail, model))
    deepest = [
        here for here in found if not any(len(other) > len(here) and other[: len(here)] == here for other in found)
    ]
    return [_joined(found[here]) for here in deepest]


def _joined(lines: Sequence[str]) -> str:
    """``a: -1 is not allowed; must be above 0, or must be a mapping``."""
    first, *others = dict.fromkeys(lines)
    return ", or ".join([first, *(line.partition("is not allowed; ")[2] or line for line in others)])


def _explain(detail: Any, model: type[BaseModel]) -> str:
    """One line for one of pydantic's error details."""
    location = _location(detail)
    where = ".".join(map(str, location)) or "config"
    kind = detail["type"]
    if kind == "extra_forbidden":
        section = _section_at(location[:-1], model)
        known = list(section.model_fields) if section else []
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"{where}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
    if kind == "missing":
        return f"{where}: must be given"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}: {message}"
    message = PATTERNS.get(detail.get("ctx", {}).get("pattern"), PLAIN.get(kind, message))
    shown = repr(detail["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{where}: {shown} is not allowed; {message[:1].lower()}{message[1:]}"


def _section_at(location: Iterable[str | int], model: type[BaseModel]) -> type[BaseModel] | None:
    """Find the section of the schema that a location of pydantic's points into."""
    here: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        if not (isinstance(here, type) and issubclass(here, BaseModel)) or part not in here.model_fields:
            return None
        here = next((section for section, _ in sections_in(here.model_fields[part].annotation)), None)
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def sections_in(annotation: Any, suffix: str = "") -> list[tuple[type[BaseModel], str]]:
    """The sections inside an annotation, such as ``X | None``, with what their paths have after the key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, suffix)]
    if get_origin(annotation) is Annotated:
        return sections_in(get_args(annotation)[0], suffix)
    listed = ".N" if get_origin(annotation) in (tuple, list) else suffix
    return list(dict.fromkeys(found for one in get_args(annotation) for found in sections_in(one, listed)))
