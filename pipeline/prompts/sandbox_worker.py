"""``python -m pipeline.prompts.sandbox_worker``: renders chat templates that came with a model, within limits of memory and size.

Reads pickled (source, context, largest) from stdin - its parent is trusted, the template is not - and answers with a status
byte and text, never with a pickle. The parent ends it when it takes too long. It has no environment variables to tell.
"""

import contextlib
import json
import pickle
import resource
import struct
import sys
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

OK, SYNTAX, REFUSED, TOO_MUCH = b"0", b"1", b"2", b"3"
HEADER = struct.Struct("<Q")
# address space on top of what the interpreter has taken; a 128k-token conversation takes a few MB
MEMORY_BYTES = 512 << 20


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant wrote; it prints its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Any) -> str:
        return str(caller())


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """The compiled template; raises jinja2.TemplateSyntaxError."""
    extensions = [_Generation, LoopControlExtension]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def render(source: str, context: dict[str, object], largest: int) -> tuple[bytes, str]:
    """Status and text: the prompt, or what is wrong."""
    try:
        parts, size = [], 0
        for part in compiled(source).generate(**context):
            size += len(part)
            if size > largest:
                return TOO_MUCH, f"writes more than {largest >> 20} MiB"
            parts.append(part)
        return OK, "".join(parts)
    except jinja2.TemplateSyntaxError as error:
        return SYNTAX, f"line {error.lineno}: {error.message}"
    except MemoryError:
        return TOO_MUCH, f"needs more than {MEMORY_BYTES >> 20} MiB of memory"
    except Exception as error:  # a template can raise whatever the values it is given raise
        return REFUSED, str(error) or type(error).__name__


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until stdin ends, which it does with the parent."""
    _limit_memory()
    answers.write(OK)
    answers.flush()
    while len(head := requests.read(HEADER.size)) == HEADER.size:
        status, text = render(*pickle.loads(requests.read(HEADER.unpack(head)[0])))
        raw = text.encode("utf-8", "surrogatepass")
        answers.write(status + HEADER.pack(len(raw)) + raw)
        answers.flush()


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as statm:
            taken = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
