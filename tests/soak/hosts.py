"""Hosts of a network, on this machine: namespaces with an address, a name and processes of their own.

Every host has its own network stack, host name, process table, /dev/shm and /tmp/ray, and a cable to a switch that can
be pulled. Files are shared, as on a cluster with a network file system. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

RAY_PORT = 6379
UNSHARED = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
BOOT = """
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray
mount --bind {names} /etc/hosts
exec sleep infinity
"""

# What a host needs of the kernel, and of whoever allows it.
PROBE = """
hostname probe
mount -t tmpfs tmpfs /dev/shm
ip link add bridge type bridge
ip link add one type veth peer name other
"""


def missing() -> str:
    """Why there can be no such hosts here; empty if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "unshare", "nsenter", "setpriv", "mount") if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: iproute2, util-linux)"
    space = f"probe-{os.getpid()}"
    try:
        _ip("netns", "add", space)
        _ip("netns", "del", space)
        subprocess.run(
            ["unshare", "--net", *UNSHARED, "bash", "-ec", PROBE], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    return ""


@dataclass(frozen=True)
class Host:
    """One of them. ``init`` is the id, outside, of the process that it lives as long as; ``switch`` has its cable."""

    name: str
    address: str
    init: int
    switch: str

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Run a program in it, in the background; it ends with its host."""
        with log.open("ab") as file:
            return subprocess.Popen(self.entered(command), stdout=file, stderr=file, env={**os.environ, **env})

    def entered(self, command: Sequence[str]) -> list[str]:
        """The command that runs a command in it."""
        return ["nsenter", "--target", str(self.init), "--mount", "--uts", "--net", "--pid", "--", *command]

    def cable(self, state: str) -> None:
        """Pull it, ``down``, or plug it in again, ``up``: connections see nothing but silence."""
        _ip("-n", self.switch, "link", "set", f"to-{self.name}", state)


@contextmanager
def network(count: int, folder: Path) -> Iterator[list[Host]]:
    """So many hosts on one switch; networks of several processes do not see each other."""
    switch = f"switch-{os.getpid()}"
    addresses = {f"host{number}": f"10.77.0.{number}" for number in range(1, count + 1)}
    names = folder / "hosts"
    names.write_text("".join(f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", **addresses}.items()))
    running: list[subprocess.Popen[bytes]] = []
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        hosts = []
        for name, address in addresses.items():
            running.append(_plug_in(name, address, switch, names))
            hosts.append(Host(name, address, _init(running[-1].pid), switch))
        yield hosts
    finally:
        for process in running:
            process.kill()
            process.wait()
        for space in [*(_space(switch, name) for name in addresses), switch]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


@contextmanager
def ray_cluster(hosts: Sequence[Host], folder: Path, cpus: int, env: Mapping[str, str]) -> Iterator[None]:
    """Ray on every host, the first is the head. One that loses its cluster tries to join again, as a service would."""
    ray = str(Path(sys.executable).parent / "ray")
    head = f"{hosts[0].address}:{RAY_PORT}"
    nodes = []
    for host in hosts:
        place = (
            ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"] if host is hosts[0] else [f"--address={head}"]
        )
        own = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--object-store-memory=200000000", "--block"]
        forever = ["bash", "-c", 'while true; do "$@"; sleep 1; done', "ray", ray, "start", *place, *own]
        nodes.append(host.start(forever, folder / f"{host.name}.log", env))
    try:
        yield
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def signal_inside(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a program that `Host.start` started; the process that it returned only waits for that."""
    for child in psutil.Process(process.pid).children():
        child.send_signal(number)


def _plug_in(name: str, address: str, switch: str, names: Path) -> subprocess.Popen[bytes]:
    space = _space(switch, name)
    _ip("netns", "add", space)
    _ip("-n", switch, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("-n", switch, "link", "set", f"to-{name}", "master", "bridge", "up")
    _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", space, "link", "set", device, "up")
    boot = ["bash", "-ec", BOOT.format(name=name, names=names)]
    # It ends with this process, however that ends.
    entered = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", space, "unshare", *UNSHARED, *boot]
    return subprocess.Popen(entered, start_new_session=True)


def _space(switch: str, name: str) -> str:
    """The namespace of a host."""
    return f"{switch}-{name}"


def _init(outer: int) -> int:
    """The first process inside, once it is what it will be."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for child in psutil.Process(outer).children():
            if child.name() == "sleep":
                return child.pid
        time.sleep(0.05)
    raise TimeoutError("a host did not start")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
