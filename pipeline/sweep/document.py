"""A YAML file that people write: plain values, with the line of each key, so that an error can name it."""

import re
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.runs.files import read_utf8

_MOST_NODES, _DEEPEST = 100_000, 16
# YAML 1.1 reads 2e-4 as text
_FLOAT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+")


class Document:
    """The file as a mapping (``data``); keys of what is inside are dotted, as ``runs.triage.RANK``.

    InputError for what is no YAML mapping, and for what YAML would let pass in silence: a key that is there twice, a name or
    value that is read as something else than text, number, list or mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        self.nodes = 0
        self.data = self._read()

    def where(self, key: str, line: int | None = None) -> str:
        """``file:line`` of a key, or of what it stands in."""
        while line is None and key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.path}:{line or self.lines.get(key, 1)}"

    def wrong(self, key: str, what: str, remedy: str, line: int | None = None) -> InputError:
        """The error about a key."""
        return InputError(f"{self.where(key, line)}: {key}: {what}", remedy=remedy)

    def _read(self) -> dict[str, Any]:
        import yaml

        class Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
            pass

        Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
        try:
            loader = Loader(read_utf8(self.path))
            node = loader.get_single_node()
            found = self._value(loader, node, "", 0) if node else {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{self.path}:{mark.line + 1}" if mark else str(self.path)
            raise InputError(f"{where}: not valid YAML ({error.problem or error.context})") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path} is not valid YAML ({error})") from None
        if not isinstance(found, dict):
            raise InputError(f"{self.path} is not a mapping of names to values", remedy="see docs/scale.md for an example")
        return found

    def _value(self, loader: Any, node: Any, key: str, depth: int) -> Any:
        """A node as plain JSON values; a key that is said twice, which YAML would let pass, is refused."""
        import yaml

        self.nodes += 1
        if self.nodes > _MOST_NODES or depth > _DEEPEST:
            raise InputError(f"{self.path} is too large or too deep", remedy="use fewer entries, and no aliases of large parts")
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, one, f"{key}[{i}]", depth + 1) for i, one in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            value = loader.construct_object(node)
            if value is not None and not isinstance(value, str | int | float | bool):
                raise self.wrong(key, f"{node.value!r} is read as a {type(value).__name__}", "quote it")
            return value
        found: dict[str, Any] = {}
        for named, value in node.value:
            name = named.value if named.tag.endswith(":merge") else loader.construct_object(named, deep=True)
            inner = f"{key}.{name}" if key else str(name)
            line = named.start_mark.line + 1
            if named.tag.endswith(":merge"):
                raise self.wrong(inner, "merge keys are not read", "put what all runs share below parameters", line)
            if not isinstance(name, str):
                raise self.wrong(inner, f"the name {named.value!r} is read as {name!r}, not as text", "quote it", line)
            if name in found:
                raise self.wrong(inner, f"{name} is there twice", "leave one of the two", line)
            self.lines[inner] = line
            found[name] = self._value(loader, value, inner, depth + 1)
        return found
