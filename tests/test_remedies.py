"""Every remedy and every text about usage names only what exists; a made-up one is caught."""

from __future__ import annotations

import pytest
from advice import HOLE, Text, in_code, texts
from existing import unknown


def test_every_remedy_and_usage_text_names_what_exists() -> None:
    found = list(texts())
    assert sum(text.remedy for text in found) > 250
    assert len(found) > 500
    assert [(text.where, name) for text in found for name in unknown(text)] == []


@pytest.mark.parametrize(
    ("words", "caught"),
    [
        ("use --frobnicate", "--frobnicate"),
        ("train again with --frobnicate", "train --frobnicate"),
        ("granite-pipeline export --offline", "export --offline"),
        ("stop it first (certify --whole)", "certify --whole"),
        ("granite-pipeline mend --run x", "granite-pipeline mend"),
        ("lower --max-model-len", "--max-model-len"),  # an engine's, which only --set takes
        ("--set max-modal-len=4096", "--set max-modal-len"),
        ("pip install x --frobnicate", "pip --frobnicate"),
        ("make everything", "make everything"),
        ("make DEVICE=cpu it", "make it"),
        ("set VLLM_KEY_OF_API", "VLLM_KEY_OF_API"),
        (f"set {HOLE}_BASE_ADDRESS", f"{HOLE}_BASE_ADDRESS"),
        ("make setup GADGET=cuda", "GADGET"),
        ("open report/index.html", "report/index.html"),
        ("pip install -c constraints/tpu.txt", "constraints/tpu.txt"),
        ("pip install 'granite-pipeline[everything]'", "granite-pipeline[everything]"),
    ],
)
def test_a_made_up_name_is_caught(words: str, caught: str) -> None:
    assert unknown(Text("here", words, remedy=True)) == [caught]


@pytest.mark.parametrize(
    "words",
    [
        "use --host, or granite-pipeline export --run x --force, then certify --offline",
        "make setup DEVICE=cpu; make available what was skipped; see report/report.html and constraints/cpu.txt",
        f"set {HOLE}_BASE_URL={HOLE}/v1, HF_TOKEN or VLLM_PYTHON; {HOLE} -m pip install -c constraints/cuda.txt x",
        "--set max-model-len=32k, --set VLLM_CPU_KVCACHE_SPACE=4 or --set enforce_eager",
        "pip uninstall -y torchvision; save FP8, Q4_K_M and AVX512_BF16 in config.json",
    ],
)
def test_what_exists_is_let_through(words: str) -> None:
    assert unknown(Text("here", words, remedy=True)) == []


def test_a_text_about_usage_may_name_an_engines_own_flag() -> None:
    assert unknown(Text("docs", "vLLM takes --enforce-eager")) == []
    assert unknown(Text("docs", "vLLM takes --enforce-lazy")) == ["--enforce-lazy"]


def test_remedies_are_found_wherever_code_keeps_them() -> None:
    source = """
raise InputError("x", remedy="one" if a else f"two {b} 2")
_REMEDY: str = "three"
remedy, other = ("four", "five")
_RESERVED = {"--key": "six"}
yield Finding("check", "fail", "evidence", "seven")
Mismatch(True, "text", "eight")
def _remedy(): return "nine" + ", ".join(names)
log("not a remedy --frobnicate")
"""
    found = [text.words for text in in_code(source, "module.py")]
    assert sorted({*found} - {", "}) == sorted(["one", f"two {HOLE} 2", "three", "four", "five", "six", "seven", "eight", "nine"])
    assert {text.where for text in in_code(source, "module.py")} >= {"module.py:2", "module.py:7"}
