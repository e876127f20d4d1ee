"""What is wrong with a node and what to do about it: each check a small pure function over what was gathered.

    Board (survey) ─┐
    Node ───────────┼──▶ every check ──▶ Finding(id, severity, what, why, fix), worst first
    Cluster ────────┘

A fault stops work, a warning wants a person, a note is only good to know. What could not be gathered (None, empty) is
not judged. The list of checks follows what owners of such clusters met; each is found when it is planted (the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from .sensors import HOT_C
from .survey import Board

Severity = Literal["fault", "warning", "note"]
RANK: dict[Severity, int] = {"fault": 0, "warning": 1, "note": 2}

GB = 10**9
FREE_LOW, FREE_OUT = 1 * GB, 100 * 10**6
"""A ledger grows by megabytes a day; a model is gigabytes."""
WRITE_SLOW_S = 0.05
"""A fair A2 card does an fsync in some 5 ms; an acknowledged webhook waits for two."""
PRESSURE_HIGH = 10.0
"""Percent of the time in which something waited for memory, over 10 s: the board swaps or drops its model's pages."""
CERTIFICATE_LOW_S = 7 * 86400.0
"""Renewal begins 10 days before the end and is tried all the time: at 7 it has failed for three days."""
OFFSET_S = 2.5
"""Of a peer's clock. `/health` tells whole seconds, and the network takes its part."""
FDS_SHARE = 0.8
UNDERVOLT, THROTTLED, SINCE_BOOT = 1 << 0, 1 << 2, 16
"""Bits of `vcgencmd get_throttled`: each again, SINCE_BOOT places higher, for what has been."""


@dataclass(frozen=True, slots=True)
class Finding:
    id: str
    severity: Severity
    what: str
    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class ModelFile:
    name: str
    path: str
    fault: str
    """Why it cannot be served; "" where it can."""
    public: bool = True
    """Readable by every user, and so by the worker's."""


@dataclass(frozen=True, slots=True)
class Node:
    """This node's own files and its daemon."""

    running: bool
    """The daemon answers."""
    joined: bool | None
    """Belongs to a cluster; None: its files are closed to this user."""
    certificate_s: float | None = None
    """Seconds the certificate is still good for."""
    ports: tuple[tuple[str, int], ...] = ()
    """(section, port) as configured."""
    models: tuple[ModelFile, ...] = ()
    fds: tuple[int, int] | None = None
    """The daemon's (open, allowed) files."""


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    state: str
    release: str = ""
    reachable: bool = True
    """One of its peer addresses takes a connection from here."""
    offset_s: float | None = None
    """Its clock less ours."""
    advertised: bool = True
    """Heard over mDNS."""
    relay: bool = False


@dataclass(frozen=True, slots=True)
class Cluster:
    """The others, as this node sees them."""

    release: str = ""
    peers: tuple[Peer, ...] = ()
    twins: tuple[str, ...] = ()
    """Addresses, not ours, at which somebody goes by this node's id."""


@dataclass(frozen=True, slots=True)
class Survey:
    board: Board
    node: Node
    cluster: Cluster


Check = Callable[[Survey], Iterator[Finding]]


def examine(survey: Survey) -> list[Finding]:
    """Everything found, worst first, in the order of `CHECKS` otherwise."""
    return sorted((found for check in CHECKS for found in check(survey)), key=lambda found: RANK[found.severity])


# power and heat --------------------------------------------------------------------------------------------------
def undervolt(survey: Survey) -> Iterator[Finding]:
    if when := _when(survey, UNDERVOLT, survey.board.readings.undervolt):
        yield Finding(
            "power.undervolt", "warning", f"the supply's voltage is too low ({when})",
            "it sags under load, and the firmware slows the processor or the card loses writes",
            "Use the official supply (27 W for a Pi 5) and a short cable.",
        )  # fmt: skip


def throttled(survey: Survey) -> Iterator[Finding]:
    if when := _when(survey, THROTTLED, survey.board.readings.throttled):
        yield Finding(
            "power.throttled", "warning", f"the processor is throttled ({when})",
            "its firmware holds the clock down for heat or voltage", "Check its cooling and its supply.",
        )  # fmt: skip


def _when(survey: Survey, bit: int, sensed: bool) -> str:
    """`now`, `since boot`, or "" for never, by the sensor in /sys and by the firmware's flags."""
    flags = survey.board.firmware_flags or 0
    if sensed or flags & bit:
        return "now"
    return "since boot" if flags & bit << SINCE_BOOT else ""


def thermal(survey: Survey) -> Iterator[Finding]:
    heat = survey.board.readings.temperature_c
    if heat is not None and heat >= HOT_C:
        yield Finding(
            "thermal.hot", "warning", f"the processor is at {heat:.0f} °C", f"it slows down from {HOT_C:.0f} °C",
            "Give it air: a fan, a heat sink, or a cooler place.",
        )  # fmt: skip


def governor(survey: Survey) -> Iterator[Finding]:
    if survey.board.readings.governor not in ("", "performance"):
        yield Finding(
            "cpu.governor", "note", f"the clock's governor is {survey.board.readings.governor}",
            "the first tokens of an answer come at the low clock",
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )  # fmt: skip


# processor -------------------------------------------------------------------------------------------------------
def userland(survey: Survey) -> Iterator[Finding]:
    if not survey.board.readings.userland_64bit:
        yield Finding(
            "isa.userland_32bit", "fault", "the system's programs are 32-bit",
            "models cannot be mapped and llama.cpp's fast kernels are missing, whatever the kernel is",
            "Install the 64-bit Raspberry Pi OS. Until then this node can be a relay only.",
        )  # fmt: skip


def dotprod(survey: Survey) -> Iterator[Finding]:
    board = survey.board
    if not board.arm:
        return
    if not board.readings.dotprod:
        yield Finding(
            "isa.dotprod_missing", "note", "the processor has no dot product instructions",
            "a Pi 4 reads prompts 4 to 7 times more slowly than a Pi 5", "Let a Pi 5 hold the larger models.",
        )  # fmt: skip
    elif board.llama and "DOTPROD = 1" not in board.llama:
        yield Finding(
            "isa.dotprod_unused", "warning", "llama.cpp was built without this processor's dot product instructions",
            "a prebuilt wheel fits every Arm board and runs at a third of the speed here",
            "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python (in the daemon's venv).",
        )  # fmt: skip


def cuda(survey: Survey) -> Iterator[Finding]:
    if survey.board.arm and survey.board.cuda_packages:
        yield Finding(
            "pip.cuda", "warning", f"{len(survey.board.cuda_packages)} CUDA packages are installed",
            "torch brought them; they fill gigabytes of the card and no Raspberry Pi can use them",
            "Reinstall torch from its CPU index, and uninstall " + survey.board.cuda_packages[0] + " and the like.",
        )  # fmt: skip


# memory ----------------------------------------------------------------------------------------------------------
def cgroup(survey: Survey) -> Iterator[Finding]:
    if survey.board.memory_cgroup is False:
        yield Finding(
            "mem.cgroup_off", "warning", "limits of memory are not enforced",
            "the memory cgroup is off (Pi OS default)",
            "Add cgroup_enable=memory to /boot/firmware/cmdline.txt and reboot.",
        )  # fmt: skip


def pressure(survey: Survey) -> Iterator[Finding]:
    now = survey.board.readings.memory_pressure
    if now is None:
        yield Finding(
            "mem.psi_off", "note", "the kernel does not tell memory pressure", "it is off by default on Pi OS",
            "Add psi=1 to /boot/firmware/cmdline.txt and reboot.",
        )  # fmt: skip
    elif now >= PRESSURE_HIGH:
        yield Finding(
            "mem.pressure", "warning", f"programs wait for memory {now:.0f} % of the time",
            "the models and what else runs here do not fit", "Serve a smaller model or a shorter context.",
        )  # fmt: skip


def swap(survey: Survey) -> Iterator[Finding]:
    if survey.board.card_swaps:
        yield Finding(
            "mem.swap_on_card", "warning", f"{', '.join(survey.board.card_swaps)} swaps to the SD card",
            "a model that is swapped out makes the board unreachable, and wears the card",
            "Use zram (package rpi-swap or zram-tools), or swapoff it.",
        )  # fmt: skip


# disk ------------------------------------------------------------------------------------------------------------
def free(survey: Survey) -> Iterator[Finding]:
    left = survey.board.state_free
    if survey.board.state_total and left < FREE_LOW:
        yield Finding(
            "disk.free", "fault" if left < FREE_OUT else "warning",
            f"{left / 10**6:.0f} MB are free for this node's state",
            "a full disk takes no webhooks", "Remove models or logs that are not needed, or use a larger card.",
        )  # fmt: skip


def slow(survey: Survey) -> Iterator[Finding]:
    took = survey.board.write_s
    if took is not None and took > WRITE_SLOW_S:
        yield Finding(
            "disk.slow", "warning", f"a small durable write takes {took * 1000:.0f} ms",
            "every webhook waits for it on two nodes", "Use an A2 card or an SSD; an old card may be wearing out.",
        )  # fmt: skip


# clock -----------------------------------------------------------------------------------------------------------
def unsynced(survey: Survey) -> Iterator[Finding]:
    if not survey.board.clock_synced:
        yield Finding(
            "clock.unsynced", "warning", "the clock was never set by a time server",
            "a Pi has none that runs without power; certificates' dates are not checked until it is set",
            "timedatectl set-ntp true, and look whether port 123 gets out.",
        )  # fmt: skip


def offset(survey: Survey) -> Iterator[Finding]:
    for peer in survey.cluster.peers:
        if peer.offset_s is not None and abs(peer.offset_s) > OFFSET_S:
            yield Finding(
                "clock.offset", "warning", f"{peer.name}'s clock is {peer.offset_s:+.0f} s from this one's",
                "one of the two is not set by a time server", "Run `timedatectl` on both.",
            )  # fmt: skip


# network ---------------------------------------------------------------------------------------------------------
def mdns(survey: Survey) -> Iterator[Finding]:
    near = [peer for peer in survey.cluster.peers if peer.state == "alive" and not peer.relay]
    if near and not any(peer.advertised for peer in near):
        yield Finding(
            "net.mdns_blocked", "warning", "no other node is heard over mDNS, though some are up",
            "the access point isolates its clients, or a firewall drops UDP 5353",
            "Switch off AP or client isolation, let UDP 5353 in, or list the nodes in [peers] seeds.",
        )  # fmt: skip


def avahi(survey: Survey) -> Iterator[Finding]:
    if survey.board.avahi_alone:
        yield Finding(
            "net.avahi_alone", "warning", "avahi-daemon lets no other mDNS run beside it",
            "disallow-other-stacks=yes keeps UDP 5353 to itself",
            "Remove that line from /etc/avahi/avahi-daemon.conf and restart avahi-daemon.",
        )  # fmt: skip


def reach(survey: Survey) -> Iterator[Finding]:
    for peer in survey.cluster.peers:
        if peer.state != "left" and not peer.reachable:
            up = peer.state == "alive"
            yield Finding(
                "net.unreachable", "note" if up else "warning", f"{peer.name} takes no connection from here",
                "it works all the same, as it dials us or is relayed" if up else f"it is {peer.state}",
                "Behind a NAT that is normal; else let TCP 7946 in there.",
            )  # fmt: skip


def ports(survey: Survey) -> Iterator[Finding]:
    if survey.node.running:
        return
    for section, port in survey.node.ports:
        if port in survey.board.listening:
            yield Finding(
                "net.port_taken", "fault", f"port {port} is taken by another program", f"[{section}] port wants it",
                f"`sudo ss -ltnp sport = :{port}` names it; stop it, or change [{section}] port.",
            )  # fmt: skip


def files(survey: Survey) -> Iterator[Finding]:
    if survey.node.fds and survey.node.fds[0] > FDS_SHARE * survey.node.fds[1]:
        used, allowed = survey.node.fds
        yield Finding(
            "net.fds", "warning", f"the daemon has {used} of {allowed} files open",
            "past the limit it takes no connection", "Raise LimitNOFILE= (`systemctl edit piclusterd`).",
        )  # fmt: skip


# this node -------------------------------------------------------------------------------------------------------
def daemon(survey: Survey) -> Iterator[Finding]:
    if survey.node.joined is False:
        yield Finding(
            "node.no_cluster", "note", "this node belongs to no cluster", "it holds no identity",
            "sudo picluster init --cluster NAME on the first node, sudo picluster join TOKEN on the others.",
        )  # fmt: skip
    elif not survey.node.running:
        yield Finding(
            "node.down", "fault", "the daemon does not answer",
            "it does not run, or hangs, or this user may not ask it",
            "systemctl status piclusterd; journalctl -u piclusterd -n 50",
        )  # fmt: skip


def certificate(survey: Survey) -> Iterator[Finding]:
    left = survey.node.certificate_s
    if left is not None and left < CERTIFICATE_LOW_S:
        over = left <= 0
        yield Finding(
            "node.certificate", "fault" if over else "warning",
            "the certificate has ended" if over else f"the certificate ends in {left / 86400:.0f} days",
            "renewal needs the node where `init` ran, and has not reached it",
            "Bring that node up; where it is gone, restore its backup on another board.",
        )  # fmt: skip


def twin(survey: Survey) -> Iterator[Finding]:
    if survey.cluster.twins:
        yield Finding(
            "node.twin", "fault", f"another machine goes by this node's id ({', '.join(survey.cluster.twins)})",
            "its card was copied: two nodes with one key fork the ledger",
            "Stop it there, delete its /var/lib/piclusterd, and let it join anew.",
        )  # fmt: skip


def models(survey: Survey) -> Iterator[Finding]:
    for model in survey.node.models:
        if model.fault:
            yield Finding(
                "model.file", "fault", f"model {model.name} cannot be served", model.fault, "Fetch the file again."
            )
        elif not model.public:
            yield Finding(
                "model.private", "warning", f"model {model.name} is closed to its worker",
                "the worker is another user, with no rights", f"sudo chmod o+r {model.path}",
            )  # fmt: skip


def versions(survey: Survey) -> Iterator[Finding]:
    here = survey.cluster.release
    other = sorted(f"{peer.name} {peer.release}" for peer in survey.cluster.peers if peer.release not in ("", here))
    if here and other:
        yield Finding(
            "cluster.versions", "note", f"nodes run different releases: here {here}, {', '.join(other)}",
            "neighbouring releases work together, others may not", "Upgrade the older ones: sudo systemd/install.",
        )  # fmt: skip


CHECKS: tuple[Check, ...] = (
    undervolt, throttled, thermal, governor, userland, dotprod, cuda, cgroup, pressure, swap, free, slow, unsynced,
    offset, mdns, avahi, reach, ports, files, daemon, certificate, twin, models, versions,
)  # fmt: skip
