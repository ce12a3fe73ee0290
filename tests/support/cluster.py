"""Judges of Kubernetes manifests without a cluster: strict schemas of its versions, field tables of CRDs, the kubelet's expansion.

The schemas are those bundled with kubernetes-validate, read here directly: the package itself tells only the first error.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = ("1.33.0", "1.37.0")
_BASE = "https://kubernetes.io/api/_definitions.json"
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}


def _fields(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def _core(name: str) -> dict[str, str]:
    return {"$ref": f"{_BASE}#/$defs/io.k8s.api.core.v1.{name}"}


def _one_of(*words: str) -> dict[str, Any]:
    return {"enum": list(words)}


_META = {"$ref": f"{_BASE}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
_LABELS = {"type": "object", "additionalProperties": _TEXT}
# what is used of them, from the projects' CRDs: leaderworkerset v1, keda v1alpha1, kserve v1alpha2; nothing else is let through
CUSTOM = {
    "leaderworkerset.x-k8s.io/v1 LeaderWorkerSet": _fields(
        "leaderWorkerTemplate",
        replicas=_NUMBER,
        startupPolicy=_one_of("LeaderCreated", "LeaderReady"),
        rolloutStrategy=_fields(
            "type",
            type=_one_of("RollingUpdate"),
            rollingUpdateConfiguration=_fields("", partition=_NUMBER, maxUnavailable=_NUMBER, maxSurge=_NUMBER),
        ),
        leaderWorkerTemplate=_fields(
            "workerTemplate",
            size=_NUMBER,
            restartPolicy=_one_of("Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
            leaderTemplate=_core("PodTemplateSpec"),
            workerTemplate=_core("PodTemplateSpec"),
        ),
    ),
    "keda.sh/v1alpha1 ScaledObject": _fields(
        "scaleTargetRef triggers",
        scaleTargetRef=_fields("name", apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
        minReplicaCount=_NUMBER,
        maxReplicaCount=_NUMBER,
        pollingInterval=_NUMBER,
        cooldownPeriod=_NUMBER,
        triggers={"type": "array", "items": _fields("type metadata", type=_TEXT, metadata=_LABELS)},
    ),
    "serving.kserve.io/v1alpha2 LLMInferenceService": _fields(
        "",
        model=_fields("uri", uri=_TEXT, name=_TEXT),
        replicas=_NUMBER,
        labels=_LABELS,
        parallelism=_fields("", tensor=_NUMBER, data=_NUMBER),
        router=_fields("", route=_fields(""), gateway=_fields(""), scheduler=_fields("")),
        template=_core("PodSpec"),
    ),
}


@cache
def _schemas(version: str) -> Path:
    spec = find_spec("kubernetes_validate")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("kubernetes-validate (dev extra) is not installed")
    return Path(spec.submodule_search_locations[0]) / "kubernetes-json-schema" / f"v{version}-local-strict"


@cache
def _registry(version: str) -> Registry[Any]:
    definitions = json.loads((_schemas(version) / "_definitions.json").read_text(encoding="utf-8"))
    return Registry().with_resource(_BASE, Resource.from_contents(definitions))


@cache
def _schema(version: str, api: str, kind: str) -> dict[str, Any]:
    if custom := CUSTOM.get(f"{api} {kind}"):
        return _fields("spec", apiVersion={"const": api}, kind={"const": kind}, metadata=_META, spec=custom)
    short = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)
    found: dict[str, Any] = json.loads((_schemas(version) / f"{kind.lower()}-{short}.json").read_text(encoding="utf-8"))
    return found


def errors(manifest: dict[str, Any], version: str) -> list[str]:
    """Everything that a Kubernetes version's strict schema has against a manifest, each with its path; a kind that is not known fails."""
    schema = _schema(version, manifest["apiVersion"], manifest["kind"])
    found = Draft202012Validator(schema, registry=_registry(version)).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


def expanded(word: str, known: dict[str, str]) -> str:
    """A word of ``command`` or ``args`` as the kubelet hands it on: ``$(NAME)`` where NAME is known, ``$$`` as a dollar."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)", lambda found: "$" if found[0] == "$$" else known.get(found[1], found[0]), word, flags=re.DOTALL
    )


class _Lenient(yaml.SafeLoader):  # type: ignore[misc]
    """Reads as the laxest reader in the field (go-yaml 2, by which kubectl reads): 12e4 is a number there, y a truth."""


_Lenient.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)
_Lenient.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0[xob]?)?[0-9a-fA-F_]+$"), list("-+0123456789"))
_Lenient.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))
_Lenient.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))
_Lenient.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node), 0))
_Lenient.add_constructor("tag:yaml.org,2002:bool", lambda loader, node: ("not a text", loader.construct_scalar(node)))


def read(text: str) -> list[dict[str, Any]]:
    """The documents of a file, as YAML 1.1 has them; the laxest reader must find the same."""
    found = list(yaml.safe_load_all(text))
    strings = [text for one in found for text in leaves(one) if isinstance(text, str)]
    lax = [text for one in yaml.load_all(text, _Lenient) for text in leaves(one) if isinstance(text, str)]
    assert lax == strings
    return found


def leaves(value: Any) -> list[Any]:
    """Every value in JSON-like data that is no list and no object, and every key."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in (key, *leaves(inner))]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]
