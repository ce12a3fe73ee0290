"""Model folders whose config, tokenizer or chat template were cut, edited or made to hurt."""

from __future__ import annotations

import json
from typing import Any

from bad_inputs.case import Case

_CONFIG: dict[str, Any] = {
    "model_type": "granite", "architectures": ["GraniteForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 300,
    "max_position_embeddings": 512,
}  # fmt: skip
CONFIG = json.dumps(_CONFIG).encode()
WEIGHTS = (lambda h: len(h).to_bytes(8, "little") + h + b"\0" * 16)(
    b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
)
_ROWS = b"".join(json.dumps({"prompt": f"q{i}", "completion": "a"}).encode() + b"\n" for i in range(20))
_TEMPLATE = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
_TOKENIZER_CONFIG = b'{"eos_token": "</s>"}'


def _config(**changes: Any) -> bytes:
    return json.dumps({**_CONFIG, **changes}).encode()


_BAD_CONFIGS: list[tuple[str, bytes, tuple[str, ...], str]] = [
    ("empty", b"", ("config.json:1: not valid JSON",), "InputError"),
    ("cut", CONFIG[:60], ("config.json:1: not valid JSON",), "InputError"),
    ("not UTF-8", b'{"model_type": "\xff"}', ("config.json", "not valid JSON"), "InputError"),
    ("a list", b"[]", ("config.json: must be a JSON object", "list"), "InputError"),
    ("null", b"null", ("config.json: must be a JSON object",), "InputError"),
    ("nested 100,000 deep", b'{"a": ' + b"[" * 100_000, ("config.json", "nested too deeply"), "InputError"),
    ("without widths", b"{}", ("does not describe a decoder model", "num_attention_heads"), "ModelError"),
    ("widths as text", _config(hidden_size="64"), ("hidden_size is '64'",), "ModelError"),
    ("no heads", _config(num_attention_heads=0), ("num_attention_heads is 0",), "ModelError"),
    ("a negative vocabulary", _config(vocab_size=-1), ("vocab_size is -1",), "ModelError"),
    ("NaN", CONFIG.replace(b'"hidden_size": 64', b'"hidden_size": NaN'), ("hidden_size is nan",), "ModelError"),
    ("1e400", CONFIG.replace(b'"hidden_size": 64', b'"hidden_size": 1e400'), ("hidden_size is inf",), "ModelError"),
    ("a billion layers", _config(num_hidden_layers=10**9), ("1000000000 layers",), "ModelError"),
    ("layer types that do not fit", _config(layer_types=["attention"]), ("layer_types has 1 entries",), "ModelError"),
    ("quantization_config as text", _config(quantization_config="nf4"), ("quantization_config must be an object",), "ModelError"),
]
_PLAN = ("plan", "--engine", "vllm", "--model", "{folder}")
CASES = [
    Case(f"config.json: {name}", {"config.json": data, "model.safetensors": WEIGHTS}, _PLAN, words, kind)
    for name, data, words, kind in _BAD_CONFIGS
]
CASES += [
    Case("model: no config.json", {"model.safetensors": WEIGHTS}, _PLAN, ("has no config.json",), "ModelError"),
    Case("model: no weights", {"config.json": CONFIG}, _PLAN, ("has no *.safetensors",), "ModelError"),
    Case("model: a text file", {"m.txt": b"x"}, (*_PLAN[:-1], "{folder}/m.txt"), ("neither a model folder nor",), "ModelError"),
]

_TRAIN = ("train", "--base", "{folder}/base", "--data", "{folder}/rows.jsonl", "--output", "{folder}/out", "--trainer", "hf")


def _base(name: str, words: tuple[str, ...], kind: str = "ModelError", **files: bytes | None) -> Case:
    """A base model folder in which one file is bad (None: missing)."""
    content: dict[str, bytes | None] = {
        "config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}", "chat_template.jinja": _TEMPLATE,
        "tokenizer_config.json": _TOKENIZER_CONFIG,
    }  # fmt: skip
    content |= {key.replace("__", "."): value for key, value in files.items()}
    placed = {f"base/{key}": value for key, value in content.items() if value is not None}
    return Case(f"base model: {name}", {**placed, "rows.jsonl": _ROWS}, _TRAIN, words, kind)


CASES += [
    _base("tokenizer.json is {}", ("tokenizer.json is not a tokenizer file",)),
    _base("tokenizer.json is empty", ("tokenizer.json is not a tokenizer file",), tokenizer__json=b""),
    _base("tokenizer.json is a list", ("tokenizer.json is not a tokenizer file",), tokenizer__json=b"[]"),
    _base("tokenizer.json cut", ("tokenizer.json is not a tokenizer file",), tokenizer__json=b'{"version": "1.0", "mod'),
    _base("tokenizer.json nested", ("tokenizer.json is not a tokenizer file",), tokenizer__json=b'{"model":' + b"[" * 9999),
    _base("no tokenizer.json", ("lacks tokenizer.json",), tokenizer__json=None),
    _base("tokenizer_config.json cut", ("tokenizer_config.json:1: not valid JSON",), "InputError", tokenizer_config__json=b"{"),
    _base("tokenizer_config.json is a list", ("must be a JSON object",), "InputError", tokenizer_config__json=b"[1]"),
    _base("eos_token is a number", ("eos_token must be text",), tokenizer_config__json=b'{"eos_token": 3}'),
    _base("chat_template is a number", ("chat_template must be text",), chat_template__jinja=None,
          tokenizer_config__json=b'{"chat_template": 3}'),
    _base("no chat template", ("has no chat template",), chat_template__jinja=None),
    _base("chat template not UTF-8", ("chat_template.jinja:2: not UTF-8",), "InputError", chat_template__jinja=b"ok\n\xff\xfe"),
    _base("pickled weights", ("pickled weights can run code",), **{"model__safetensors": None, "pytorch_model__bin": b"x"}),
    _base("code of its own", ("asks for code of its own", "auto_map"), config__json=_config(auto_map={"AutoModel": "evil.Model"})),
    _base("code in the tokenizer", ("asks for code of its own",), tokenizer_config__json=b'{"auto_map": {"AutoTokenizer": ["x", null]}}'),
]  # fmt: skip

_RENDER = ("render", "--messages", "{folder}/m.json", "--template", "{folder}/t.jinja")
_CHAT = b'[{"role": "user", "content": "hi"}]'
_TEMPLATES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("not closed", b"{% for m in messages %}", ("does not parse, line 1",)),
    ("unknown tag", b"ok\n{% import_secrets %}", ("does not parse, line 2",)),
    ("unknown filter", b"{{ messages|no_such }}", ("no_such",)),
    ("raises", b"{{ raise_exception('roles must alternate') }}", ("roles must alternate",)),
    ("reaches for python", b"{{ ''.__class__.__mro__[1].__subclasses__() }}", ("refuses these messages", "unsafe")),
    ("reaches through format", b"{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", ("refuses these messages",)),
    ("changes the messages", b"{{ messages.append(1) }}", ("refuses these messages",)),
    ("calls itself", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ("refuses these messages",)),
    ("loops for ever", b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ("takes longer than",)),
    ("a range of a billion", b"{% for a in range(10**9) %}{{ a }}{% endfor %}", ("refuses these messages",)),
    ("a text of 10 GB", b"{{ 'a' * 10**10 }}", ("memory",)),
    ("doubles a text", b"{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
     ("memory",)),
    ("writes 200 MB", b"{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaa' * 100 }}{% endfor %}", ("MiB",)),
    ("9 to the 9 to the 9", b"{{ 9 ** (9 ** 9) }}", ("takes longer than",)),
]  # fmt: skip
CASES += [
    Case(f"chat template: {name}", {"m.json": _CHAT, "t.jinja": data}, _RENDER, words, "ModelError")
    for name, data, words in _TEMPLATES
]
CASES += [
    Case(
        "base model: a name of 300 letters",
        {"rows.jsonl": _ROWS},
        (*_TRAIN[:2], "x" * 300, *_TRAIN[3:]),
        ("x" * 50,),
        "InputError",
    )
]
