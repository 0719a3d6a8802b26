"""The KubeRay manifests say what Kubernetes, KubeRay, Ray and langcell's own command line understand.

Kubernetes drops fields that it does not know without a word, so validation here is strict. Ray's autoscaler
reads the cluster as it would in the head's pod. That pods start needs Kubernetes, and is not shown.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from langcell.config import Config, parse

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
IMAGE_HOME = "/home/ray/langcell"
"""Where docker/Dockerfile puts jobs/."""
PART_OF = {"app.kubernetes.io/part-of": "langcell"}

Document = dict[str, Any]


def read(name: str) -> Document:
    """A manifest, each alias in it a copy of its own."""
    return json.loads(json.dumps(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())))


@pytest.fixture
def cluster() -> Document:
    return read("raycluster")


@pytest.fixture
def job(cluster: Document) -> Document:
    """The RayJob as `kubectl apply -k` sends it (`test_kustomize_joins_job_and_cluster` holds it to that)."""
    joined = read("rayjob")
    joined["spec"]["rayClusterSpec"] = cluster["spec"]
    [submitter] = joined["spec"]["submitterPodTemplate"]["spec"]["containers"]
    submitter["image"] = container(cluster["spec"]["headGroupSpec"])["image"]
    return joined


def container(group: Document) -> Document:
    [one] = group["template"]["spec"]["containers"]
    return one


def groups(cluster: Document) -> dict[str, Document]:
    workers = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"], **workers}


def pods(job: Document) -> Iterator[Document]:
    yield job["spec"]["submitterPodTemplate"]
    for group in groups({"spec": job["spec"]["rayClusterSpec"]}).values():
        yield group["template"]


def strict(schema: Any) -> Any:
    """The schema with every property refused that it does not name, and Kubernetes' integer or string."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "x-kubernetes-int-or-string" in schema:
        return {"type": ["integer", "string"]}
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.fixture(params=["rayclusters", "rayjobs"])
def manifest(request: pytest.FixtureRequest, shared: Path) -> tuple[jsonschema.Validator, Document]:
    """A manifest, and a validator by KubeRay's definition of its kind."""
    file = shared / "kuberay" / f"{request.param}.v1.schema.json.gz"
    if not file.exists():
        pytest.skip(f"no definition at {file}")
    schema = strict(json.loads(gzip.decompress(file.read_bytes())))
    # metadata and status are Kubernetes' own: the definition leaves them open.
    schema["properties"]["metadata"] = {"type": "object"}
    document = request.getfixturevalue({"rayclusters": "cluster", "rayjobs": "job"}[request.param])
    return jsonschema.Draft202012Validator(schema), document


def test_manifest_has_what_the_definition_names_and_nothing_else(
    manifest: tuple[jsonschema.Validator, Document],
) -> None:
    validator, document = manifest
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)] == []


def test_definition_refuses_typos(manifest: tuple[jsonschema.Validator, Document]) -> None:
    """The validation above is one that can fail, at every depth."""
    validator, document = manifest
    spec = ["spec", "rayClusterSpec"] if document["kind"] == "RayJob" else ["spec"]
    pod = [*spec, "workerGroupSpecs", 1, "template", "spec", "containers", 0]
    for path in (spec, [*spec, "autoscalerOptions"], [*pod, "securityContext"], [*pod, "livenessProbe"]):
        wrong = copy.deepcopy(document)
        place: Any = wrong
        for key in path:
            place = place[key]
        place["idleTimeoutSecond"] = 5
        [error] = validator.iter_errors(wrong)
        assert "idleTimeoutSecond" in error.message
    wrong = copy.deepcopy(document)
    (wrong["spec"].get("rayClusterSpec") or wrong["spec"])["authOptions"]["mode"] = "tokens"
    assert not validator.is_valid(wrong)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which has kustomize built in, is not here")
def test_kustomize_joins_job_and_cluster(job: Document) -> None:
    rendered = subprocess.run(
        ["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    documents = {document["kind"]: document for document in yaml.safe_load_all(rendered)}
    assert documents == {"RayJob": job, "NetworkPolicy": read("networkpolicy")}, (
        "no cluster of its own beside"
    )


def test_kinds_and_versions() -> None:
    found = {file.stem: (read(file.stem)["apiVersion"], read(file.stem)["kind"]) for file in FOLDER.iterdir()}
    assert found == {
        "kustomization": ("kustomize.config.k8s.io/v1beta1", "Kustomization"),
        "networkpolicy": ("networking.k8s.io/v1", "NetworkPolicy"),
        "podmonitor": ("monitoring.coreos.com/v1", "PodMonitor"),
        "raycluster": ("ray.io/v1", "RayCluster"),
        "rayjob": ("ray.io/v1", "RayJob"),
        "volume": ("v1", "PersistentVolumeClaim"),
    }


def test_autoscaler_reads_the_groups_as_meant(cluster: Document) -> None:
    """By the code that the autoscaler runs in the head's pod. `memory` is left out: sizes are the user's."""
    cluster["metadata"]["namespace"] = "langcell"  # which the API server fills in
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    resources = {
        name: {k: v for k, v in one["resources"].items() if k != "memory"} for name, one in types.items()
    }
    assert resources == {
        config["head_node_type"]: {"CPU": 0},  # the head must live as long as the run
        "data": {"CPU": 30},
        "a100": {"CPU": 0, "GPU": 8},  # no data task beside 8 trainers, and none that brings such a node up
    }
    workers = [one for name, one in types.items() if name != config["head_node_type"]]
    assert all(one["min_workers"] == 0 < one["max_workers"] for one in workers), "idle nodes cost"
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"


def test_data_alone_runs_on_spot_nodes(cluster: Document) -> None:
    markets = {name: group["template"]["spec"]["nodeSelector"] for name, group in groups(cluster).items()}
    key = "karpenter.sh/capacity-type"
    assert markets == {"head": {key: "on-demand"}, "data": {key: "spot"}, "a100": {key: "on-demand"}}


def test_token_is_asked_for_and_no_secret_stands_here(cluster: Document) -> None:
    assert cluster["spec"]["authOptions"] == {"mode": "token"}, "the operator makes the secret"
    assert cluster["spec"]["rayVersion"] == ray.__version__, "KubeRay asks for the version to turn it on"
    for file in FOLDER.iterdir():
        # Manifests, not their comments, which say how to read the token.
        text = yaml.safe_dump(yaml.safe_load(file.read_text()))
        assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN|AUTH_TOKEN|\bhf_\w{20}", text), file
        assert "kind: Secret" not in text, file


def test_pods_cannot_become_root(job: Document) -> None:
    for pod in pods(job):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000, "the image's user"
        [one] = pod["spec"]["containers"]
        autoscaler = job["spec"]["rayClusterSpec"]["autoscalerOptions"]
        for context in (one["securityContext"], autoscaler["securityContext"]):
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_requests_equal_limits_and_every_pod_runs_one_image(job: Document) -> None:
    """GPUs must be asked for so; for memory it means that a pod is not evicted for what another takes."""
    autoscaler = job["spec"]["rayClusterSpec"]["autoscalerOptions"]["resources"]
    containers = [pod["spec"]["containers"][0] for pod in pods(job)]
    for resources in (autoscaler, *(one["resources"] for one in containers)):
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()
    assert len({one["image"] for one in containers}) == 1


def test_nodes_share_the_volume_and_are_probed_without_a_token(cluster: Document) -> None:
    claim = read("volume")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups(cluster).values():
        mounts = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        shared_volume = volumes[mounts["/mnt/langcell"]]
        assert shared_volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert set(mounts.values()) == volumes.keys()
        assert container(group)["workingDir"] == "/mnt/langcell"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container(group)[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    [shm] = [v for v in groups(cluster)["a100"]["template"]["spec"]["volumes"] if v["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"


def test_probed_path_is_one_that_ray_answers_without_a_token() -> None:
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    assert "/api/healthz" in PUBLIC_EXACT_PATHS
    assert DEFAULT_DASHBOARD_AGENT_LISTEN_PORT == 52365


def options(job: Document) -> Config:
    """The run of the entrypoint, by langcell's own parser; the image's paths read from the checkout."""
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"].replace(IMAGE_HOME, str(ROOT)))
    assert python == "python"
    assert Path(script).is_file()
    return parse("", ROOT / "jobs" / "configs" / "demo.yaml", arguments)


def test_entrypoint_is_one_that_the_job_takes_and_that_resumes(job: Document) -> None:
    config = options(job)
    assert config.run.resume == "auto", "each retry goes on where the last one stopped"
    assert config.train.gpus is True, "a cluster that has scaled to none shows no GPU to find"
    assert config.census.version == "2023-07-25", "the paper's corpus"
    for folder in (config.run.dir, config.corpus.dir):
        assert folder.startswith("/mnt/langcell/"), "every node must see it"
    a100 = groups({"spec": job["spec"]["rayClusterSpec"]})["a100"]
    gpus = int(container(a100)["resources"]["limits"]["nvidia.com/gpu"])
    assert config.train.num_workers <= gpus * a100["maxReplicas"], (
        "the cluster can grow to what the run asks for"
    )


def test_job_is_tried_again_and_leaves_nothing_that_costs(job: Document) -> None:
    spec = job["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 3600
    assert not {"activeDeadlineSeconds", "clusterSelector"} & spec.keys()
    assert "deletionStrategy" not in spec, "KubeRay refuses its rules beside shutdownAfterJobFinishes"
    # And in these pods another policy than Never, with the autoscaler's version 2.
    assert all(pod["spec"].get("restartPolicy", "Never") == "Never" for pod in pods(job))


def test_policy_and_monitor_select_the_pods(job: Document) -> None:
    for pod in pods(job):
        assert PART_OF.items() <= pod["metadata"]["labels"].items()
    policy = read("networkpolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == PART_OF
    own, *others = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": PART_OF}}]}, "its own pods, on every port"
    assert [rule["ports"] for rule in others] == [
        [{"protocol": "TCP", "port": 8265}],
        [{"protocol": "TCP", "port": 8080}],
    ]
    assert all(rule["from"] for rule in others), "an empty list is everyone"
    monitor = read("podmonitor")["spec"]
    assert PART_OF.items() <= monitor["selector"]["matchLabels"].items()
    assert [end["port"] for end in monitor["podMetricsEndpoints"]] == ["metrics"]
