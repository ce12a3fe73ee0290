"""BeeAI: a ``ChatModel`` for the configured backend, whichever it is (extra ``beeai``)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline import engines
from pipeline.config import Settings
from pipeline.errors import InputError, MissingDependency
from pipeline.operate.agents import Agents
from pipeline.operate.registry import address_for

if TYPE_CHECKING:
    from beeai_framework.backend import ChatModel


def chat_model(config: Settings, agent_name: str | None = None) -> ChatModel:
    """BeeAI's chat model for the backend in ``LLM_BACKEND``, or for the one that agents.yaml gives the agent, as it was verified.

    Raises InputError for an unknown agent or a backend without URL or model, MissingDependency without the extra.
    """
    address = address_for(config, agent_name)
    if not address.base_url or not address.model:
        raise InputError(f"{address.backend} has no base URL or no model name", remedy="granite-pipeline config")
    # BeeAI speaks through LiteLLM, which would fetch a price list when it is imported
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        from beeai_framework.adapters.openai import OpenAIChatModel
        from beeai_framework.backend import ChatModelParameters
    except ImportError as error:
        raise MissingDependency(f"BeeAI cannot be imported ({error})", remedy="pip install 'granite-pipeline[beeai]'") from None
    # the run's sampling settings, since engines have defaults of their own, unless agents.yaml says otherwise, as in the gateway
    sampling = Agents.load(config.agents_file).sampling.get(address.backend, engines.get(address.backend).sampling)
    # a key is always given: without one, BeeAI would send OPENAI_API_KEY to this server
    model: ChatModel = OpenAIChatModel(
        address.model, api_key=address.key, base_url=address.v1, parameters=ChatModelParameters(**sampling)
    )
    if "temperature" not in sampling:  # BeeAI's own default is 0
        model.parameters.temperature = None
    return model
