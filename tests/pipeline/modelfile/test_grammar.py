from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.modelfile.grammar import parse_modelfile, quoted, writable

PIECES = ['"', '"""', "'", "\\", "{{", "}}", " ", "\n", "\r\n", "\t", "a", "é", "#", "FROM x", "SYSTEM ", "🚨", "漢"]
awkward = st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=10).map("".join)


def test_every_command():
    text = (
        '# comment\nFROM ./m.gguf\n  template """{{ .Prompt }}\nx"""\nPARAMETER stop <|end_of_text|>\nPARAMETER stop "</s>"\n'
        'PARAMETER num_ctx 4096\nSYSTEM You are   "x".\nLICENSE one\nLICENSE two\nMESSAGE user hi there\nREQUIRES 0.30.0'
    )
    modelfile = parse_modelfile(text)
    assert modelfile.source == "./m.gguf"
    assert modelfile.template == "{{ .Prompt }}\nx"
    assert modelfile.parameters == {"stop": ["<|end_of_text|>", "</s>"], "num_ctx": ["4096"]}
    assert modelfile.system == 'You are   "x".'
    assert modelfile.licenses == ["one", "two"]
    assert modelfile.commands[-2:] == (("message user", "hi there"), ("requires", "0.30.0"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("SYSTEM x\n", "no FROM line"),
        ("FROM x\nFOO bar\n", r"line 2: a command must be one of"),
        ("FROM\n", "line 2: a command must be one of"),
        ("FROM x\n12 y\n", "line 2"),
        ('FROM x\nSYSTEM """open\n', "ends inside"),
        ("FROM x\nPARAMETER stop\n", "needs a name"),
        ("FROM x\nMESSAGE robot hi\n", "needs a role"),
        ("FROM x\nSYST", "ends inside"),
    ],
)
def test_refusals(text, why):
    with pytest.raises(InputError, match=why):
        parse_modelfile(text)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain words", "plain words"),
        ("", ""),
        (" leading", '""" leading"""'),
        ("final newline\n", '"""final newline\n"""'),
        ('"quoted"', '""""quoted""""'),
        ('ends in """', 'ends in """'),
        ("a\\b {{ .X }}", "a\\b {{ .X }}"),
        ('"\n"', '""""\n""""'),
    ],
)
def test_quoting(value, written):
    assert quoted(value, "SYSTEM") == written


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("a\nb\u00a0c", r"U\+00A0 in line 2"),
        ("x\u200dy", r"U\+200D in line 1"),
        ('one """\ntwo', 'ends in """'),
        ("bell\a", r"U\+0007"),
    ],
)
def test_what_no_modelfile_can_hold_is_refused(value, why):
    assert not writable(value)
    with pytest.raises(InputError, match=why):
        quoted(value, "LICENSE")


@given(value=awkward)
def test_round_trip_or_refusal(value):
    """Written values come back unchanged; refused are only those that Ollama cannot read back."""
    try:
        text = f"FROM x\nLICENSE {quoted(value, 'LICENSE')}\nPARAMETER num_ctx 1\n"
    except InputError:
        unprintable = any(c not in "\t\r\n " and not c.isprintable() for c in value)
        assert unprintable or any(
            line.rstrip(" \t").endswith('"""') for line in f'"""{value}'.replace("\r", "\n").split("\n")[:-1]
        )
        return
    assert parse_modelfile(text).commands == (("from", "x"), ("license", value), ("parameter num_ctx", "1"))
