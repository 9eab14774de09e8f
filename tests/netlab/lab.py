"""Hosts as network namespaces, joined by a switch that is a namespace too: the machine's own network is not touched.

        host 0 eth0 ==tbf== port0 \\                      / port2 ==tbf== eth0 host 2
                                   bridge ==tbf== core ==tbf== bridge             (two groups; one group: one bridge)
        host 1 eth0 ==tbf== port1 /                      \\ port3 ==tbf== eth0 host 3

A token bucket at both ends of each link gives a host its rate in each direction. Delay and loss are not modelled:
queues are deep enough not to drop.
"""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.netlab._names import KEPT, LabName, owned_name, parse
from tests.support.ranks import run_ranks

INTERFACE = "eth0"
PORT = 29500

_QUEUE_BYTES = 8 << 20
_COMMAND_TIMEOUT_S = 20.0
_counter = itertools.count()


class NetlabError(RuntimeError):
    """A lab cannot be built or a command in it failed."""


@functools.cache
def why_unavailable() -> str | None:
    """Return why no lab can be built on this machine, or None. Builds and removes a tiny one to find out."""
    if not sys.platform.startswith("linux"):
        return f"netlab needs Linux network namespaces, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"netlab needs root to make network namespaces, this is user {os.geteuid()}: run it with sudo"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"netlab needs {' and '.join(missing)}: install iproute2"
    try:
        Lab._probe()
    except NetlabError as error:
        return f"netlab needs a kernel with network namespaces, veth, bridges and tbf: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Links:
    """The hosts' links, as a value that ranks can take with them: one may change the rate while all run.

    Attributes:
        switch: The switch's namespace.
        hosts: The hosts' namespaces.
    """

    switch: str
    hosts: tuple[str, ...]

    def limit(self, rate: str | None) -> None:
        """Give every host's link this rate in each direction, None for no limit. Links between groups stay."""
        for host in self.hosts:
            _limit(host, [INTERFACE], rate)
        _limit(self.switch, [f"port{i}" for i in range(len(self.hosts))], rate)


class Lab:
    """A few hosts with slow links, alive until `close` or the end of a `with` block.

    Args:
        hosts: The number of hosts.
        rate: Of each host's link, in each direction: `100mbit`, `2.5gbit`, `500kbit`; None for no limit.
        groups: Sizes of groups of hosts, in order. Links between groups are slower than inside one.
        between: The rate of each group's link to the other groups. Required with `groups`.
        keep: Leave the lab when this process ends; `remove_labs(kept=True)` removes it.

    Raises:
        NetlabError: Without root or iproute2, or if the kernel refuses.
        ValueError: For a rate that cannot be read, or groups that do not add up to `hosts`.
    """

    def __init__(
        self,
        hosts: int,
        *,
        rate: str | None = None,
        groups: Sequence[int] | None = None,
        between: str | None = None,
        keep: bool = False,
    ) -> None:
        if not 1 <= hosts <= 250:
            raise ValueError(f"hosts must be 1 to 250, got {hosts}")
        sizes = list(groups) if groups is not None else [hosts]
        if sum(sizes) != hosts or min(sizes) < 1:
            raise ValueError(f"groups {sizes} do not add up to {hosts} hosts: give sizes of at least 1.")
        if (len(sizes) > 1) != (between is not None):
            raise ValueError("`between` is the rate between groups: give it with two or more groups, and only then.")
        for text in (rate, between):
            _bits_per_second(text)
        if reason := why_unavailable():
            raise NetlabError(reason)
        remove_labs(kept=False)
        self._build(hosts, rate, sizes, between, keep)

    def _build(self, hosts: int, rate: str | None, sizes: list[int], between: str | None, keep: bool) -> None:
        self.name = f"{KEPT}{os.getpid()}-{next(_counter)}" if keep else owned_name(next(_counter))
        self.namespaces = [f"{self.name}-h{i}" for i in range(hosts)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(hosts)]
        self.links = Links(f"{self.name}-switch", tuple(self.namespaces))
        self._everything = [self.links.switch, *self.namespaces]
        if not keep:
            # Also when forgotten or at interpreter exit; a killed owner's lab is removed by the next one to start.
            weakref.finalize(self, _remove, self._everything)
        try:
            _configure(self.links, self.addresses, rate, sizes, between)
        except BaseException:
            self.close()
            raise

    @classmethod
    def _probe(cls) -> None:
        """Build a lab that uses every kernel feature, and remove it."""
        lab = cls.__new__(cls)
        lab._build(2, "10mbit", [1, 1], "10mbit", keep=False)
        lab.close()

    def __enter__(self) -> "Lab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.namespaces)

    def close(self) -> None:
        """Kill what still runs in the lab and remove it. Harmless when done twice."""
        _remove(self._everything)

    def environment(self, host: int) -> dict[str, str]:
        """What torch's `env://` rendezvous needs on `host`, in the variables that torchrun would set."""
        return {
            "RANK": str(host),
            "WORLD_SIZE": str(len(self)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(host),
            "NODE_RANK": str(host),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(PORT),  # no race for it: the port is inside the lab
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
        }

    def run_ranks(
        self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, env: dict[str, str] | None = None
    ) -> list[Any]:
        """Call `fn(rank, hosts, *args)` on each host; see `tests.support.ranks.run_ranks`."""
        envs = [{**self.environment(host), **(env or {})} for host in range(len(self))]
        return run_ranks(fn, len(self), *args, timeout=timeout, netns=self.namespaces, env=envs)

    def popen(self, host: int, command: Sequence[str], **kwargs: Any) -> "subprocess.Popen[Any]":
        """Start a command on a host, with the environment of a rank. It dies with this process."""
        env = {**os.environ, **(kwargs.pop("env", None) or {}), **self.environment(host)}
        enter = ["ip", "netns", "exec", self.namespaces[host], "setpriv", "--pdeathsig", "KILL", "--"]
        return subprocess.Popen([*enter, *command], env=env, start_new_session=True, **kwargs)

    def run(self, command: Sequence[str], *, timeout: float, env: dict[str, str] | None = None) -> None:
        """Run a command on every host at once, as one rank each, and wait until all have ended well.

        Raises:
            NetlabError: If one fails or the time is over. All are killed.
        """
        until = time.monotonic() + timeout
        processes = [self.popen(host, command, env=env) for host in range(len(self))]
        try:
            while any(p.poll() is None for p in processes):
                _raise_if_failed(processes)
                if time.monotonic() > until:
                    late = [host for host, p in enumerate(processes) if p.poll() is None]
                    raise NetlabError(f"hosts {late} did not end within {timeout:g} s and were killed: {command}")
                time.sleep(0.02)
            _raise_if_failed(processes)
        finally:
            for p in processes:
                if p.poll() is None:
                    os.killpg(p.pid, signal.SIGKILL)
                p.wait()

    def tx_bytes(self, host: int) -> int:
        """Bytes that a host's interface has sent so far, headers included."""
        found = json.loads(_ip("-n", self.namespaces[host], "-s", "-j", "link", "show", "dev", INTERFACE))
        return int(found[0]["stats64"]["tx"]["bytes"])


def tx_bytes_here(interface: str = INTERFACE) -> int:
    """Bytes that the interface of the calling rank's host has sent so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise NetlabError(f"this host has no interface {interface}")


def remove_labs(*, kept: bool, name: str | None = None) -> list[str]:
    """Remove labs whose owner is dead, and with `kept` also those made to stay: all, or the one called `name`.

    Returns:
        The names of the labs removed.
    """
    doomed: dict[str, list[str]] = {}
    for namespace in _namespaces():
        lab: LabName | None = parse(namespace)
        if lab is not None and ((kept and name in (None, lab.name)) if lab.kept else not lab.owner_alive()):
            doomed.setdefault(lab.name, []).append(namespace)
    for namespaces in doomed.values():
        _remove(namespaces)
    return sorted(doomed)


def _configure(links: Links, addresses: list[str], rate: str | None, sizes: list[int], between: str | None) -> None:
    for namespace in (links.switch, *links.hosts):
        _ip("netns", "add", namespace)
    cables = [f"link add {INTERFACE} netns {host} type veth peer name port{i} netns {links.switch}"
              for i, host in enumerate(links.hosts)]  # fmt: skip
    _ip_batch(None, cables)
    for host, address in zip(links.hosts, addresses, strict=True):
        up = ["link set lo up", f"addr add {address}/24 dev {INTERFACE}", f"link set {INTERFACE} up"]
        _ip_batch(host, up)
    _ip_batch(links.switch, _switch_commands(sizes))
    links.limit(rate)
    if between is not None:
        _limit(links.switch, [f"{end}{g}" for g in range(len(sizes)) for end in ("up", "down")], between)


def _switch_commands(sizes: list[int]) -> list[str]:
    """A bridge for each group; with several groups, a core bridge with a cable to each."""
    commands = ["link add core type bridge", "link set core up"] if len(sizes) > 1 else []
    port = itertools.count()
    for g, size in enumerate(sizes):
        commands += [f"link add group{g} type bridge", f"link set group{g} up"]
        members = [f"port{next(port)}" for _ in range(size)]
        if len(sizes) > 1:
            commands += [f"link add up{g} type veth peer name down{g}", f"link set down{g} master core up"]
            members.append(f"up{g}")
        commands += [f"link set {member} master group{g} up" for member in members]
    return commands


def _limit(namespace: str, devices: Sequence[str], rate: str | None) -> None:
    bits = _bits_per_second(rate)
    if bits is None:
        # Back to the kernel's default: `delete` would fail where there is no limit yet.
        shape = "root pfifo_fast"
    else:
        # The bucket lets a short message pass at full speed, so it holds little: what the link carries in 2 ms.
        # Less than two frames would stop the link; less time than the timer's jitter would lower the rate.
        burst = max(4096, int(bits / 8 * 0.002))
        shape = f"root tbf rate {int(bits)}bit burst {burst} limit {_QUEUE_BYTES}"
    lines = "".join(f"qdisc replace dev {device} {shape}\n" for device in devices)
    _command(["tc", "-n", namespace, "-batch", "-"], lines)


def _bits_per_second(rate: str | None) -> float | None:
    if rate is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate.lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"rate {rate!r} cannot be read: write a number and kbit, mbit or gbit, such as 100mbit.")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def _raise_if_failed(processes: "list[subprocess.Popen[Any]]") -> None:
    for host, process in enumerate(processes):
        if process.poll() not in (None, 0):
            raise NetlabError(f"host {host}'s command ended with exit code {process.returncode}: {process.args!r}")


def _remove(namespaces: list[str]) -> None:
    present = set(_namespaces())
    for namespace in (n for n in namespaces if n in present):
        for pid in _ip("netns", "pids", namespace).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        _ip("netns", "delete", namespace)


def _namespaces() -> list[str]:
    # Not `ip netns list`: it queries every namespace, and fails when another process removes one meanwhile.
    try:
        return sorted(os.listdir("/run/netns"))
    except FileNotFoundError:
        return []


def _ip(*words: str) -> str:
    return _command(["ip", *words], "")


def _ip_batch(namespace: str | None, lines: list[str]) -> None:
    where = ["-n", namespace] if namespace else []
    _command(["ip", *where, "-batch", "-"], "".join(f"{line}\n" for line in lines))


def _command(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
    if done.returncode != 0:
        raise NetlabError(f"`{' '.join(command)}` failed: {done.stderr.strip()}\n{text}".strip())
    return done.stdout
