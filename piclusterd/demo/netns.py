"""Networks like an owner's, on one machine: sites behind NAT routers, a WAN, a droplet; made of network namespaces.

    street ── hub, Linear, and whoever drives the test        198.18.77.20     (10.99.k.1: a wire to each host's API)
      │
    wan switch ─── droplet 198.18.77.10
      ├── router of site 0 (masquerade, nothing comes in) ── lan switch ── hosts 10.77.0.11, .12, …
      └── router of site 1                                ── lan switch ── hosts 10.78.0.11, …

Nothing outside these namespaces is touched. Names carry the pid of their owner: `down` removes them after any failure,
and the next `up` removes those whose owner is dead. The wires to the street are point to point and nothing is forwarded
over them, so hosts reach each other by LAN and WAN only. Needs root, `ip` and `nft`; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000
STREET, DROPLET = "198.18.77.20", "198.18.77.10"
WAN = "wan"
"""The place of a host that is in no site."""
_COUNT = itertools.count(1)
_NAME = re.compile(r"pc(\d+)-")
_NAT = """
table ip nat {
  chain postrouting {
    type nat hook postrouting priority 100; policy accept;
    oifname "wan0" masquerade
  }
}
table ip filter {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "lan0" oifname "wan0" accept
  }
}
"""
_DOORS = f"""
table ip nat {{
  chain prerouting {{
    type nat hook prerouting priority -100; policy accept;
    ip daddr {STREET} tcp dport 1024-65535 dnat to 127.0.0.1
  }}
}}
"""
"""The doubles of the outside world listen on the street's loopback; on the WAN the street answers for them."""


class NetFailed(RuntimeError):
    """The kernel or a tool refused; the text says what."""


@dataclass(frozen=True, slots=True)
class Host:
    """`site` is None on the WAN; `port` is its port at the switch; `api` its address on the wire to the street."""

    name: str
    site: int | None
    address: str
    api: str
    port: str


def why_not() -> str:
    """Why this machine cannot have such a network; "" where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nft", "sysctl") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = f"pc{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "-n", probe, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
        _run("ip", "netns", "exec", probe, "nft", "-f", "-", given=_NAT)
    except NetFailed as fault:
        return str(fault)
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return ""


class Network:
    def __init__(self, sites: int = 1) -> None:
        self.hosts: dict[str, Host] = {}
        self._sites = sites
        self._prefix = f"pc{os.getpid()}-{next(_COUNT)}-"
        self._cables: dict[str, subprocess.Popen[str]] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)

    # building ------------------------------------------------------------------------------------------------
    def up(self) -> None:
        """Switches, routers and the street. Raises `NetFailed`; `down` undoes what was made."""
        sweep()
        self._switch("wan")
        self._box("street")
        self._plug("street", "eth0", "wan", "street", f"{STREET}/24")
        _run("ip", "netns", "exec", self.ns("street"), "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
        self._nft("street", _DOORS)
        for site in range(self._sites):
            self._switch(f"lan{site}")
            router = f"router{site}"
            self._box(router)
            self._plug(router, "lan0", f"lan{site}", "router", f"10.{77 + site}.0.1/24")
            self._plug(router, "wan0", "wan", router, f"198.18.77.{2 + site}/24")
            _run("ip", "netns", "exec", self.ns(router), "sysctl", "-qw", "net.ipv4.ip_forward=1")
            self._nft(router, _NAT)

    def add(self, name: str, site: int | None, cable: dict[str, float] | None = None) -> Host:
        """A host in a site, or on the WAN. `cable`: a bad one (see `cable`), instead of a veth pair."""
        number = len(self.hosts)
        mates = sum(host.site == site for host in self.hosts.values())
        address = DROPLET if site is None else f"10.{77 + site}.0.{11 + mates}"
        switch = WAN if site is None else f"lan{site}"
        host = self.hosts[name] = Host(name, site, address, f"10.99.{number}.2", f"h{number}")
        self._box(name)
        if cable is None:
            self._plug(name, "eth0", switch, host.port, f"{address}/24")
        else:
            self._cables[name] = self._cable(host, switch, cable)
        if site is not None:
            self.route(name)
        street = f"m{number}"
        _run("ip", "link", "add", "name", "mgmt0", "netns", self.ns(name), "type", "veth",
             "peer", "name", street, "netns", self.ns("street"))  # fmt: skip
        for ns, link, end in ((name, "mgmt0", 2), ("street", street, 1)):
            _run("ip", "-n", self.ns(ns), "addr", "add", f"10.99.{number}.{end}/30", "dev", link)
            _run("ip", "-n", self.ns(ns), "link", "set", link, "up")
        return host

    def route(self, name: str) -> None:
        """The way out; lost whenever its interface goes down."""
        site = self.hosts[name].site
        _run("ip", "-n", self.ns(name), "route", "replace", "default", "via", f"10.{77 + (site or 0)}.0.1")

    def down(self) -> None:
        """Remove it all, whatever state it is in: first who still runs in it, by pid, then the names."""
        for cable in self._cables.values():
            cable.kill()
            cable.communicate()
        _remove(self._prefix)

    def ns(self, name: str) -> str:
        return self._prefix + name

    def within(self, name: str) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("ip", "netns", "exec", self.ns(name))

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """This thread makes its sockets and children there; a socket stays where it was made."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(f"/run/netns/{self.ns(name)}", os.O_RDONLY)
            self._enter(there)
            os.close(there)
            yield
        finally:
            self._enter(before)
            os.close(before)

    def _enter(self, handle: int) -> None:
        if self._libc.setns(handle, CLONE_NEWNET):
            raise NetFailed(f"setns: {os.strerror(ctypes.get_errno())}")

    def _box(self, name: str) -> None:
        _run("ip", "netns", "add", self.ns(name))
        _run("ip", "-n", self.ns(name), "link", "set", "lo", "up")

    def _switch(self, name: str) -> None:
        self._box(name)
        _run("ip", "-n", self.ns(name), "link", "add", "br0", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        _run("ip", "-n", self.ns(name), "link", "set", "br0", "up")

    def _plug(self, name: str, link: str, switch: str, port: str, address: str) -> None:
        _run("ip", "link", "add", "name", link, "netns", self.ns(name), "type", "veth",
             "peer", "name", port, "netns", self.ns(switch))  # fmt: skip
        _run("ip", "-n", self.ns(switch), "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", self.ns(name), "addr", "add", address, "dev", link)
        _run("ip", "-n", self.ns(name), "link", "set", link, "up")

    def _cable(self, host: Host, switch: str, faults: dict[str, float]) -> subprocess.Popen[str]:
        ends = (self.ns(host.name), "eth0", f"{host.address}/24", self.ns(switch), host.port, "br0")
        child = subprocess.Popen(
            [sys.executable, "-m", "piclusterd.demo.cable", *ends, json.dumps(faults)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise NetFailed("the cable between two namespaces did not come up")
        return child

    def _nft(self, name: str, rules: str) -> None:
        _run("ip", "netns", "exec", self.ns(name), "nft", "-f", "-", given=rules)

    # breaking ------------------------------------------------------------------------------------------------
    def spoil(self, name: str, **faults: float) -> None:
        """Change what the bad cable of `name` does from now on: delay, jitter (s), loss, dup, reorder (0..1)."""
        stdin = self._cables[name].stdin
        assert stdin is not None
        stdin.write(json.dumps(faults) + "\n")
        stdin.flush()

    def unplug(self, name: str, *, wan: bool = False) -> None:
        """The cable of a host; with `wan`, of its site's router to the world. Addresses stay, packets do not."""
        self._port(name, wan, "down")

    def replug(self, name: str, *, wan: bool = False) -> None:
        self._port(name, wan, "up")

    def _port(self, name: str, wan: bool, state: str) -> None:
        host = self.hosts[name]
        at_wan = wan or host.site is None
        port = f"router{host.site}" if wan else host.port
        _run("ip", "-n", self.ns(WAN if at_wan else f"lan{host.site}"), "link", "set", port, state)

    def change_card(self, name: str) -> None:
        """The network card of a host in a site, out and in again: another device under the same name and address."""
        host = self.hosts[name]
        _run("ip", "-n", self.ns(name), "link", "del", "eth0")
        self._plug(name, "eth0", f"lan{host.site}", host.port, f"{host.address}/24")
        self.route(name)

    def block(self, sender: str, receiver: str) -> None:
        """A one-way partition at the switch of a site: nothing from `sender` arrives at `receiver`."""
        one, other = self.hosts[sender], self.hosts[receiver]
        rule = f'iifname "{one.port}" oifname "{other.port}" drop'
        self._nft(
            f"lan{one.site}",
            "table bridge part {\n chain forward {\n type filter hook forward priority 0; policy accept;\n"
            f" {rule}\n }}\n}}\n",
        )

    def unblock(self, name: str) -> None:
        """Remove every one-way partition at the switch of `name`."""
        site = self.hosts[name].site
        _run("ip", "netns", "exec", self.ns(f"lan{site}"), "nft", "delete", "table", "bridge", "part")


def sweep() -> None:
    """Remove what an owner that is dead left behind."""
    for name in _names():
        if (match := _NAME.match(name)) and not Path(f"/proc/{match[1]}").exists():
            _remove(match[0])


def _remove(prefix: str) -> None:
    names = [name for name in _names() if name.startswith(prefix)]
    for name in names:
        for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False).stdout.split():
            if int(pid) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _names() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _run(*command: Any, given: str | None = None) -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetFailed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
