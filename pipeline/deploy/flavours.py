"""The kinds of manifests: a Deployment, a LeaderWorkerSet for a model over several nodes, KServe's LLMInferenceService, a sweep's Job."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.deploy.container import DNS_NAME, FILE_PATH, RUNS, Object, Storage
from pipeline.deploy.kubernetes import (
    DOMAIN,
    GRACE,
    SHORT_HASH,
    USER_ID,
    Options,
    Served,
    as_words,
    check_container,
    disruption_budget,
    dns_label,
    network_policy,
    pod_security,
    pod_spec,
    resources,
    scaler,
    scratch,
    security,
    server,
    services,
    variables,
)
from pipeline.errors import InputError

# what LeaderWorkerSet puts into each container's environment, and $(NAME) makes a word of
_LEADER, _RANK = "$(LWS_LEADER_ADDRESS)", "$(LWS_WORKER_INDEX)"
_ROLE = f"{DOMAIN}/role"
# KServe's container waits for exactly this
_KSERVE_PORT = 8000
# its start script puts arguments through eval: a word that a shell, or its templates, would read is not what arrives
_SAFE = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


def deployment(served: Served) -> list[Object]:
    """Replicas of the whole model behind one Service."""
    if served.inside.request.nodes > 1:
        raise InputError(
            "a Deployment's pod is on one node", remedy="--flavour lws holds one model on several, or leave --nodes out"
        )
    container = server(served, [*as_words(served.inside.arguments), *served.inside.facts.drain])
    template = {"metadata": {"labels": served.labels, **_scraped(served)}, "spec": pod_spec(served, container)}
    spec: Object = {
        **({} if served.options.most else {"replicas": served.options.replicas}),
        "progressDeadlineSeconds": 1800,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": served.selector},
        "template": template,
    }
    made = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": served.meta, "spec": spec}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": served.name}
    return [made, *services(served), disruption_budget(served), network_policy(served), *scaler(served, target)]


def lws(served: Served) -> list[Object]:
    """Replicas of a group of pods that hold one model together; when one of them ends, its group starts again."""
    inside, nodes = served.inside, served.inside.request.nodes
    inside.engine.require_nodes()
    if nodes < 2:
        raise InputError(
            "a LeaderWorkerSet is for a model over several nodes", remedy="give --nodes 2 or more, or leave --flavour out"
        )
    # the planned words, then the rank's own, as on any machine; host and port are the leader's
    *planned, _, _, _, _ = inside.arguments
    place = inside.arguments[len(planned) :]
    leader = [*as_words(planned), *inside.engine.rank_flags(0, _LEADER), *place, *inside.facts.drain]
    worker = [*as_words(planned), *inside.engine.rank_flags(_RANK, _LEADER), *inside.facts.drain]
    rollout = {"type": "RollingUpdate", "rollingUpdateConfiguration": {"maxSurge": 1, "maxUnavailable": 0}}
    spec: Object = {
        **({} if served.options.most else {"replicas": served.options.replicas}),
        "startupPolicy": "LeaderCreated",
        "rolloutStrategy": rollout,
        "leaderWorkerTemplate": {
            "size": nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": _ranked(served, "leader", server(served, leader)),
            "workerTemplate": _ranked(served, "worker", server(served, worker, answers=False)),
        },
    }
    made = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "metadata": served.meta, "spec": spec}
    target = {"apiVersion": str(made["apiVersion"]), "kind": str(made["kind"]), "name": served.name}
    around = [*services(served, {_ROLE: "leader"}), disruption_budget(served), network_policy(served, peers=True)]
    return [made, *around, *scaler(served, target)]


def kserve(served: Served) -> list[Object]:
    """An LLMInferenceService, whose own presets start the server: words, port and served name are theirs."""
    inside, storage = served.inside, served.storage
    if inside.request.nodes > 1:
        # serving.kserve.io ignores parallelism.pipeline on one node and has no preset for several (kserve issues 6044, 5047)
        raise InputError("KServe has no preset for one model on several nodes", remedy="use --flavour lws")
    if not storage.claim:
        raise InputError(
            "an image as a run folder is not KServe's kind of image", remedy="give --storage pvc://CLAIM, or --flavour deployment"
        )
    if served.options.most:
        raise InputError("KServe scales by settings of its own", remedy="leave --max-replicas out, or use --flavour deployment")
    arguments, artefact = inside.engine.kserve_arguments(inside.plan), inside.request.model.path
    if not artefact:
        raise InputError("no model folder is known", remedy="give --run")
    for word in (*arguments, inside.request.name):
        if not _SAFE.fullmatch(word):
            remedy = "choose a value of letters, digits and _@%+=:,./- (another --served-model-name), or --flavour deployment"
            raise InputError(f"KServe puts {word!r} through a shell, which would change it", remedy=remedy)
    container = {
        "name": "main",
        "image": inside.facts.gpu_image if served.gpus else inside.facts.image,
        "args": arguments,
        "env": [one for one in variables(inside.env, inside.engine.key_variable, served.options.secret) if one["name"] != "HOME"],
        "resources": resources(served),
    }
    pod: Object = {
        "securityContext": pod_security(),
        "automountServiceAccountToken": False,
        "initContainers": [check_container(served)],
        "containers": [container],
        "volumes": [storage.volume(), {"name": "tmp", "emptyDir": {}}],
    }
    if served.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if served.options.runtime_class:
        pod["runtimeClassName"] = served.options.runtime_class
    where = "/".join(filter(None, (storage.claim, storage.path, served.run, artefact.name)))
    spec: Object = {
        "model": {"uri": f"pvc://{where}", "name": inside.request.name},
        "replicas": served.options.replicas,
        "labels": served.selector,
        **({"parallelism": {"tensor": served.gpus}} if served.gpus > 1 else {}),
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": pod,
    }
    made = {"apiVersion": "serving.kserve.io/v1alpha2", "kind": "LLMInferenceService", "metadata": served.meta, "spec": spec}
    return [made, disruption_budget(served)]


FLAVOURS: Mapping[str, Callable[[Served], list[Object]]] = {"deployment": deployment, "lws": lws, "kserve": kserve}


@dataclass(frozen=True)
class Sweep:
    """A sweep's spec in the shared folder: its file name, the hash of its bytes, how many runs it has, and what one of them is given."""

    file: str
    sha256: str
    runs: int
    cpus: float | None = None
    gpus: float | None = None
    memory_gib: float | None = None


def sweep_job(sweep: Sweep, storage: Storage, options: Options, parallel: int, queue: str = "") -> Object:
    """An Indexed Job, a pod a run: pod N does run N of the spec and goes on where an earlier pod was cut.

    A wrong input or a failed verification (exit codes 1 and 2) ends its run; what a machine failed (3) is tried again, six times;
    an evicted pod counts for nothing.
    """
    if storage.image:
        raise InputError(
            "a sweep writes its runs, and an image cannot be written", remedy="--storage pvc://CLAIM of a shared folder"
        )
    if not FILE_PATH.fullmatch(sweep.file) or (queue and not DNS_NAME.fullmatch(queue)):
        what = f"{queue or sweep.file!r} cannot be a name here"
        raise InputError(what, remedy="letters, digits, '.', '_' and '-' for the file, lower-case ones for --queue")
    name = f"{dns_label(PurePosixPath(sweep.file).stem)}-{sweep.sha256[:SHORT_HASH]}"
    gpus = math.ceil(sweep.gpus or 0)
    requests = {"cpu": f"{sweep.cpus or 2:g}", "memory": f"{math.ceil(sweep.memory_gib or 8)}Gi"}
    below = {"subPath": storage.path} if storage.path else {}
    words = as_words([str(RUNS / sweep.file), "--index", "", "--output", str(RUNS)])
    words[2] = "$(JOB_COMPLETION_INDEX)"  # by the Job's controller
    container = {
        "name": "sweep",
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["granite-pipeline", "sweep"],
        "args": words,
        "workingDir": str(RUNS),
        "env": variables({}),
        "resources": {"requests": requests, **({"limits": {"nvidia.com/gpu": gpus}} if gpus else {})},
        "securityContext": security(read_only=not gpus),
        "volumeMounts": [
            {"name": "runs", "mountPath": str(RUNS), **below},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod: Object = {
        "restartPolicy": "Never",
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {**pod_security(), "fsGroup": USER_ID, "fsGroupChangePolicy": "OnRootMismatch"},
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container],
        "volumes": [storage.volume(read_only=False), *scratch(shm_gib=2 * max(1, gpus))],
    }
    if gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if options.runtime_class:
        pod["runtimeClassName"] = options.runtime_class
    labels = {
        "app.kubernetes.io/name": "sweep",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": "granite-pipeline",
    }
    rules: list[Object] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailIndex", "onExitCodes": {"containerName": "sweep", "operator": "In", "values": [1, 2]}},
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": sweep.runs,
        "parallelism": min(parallel or sweep.runs, sweep.runs),
        "backoffLimitPerIndex": 6,
        # the other runs go on whatever becomes of one
        "maxFailedIndexes": sweep.runs,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    queued = labels | ({"kueue.x-k8s.io/queue-name": queue} if queue else {})
    said = {f"{DOMAIN}/spec-sha256": sweep.sha256}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": queued, "annotations": said},
        "spec": spec,
    }


def _ranked(served: Served, role: str, container: Object) -> Object:
    """A pod template of a group; each rank is reached at its own address."""
    address = {"name": served.inside.engine.address_variable, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    container["env"] = [*container["env"], address]
    about = {"labels": {**served.labels, _ROLE: role}, **(_scraped(served) if role == "leader" else {})}
    return {"metadata": about, "spec": pod_spec(served, container)}


def _scraped(served: Served) -> Object:
    """What Prometheus looks for where it is set up to find pods by annotations."""
    if not served.inside.facts.queue:
        return {}
    said = {"prometheus.io/scrape": "true", "prometheus.io/port": str(served.port), "prometheus.io/path": "/metrics"}
    return {"annotations": said}
