"""Everything else a person hands over: .env, Modelfile, notebook, messages, machine, manifest, report."""

from __future__ import annotations

import json
from typing import Any

from bad_inputs.case import Case
from bad_inputs.models import CONFIG, WEIGHTS

_ENV: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("no equals sign", b"LLM_BACKEND=vllm\nthis is not an assignment\n", (".env:2: not NAME=VALUE",)),
    ("an open quote", b'LLM_BACKEND="vllm\nOLLAMA_MODEL=x\n', (".env:1: not NAME=VALUE",)),
    ("a name with a space", b"LLM BACKEND=vllm\n", (".env:1: not NAME=VALUE",)),
    ("text after the quote", b"LLM_BACKEND='vllm' or ollama\n", (".env:1: not NAME=VALUE",)),
    ("not UTF-8", b"# caf\xe9\nLLM_BACKEND=vllm\n", (".env:1: not UTF-8",)),
    ("NUL", b"LLM_BACKEND=vllm\nHF_TOKEN=a\0b\n", (".env:2: contains a NUL",)),
    ("an unknown backend", b"LLM_BACKEND=vlm\n", ("LLM_BACKEND='vlm'",)),
    ("a number with a comma", b"VLLM_GPU_MEMORY_UTIL=0,9\n", ("VLLM_GPU_MEMORY_UTIL='0,9'",)),
    ("a share above 1", b"VLLM_GPU_MEMORY_UTIL=90\n", ("VLLM_GPU_MEMORY_UTIL='90'", "less than or equal to 1")),
    ("quoted spaces", b'VLLM_MAX_MODEL_LEN=" 4 096 "\n', ("VLLM_MAX_MODEL_LEN",)),
    ("a negative length", b"VLLM_MAX_MODEL_LEN=-1\n", ("VLLM_MAX_MODEL_LEN='-1'",)),
    ("a huge number", b"LLAMACPP_PARALLEL=" + b"9" * 5000 + b"\n", ("LLAMACPP_PARALLEL",)),
    ("a token in the wrong place", b"VLLM_MAX_MODEL_LEN=hf_" + b"A" * 30 + b"\n", ("VLLM_MAX_MODEL_LEN='********'",)),
]
CASES = [Case(f".env: {name}", {".env": data}, ("env",), words, "InputError") for name, data, words in _ENV]

_MODELFILE: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("has no FROM",)),
    ("no FROM", b"SYSTEM hi\n", ("has no FROM",)),
    ("an unknown command", b"FROM x\nFORM y\n", ("line 2", "a command must be one of")),
    ("an open quote", b'FROM x\nSYSTEM """hello\n', ("ends inside",)),
    ("a parameter without a value", b"FROM x\nPARAMETER temperature\n", ("parameter needs a name and a value",)),
    ("an unknown role", b"FROM x\nMESSAGE robot hi\n", ("line 2", "message needs a role")),
    ("not UTF-8", b"FROM x\nSYSTEM \xff\n", ("Modelfile:2: not UTF-8",)),
    ("binary", bytes(range(256)), ("Modelfile",)),
]
CASES += [
    Case(f"Modelfile: {name}", {"Modelfile": data}, ("modelfile",), words, "InputError") for name, data, words in _MODELFILE
]


def _book(*cells: tuple[str, list[str]]) -> bytes:
    code = [
        {"cell_type": "code", "id": f"c{i}", "execution_count": None, "metadata": {"tags": tags}, "outputs": [], "source": source}
        for i, (source, tags) in enumerate(cells)
    ]
    return json.dumps({"cells": code, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()


_NOTEBOOK: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("is not a notebook",)),
    ("a list", b"[]", ("is not a notebook",)),
    ("cells missing", b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', ("is not a notebook",)),
    ("no tagged cell", _book(("A = 1", [])), ("no cell tagged 'parameters'",)),
    ("a syntax error", _book(("A = 1\nB = (", ["parameters"])), ("parameters cell, line 2",)),
    ("names that do not match", _book(("A, B = 1, 2, 3", ["parameters"])), ("2 names for 3 values",)),
]
CASES += [Case(f"notebook: {name}", {"n.ipynb": data}, ("notebook",), words, "InputError") for name, data, words in _NOTEBOOK]

_MESSAGES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("no JSON", b"{", ("m.json:1: not valid JSON",)),
    ("a number", b"7", ("m.json",)),
    ("turns that are text", b'["hi"]', ("m.json",)),
    ("no turns", b"[]", ()),
]
_RENDER = ("render", "--messages", "{folder}/m.json", "--template", "{folder}/t.jinja")
_JINJA = b"{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
CASES += [
    Case(f"messages: {name}", {"m.json": data, "t.jinja": _JINJA}, _RENDER, words, "InputError")
    for name, data, words in _MESSAGES
]


def _hardware(value: Any) -> Case:
    files = {"h.json": json.dumps(value).encode(), "config.json": CONFIG, "model.safetensors": WEIGHTS}
    verb = ("plan", "--engine", "vllm", "--model", "{folder}", "--hardware", "{folder}/h.json")
    return Case(f"hardware: {json.dumps(value)[:30]}", files, verb, ("h.json",), "InputError")


CASES += [_hardware(value) for value in ([], {"cpu": 4}, "x")]

_STAGE = {"key": "", "artefacts": {}, "result": {}, "seconds": 0, "finished_at": ""}
_MANIFEST: list[tuple[str, bytes]] = [
    ("cut", b'{"schema": 1, "stages": {'),
    ("a list", b"[]"),
    ("of another schema", json.dumps({"schema": 99, "stages": {"finetune": _STAGE}}).encode()),
    ("stages are text", b'{"schema": 1, "stages": "none"}'),
    ("a stage without a key", b'{"schema": 1, "stages": {"finetune": {}}}'),
]
CASES += [
    Case(f"manifest: {name}", {"x/manifest.json": data}, ("export", "--name", "x", "--output", "{folder}"), ("manifest.json",), "InputError")
    for name, data in _MANIFEST
]  # fmt: skip
_REPORT: list[tuple[str, bytes]] = [("cut", b'{"schema": 1'), ("a list", b"[]"), ("empty object", b"{}"), ("null", b"null")]
CASES += [
    Case(f"report: {name}", {"x/report/report.json": data}, ("report", "--run", "x", "--output", "{folder}"), (), "InputError")
    for name, data in _REPORT
]
CASES += [
    Case(f"run name: {name!r}", {}, ("export", "--name", name, "--output", "{folder}"), ("is not usable",), "InputError")
    for name in ("../up", "a/b", ".hidden", "", "a\nb", "x" * 65)
]
CASES += [
    Case("force: unknown stage", {}, ("export", "--output", "{folder}", "--force", "mrege"), ("no stage 'mrege'",), "InputError"),
    Case("prune: unknown run", {}, ("prune", "nope", "--output", "{folder}"), ("no run 'nope'",), "InputError"),
    Case("held-out rows cut", {"h.jsonl": b'{"messages": [\n'}, ("heldout",), ("h.jsonl:1",), "InputError"),
    Case("held-out rows not UTF-8", {"h.jsonl": b"\xff\n"}, ("heldout",), ("h.jsonl:1",), "InputError"),
]
