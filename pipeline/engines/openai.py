"""Any OpenAI-compatible URL: nothing is launched; the server belongs to someone else (TGI, a hosted vLLM, a vendor)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import httpx

from pipeline.engines.base import OTHERS_TELL, Body, Engine
from pipeline.errors import EngineError, InputError
from pipeline.net.chat import SAMPLING, Defaults
from pipeline.planning.plan import Plan, Request
from pipeline.prompts.conversation import Conversation, Prompt


class OpenAiCompatible(Engine):
    """A server reached by URL only."""

    name = "openai"
    title = "OpenAI-compatible"
    drawback = "a server elsewhere is not needed: this machine can serve {users} itself"
    serves = "url"
    prefix = "OPENAI_COMPATIBLE"
    key_variable = "OPENAI_COMPATIBLE_API_KEY"
    default_model = ""
    defaults = Defaults("its owner's choice")
    # some hosted models refuse top_p, above all beside a temperature
    sampling: ClassVar[Mapping[str, float]] = {"temperature": SAMPLING["temperature"]}

    def plan(self, request: Request) -> Plan:
        """An empty plan: the server's flags are its owner's."""
        model = request.model
        if request.overrides:
            remedy = "change the settings where that server is started"
            raise InputError("--set does nothing for an OpenAI-compatible URL", remedy=remedy)
        return Plan(
            engine=self.name,
            feasible=True,
            dtype=model.dtype,
            quantization=model.quantization,
            max_model_len=model.shape.max_positions,
            warnings=("nothing is launched: the flags of this server are its owner's",),
        )

    def completion(self, model: str, prompt: Prompt, most: int, marks: Sequence[str]) -> tuple[str, Body]:
        """As text: not every server takes token IDs."""
        path, body = super().completion(model, prompt, most, marks)
        return path, body | {"prompt": prompt.text}

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """Always raises EngineError: the OpenAI API has no way to ask for the rendered prompt."""
        raise EngineError("the OpenAI API does not tell the rendered prompt", remedy=OTHERS_TELL)
