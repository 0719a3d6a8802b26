"""Three hosts on this machine, with a cable to each that a test can cut.

A host is a network namespace: its own loopback, ports and one `eth0`, joined by a veth pair to a
bridge that stands in a fourth namespace, the switch. Nothing is added to the machine's own network,
so addresses and ports are fixed and two runs at once do not meet; the names of the namespaces carry
the pid of the run, and a run that was killed is cleared away by the next.

A cut takes the host's port out of the bridge. `eth0` keeps its carrier and frames fall in both
directions, so that nobody is told anything: no reset, no unreachable, which is what a peer sees of a
cable cut two switches away or of a machine without power. `ip link set down` would be kinder than
life: the host's own kernel would know, and fail at once what here has to run into a time-out. (A
port's bridge state `disabled` does nothing: without spanning tree the kernel forwards again at once.)

Processes, `/tmp` and `/dev/shm` are the machine's: a folder is storage that all hosts share, also
over a cut, and a process of a cut host can be killed, waited for and asked what it did.

On two cores the three Ray nodes stand after about 15 s and are gone 1 s after the end.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

BIN = Path(sys.executable).parent
RAY_PORT = 6379
SERIAL = itertools.count()
NAME = re.compile(r"langcell-(?P<pid>\d+)-[\w-]+")

# What a process of any host needs to find its peers by the right interface.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    # With several clusters on the machine Ray's own search of the process table may find another's.
    "RAY_ADDRESS": f"10.77.0.1:{RAY_PORT}",
    # By default gloo asks for the address of the machine's name, which is loopback on most.
    "GLOO_SOCKET_IFNAME": "eth0",
    "NCCL_SOCKET_IFNAME": "eth0",
    "TP_SOCKET_IFNAME": "eth0",
}

WAIT_FOR_NODES = """
import sys, time, ray
ray.init(logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[1]):
    time.sleep(0.2)
"""


@dataclass(frozen=True)
class Resources:
    """What a host offers Ray: logical CPUs, other resources by name, object store in bytes."""

    cpus: int = 2
    other: Mapping[str, float] = field(default_factory=dict)
    object_store: int = 128 << 20


# A driver and data tasks on the first host; two training workers fit on either of the others.
DEFAULT = (Resources(2), Resources(2, {"trainer": 2}), Resources(2, {"trainer": 2}))


@dataclass
class Network:
    """Hosts numbered from 0, the first the head. `dir` is a short path, for logs and Ray's sockets."""

    name: str
    dir: Path
    resources: Sequence[Resources]
    environment: dict[str, str]
    dashboard: bool = False
    """Whether the head has one: jobs are submitted to it."""
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def namespace(self, host: int) -> str:
        return f"{self.name}-host{host}"

    @property
    def switch(self) -> str:
        return f"{self.name}-switch"

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def run(
        self, argv: Sequence[str | Path], host: int = 0, env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a host; `env` adds to the hosts' environment, `popen` goes to Popen.

        It has the pid of the command itself, and ends with the network at the latest.
        """
        command = ["ip", "netns", "exec", self.namespace(host), *map(str, argv)]
        process = subprocess.Popen(command, env=self.environment | dict(env or {}), **popen)
        self.started.append(process)
        return process

    def end(self) -> None:
        """End what `run` started and reap it; a namespace's end takes what is left of its children."""
        for process in self.started:
            process.kill()
            process.wait()

    def cut(self, host: int) -> None:
        """Let every frame from and to the host fall, silently."""
        ip("-n", self.switch, "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{host}", "master", "bridge")

    def pids(self, host: int) -> list[int]:
        """The host's processes, also those whose parent is gone."""
        return pids(self.namespace(host))

    def start_ray(self, host: int, env: Mapping[str, str] | None = None) -> None:
        """Start the host's Ray node, also again after it was lost; `wait_for_nodes` waits for it."""
        offered = self.resources[host]
        command: list[str | Path] = [BIN / "ray", "start", "--block", "--disable-usage-stats"]
        # A folder each time: in a common one, a node binds to a socket that another has, or has left.
        command += [f"--temp-dir={tempfile.mkdtemp(prefix=f'{host}-', dir=self.dir)}"]
        command += [f"--node-ip-address={self.address(host)}", f"--num-cpus={offered.cpus}"]
        command += [f"--resources={json.dumps(dict(offered.other))}"]
        command += [f"--object-store-memory={offered.object_store}"]
        if host == 0:
            command += ["--head", f"--port={RAY_PORT}", f"--include-dashboard={self.dashboard}"]
            command += [f"--dashboard-host={self.address(0)}"]
        else:
            command += [f"--address={self.address(0)}:{RAY_PORT}"]
        with self.log(host).open("ab") as log:
            self.run(command, host, env, stdout=log, stderr=subprocess.STDOUT, cwd=self.dir)

    def log(self, host: int) -> Path:
        """What `ray start` said on the host; its parts log to `dir/HOST-*/session_latest/logs`."""
        return self.dir / f"host{host}.log"

    def wait_for_nodes(self, count: int, timeout: float = 90) -> None:
        """Wait until the head counts `count` live Ray nodes. Raises RuntimeError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        waiting = self.run([sys.executable, "-c", WAIT_FOR_NODES, str(count)])
        while waiting.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if waiting.poll() is None:
            waiting.kill()
            waiting.wait()
        if waiting.returncode:
            logs = "\n".join(f"{path}:\n{path.read_text()}" for path in sorted(self.dir.glob("host*.log")))
            raise RuntimeError(f"not {count} live nodes within {timeout:.0f} s\n{logs}")


def ip(*arguments: str) -> str:
    """Run `ip`. Raises RuntimeError with what it said where it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def pids(namespace: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", namespace).split()]


def destroy(namespace: str) -> None:
    """End every process of a namespace and remove it, with its interfaces."""
    deadline = time.monotonic() + 20
    while remaining := pids(namespace):  # again, as a process may have started another meanwhile
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {remaining} of {namespace} do not end")
        for pid in remaining:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    ip("netns", "del", namespace)


def clear_abandoned() -> None:
    """Remove the namespaces and folders of runs that were killed."""

    def abandoned(name: str) -> re.Match[str] | None:
        found = NAME.match(name)
        return found if found and not psutil.pid_exists(int(found["pid"])) else None

    for line in ip("netns", "list").splitlines():
        if found := abandoned(line):
            with suppress(RuntimeError):  # another run may be clearing it away too
                destroy(found[0])
    for path in Path(tempfile.gettempdir()).glob("langcell-*"):
        if abandoned(path.name):
            shutil.rmtree(path, ignore_errors=True)


def why_not() -> str | None:
    """Why this machine cannot have hosts in network namespaces; None: it can."""
    if shutil.which("ip") is None:
        return "no `ip` command (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    trial = f"langcell-{os.getpid()}-{next(SERIAL)}-trial"
    try:
        with ExitStack() as made:
            ip("netns", "add", trial)
            made.callback(destroy, trial)
            ip("-n", trial, "link", "add", "bridge", "type", "bridge")
            ip("-n", trial, "link", "add", "port", "type", "veth", "peer", "name", "eth0")
            ip("netns", "exec", trial, "true")
    except RuntimeError as error:
        return f"no network namespaces here: {error}"
    return None


@contextmanager
def wired(
    resources: Sequence[Resources], environment: Mapping[str, str], dashboard: bool
) -> Iterator[Network]:
    """Hosts and switch, without Ray."""
    clear_abandoned()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["PATH"] = f"{BIN}{os.pathsep}{kept['PATH']}"
    with ExitStack() as made:
        # Not pytest's folder: the path of a Unix socket in it must stay below 108 bytes.
        directory = Path(tempfile.mkdtemp(prefix=f"langcell-{os.getpid()}-"))
        made.callback(shutil.rmtree, directory, ignore_errors=True)
        name = f"langcell-{os.getpid()}-{next(SERIAL)}"
        # What `ray start` leaves of a cluster that is killed would mislead the next Ray of the machine.
        kept |= ENVIRONMENT | {"RAY_TMPDIR": str(directory)}
        net = Network(name, directory, resources, kept | dict(environment), dashboard)
        hosts = range(len(resources))
        for namespace in (net.switch, *map(net.namespace, hosts)):
            ip("netns", "add", namespace)
            made.callback(destroy, namespace)
        made.callback(net.end)
        ip("-n", net.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", net.switch, "link", "set", "bridge", "up")
        for host in hosts:
            port, inside = f"port{host}", net.namespace(host)
            peer = ["peer", "name", "eth0", "netns", inside]
            ip("-n", net.switch, "link", "add", port, "type", "veth", *peer)
            ip("-n", net.switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", inside, "address", "add", f"{net.address(host)}/24", "dev", "eth0")
            ip("-n", inside, "link", "set", "lo", "up")
            ip("-n", inside, "link", "set", "eth0", "addrgenmode", "none", "up")  # IPv4 alone
            # Ray takes a host's own address from the route to this one, and sends nothing there.
            ip("-n", inside, "route", "add", "8.8.8.8", "dev", "eth0")
        yield net


@contextmanager
def three_hosts(
    resources: Sequence[Resources] = DEFAULT,
    environment: Mapping[str, str] | None = None,
    ray: bool = True,
    dashboard: bool = False,
) -> Iterator[Network]:
    """Three hosts, each a node of one Ray cluster whose head is the first; all gone at the end.

    Skips the test, with the reason, where the machine does not allow it. `environment` reaches Ray's
    own processes (its health checks are set there) and every command. Raises RuntimeError where the
    nodes do not come up.
    """
    if reason := why_not():
        pytest.skip(reason)
    with wired(resources, environment or {}, dashboard) as net:
        if ray:
            for host in range(len(resources)):
                net.start_ray(host)
            net.wait_for_nodes(len(resources))
        yield net
