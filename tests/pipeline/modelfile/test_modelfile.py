from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, ModelError
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.modelfile.modelfile import build_modelfile, explain, for_gguf, own_system, to_create_request, write_modelfile
from pipeline.modelfile.template import derive, kept_system
from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate
from pipeline.prompts.renderers import render_go
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder

EMBEDDED = ChatTemplate(EMBEDDED_TEMPLATE, {"eos_token": "<|end_of_text|>"})
PIECES = ['"', '"""', "\\", "{{", "}}", " ", "\n", "\u00a0", "a", "é", "@end@", "SYSTEM "]


def build(**kwargs):
    return build_modelfile(**{"gguf": "unsloth.Q8_0.gguf", "template": EMBEDDED, "parameters": {"num_ctx": 4096}, **kwargs})


def make_run(tmp_path, gguf, jinja=EMBEDDED_TEMPLATE, positions=131072):
    run = RunFolder("r", tmp_path)
    run.merged.mkdir(parents=True)
    (run.merged / "chat_template.jinja").write_text(EMBEDDED_TEMPLATE, encoding="utf-8")
    write_json(run.merged / "tokenizer_config.json", {"eos_token": "<|end_of_text|>"})
    write_json(run.merged / "config.json", {"max_position_embeddings": positions})
    gguf(run.gguf, {"general.architecture": "granite", "granite.context_length": 2048, "tokenizer.chat_template": jinja})
    return run


def test_commands_in_order():
    modelfile = parse_modelfile(build(system="Be brief.", license="Apache-2.0"))
    assert [name for name, _ in modelfile.commands] == [
        "from", "template", "parameter temperature", "parameter top_p", "parameter stop", "parameter num_ctx", "system", "license",
    ]  # fmt: skip
    assert modelfile.source == "./unsloth.Q8_0.gguf"
    assert modelfile.template == derive(EMBEDDED).text
    assert modelfile.parameters == {"temperature": ["0"], "top_p": ["1"], "stop": ["<|end_of_text|>"], "num_ctx": ["4096"]}
    assert (modelfile.system, modelfile.licenses) == ("Be brief.", ["Apache-2.0"])


def test_no_system_message_unless_given():
    assert parse_modelfile(build()).system is None


def test_num_ctx_is_required():
    with pytest.raises(InputError, match="num_ctx"):
        build(parameters={})


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"foo": 1}, "no parameter 'foo'"),
        ({"num_ctx": "many"}, "num_ctx must be int"),
        ({"use_mmap": "maybe"}, "use_mmap must be bool"),
    ],
)
def test_wrong_parameters_are_refused_here_not_at_the_first_chat(parameters, why):
    with pytest.raises(InputError, match=why):
        build(parameters={"num_ctx": 1, **parameters})


def test_create_request_is_typed():
    modelfile = parse_modelfile(build(system="S", license="L", parameters={"num_ctx": 8, "use_mmap": True, "stop": ["a", "b"]}))
    assert to_create_request(modelfile, "sha256:00", "m:latest") == {
        "model": "m:latest",
        "files": {"unsloth.Q8_0.gguf": "sha256:00"},
        "stream": False,
        "template": derive(EMBEDDED).text,
        "system": "S",
        "license": ["L"],
        "parameters": {"temperature": 0.0, "top_p": 1.0, "stop": ["a", "b"], "num_ctx": 8, "use_mmap": True},
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(system=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_any_system_message_survives(system):
    """As SYSTEM where the grammar can hold it, else as a literal in TEMPLATE."""
    modelfile = parse_modelfile(build(system=system))
    own = derive(EMBEDDED, system).text
    assert (modelfile.system, modelfile.template) in {(system, derive(EMBEDDED).text), (None, own)}


def test_system_message_in_template_reaches_the_prompt_only_when_none_is_sent(go, template, now):
    system = 'no-break\u00a0space, 👩‍💻, """\nand {{ braces }} @end@'
    text = derive(template, system).text
    user, other = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Mine."}
    prompts = render_go(text, [([user], None), ([other, user], None)], now)
    expected = [[{"role": "system", "content": system}, user], [other, user]]
    assert prompts == [template.render(m, add_generation_prompt=True, now=now) for m in expected]


class TestRun:
    def test_written_beside_the_gguf(self, tmp_path, write_gguf):
        run = make_run(tmp_path, write_gguf)
        path = write_modelfile(run, system="S")
        modelfile = parse_modelfile(path.read_text(encoding="utf-8"))
        assert path == run.modelfile
        assert modelfile.source == "./unsloth.Q8_0.gguf"
        assert modelfile.parameters["num_ctx"] == ["8192"]

    def test_context_of_a_small_model(self, tmp_path, write_gguf):
        run = make_run(tmp_path, write_gguf, positions=1024)
        assert parse_modelfile(write_modelfile(run).read_text(encoding="utf-8")).parameters["num_ctx"] == ["1024"]

    def test_gguf_with_another_template_is_refused(self, tmp_path, write_gguf):
        run = make_run(tmp_path, write_gguf, jinja="{{ messages }}")
        with pytest.raises(ModelError, match="another chat template"):
            write_modelfile(run)
        assert not run.modelfile.exists()

    def test_missing_stage_says_which(self, tmp_path):
        with pytest.raises(InputError, match="no merged_fp16") as caught:
            write_modelfile(RunFolder("r", tmp_path))
        assert caught.value.remedy == "granite-pipeline export --run r"


def test_any_gguf_by_the_template_it_carries(tmp_path, write_gguf):
    path = tmp_path / "model.gguf"
    write_gguf(
        path, {"general.architecture": "granite", "granite.context_length": 2048, "tokenizer.chat_template": EMBEDDED_TEMPLATE}
    )
    modelfile = parse_modelfile(for_gguf(path).text)
    assert modelfile.source == str(path)
    assert modelfile.parameters["num_ctx"] == ["2048"]
    write_gguf(path, {"general.architecture": "granite"})
    with pytest.raises(ModelError, match="carries no chat template"):
        for_gguf(path)
    with pytest.raises(InputError, match="no such file"):
        for_gguf(tmp_path / "none.gguf")


class TestExplain:
    def renderers(self, template, jinja):
        text = f"FROM x\nTEMPLATE {template}\n" if template else "FROM x\n"
        return [choice.renderer for choice in explain(parse_modelfile(text), jinja)]

    def test_our_templates_are_used_by_every_generation(self, template):
        modelfile = parse_modelfile(build(template=template))
        before, after, forced, native = explain(modelfile, template.source)
        assert (before.renderer, after.renderer, forced.renderer) == ("TEMPLATE",) * 3
        assert native.renderer == "the GGUF's chat template"

    def test_template_without_tools_loses_to_a_jinja_with_tools(self):
        renderers = self.renderers("{{ range .Messages }}{{ .Content }}{{ end }}", EMBEDDED_TEMPLATE)
        assert renderers[:2] == ["TEMPLATE", "the GGUF's chat template"]

    def test_template_that_lists_tools_but_shows_no_results_loses_too(self):
        renderers = self.renderers("{{ .Tools }}{{ range .Messages }}{{ .Content }}{{ end }}", EMBEDDED_TEMPLATE)
        assert renderers[1] == "the GGUF's chat template"

    def test_plain_jinja_leaves_template_in_charge(self):
        assert self.renderers("{{ .Prompt }}", "{{ messages }}")[1] == "TEMPLATE"

    def test_without_template(self):
        assert self.renderers("", EMBEDDED_TEMPLATE) == ["a guessed built-in template", "the GGUF's chat template"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(system=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_ollama_is_given_the_system_message_wherever_the_modelfile_keeps_it(system):
    """As SYSTEM, which an Ollama that does not render with TEMPLATE uses too."""
    parsed = parse_modelfile(build(system=system))
    assert to_create_request(parsed, "", "m")["system"] == own_system(parsed) == system
    assert (kept_system(parsed.template) is None) == (parsed.system is not None)


def test_explain_says_where_a_kept_system_message_is_lost():
    system = 'a """ b " c\u200b'
    lost = [
        choice.generation
        for choice in explain(parse_modelfile(build(system=system)), EMBEDDED.source)
        if "loses" in choice.reason
    ]
    assert lost == ["0.30 and later, OLLAMA_GO_TEMPLATE=0"]
    assert not any("loses" in choice.reason for choice in explain(parse_modelfile(build(system="plain")), EMBEDDED.source))
