"""The cluster files launch what they promise.

Checked by Ray's validation and its scheduler of nodes, by EC2's and Compute Engine's own models of a
request, and by a shell that runs the hosts' commands beside stand-ins for mdadm, mount and sudo. No cloud
is asked: what only the accounts know (quotas, images, prices) stays unseen.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

from langcell.config import parse
from tests.cluster import launcher

INSTANCE = {"aws": "InstanceType", "gcp": "machineType"}


@pytest.fixture(params=launcher.CLOUDS)
def cloud(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def raw(cloud: str) -> dict[str, Any]:
    return launcher.raw(cloud)


@pytest.fixture
def config(raw: dict[str, Any]) -> dict[str, Any]:
    return launcher.prepared(raw)


def is_spot(node: dict[str, Any]) -> bool:
    request = node["node_config"]
    return (
        request.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or request.get("scheduling", {}).get("provisioningModel") == "SPOT"
    )


def test_unknown_key_is_refused(raw: dict[str, Any]) -> None:
    """The validation above is one that can fail."""
    for path in (
        (),
        ("docker",),
        ("available_node_types", "a100"),
        ("available_node_types", "a100", "docker"),
    ):
        wrong = copy.deepcopy(raw)
        place = wrong
        for key in path:
            place = place[key]
        place["idle_timeout_minuts"] = 5
        with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
            validate_config(prepare_config(wrong))


def test_aws_node_configs_are_requests_that_ec2_takes() -> None:
    """Ray's schema does not look into `node_config`; a typo there would fail at launch."""
    model = botocore.session.get_session().get_service_model("ec2")
    request = model.operation_model("RunInstances").input_shape
    for name, node in launcher.prepared(launcher.raw("aws"))["available_node_types"].items():
        report = ParamValidator().validate({**node["node_config"], "MinCount": 1, "MaxCount": 1}, request)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert "Arn" in node["node_config"]["IamInstanceProfile"], f"{name} needs a role: it has no keys"


def test_gcp_node_configs_are_instances_that_compute_engine_takes() -> None:
    """The discovery document that Google's client ships is a JSON schema but for how it names and closes
    its objects."""
    cache = pytest.importorskip("googleapiclient.discovery_cache", reason="needs google-api-python-client")
    text = re.sub(r'"\$ref": "(\w+)"', r'"$ref": "#/schemas/\1"', cache.get_static_doc("compute", "v1"))
    document = json.loads(text)
    for schema in document["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    model = jsonschema.Draft4Validator({"$ref": "#/schemas/Instance", "schemas": document["schemas"]})
    nodes = launcher.prepared(launcher.raw("gcp"))["available_node_types"]
    for name, node in nodes.items():
        errors = [f"{error.json_path}: {error.message}" for error in model.iter_errors(node["node_config"])]
        assert not errors, name
        assert node["node_config"]["serviceAccounts"][0]["email"], f"{name} needs an account: it has no keys"
    wrong = copy.deepcopy(nodes["data"]["node_config"])
    wrong["scheduling"] |= {"provisioningModel": "CHEAP", "restart": False}
    assert len(list(model.iter_errors(wrong))) == 2, "the model is one that can refuse"


def test_head_runs_no_tasks(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head), "a head on spot takes the run with it"


def test_workers_come_on_demand_and_go_when_idle(cloud: str, config: dict[str, Any]) -> None:
    workers = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) == config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False, "a stopped node still costs its disk"
    machines = {name: node["node_config"][INSTANCE[cloud]] for name, node in workers.items()}
    assert machines["a100"] == {"aws": "p4d.24xlarge", "gcp": "a2-highgpu-8g"}[cloud]
    assert {name: is_spot(node) for name, node in workers.items()} == {"data": True, "a100": False}


@pytest.mark.parametrize(
    ("demand", "launched"),
    [
        ([{"CPU": 1}] * 40, {"data": 2}),
        ([{"CPU": 1}] * 1000, {"data": 8}),
        ([{"GPU": 1}] * 32, {"a100": 4}),
        ([{"GPU": 1}] * 8 + [{"CPU": 0.5}] * 3, {"a100": 1, "data": 1}),
    ],
)
def test_data_work_stays_off_gpu_nodes_and_trainers_off_spot(
    config: dict[str, Any], demand: list[dict[str, Any]], launched: dict[str, int]
) -> None:
    """What Ray's autoscaler launches for a job's tasks and trainers: however many data tasks wait, no GPU
    node comes for them."""
    got, _ = get_nodes_for(
        config["available_node_types"],
        {config["head_node_type"]: 1},
        config["head_node_type"],
        config["max_workers"],
        demand,
        partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({})),  # type: ignore[arg-type]
    )
    assert got == launched


def test_commands_of_the_first_lines_are_what_the_job_takes(cloud: str) -> None:
    """The job as a reader copies it: every option exists, and its trainers fit the GPU nodes."""
    text = re.sub(r"\\\n#", "", launcher.path(cloud).read_text())
    words = shlex.split(re.findall(r"python jobs/pretrain\.py (.*)", text)[0])
    argv = [str(launcher.ROOT / word) if word.startswith("jobs/") else word for word in words]
    job = parse("", launcher.ROOT / "jobs" / "configs" / "demo.yaml", argv)
    asked = {"CPU": job.train.cpus_per_worker, "GPU": 1, **job.train.worker_resources}
    offered = launcher.raw(cloud)["available_node_types"]["a100"]["resources"]
    assert job.train.gpus
    assert all(8 * amount <= offered.get(name, 0) for name, amount in asked.items())
    scheme = {"aws": "s3://", "gcp": "gs://"}[cloud]
    assert job.run.dir.startswith(scheme)
    assert job.corpus.dir.startswith(scheme)


def test_addresses_are_private(cloud: str, config: dict[str, Any]) -> None:
    assert config["provider"]["use_internal_ips"] is True
    for node in config["available_node_types"].values():
        if cloud == "aws":
            for interface in node["node_config"]["NetworkInterfaces"]:
                assert interface["AssociatePublicIpAddress"] is False
                assert interface["Groups"], "Ray's own group takes SSH from everywhere"
        else:
            assert not any("accessConfigs" in each for each in node["node_config"]["networkInterfaces"])


def test_what_is_the_users_is_filled_in_once(cloud: str) -> None:
    """A subnet, group, image or role that stood in two places would be changed in one of them."""
    text = launcher.path(cloud).read_text()
    image = r"\S+/langcell:[\w.-]+"
    kinds = {
        "aws": rf"\b(?:ami|subnet|sg)-0[0-9a-f]+|instance-profile/[\w-]+|{image}",
        "gcp": rf"[\w-]+@PROJECT|\S*subnetworks/\w+|\S*resourcePolicies/\w+|images/family/\S+|{image}",
    }
    found = re.findall(kinds[cloud], text)
    assert len(found) >= 7
    assert sorted(set(found)) == sorted(found)


def test_nothing_listens_without_a_token(config: dict[str, Any]) -> None:
    starts = {
        role: [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
        for role in ("head", "worker")
    }
    for role, lines in starts.items():
        assert len(lines) == 1
        assert "RAY_AUTH_MODE=token ray start" in lines[0], role
    assert re.findall(r"--dashboard-host=(\S+)", starts["head"][0]) == ["127.0.0.1"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"], (
        "jobs are drivers: they need it too"
    )
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_a_stopped_job_has_time_for_a_checkpoint(config: dict[str, Any]) -> None:
    [start] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "RAY_JOB_STOP_WAIT_TIME_S=120 " in start


def test_launcher_installs_nothing_of_its_own(config: dict[str, Any]) -> None:
    """Ray's defaults would put a nightly wheel of Ray into the image."""
    assert not config["setup_commands"] + config["head_setup_commands"] + config["worker_setup_commands"]


def test_no_secret(raw: dict[str, Any]) -> None:
    """Neither a key pair, nor a token, nor a credential: roles and the user's own files stand for them."""
    values = yaml.safe_dump(raw)
    assert not re.search(
        r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN|RAY_AUTH_TOKEN=|\bhf_\w{20}|private_key", values
    )
    forbidden = {"aws_credentials", "gcp_credentials", "ssh_private_key"}
    assert not forbidden & ({*raw["provider"]} | {*raw["auth"]})


def test_only_gpu_nodes_get_gpus_and_their_image(config: dict[str, Any]) -> None:
    """As the launcher joins the options of all nodes with those of a type."""
    common = config["docker"]
    assert "gpu" not in " ".join(common["run_options"])
    for name, node in config["available_node_types"].items():
        docker = common | node.get("docker", {})
        options = [*docker["run_options"], *docker.get("worker_run_options", [])]
        assert ("--gpus all" in options) == (name == "a100")
        assert docker.get("worker_image", docker["image"]).endswith("-cpu") == (name != "a100")


class Host:
    """A shell whose disks and mounts are made up and whose changes are only written down.

    disks: local disks it has; mounts: what is mounted already.
    """

    def __init__(self, folder: Path, disks: int = 0, mounts: tuple[str, ...] = ()) -> None:
        self._folder, self._log = folder, folder / "changes"
        names = [f"/dev/nvme{i}n1" for i in range(disks)]
        lsblk = ["/dev/nvme9n1 Amazon Elastic Block Store"]
        lsblk += [f"{name} Amazon EC2 NVMe Instance Storage" for name in names]
        self._write("lsblk", "echo " + shlex.quote("\n".join(lsblk)))
        self._write("ls", "echo " + shlex.quote("\n".join(names)) if names else "exit 2")
        self._write("mountpoint", f'case " {" ".join(mounts)} " in *" $2 "*) exit 0;; esac; exit 1')
        self._write("sudo", f'echo "$*" >> {self._log}; [ "$1" != "$BROKEN" ]')

    def run(self, command: str, broken: str = "") -> tuple[int, list[str]]:
        """Exit code, and what was done as root; `broken` is a command that fails."""
        path = f"{self._folder}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command], env={"PATH": path, "BROKEN": broken}, capture_output=True, check=False
        )
        return done.returncode, self._log.read_text().splitlines()

    def _write(self, name: str, body: str) -> None:
        file = self._folder / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)


FIRST, LAST = "mkdir -p /mnt/scratch", "chmod 1777 /mnt/scratch"


class TestScratch:
    """The command that joins a host's local disks, run by a real shell."""

    @pytest.fixture
    def command(self, config: dict[str, Any]) -> str:
        [command] = [line for line in config["initialization_commands"] if "mdadm" in line]
        assert "--volume /mnt/scratch:/tmp" in config["docker"]["run_options"]
        return command

    def test_joins_all_local_disks(self, command: str, tmp_path: Path) -> None:
        code, (first, raid, make, mount, last) = Host(tmp_path, disks=8).run(command)
        assert (code, first, last) == (0, FIRST, LAST)
        assert "--level=0 --raid-devices=8 " in raid
        assert raid.split()[-8:] == [f"/dev/nvme{i}n1" for i in range(8)]
        assert make.startswith("mkfs.ext4 ")
        assert mount.startswith("mount ")
        assert mount.endswith(" /dev/md0 /mnt/scratch")

    def test_leaves_a_host_without_them_alone(self, command: str, tmp_path: Path) -> None:
        assert Host(tmp_path).run(command) == (0, [FIRST, LAST])

    def test_does_nothing_a_second_time(self, command: str, tmp_path: Path) -> None:
        assert Host(tmp_path, 8, ("/mnt/scratch",)).run(command) == (0, [FIRST, LAST])

    def test_a_disk_that_cannot_be_joined_ends_the_launch(self, command: str, tmp_path: Path) -> None:
        code, changes = Host(tmp_path, disks=8).run(command, broken="mdadm")
        assert code != 0
        assert LAST not in changes, "else Ray would fill the root disk and nobody would know"

    @pytest.mark.parametrize("cloud", ["aws"], indirect=True)
    def test_takes_disks_that_the_image_has_joined(self, command: str, tmp_path: Path) -> None:
        bind = "mount --bind /opt/dlami/nvme /mnt/scratch"
        assert Host(tmp_path, 8, ("/opt/dlami/nvme",)).run(command) == (0, [FIRST, bind, LAST])
