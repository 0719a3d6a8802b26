"""The three hosts themselves: joined, cut without a word, mended, gone at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.hosts import Network, clear_abandoned, ip, three_hosts, why_not

PORT = 4321

# Sends back every line that comes on its one connection.
ECHO = f"""
import socket
server = socket.create_server(("", {PORT}))
print("listening", flush=True)
connection, _ = server.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""

# One line of input: one line sent to the host, and what came back within 2 s.
ASK = f"""
import socket, sys
connection = socket.create_connection((sys.argv[1], {PORT}), timeout=5)
connection.settimeout(2)
for line in sys.stdin:
    connection.sendall(line.encode())
    try:
        print(connection.recv(100).decode().strip(), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""

WHERE = """
import ray
ray.init(logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=1)
def address():
    return ray.util.get_node_ip_address()

nodes = [node["NodeID"] for node in ray.nodes()]
here = [ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
print(*sorted(ray.get([address.options(scheduling_strategy=one).remote() for one in here])))
"""

REDUCE = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:4322", rank=int(sys.argv[1]), world_size=3)
ranks = torch.tensor([float(dist.get_rank())])
dist.all_reduce(ranks)
print(ranks.item())
"""


KILLED = """
from tests.faults.hosts import three_hosts
with three_hosts(ray=False) as net:
    sleeping = net.run(["sleep", "1000"], 1)
    while sleeping.pid not in net.pids(1):  # not yet there
        pass
    print(net.name, net.dir, sleeping.pid, flush=True)
    input()
"""


@contextmanager
def conversation(net: Network, host: int, other: int) -> Iterator[subprocess.Popen[str]]:
    """A process of `host` with an open connection to one of `other`: ask it by its pipes."""
    echo = net.run([sys.executable, "-c", ECHO], other, stdout=subprocess.PIPE, text=True)
    assert echo.stdout is not None
    assert echo.stdout.readline() == "listening\n"
    client = [sys.executable, "-c", ASK, net.address(other)]
    ask = net.run(client, host, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with echo, ask:
        yield ask
        ask.kill()
        echo.kill()


def answer(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.slow
@pytest.mark.soak
def test_cut_cable_is_silent_and_mended_one_carries_what_was_sent() -> None:
    with three_hosts(ray=False) as net, conversation(net, 0, 1) as near, conversation(net, 0, 2) as far:
        assert answer(near, "one") == "one"
        assert answer(far, "one") == "one"
        net.cut(2)
        # A time-out, not ConnectionResetError: nobody told the sender.
        assert answer(far, "two") == "TimeoutError"
        assert answer(near, "two") == "two", "another host's cable"
        carrier = net.run(["cat", "/sys/class/net/eth0/carrier"], 2, stdout=subprocess.PIPE, text=True)
        assert carrier.communicate()[0] == "1\n", "the cut host is not told either"
        net.mend(2)
        # The same connection: TCP sends again what had fallen, in order.
        assert answer(far, "three").split() in (["two"], ["two", "three"])


@pytest.mark.slow
@pytest.mark.soak
def test_ray_and_gloo_reach_every_host_and_a_lost_node_can_come_back() -> None:
    with three_hosts() as net:
        where = net.run([sys.executable, "-c", WHERE], stdout=subprocess.PIPE, text=True)
        assert where.communicate(timeout=120)[0].split() == [net.address(host) for host in range(3)]
        ranks = [
            net.run([sys.executable, "-c", REDUCE, str(host)], host, stdout=subprocess.PIPE, text=True)
            for host in range(3)
        ]
        assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["3.0\n"] * 3
        for pid in net.pids(2):
            os.kill(pid, signal.SIGKILL)
        net.wait_for_nodes(2)
        net.start_ray(2)
        net.wait_for_nodes(3)
        family = [psutil.Process(pid) for host in range(3) for pid in net.pids(host)]
        assert len(family) >= 3
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert net.name not in ip("netns", "list")
    assert not net.dir.exists()


@pytest.mark.slow
@pytest.mark.soak
def test_all_is_gone_after_a_failure_and_after_a_killed_run() -> None:
    if reason := why_not():
        pytest.skip(reason)
    sleeping: subprocess.Popen[bytes] | None = None
    name = ""
    with pytest.raises(ZeroDivisionError), three_hosts(ray=False) as net:  # noqa: PT012
        name = net.name
        sleeping = net.run(["sleep", "1000"], 2)
        raise ZeroDivisionError
    assert sleeping is not None
    assert sleeping.wait(5) != 0
    assert name not in ip("netns", "list")

    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert killed.stdout is not None
    left, directory, orphan = killed.stdout.readline().split()
    killed.kill()
    killed.wait()
    assert left in ip("netns", "list")
    assert psutil.pid_exists(int(orphan))
    clear_abandoned()
    assert left not in ip("netns", "list")
    assert not Path(directory).exists()
    assert not psutil.pid_exists(int(orphan)) or psutil.Process(int(orphan)).status() == psutil.STATUS_ZOMBIE


def test_names_of_two_networks_differ_and_no_address_is_added_to_the_machine() -> None:
    if reason := why_not():
        pytest.skip(reason)
    before = ip("-o", "address")
    with three_hosts(ray=False) as one, three_hosts(ray=False) as other:
        assert one.name != other.name
        assert str(os.getpid()) in one.name
        assert ip("-o", "address") == before
