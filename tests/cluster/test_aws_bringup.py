"""Ray's own AWS launcher brings the cluster file up on an EC2 that stands in for Amazon's.

The edge that is replaced is the account alone: boto3's requests go to moto, which keeps networks, roles and
instances in memory. Filling in resources, bootstrapping, launching and ending nodes are Ray's, with our file
as it is but for the three ids that a user puts in for what was made beforehand. Asserted is what EC2 then
says of its instances, and for what moto does not keep (EFA, network cards, the placement group), what reached
EC2. moto launches MinCount instances of a request, hence one a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    TAG_RAY_NODE_KIND,
    TAG_RAY_USER_NODE_TYPE,
)

from tests.cluster import launcher

REGION, ZONE = "us-east-1", "us-east-1a"
WANTED = {"head": 1, "data": 3, "a100": 2}
PROFILE = "arn:aws:iam::123456789012:instance-profile/langcell-"


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of an empty account. The key pair that Ray makes goes to a home of the test's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    caches = (client_cache, resource_cache, aws_config._get_subnets_or_die)
    with mock_aws():
        boto3.setup_default_session(region_name=REGION)
        yield boto3.client("ec2")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for cache in caches:
        cache.cache_clear()


def make_what_the_file_asks_for(ec2: Any) -> dict[str, str]:
    """Network and roles as a user makes them: placeholder of the file -> id in this account.

    The subnet gives public addresses: that nodes have none must be the file's doing.
    """
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20", AvailabilityZone=ZONE)["Subnet"][
        "SubnetId"
    ]
    ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    group = ec2.create_security_group(GroupName="langcell", Description="langcell", VpcId=vpc)["GroupId"]
    for name in ("langcell-head", "langcell-worker"):
        boto3.client("iam").create_instance_profile(InstanceProfileName=name)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    placeholder = "0123456789abcdef0"
    return {f"subnet-{placeholder}": subnet, f"sg-{placeholder}": group, f"ami-{placeholder}": image}


def alive(ec2: Any) -> list[dict[str, Any]]:
    """Instances that EC2 has and bills."""
    pages = ec2.get_paginator("describe_instances").paginate(
        Filters=[{"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}]
    )
    return [each for page in pages for group in page["Reservations"] for each in group["Instances"]]


def security_groups(ec2: Any) -> set[str]:
    return {group["GroupId"] for group in ec2.describe_security_groups()["SecurityGroups"]}


@pytest.mark.slow
def test_launches_and_ends_what_the_file_promises(ec2: Any) -> None:
    mine = make_what_the_file_asks_for(ec2)
    subnet, group, _ = mine.values()
    groups = security_groups(ec2)
    requests: list[dict[str, Any]] = []
    boto3.DEFAULT_SESSION.events.register(
        "provide-client-params.ec2.RunInstances", lambda params, **_: requests.append(dict(params))
    )

    config = launcher.prepared(launcher.raw("aws", mine))
    config = AWSNodeProvider.bootstrap_config(AWSNodeProvider.fillout_available_node_types_resources(config))
    nodes = config["available_node_types"]
    assert [nodes[name]["resources"]["CPU"] for name in WANTED] == [0, 32, 0], "not the instance's own number"
    assert security_groups(ec2) == groups, "Ray made a group of its own, open to SSH from everywhere"

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, count in WANTED.items():
        kind = NODE_KIND_HEAD if name == config["head_node_type"] else NODE_KIND_WORKER
        tags = {TAG_RAY_NODE_KIND: kind, TAG_RAY_USER_NODE_TYPE: name}
        for _ in range(count):
            provider.create_node(nodes[name]["node_config"], dict(tags), 1)

    instances: dict[str, list[dict[str, Any]]] = {name: [] for name in WANTED}
    for each in alive(ec2):
        [name] = [tag["Value"] for tag in each["Tags"] if tag["Key"] == TAG_RAY_USER_NODE_TYPE]
        instances[name].append(each)
    assert {name: len(launched) for name, launched in instances.items()} == WANTED
    said = {
        name: {
            (
                each["InstanceType"],
                each.get("InstanceLifecycle", "on demand"),
                each["IamInstanceProfile"]["Arn"],
            )
            for each in launched
        }
        for name, launched in instances.items()
    }
    assert said == {
        "head": {("m6i.2xlarge", "on demand", PROFILE + "head")},
        "data": {("m6i.8xlarge", "spot", PROFILE + "worker")},
        "a100": {("p4d.24xlarge", "on demand", PROFILE + "worker")},
    }
    for each in alive(ec2):
        assert "PublicIpAddress" not in each
        assert each["Placement"]["AvailabilityZone"] == ZONE
        assert {nic["SubnetId"] for nic in each["NetworkInterfaces"]} == {subnet}
        assert {g["GroupId"] for nic in each["NetworkInterfaces"] for g in nic["Groups"]} == {group}

    for request in requests:
        cards = [
            (nic.get("InterfaceType"), nic.get("NetworkCardIndex"), nic["DeviceIndex"])
            for nic in request["NetworkInterfaces"]
        ]
        gpus = request["InstanceType"] == "p4d.24xlarge"
        efa = [("efa", 0, 0), ("efa", 1, 1), ("efa", 2, 1), ("efa", 3, 1)]
        assert cards == (efa if gpus else [(None, None, 0)])
        assert request.get("Placement") == ({"GroupName": "langcell"} if gpus else None)
    assert len(requests) == sum(WANTED.values())

    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert not provider.non_terminated_nodes({})
    assert not alive(ec2), "a node that is stopped, not terminated, still costs its disk"
    assert not ec2.describe_volumes()["Volumes"], "disks outlive their nodes"
