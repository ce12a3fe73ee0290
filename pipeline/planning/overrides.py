"""The user's own settings (``--set``): normalised, validated, and laid over what was planned.

Written for every verb alike as ``Overrides.of`` reads them: ``enforce_eager`` (a switch alone), ``max-num-seqs=8``,
``max-model-len=32k`` where tokens are counted, ``dtype=auto`` where there is an automatic choice.
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.planning.plan import Setting

_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
# given elsewhere, or secrets that must not stand in a process list
_RESERVED = {
    "--host": "use --host",
    "--port": "use --port",
    "--model": "use --model or --run",
    "--model-path": "use --model or --run",
    "--alias": "use --served-model-name",
    "--served-model-name": "use --served-model-name",
    "--api-key": "put the key in the environment (VLLM_API_KEY, LLAMA_API_KEY): argv is visible to everyone on the machine",
    "--hf-token": "put the token in the environment as HF_TOKEN: argv is visible to everyone on the machine",
}
_TRUE, _FALSE = ("true", "1", "yes", "on", ""), ("false", "0", "no", "off")


_THOUSANDS = re.compile(r"(\d+(?:\.\d+)?)[kK]")


@dataclass(frozen=True)
class Known:
    """What an engine version accepts: flags with a value, bare switches, environment variables; all by full name.

    ``tokens`` are those that count tokens, ``automatic`` those that the plan, or else the engine, chooses when they are left out.
    """

    flags: Collection[str] = ()
    switches: Collection[str] = ()
    variables: Collection[str] = ()
    tokens: Collection[str] = ()
    automatic: Collection[str] = ()

    def require(self, name: str) -> None:
        """Raise InputError, with the nearest known names, when a setting is unknown."""
        every = {*self.flags, *self.switches, *self.variables}
        if name not in every:
            plain = {_plain(one): one for one in sorted(every)}
            close = ", ".join(plain[one] for one in difflib.get_close_matches(_plain(name), plain, n=3))
            remedy = f"did you mean {close}?" if close else "the engine's own --help lists its settings"
            raise InputError(f"the engine has no setting {name}", remedy=remedy)


@dataclass(frozen=True)
class Overrides:
    """User settings by canonical name: ``--flag-name`` for flags, ``NAME`` for environment variables."""

    values: Mapping[str, str]

    @staticmethod
    def of(raw: Mapping[str, str], known: Known, aliases: Mapping[str, str] | None = None) -> "Overrides":
        """Accept ``max_model_len``, ``max-model-len``, ``--max-model-len`` alike; ``aliases`` maps other spellings to one.

        The last of several values for one setting holds; ``auto`` is as if there had been none. Raises InputError for what
        the engine does not know, for a missing value, for ``auto`` where nothing is chosen, and for part of a token.
        """
        values = dict[str, str]()
        for key, text in raw.items():
            name = key if _VARIABLE.fullmatch(key) else "--" + key.lstrip("-").replace("_", "-")
            name, value = (aliases or {}).get(name, name), text.strip()
            if name in _RESERVED:
                raise InputError(f"{name} cannot be set with --set", remedy=_RESERVED[name])
            known.require(name)
            if value.lower() == "auto":
                if name not in known.automatic:
                    raise InputError(f"{name} has no automatic choice", remedy="give a value, or leave it out")
                values.pop(name, None)
            elif not value and name not in known.switches:
                raise InputError(f"{name} needs a value", remedy=f"--set {name.lstrip('-')}=VALUE")
            else:
                values[name] = _count(name, value) if name in known.tokens else value
        return Overrides(values)

    def integer(self, name: str, low: int, high: int, why: str = "") -> int | None:
        """The user's whole number for ``name``, or None; raises InputError outside low..high."""
        text = self.values.get(name)
        if text is None:
            return None
        if not re.fullmatch(r"-?\d+", text) or not low <= int(text) <= high:
            raise InputError(f"{name} is {text!r}; it must be a whole number from {low} to {high}{why and ': ' + why}")
        return int(text)

    def number(self, name: str, low: float, high: float) -> float | None:
        """The user's number for ``name``, or None; raises InputError outside low..high."""
        if name not in self.values:
            return None
        try:
            value = float(self.values[name])
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise InputError(f"{name} is {self.values[name]!r}; it must be a number from {low} to {high}")
        return value

    def choice(self, name: str, allowed: Sequence[str]) -> str | None:
        """The user's word for ``name``, or None; raises InputError when it is not one of ``allowed``."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise InputError(f"{name} is {value!r}", remedy="allowed here: " + ", ".join(allowed))
        return value

    def switch(self, name: str) -> bool | None:
        """The user's yes or no for a bare flag, or None."""
        value = self.values.get(name)
        if value is not None and value.lower() not in (*_TRUE, *_FALSE):
            raise InputError(f"{name} is {value!r}; it takes true or false")
        return None if value is None else value.lower() in _TRUE

    def lay_over(self, planned: Sequence[Setting], known: Known) -> tuple[tuple[Setting, ...], tuple[Setting, ...]]:
        """Planned settings with the user's put in their place and marked as such, split into (flags, environment)."""
        merged = {setting.name: setting for setting in planned}
        for name, value in self.values.items():
            if name not in known.switches:
                merged[name] = Setting(name, value, "set by the user", "user")
                continue
            opposite = name.replace("--no-", "--", 1) if name.startswith("--no-") else name.replace("--", "--no-", 1)
            on = self.switch(name)
            merged.pop(opposite, None)
            merged.pop(name, None)
            if on or opposite in known.switches:
                word = name if on else opposite
                merged[word] = Setting(word, None, "set by the user", "user")
        settings = merged.values()
        return tuple(s for s in settings if s.name[0] == "-"), tuple(s for s in settings if s.name[0] != "-")


def _plain(name: str) -> str:
    """A setting's name without what people write differently."""
    return name.lstrip("-").replace("_", "-").lower()


def _count(name: str, text: str) -> str:
    """``32k`` as a plain number: engines disagree about what k is (vLLM's own k is 1000, its K 1024)."""
    found = _THOUSANDS.fullmatch(text)
    if found is None:
        return text
    tokens = float(found[1]) * 1024
    if not tokens.is_integer():
        raise InputError(f"{name} is {text!r}, which is {tokens:g} tokens", remedy="give a whole number of tokens; 1k is 1024")
    return str(int(tokens))
