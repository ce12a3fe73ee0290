"""What an inference engine declares and can do; every other room knows engines only through this.

A new engine is one class: ``name``, ``plan``, ``program``, and the facts below that differ from their defaults.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import httpx

from pipeline.engines.listing import Listing, openai_listing
from pipeline.errors import EngineError, InputError
from pipeline.machine.hardware import Hardware
from pipeline.model.tokenizer import Tokenizer
from pipeline.model.toolcalls import MARKS, Call
from pipeline.net.chat import SAMPLING, Defaults
from pipeline.net.client import ask
from pipeline.net.reach import get_json
from pipeline.planning.overrides import Known
from pipeline.planning.plan import Node, Plan, Request, Setting
from pipeline.prompts.conversation import Conversation, Prompt, openai_body
from pipeline.runs.folder import RunFolder

Body = dict[str, Any]
Top = list[tuple[int, float]]

LOOPBACK = "127.0.0.1"
# next tokens a server is asked for at each position: twice those that are compared, so that near-ties do not fall out
ASKED = 20
# the token ID of a text that is no token's
UNNAMED = -1
# half the context is not worth a retry below this
LEAST_CONTEXT = 512
# the reason of a flag that sets what a server samples with by default
WHY_DEFAULT = "for clients that name no sampling settings: what the run was verified with"
OTHERS_TELL = "compare prompts with the vllm, llamacpp or ollama engine"


@dataclass(frozen=True)
class Launch:
    """A server process to start: its argv, the variables added to the environment, and where it answers."""

    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    url: str
    ready_path: str
    model: str
    start_timeout: float = 600.0
    store: str = ""  # a folder that the server alone uses, removed when it has ended

    @property
    def ours(self) -> bool:
        """True when what is started is a module of this package, for this interpreter; any other program has its own packages."""
        return self.argv[1:2] == ("-m",) and self.argv[2].startswith("pipeline.")


@dataclass(frozen=True)
class Availability:
    """Whether an engine can be started here, or one that runs can be used; when not, why and the command that changes it.

    ``there``: something answers at the address that was asked, or accepts connections and says nothing.
    """

    usable: bool
    version: str | None = None
    reason: str = ""
    remedy: str = ""
    there: bool = False


@dataclass(frozen=True)
class Container:
    """How docker compose and Kubernetes run an engine.

    ``image`` is empty for an engine that needs a GPU. ``variables`` are documented variables that override a planned flag,
    ``gpu_flags`` flags with a default that the GPU file always has, ``entry`` the words before the flags where the image's
    entry point is not the server, ``health`` the test ("{port}" is filled in; empty: /health asked with the image's Python),
    ``create`` the command that makes a run's model ("{model}") in the server that the variable ``create_at`` names, where the
    server is started without one. On Kubernetes ``program`` are the words that start the server in its image (empty: ``entry``), ``drain`` flags with
    which it finishes what it answers before it ends, ``queue`` the Prometheus metric of requests that wait.
    """

    gpu_image: str
    image: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    gpu_flags: Mapping[str, str] = field(default_factory=dict)
    entry: tuple[str, ...] = ()
    health: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    shm_size: str = ""
    gpu_ipc: str = ""
    create: tuple[str, ...] = ()
    create_at: str = ""
    program: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    queue: str = ""


@dataclass(frozen=True)
class Mismatch:
    """An installed build that does not suit this machine: fatal or only slow, what was found, and the command that helps."""

    fatal: bool
    text: str
    remedy: str


class Engine(ABC):
    """One inference engine. ``plan`` and ``launch`` are pure; the rest asks the machine or a running server.

    Every ``client`` has the server's base URL, without ``/v1``, and its key.
    """

    name: ClassVar[str]
    # as its makers write it
    title: ClassVar[str] = ""
    default_port: ClassVar[int] = 0
    # what follows host and port in the URL that applications are given
    url_path: ClassVar[str] = "/v1"
    # answers 200 once the model is loaded, which takes so many seconds at most
    ready_path: ClassVar[str] = "/health"
    start_timeout: ClassVar[float] = 600.0
    # why another engine may be chosen rather than this one, for so many {users}
    drawback: ClassVar[str] = "none of this project's measurements are of it"
    # what it loads: a model folder or a GGUF file; "url": nothing is launched from here, the server is someone else's
    serves: ClassVar[Literal["folder", "gguf", "url"]] = "folder"
    # the environment variables that configure it begin with this: VLLM_BASE_URL, VLLM_MODEL, ...
    prefix: ClassVar[str] = ""
    # a variable of the engine's own makers that says where its server is, beside {prefix}_BASE_URL
    host_variable: ClassVar[str] = ""
    # the variable that tells its server where to keep the models that are made in it
    store_variable: ClassVar[str] = ""
    # the variable from which the server reads the key that it asks for; empty: it reads none
    key_variable: ClassVar[str] = ""
    # the name asked of it where no variable says another
    default_model: ClassVar[str] = "granite-soc"
    # documented variable -> the planning override it holds
    settings: ClassVar[Mapping[str, str]] = {}
    # what a model's name ends with where it was given without
    tag: ClassVar[str] = ""
    # next_tokens() is asked by text and told by text: tokens that print alike are one there
    tells_texts: ClassVar[bool] = False
    # it loads a copy of its own making, whose content and not whose bytes are the artefact's
    copies_file: ClassVar[bool] = False
    # whether prompt() can be asked for what the model is fed
    tells_prompt: ClassVar[bool] = False
    # the ways a chat may take to a prompt here, as the known deviations in pipeline.prompts.parity name them
    renderers: ClassVar[tuple[str, ...]] = ()
    # other forms of its API through which a chat may come to another prompt: each is compared too (``prompt_through``)
    doors: ClassVar[tuple[str, ...]] = ()
    # forms of tool calls (pipeline.model.toolcalls) that it finds in an answer
    call_forms: ClassVar[tuple[str, ...]] = tuple(MARKS)
    # the model is made inside a running server, which is started without one
    creates_model: ClassVar[bool] = False
    serves_adapters: ClassVar[bool] = False
    # one model can be held by several machines: ``plan`` reads Request.nodes
    spans_nodes: ClassVar[bool] = False
    # the variable that tells a node of such a model its own address
    address_variable: ClassVar[str] = ""
    # what the log of a headless node says once it waits for the others
    joined: ClassVar[str] = ""
    # whether its program lists its flags with --help
    tells_flags: ClassVar[bool] = False
    # settings known where the engine is not installed
    flags: ClassVar[Known] = Known()
    # the flag that leaves out compilation and graphs, and the one that limits requests computed together: for retries
    eager_flag: ClassVar[str] = ""
    sequences_flag: ClassVar[str] = ""
    container: ClassVar[Container | None] = None
    defaults: ClassVar[Defaults] = Defaults("not documented")
    # what the gateway gives a request that leaves it out
    sampling: ClassVar[Mapping[str, float]] = SAMPLING

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            cls.title = cls.title or cls.name
            cls.prefix = cls.prefix or cls.name.upper()

    @abstractmethod
    def plan(self, request: Request) -> Plan:
        """Choose flags for this model, hardware and purpose, each with its reason."""

    def program(self) -> Sequence[str]:
        """The words that start its server, before the flags; EngineError where none is started from here."""
        raise EngineError(f"{self.title} is not started from here", remedy=f"set {self.prefix}_BASE_URL to the running server")

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        """Turn a plan into the process to start; EngineError when it is not feasible."""
        require_feasible(plan)
        argv = (*self.program(), *plan.arguments, *self.more_words(request), "--host", host, "--port", str(port))
        url = f"http://{host}:{port}"
        return Launch(self.name, argv, plan.environment, url, self.ready_path, request.name, self.start_timeout)

    def rank(self, plan: Plan, request: Request, node: Node, *, host: str, port: int) -> Launch:
        """The process on one node of a plan over several; rank 0 answers at host and port, for the others they are where it does.

        InputError for an engine whose models stay on one machine.
        """
        self.require_nodes()
        raise NotImplementedError(f"{self.name} spans nodes and says not how")

    def rank_flags(self, rank: int | str, master: str) -> list[str]:
        """The words that tell a node of a plan over several which one it is, and where the first is."""
        self.require_nodes()
        raise NotImplementedError(f"{self.name} spans nodes and says not how")

    def kserve_arguments(self, plan: Plan) -> list[str]:
        """A plan's words for a server that KServe's LLMInferenceService starts, without what that says itself.

        InputError for an engine that it does not start.
        """
        raise InputError(f"KServe's LLMInferenceService does not start {self.title}", remedy="use vllm, or --flavour deployment")

    def require_nodes(self) -> None:
        """Raise InputError for an engine that cannot hold one model on several machines."""
        if not self.spans_nodes:
            remedy = "use vllm, or start one server a machine: replicas of the whole model"
            raise InputError(f"{self.title} is not planned over several machines here", remedy=remedy)

    def default_flags(self, sampling: Mapping[str, float]) -> list[Setting]:
        """Flags with which its server samples so where a client names nothing; empty where it has none."""
        return []

    def to_clients(self) -> str:
        """How clients get what a run was verified with from a server of it that has defaults of its own."""
        wanted = " and ".join(f"{name} {value:g}" for name, value in self.sampling.items())
        own = f", or granite-pipeline serve {self.name} sets it" if self.default_flags(self.sampling) else ""
        return f"{self.title} takes {self.defaults} where a request names none: send {wanted}; the gateway fills it in{own}"

    def more_words(self, request: Request) -> Sequence[str]:
        """Words after the planned flags that are no settings."""
        return ()

    def available(self) -> Availability:
        """Look for the program or package, without starting it."""
        return Availability(True)

    def mismatch(self, hardware: Hardware, version: str, packages: Mapping[str, str]) -> Mismatch | None:
        """What is wrong with the installed build on this machine; ``packages`` are those beside it."""
        return None

    def advice(self, hardware: Hardware, users: int) -> str:
        """Why another engine may be chosen rather than this one."""
        return self.drawback.format(users=users)

    def url(self, host: str = LOOPBACK) -> str:
        """Where it answers on its documented port; empty where it has none."""
        return f"http://{host}:{self.default_port}{self.url_path}" if self.default_port else ""

    def as_url(self, address: str) -> str:
        """An address as the variables hold it, as a URL; one that cannot be read stays as it is."""
        return address

    def canonical(self, name: str) -> str:
        """A model's name as its server tells names apart; two that are equal here are one model there."""
        return name

    def variables(self) -> list[str]:
        """The variables that configure it."""
        common = (f"{self.prefix}_{word}" for word in ("BASE_URL", "MODEL", "ORCHESTRATOR_MODEL"))
        more = (f"{self.prefix}_REMOTE_OK",) if self.creates_model else ()
        return list(filter(None, [*common, *more, *self.settings, self.key_variable, self.host_variable]))

    def artefact(self, run: RunFolder) -> Path | None:
        """The folder or file of a run that it serves; None when nothing is served from here."""
        return {"folder": run.merged, "gguf": run.gguf}.get(self.serves)

    def folders(self) -> list[Path]:
        """Folders outside the runs that its server writes to."""
        return []

    def flags_question(self) -> list[str]:
        """A command that prints its flags, as ``--help`` or as a line FLAGS and a JSON list; empty when it takes none."""
        return [*self.program(), "--help"] if self.tells_flags else []

    def half_context(self, plan: Plan, request: Request) -> Mapping[str, str | None]:
        """Settings with half the context, where a shorter context is what frees memory; empty where it is not, or too short."""
        return {}

    async def at(self, root: str, timeout: float) -> Availability:
        """Whether the server at a URL can be given a model to serve; nothing is raised."""
        return Availability(False, reason=f"{self.title} is started with its model; none is made in it")

    def create(self, root: str, name: str, gguf: Path, parts: Mapping[str, Any]) -> None:
        """Make or replace the model ``name`` in the server at a URL from a GGUF; ``parts`` are what its Modelfile says beside it."""
        raise EngineError(f"{self.title} is started with its model; none is made in it")

    def remove(self, root: str, name: str) -> None:
        """Delete a model that :meth:`create` made; one that is gone already is no error."""
        raise EngineError(f"{self.title} is started with its model; none is removed from it")

    def prompt(self, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """What the engine feeds the model for this conversation.

        Raises ModelError when the chat template refuses it, NotApplicable when the API cannot say it, EngineError when
        the engine does not tell its prompts or does not answer.
        """
        raise EngineError(f"{self.title} does not tell the rendered prompt", remedy=OTHERS_TELL)

    def prompt_through(self, door: str, client: httpx.Client, model: str, conversation: Conversation) -> Prompt:
        """As :meth:`prompt`, by one of ``doors``."""
        raise EngineError(f"{self.title} has no {door}")

    def own_system(self, client: httpx.Client, model: str) -> str:
        """The system message that a running server puts before a conversation which brings none; empty where it adds none."""
        return ""

    def chat_body(self, conversation: Conversation) -> Body:
        """What a chat request says of a conversation; NotApplicable when the chat API cannot say it."""
        return openai_body(conversation)

    def completion(self, model: str, prompt: Prompt, most: int, marks: Sequence[str]) -> tuple[str, Body]:
        """(path, body) of a greedy request for at most ``most`` tokens after a rendered prompt (text and token IDs).

        Of the special tokens that the model writes, those in ``marks`` have to come back as text.
        """
        return "/v1/completions", {"model": model, "prompt": list(prompt.ids or ()), "max_tokens": most, "temperature": 0}

    def completed(self, answer: Body) -> Body:
        """The answer to such a request in the form of OpenAI's completions."""
        return answer

    def schema_requests(self, body: Body, schema: Body) -> list[tuple[str, Body]]:
        """(path, body) of every way this engine has to answer a chat request by a JSON schema; here OpenAI's."""
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        return [("/v1/chat/completions", body | {"response_format": wanted})]

    def force_call(self, body: Body, call: Call) -> Body | None:
        """A chat request with ``tools`` changed so that the engine makes the model write a call; None where it cannot."""
        return body | {"tool_choice": "required"}

    async def listing(self, root: str, api_key: str, timeout: float) -> Listing:
        """The models of a running server, at its URL without ``/v1``; a fault is in the listing, nothing is raised."""
        return openai_listing(await get_json(root, "/v1/models", api_key, timeout))

    def to_have(self, model: str) -> str:
        """How a model that a running server does not list comes to be served there."""
        return "serve the run under that name, or ask for one of these"

    def loaded_file(self, client: httpx.Client, model: str) -> str | None:
        """The model file or folder that a running server says it loaded; None where it does not tell."""
        try:
            served = client.get("/v1/models").json()["data"]
            return next((str(entry["root"]) for entry in served if entry["id"] == model and entry.get("root")), None)
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def next_tokens(self, client: httpx.Client, model: str, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[Top]:
        """The ASKED most likely next tokens after each prompt (text and token IDs), as (token ID, log-probability).

        Where it ``tells_texts``, an ID stands for all that print alike, and UNNAMED for a text that is no token's. Raises
        EngineError when the engine tells none.
        """
        try:
            with ThreadPoolExecutor(8) as pool:
                return list(pool.map(lambda prompt: self._top(client, model, prompt, tokenizer), prompts))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{self.name} gives no log-probabilities of tokens ({error!r})") from None

    def _top(self, client: httpx.Client, model: str, prompt: Prompt, tokenizer: Tokenizer) -> Top:
        """One position, asked by OpenAI's completions as vLLM extends them."""
        wanted = {"max_tokens": 1, "temperature": 0, "logprobs": ASKED, "return_tokens_as_token_ids": True}
        answer = ask(client, "/v1/completions", {"model": model, "prompt": list(prompt.ids or ()), **wanted})
        tops: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return [(int(token.removeprefix("token_id:")), float(value)) for token, value in tops.items()]

    def tokenize(self, client: httpx.Client, text: str) -> list[int] | None:
        """The token IDs that the engine's own tokenizer gives a text; None where that is the folder's tokenizer or is not told."""
        return None

    def served_dtype(self, argv: Sequence[str]) -> str:
        """The number type it computes in when started with ``argv`` (empty: unknown); Q8_0 for a run's GGUF.

        "quantised" where the engine makes the weights or the KV cache smaller than the exported ones.
        """
        if self.serves == "gguf":
            return "Q8_0"
        if {"--quantization", "--kv-cache-dtype"} & set(argv):
            return "quantised"
        told = argv[argv.index("--dtype") + 1] if "--dtype" in argv else "unknown"
        return "float16" if told == "auto" else told


def require_feasible(plan: Plan) -> None:
    """Raise EngineError with the numbers and the alternatives when a plan was refused."""
    if not plan.feasible:
        what, remedy = f"{plan.engine} cannot serve this model on this machine", "; or ".join(plan.alternatives)
        raise EngineError(what, evidence="\n".join(plan.warnings), remedy=remedy or "use a larger machine")
