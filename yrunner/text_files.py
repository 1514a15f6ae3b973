"""Read the text files that a recipe names beside its data: templates, JSON, Python, hostfiles."""

import ast
import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from yrunner.errors import YRunnerError

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MAX_BYTES = 10_000_000


class NotUnicode(ValueError):
    """A text whose encoding is unknown: `line` and `column` of the first wrong byte, from 1."""

    def __init__(self, line: int, column: int, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.line, self.column, self.remedy = line, column, remedy


def decode(content: bytes, name: str = "FILE") -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its byte order mark.

    The mark is no part of the text. `name` is that of the file, for the remedy. Raises `NotUnicode`
    for any other encoding.
    """
    mark = next((mark for mark in BYTE_ORDER_MARKS if content.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        start = len(mark) + error.start
        before = content[len(mark) : start].decode(encoding)
        unit = f"byte {start + 1} of the file (0x{content[start]:02x})"
        reason = f"{unit} is not {encoding[:6].upper().rstrip('-')}"
        raise NotUnicode(*_end_of(before), reason, _remedy(content, name)) from error
    if "\0" in text:
        before = text.partition("\0")[0]
        reason = "a NUL character, so this is not UTF-8 text"
        raise NotUnicode(*_end_of(before), reason, _remedy(content, name))
    return text


def _end_of(text: str) -> tuple[int, int]:
    """Line and column behind a text."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def _remedy(content: bytes, name: str) -> str:
    """How to convert the file, by the likeliest encoding that can read it."""
    if b"\0" in content:
        likely = ["utf-16-le", "utf-16-be"]
    else:
        likely = (["gb18030"] if looks_chinese(content) else []) + ["cp1252"]
    for encoding in likely:
        try:
            found = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in found:
            command = f"iconv -f {encoding} -t utf-8 {name} > utf8-{name}"
            return f"save the file as UTF-8; if it is {encoding}: {command}"
    return "save the file as UTF-8"


def looks_chinese(content: bytes) -> bool:
    """Whether most of a text is GB 2312, the common part of GBK and GB 18030.

    Almost any bytes are valid GB 18030, so decoding alone cannot tell it from Latin-1. The last
    character may be cut off.
    """
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(content)
    except UnicodeDecodeError:
        return False
    num_letters = sum(not letter.isascii() for letter in text)
    common = content.decode("gb2312", errors="ignore")
    return sum(not letter.isascii() for letter in common) * 2 > num_letters


def read_text(path: Path) -> str:
    """The text of a file, with line feeds as line ends.

    Raises `YRunnerError` if it cannot be read, or is not Unicode as `decode` reads it.
    """
    try:
        if path.is_dir():
            raise YRunnerError(
                f"{path} is a folder, but a file is needed", remedy="name a file in it"
            )
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise YRunnerError(f"there is no file {path}", remedy="check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise YRunnerError(
            f"{path} cannot be read ({reason})", remedy="check its path and permissions"
        ) from error
    if len(content) > MAX_BYTES:
        raise YRunnerError(
            f"{path} is larger than {MAX_BYTES:,} bytes", remedy="check that it is the right file"
        )
    try:
        text = decode(content, path.name)
    except NotUnicode as error:
        where = f"{path}:{error.line}:{error.column}"
        raise YRunnerError(f"{where}: {error}", remedy=error.remedy) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `YRunnerError`, with the place where it is not valid."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise YRunnerError(f"{where}: {error.msg}", remedy="correct the JSON") from error
    except (ValueError, RecursionError) as error:  # a huge integer, or nested too deeply
        raise YRunnerError(
            f"{path} is not valid JSON: {error}", remedy="correct the JSON"
        ) from error


def schema_fault(schema: Any) -> str | None:
    """Why a value is not a JSON Schema that can be used; None if it is one.

    What its references refer to must be in it: nothing is downloaded.
    """
    # Imported here: `--help` does not need it.
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    if not isinstance(schema, dict):
        return "it is not an object"
    try:
        validator_for(schema, Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return str(error.message)
    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = REGISTRY.resolver_with_root(resource)
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            return f'it refers to "{reference}", which it does not contain'
    return None


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)


def functions_of(file: Path) -> dict[str, ast.arguments | None]:
    """The functions of a Python file with their parameters, without running it.

    None for a name that is imported or assigned. Raises `YRunnerError` if it is not valid Python.
    """
    try:
        tree = ast.parse(read_text(file))
    except SyntaxError as error:
        raise YRunnerError(
            f"{file}:{error.lineno}:{error.offset}: {error.msg}", remedy="correct the Python"
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise YRunnerError(f"{file} is not valid Python: {error}") from error
    found: dict[str, ast.arguments | None] = {}
    for node in _top_level(tree.body):
        match node:
            case ast.FunctionDef():
                found[node.name] = node.args
            case ast.ClassDef():
                found[node.name] = None
            case ast.Import() | ast.ImportFrom():
                found |= dict.fromkeys(alias.asname or alias.name for alias in node.names)
            case ast.Assign():
                found |= dict.fromkeys(it.id for it in node.targets if isinstance(it, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = None
    return found


def _top_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run with the file, also under `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            inner = ("body", "orelse", "finalbody")
            yield from _top_level([it for name in inner for it in getattr(node, name, [])])
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)
