"""Reads small files that somebody else may have written: JSON and YAML, within limits of size, depth and content.

The limits hold before memory is taken: the parsed values of a JSON text can be 80 times larger than the text, and a few
lines of YAML can stand for billions of values.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Hashable
from typing import Any, BinaryIO

import yaml

from pipeline.errors import shorten

MAX_JSON_BYTES = 64 << 20  # far more than a state with the names of all classes of a large data set
JSON_BYTES_PER_VALUE = 32  # a text may hold one value for each 32 bytes of its limit
MAX_SAFETENSORS_HEADER_BYTES = 16 << 20  # names and shapes of 100,000 tensors
MAX_YAML_BYTES = 256 << 10  # names 3,000 shards one by one; PyYAML reads 100 KB a second
MAX_YAML_DEPTH = 100  # of brackets; PyYAML's time grows with their square
MAX_YAML_VALUES = 100_000  # counted as if each alias was written out


class NotRegular(OSError):
    """A device, a named pipe or a socket, on which a read might never end."""


def open_regular(path: str) -> BinaryIO:
    """Opens a regular file for reading. Never waits, as opening a named pipe does.

    Raises:
        OSError: it can't be opened, or is something else: `NotRegular` or a folder.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115  # the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise NotRegular(errno.EINVAL, "not a regular file", path)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for its writer


def read_small(path: str, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a local file.

    Raises:
        OSError: it can't be read, or is no regular file.
        ValueError: it is larger than `most` bytes.
    """
    with open_regular(path) as file:
        check_size(os.fstat(file.fileno()).st_size, most)
        return check_size_of(file.read(most + 1), most)  # it may grow meanwhile


def check_size(nbytes: int, most: int) -> None:
    """Raises ValueError where a file is too large."""
    if nbytes > most:
        raise ValueError(f"it has {nbytes} bytes, expected at most {most}")


def check_size_of(data: bytes, most: int) -> bytes:
    check_size(len(data), most)
    return data


def read_json(path: str, most: int = MAX_JSON_BYTES) -> Any:
    """The JSON in a local file. Raises what `read_small` and `parse_json` do."""
    return parse_json(read_small(path, most), most)


def parse_json(data: bytes, most: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON in UTF-8, names a key twice, is nested too deep, or holds too many values.
    """
    check_size(len(data), most)
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > most // JSON_BYTES_PER_VALUE:
        raise ValueError(f"it holds about {values} values, expected at most {most // JSON_BYTES_PER_VALUE}")
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it gives the key {shorten(next(k for k in keys if keys.count(k) > 1))} twice")
    return found


def check_safetensors(path: str) -> None:
    """Raises ValueError where a file's header is larger than the file, or than headers are; OSError as `open_regular`.

    All else is checked by safetensors itself when it opens the file: types, shapes and the places of the tensors.
    """
    with open_regular(path) as file:
        most = min(MAX_SAFETENSORS_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8)
        nbytes = int.from_bytes(file.read(8), "little")
    if nbytes > most:
        raise ValueError(f"no readable safetensors: a header of {nbytes} bytes, expected at most {max(most, 0)}")


def parse_yaml(data: str | bytes) -> Any:
    """The value of a YAML text: plain values only, never an object of Python's.

    Raises:
        ValueError: it can't be read as YAML, is too large or nested too deep, names a key twice, or stands for too many
            values.
    """
    check_size(len(data), MAX_YAML_BYTES)
    _check_brackets(data.decode("latin-1") if isinstance(data, bytes) else data)
    try:
        loader = yaml.SafeLoader(data)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{shorten(error.problem or error.context or 'an error', 200, quote=False)}") from None
    except yaml.YAMLError as error:
        raise ValueError(shorten(" ".join(str(error).split()), 200, quote=False)) from None


def _check_brackets(text: str) -> None:
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        if depth > MAX_YAML_DEPTH:
            raise ValueError("it is nested too deep")


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """The values that a node stands for, with its aliases written out.

    Raises:
        ValueError: too many, an alias of a node within itself, or a key that is given twice.
    """
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError(f"{_line(node)}: an alias refers to a value that it is a part of")
        return count
    known[id(node)] = None
    count = 1
    if isinstance(node, yaml.SequenceNode):
        count += sum(_count(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        keys: set[Hashable] = set()
        for key, value in node.value:
            count += _count(key, known) + _count(value, known)
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in keys:
                raise ValueError(f"{_line(key)}: the key {shorten(key.value)} is given twice")
            keys.add(name)
    if count > MAX_YAML_VALUES:
        raise ValueError(f"{_line(node)}: its aliases stand for more than {MAX_YAML_VALUES} values")
    known[id(node)] = count
    return count


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
