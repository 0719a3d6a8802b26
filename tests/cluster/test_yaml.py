"""The cluster file launches what it promises: checked by Ray's validation and by EC2's own request model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster" / "aws-a100.yaml"


@pytest.fixture
def raw() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def config(raw: dict[str, Any]) -> dict[str, Any]:
    """As the launcher sees it: with Ray's defaults filled in, and validated."""
    prepared = prepare_config(raw)
    validate_config(prepared)
    return prepared


def test_unknown_key_is_refused(raw: dict[str, Any]) -> None:
    """The validation above is one that can fail."""
    for path in ((), ("docker",), ("available_node_types", "a100")):
        wrong = copy.deepcopy(raw)
        place = wrong
        for key in path:
            place = place[key]
        place["idle_timeout_minuts"] = 5
        with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
            validate_config(prepare_config(wrong))


def test_node_configs_are_requests_that_ec2_takes(config: dict[str, Any]) -> None:
    """Ray's schema does not look into `node_config`; a typo there would fail at launch."""
    model = botocore.session.get_session().get_service_model("ec2")
    request = model.operation_model("RunInstances").input_shape
    for name, node in config["available_node_types"].items():
        report = ParamValidator().validate({**node["node_config"], "MinCount": 1, "MaxCount": 1}, request)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert "Arn" in node["node_config"]["IamInstanceProfile"], f"{name} needs a role: it has no keys"


def test_head_runs_no_tasks(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"], "a head on spot takes the run with it"


def test_workers_come_on_demand_and_go_when_idle(config: dict[str, Any]) -> None:
    workers = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) == config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False, "a stopped node still costs its disk"
    data = [node for node in workers.values() if "GPU" not in node["resources"]]
    gpus = [node for node in workers.values() if "GPU" in node["resources"]]
    assert [node["node_config"].get("InstanceMarketOptions") for node in data] == [{"MarketType": "spot"}]
    assert [node["node_config"]["InstanceType"] for node in gpus] == ["p4d.24xlarge"]
    for node in gpus:
        assert "InstanceMarketOptions" not in node["node_config"], "trainers stay off spot"
        assert node["resources"]["CPU"] == node["resources"]["GPU"] == 8, "no data task beside 8 trainers"


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


def test_launcher_installs_nothing_of_its_own(config: dict[str, Any]) -> None:
    """Ray's defaults would put a nightly wheel of Ray into the image."""
    assert not config["setup_commands"] + config["head_setup_commands"] + config["worker_setup_commands"]


def test_no_secret(raw: dict[str, Any]) -> None:
    """Neither a key pair, nor a token, nor a credential: roles and the user's own files stand for them."""
    values = yaml.safe_dump(raw)
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN|RAY_AUTH_TOKEN=|\bhf_\w{20}", values)
    assert not {"aws_credentials", "ssh_private_key"} & ({*raw["provider"]} | {*raw["auth"]})
