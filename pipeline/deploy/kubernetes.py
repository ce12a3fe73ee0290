"""What all Kubernetes manifests here are made of: a fine-tune's name, its pod, the Service and what stands around it.

One address is one fine-tune: names and selectors carry the manifest hash, so a new training is a new set of objects beside the old one.
Nothing of a cluster is asked; what it must have is said in the file's first lines (:func:`to_yaml`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import yaml

from pipeline.deploy.container import DNS_NAME, RUNS, Contained, Object, Storage
from pipeline.errors import InputError
from pipeline.runs.text import printable, without_password

# the product's own image, as docker compose builds it; a cluster has it from a registry
IMAGE = "granite-pipeline:local"
PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
DOMAIN = "granite-pipeline.dev"
USER_ID = 1000
# StatefulSets and autoscalers put up to 20 characters before or after a name, and a label has 63
_LONGEST_RUN, SHORT_HASH, _LABEL = 27, 12, 63
# seconds: what is being answered may end while no new request comes any more
_PRE_STOP, GRACE = 10, 120
_TAGGED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
# what every reader of YAML takes for a text: not for a number (12e4), a truth (y, off) or a date
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9./_-]+")


@dataclass(frozen=True)
class Options:
    """What a user chooses beside the plan. ``most`` 0: no autoscaling; ``secret``: the Secret that holds the engine's key."""

    replicas: int = 1
    most: int = 0
    image: str = IMAGE
    secret: str = ""
    runtime_class: str = ""
    prometheus: str = PROMETHEUS

    def __post_init__(self) -> None:
        for option, value, form in (
            ("--secret", self.secret, DNS_NAME),
            ("--runtime-class", self.runtime_class, DNS_NAME),
            ("--image", self.image, _TAGGED),
        ):
            if value and not form.fullmatch(value):
                raise InputError(
                    f"{option} {value!r} cannot be a name in Kubernetes", remedy="lower-case letters, digits, '-', '.'"
                )
        if without_password(self.prometheus) != self.prometheus:
            raise InputError(
                "--prometheus has a password in it", remedy="leave it out: KEDA has a TriggerAuthentication for that"
            )
        if self.most and self.most < self.replicas:
            raise InputError(f"--max-replicas {self.most} is less than --replicas {self.replicas}", remedy="give a larger one")


@dataclass(frozen=True)
class Served:
    """A fine-tune to be served: its run, the manifest hash, the planned server, and where the bytes come from."""

    run: str
    manifest: str
    inside: Contained
    storage: Storage
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        engine, vendor = self.inside.engine, self.inside.request.hardware.accelerator
        if vendor not in (None, "nvidia"):
            raise InputError(
                f"no image of {engine.title} for GPUs of {vendor} is known here",
                remedy="give --hardware with NVIDIA GPUs or a CPU",
            )
        if self.options.secret and not engine.key_variable:
            raise InputError(
                f"{engine.title} asks for no key", remedy="leave --secret out; the NetworkPolicy says who reaches it"
            )
        if self.options.most and not self.inside.facts.queue:
            raise InputError(
                f"{engine.title} tells no queue to scale by", remedy="leave --max-replicas out, or use --engine vllm"
            )

    @cached_property
    def name(self) -> str:
        """Of every object: the run and the beginning of the manifest hash, as a DNS label."""
        return f"{dns_label(self.run)}-{self.manifest[:SHORT_HASH]}"

    @property
    def selector(self) -> dict[str, str]:
        """What the pods of this fine-tune are known by; a label has room for 63 of the hash's 64 digits."""
        return {"app.kubernetes.io/instance": self.name, f"{DOMAIN}/manifest": self.manifest[:_LABEL]}

    @property
    def labels(self) -> dict[str, str]:
        """Of every object."""
        about = {"app.kubernetes.io/name": self.inside.engine.name, "app.kubernetes.io/managed-by": "granite-pipeline"}
        return about | self.selector

    @property
    def meta(self) -> Object:
        """Name, labels, and what is too long or too free for a label."""
        said = {f"{DOMAIN}/manifest-sha256": self.manifest, f"{DOMAIN}/run": self.run}
        return {"name": self.name, "labels": self.labels, "annotations": said}

    @cached_property
    def gpus(self) -> int:
        """Of one pod: the planned tensor parallel; for an engine without it, the fewest with which the plan is the same."""
        inside, every = self.inside, self.inside.request.hardware.gpus
        if inside.engine.serves == "folder" or not every:
            return inside.plan.tensor_parallel if every else 0
        for count in range(1, len(every)):
            fewer = replace(inside.request, hardware=replace(inside.request.hardware, gpus=every[:count]))
            plan = inside.engine.plan(fewer)
            same = (plan.feasible, plan.arguments, plan.environment, plan.warnings)
            if same == (True, inside.plan.arguments, inside.plan.environment, inside.plan.warnings):
                return count
        return len(every)

    @property
    def port(self) -> int:
        """Of the Service and in the pod."""
        return self.inside.engine.default_port


def dns_label(text: str) -> str:
    """A name's beginning as Kubernetes takes it: lower case, beginning with a letter."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:_LONGEST_RUN].strip("-")


def as_words(words: Sequence[str]) -> list[str]:
    """Words as ``command`` and ``args`` hold them: there ``$(NAME)`` would be a variable, and ``$$`` is a dollar."""
    return [word.replace("$", "$$") for word in words]


def pod_spec(served: Served, container: Object) -> Object:
    """A pod that is ready only with the bytes of its fine-tune: they are read first, by a container that can write nothing."""
    options = served.options
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    spec: Object = {
        # a Service's own variables (VLLM_PORT=tcp://...) are taken for settings by some engines
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": GRACE,
        "initContainers": [check_container(served)],
        "containers": [container],
        "volumes": [served.storage.volume(), *scratch(shm_gib=2 * max(1, served.gpus))],
        "topologySpreadConstraints": [{**spread, "labelSelector": {"matchLabels": served.selector}}],
    }
    if served.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.runtime_class:
        spec["runtimeClassName"] = options.runtime_class
    return spec


def pod_security() -> Object:
    """An ordinary user; the files of a run are readable for all."""
    return {"runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": USER_ID, "seccompProfile": {"type": "RuntimeDefault"}}


def security(*, read_only: bool = True) -> Object:
    """A container's own; the hooks that put NVIDIA's driver into one write to its root file system."""
    drop = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {**drop, "readOnlyRootFilesystem": read_only}


def scratch(shm_gib: int = 0) -> list[Object]:
    """What a container may write: /tmp, which is its home too, and shared memory."""
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}}
    return [{"name": "tmp", "emptyDir": {}}, *([shm] if shm_gib else [])]


def check_container(served: Served) -> Object:
    """``granite-pipeline check``: a pod with other bytes never becomes ready, and the page cache is warm for what follows."""
    words = ["--run", served.run, "--output", str(RUNS), "--manifest", served.manifest, "--engine", served.inside.engine.name]
    return {
        "name": "check",
        "image": served.options.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["granite-pipeline", "check"],
        "args": as_words(words),
        "env": variables({}),
        "resources": {"requests": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": security(),
        "volumeMounts": [served.storage.mount(served.run), {"name": "tmp", "mountPath": "/tmp"}],
    }


def server(served: Served, arguments: Sequence[str], *, answers: bool = True) -> Object:
    """The engine's container; one that does not answer clients (a further node of a model) has no probes and no port."""
    inside, engine = served.inside, served.inside.engine
    made: Object = {
        "name": "server",
        "image": inside.facts.gpu_image if served.gpus else inside.facts.image,
        "imagePullPolicy": "IfNotPresent",
        # without one, the image's own entry point is the server
        **({"command": list(words)} if (words := inside.facts.program or inside.facts.entry) else {}),
        "args": list(arguments),
        "env": variables(inside.env, engine.key_variable, served.options.secret),
        "resources": resources(served),
        "securityContext": security(read_only=not served.gpus),
        "volumeMounts": [
            served.storage.mount(served.run),
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if answers:
        made["ports"] = [{"name": "http", "containerPort": served.port}]
        made |= probes(engine.ready_path)
        made["lifecycle"] = {"preStop": {"sleep": {"seconds": _PRE_STOP}}, **created(served)}
    return made


def created(served: Served) -> Object:
    """For an engine whose model is made inside the running server: made once it answers, before the pod can be ready."""
    inside = served.inside
    if not inside.engine.creates_model:
        return {}
    # nothing that a user names is part of the script: it comes in as its words
    wait = " ".join(inside.facts.health[1:])
    script = f'cd "$0"; until {wait} >/dev/null 2>&1; do sleep 1; done; exec "$@"'
    words = [word.replace("{model}", inside.request.name) for word in inside.facts.create]
    return {"postStart": {"exec": {"command": ["sh", "-c", script, str(RUNS / served.run), *words]}}}


def probes(path: str) -> Object:
    """Twenty minutes to pull, load and compile; then out of the Service after 15 s of silence, and started again after a minute."""
    asked = {"httpGet": {"path": path, "port": "http"}}
    return {
        "startupProbe": {**asked, "periodSeconds": 10, "failureThreshold": 120, "timeoutSeconds": 5},
        "readinessProbe": {**asked, "periodSeconds": 5, "failureThreshold": 3, "timeoutSeconds": 5},
        "livenessProbe": {**asked, "periodSeconds": 10, "failureThreshold": 6, "timeoutSeconds": 10},
    }


def variables(env: Mapping[str, str], key: str = "", secret: str = "") -> list[Object]:
    """Planned variables, a home and a name for a user that has none, and the key by its Secret, never written here."""
    own = {"HOME": "/tmp", "USER": "granite-pipeline"}
    made: list[Object] = [{"name": name, "value": value.replace("$", "$$")} for name, value in ({**env, **own}).items()]
    if secret:
        made.append({"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return made


def resources(served: Served) -> Object:
    """A GPU pod asks for its GPUs, a CPU pod for the cores its threads are planned for and the memory it will take."""
    hardware, memory = served.inside.request.hardware, served.inside.plan.memory
    if served.gpus:
        # host memory is an assumption, not a measurement: enough that the pod is not the first to be evicted
        requests = {"cpu": str(2 * served.gpus), "memory": f"{8 * served.gpus}Gi"}
        return {"requests": requests, "limits": {"nvidia.com/gpu": served.gpus}}
    cores = str(hardware.cpu.cores)
    wanted = math.ceil(memory.total) + 1
    limit = max(wanted, math.floor(hardware.ram_gib))
    return {"requests": {"cpu": cores, "memory": f"{wanted}Gi"}, "limits": {"cpu": cores, "memory": f"{limit}Gi"}}


def services(served: Served, more: Mapping[str, str] | None = None) -> list[Object]:
    """One address for the pods of one fine-tune, and a name that has all their addresses; ``more`` selects among them."""
    ports = [{"name": "http", "port": served.port, "targetPort": "http"}]
    spec = {"selector": {**served.selector, **(more or {})}, "ports": ports}
    one: Object = {"apiVersion": "v1", "kind": "Service", "metadata": served.meta, "spec": spec}
    every = {**served.meta, "name": f"{served.name}-pods"}
    return [one, {**one, "metadata": every, "spec": {"clusterIP": "None", **spec}}]


def disruption_budget(served: Served) -> Object:
    """Machines are emptied one pod at a time."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": served.selector}}
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": served.meta, "spec": spec}


def network_policy(served: Served, *, peers: bool = False) -> Object:
    """Only pods with the label of a client come in, from any namespace; ``peers``: those of the same name too, on any port."""
    client = {"namespaceSelector": {}, "podSelector": {"matchLabels": {f"{DOMAIN}/client": "true"}}}
    rules: list[Object] = [{"from": [client], "ports": [{"protocol": "TCP", "port": "http"}]}]
    rules += [{"from": [{"podSelector": {"matchLabels": served.selector}}]}] if peers else []
    spec = {"podSelector": {"matchLabels": served.selector}, "policyTypes": ["Ingress"], "ingress": rules}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": served.meta, "spec": spec}


def scaler(served: Served, target: Mapping[str, str]) -> list[Object]:
    """KEDA adds a replica for every five requests that wait in an engine's queue; nothing without --max-replicas."""
    options, queue = served.options, served.inside.facts.queue
    if not options.most:
        return []
    # pods are known to Prometheus by name, and the name has the manifest hash in it
    query = f'sum({queue}{{pod=~"{served.name}-.+"}})'
    trigger = {"type": "prometheus", "metadata": {"serverAddress": options.prometheus, "query": query, "threshold": "5"}}
    spec = {
        "scaleTargetRef": dict(target),
        "minReplicaCount": options.replicas,
        "maxReplicaCount": options.most,
        "pollingInterval": 15,
        "cooldownPeriod": 360,
        "triggers": [trigger],
    }
    return [{"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": served.meta, "spec": spec}]


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes nothing by reference, and in quotes what any reader could take for something else than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if _PLAIN.fullmatch(text) else '"'),
)


def to_yaml(documents: Sequence[Object], said: Sequence[str]) -> str:
    """The manifests as one file; ``said`` becomes its first lines: how it was made, and what the cluster must have."""
    head = "".join(f"# {printable(line)}\n" for line in said)
    written = (yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True) for one in documents)
    return head + "".join(f"---\n{text}" for text in written)
