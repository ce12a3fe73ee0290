"""The Modelfile grammar: parse what Ollama parses, write values that Ollama reads back unchanged.

Grammar: Ollama's docs/modelfile.md, and for what it leaves open the behaviour of its parser (August 2026): a value ends at
the first line end where its quotes are balanced; characters that Go calls unprintable are dropped without a word.
"""

from dataclasses import dataclass, field

from pipeline.errors import InputError

_COMMANDS = [
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "draft",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
]
_ROLES = ("system", "user", "assistant")
_BLANKS = " \t"
_LINE_ENDS = "\r\n"


@dataclass(frozen=True)
class Modelfile:
    """A parsed Modelfile: (command, value) pairs in order; a parameter's command is ``parameter NAME``."""

    commands: tuple[tuple[str, str], ...]

    @property
    def source(self) -> str:
        """The GGUF file, folder or model name of FROM."""
        return dict(self.commands).get("from", "")

    @property
    def template(self) -> str | None:
        """The Go TEMPLATE."""
        return dict(self.commands).get("template")

    @property
    def system(self) -> str | None:
        """The SYSTEM message, used where a request brings none."""
        return dict(self.commands).get("system")

    @property
    def licenses(self) -> list[str]:
        """Every LICENSE."""
        return [value for name, value in self.commands if name == "license"]

    @property
    def parameters(self) -> dict[str, list[str]]:
        """PARAMETER values by name, as written; ``stop`` may have several."""
        found: dict[str, list[str]] = {}
        for name, value in self.commands:
            if name.startswith("parameter "):
                found.setdefault(name.removeprefix("parameter "), []).append(value)
        return found


@dataclass
class _Reader:
    """State while reading: what is being read, and the characters of it so far."""

    state: str = "nothing"
    line: int = 1
    text: str = ""
    command: str = ""
    commands: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, why: str) -> InputError:
        return InputError(f"Modelfile line {self.line}: {why}")

    def feed(self, char: str) -> None:
        if char in _LINE_ENDS:
            self.line += 1
        getattr(self, f"_in_{self.state}")(char)

    def _enter(self, state: str, first: str = "") -> None:
        self.state, self.text = state, first

    def _in_nothing(self, char: str) -> None:
        if char == "#":
            self._enter("comment")
        elif char not in _BLANKS + _LINE_ENDS:
            self._enter("command", char if char.isprintable() else "")

    def _in_comment(self, char: str) -> None:
        if char in _LINE_ENDS:
            self._enter("nothing")

    def _in_command(self, char: str) -> None:
        if _is_letter(char):
            self.text += char
            return
        self.command = self.text.lower()
        if char not in _BLANKS or self.command not in _COMMANDS:
            raise self.fail(f"a command must be one of {', '.join(_COMMANDS)}")
        self._enter("word" if self.command in ("parameter", "message") else "value")

    def _in_word(self, char: str) -> None:
        if _is_letter(char) or (self.command == "parameter" and (char == "_" or char in "0123456789")):
            self.text += char
            return
        if char not in _BLANKS or (self.command == "message" and self.text not in _ROLES):
            raise self.fail(f"{self.command} needs {'a role' if self.command == 'message' else 'a name'} and a value")
        self.command += f" {self.text}"
        self._enter("value")

    def _in_value(self, char: str) -> None:
        if char in _LINE_ENDS and (value := unquoted(self.text.strip(_BLANKS + _LINE_ENDS))) is not None:
            self.commands.append((self.command, value))
            self._enter("nothing")
        elif char in _BLANKS + _LINE_ENDS or char.isprintable():
            self.text += char

    def finish(self) -> None:
        if self.state == "value":
            self.feed("\n")
        if self.state not in ("nothing", "comment"):
            raise self.fail("the file ends inside a command or a quoted value")


def parse_modelfile(text: str) -> Modelfile:
    """Parse as Ollama does; InputError with the line number when it would refuse the file."""
    reader = _Reader()
    for char in text.removeprefix("\ufeff"):
        reader.feed(char)
    reader.finish()
    if not any(name == "from" for name, _ in reader.commands):
        raise InputError("the Modelfile has no FROM line")
    return Modelfile(tuple(reader.commands))


def unquoted(value: str) -> str | None:
    """A value without its quotes, None while its closing quotes are missing."""
    for quote in ('"""', '"'):
        if value.startswith(quote):
            closed = value.endswith(quote) and len(value) >= 2 * len(quote)
            return value[len(quote) : -len(quote)] if closed else None
    return value


def writable(value: str) -> bool:
    """Whether some way of quoting makes Ollama read exactly this value."""
    return _written(value) is not None


def quoted(value: str, what: str) -> str:
    """Write a value so that Ollama reads exactly it; InputError when no way of quoting does that."""
    if (written := _written(value)) is not None:
        return written
    odd = next((c for c in value if c not in _BLANKS + _LINE_ENDS and not c.isprintable()), None)
    if odd is not None:
        line = value[: value.index(odd)].count("\n") + 1
        why = f"{what} holds the character U+{ord(odd):04X} in line {line}; Ollama drops it when it reads a Modelfile"
        raise InputError(why, remedy="replace it (a no-break space by a space, for example)")
    why = f'{what} has a line that ends in """, where Ollama ends the value too early'
    raise InputError(why, remedy='put any other character after the """, or remove it')


def _written(value: str) -> str | None:
    return next((c for c in (value, f'"""{value}"""', f'"{value}"') if _reads_as(c, value)), None)


def _reads_as(candidate: str, value: str) -> bool:
    try:
        return parse_modelfile(f"FROM x\nSYSTEM {candidate}\n").commands == (("from", "x"), ("system", value))
    except InputError:
        return False


def _is_letter(char: str) -> bool:
    return char.isascii() and char.isalpha()
