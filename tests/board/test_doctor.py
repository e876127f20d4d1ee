"""Each fault that an owner met, planted: in a tree of files as a Pi has, or in what was gathered of the cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piclusterd.board import doctor, survey
from piclusterd.board.doctor import CHECKS, Cluster, Finding, ModelFile, Node, Peer, Survey, examine

from .test_sensors import board

FREQUENCY = "sys/devices/system/cpu/cpu0/cpufreq"
SOUND = {
    f"{FREQUENCY}/scaling_governor": "performance\n",
    "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t90\t1\n",
    "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0\tpartition\t2097148\t0\t100\n",
    "proc/mounts": "/dev/mmcblk0p2 / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/nvme0n1p1 /srv ext4 rw 0 0\n",
    "proc/net/tcp": "  sl  local_address rem_address   st\n   0: 0100007F:0035 00000000:0000 0A 0\n",
    "etc/avahi/avahi-daemon.conf": "[server]\n#disallow-other-stacks=yes\n",
    "run/systemd/timesync/synchronized": "",
}
LLAMA = "CPU : NEON = 1 | DOTPROD = 1 | LLAMAFILE = 1"
NODE = Node(running=True, joined=True, certificate_s=20 * 86400, ports=(("api", 8746), ("peers", 7946)), fds=(90, 4096))
PEERS = (Peer("pi-2", "alive", "0.1.0", offset_s=0.4), Peer("vps-1", "alive", "0.1.0", advertised=False, relay=True))
CLUSTER = Cluster("0.1.0", PEERS)


def gathered(tmp_path: Path, planted: dict[str, str], **told: Any) -> survey.Board:
    root = board(tmp_path / "root")
    for name, text in {**SOUND, **planted}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "state").mkdir()
    asked: dict[str, Any] = {"firmware_flags": 0, "llama": LLAMA, "clock_synced": False, **told}
    made = survey.gather(tmp_path / "state", root, **asked)
    assert made.write_s is not None
    return replace(made, write_s=0.005, state_free=10**11, cuda_packages=())  # this machine's own


def ids(found: list[Finding]) -> list[str]:
    return [finding.id for finding in found]


def test_a_sound_pi_in_a_sound_cluster_has_nothing_to_mend(tmp_path: Path) -> None:
    assert examine(Survey(gathered(tmp_path, {}), NODE, CLUSTER)) == []


FILES: list[tuple[str, dict[str, str]]] = [
    ("power.undervolt", {"sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"}),
    ("thermal.hot", {"sys/class/thermal/thermal_zone0/temp": "83500\n"}),
    ("cpu.governor", {f"{FREQUENCY}/scaling_governor": "ondemand\n"}),
    ("isa.dotprod_missing", {"proc/cpuinfo": "processor: 0\nFeatures: fp asimd evtstrm crc32 cpuid\n"}),
    ("mem.cgroup_off", {"proc/cgroups": "#subsys_name hierarchy num_cgroups enabled\nmemory 0 90 0\n"}),
    ("mem.cgroup_off", {"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n"}),
    ("mem.psi_off", {"proc/pressure/memory": ""}),
    ("mem.pressure", {"proc/pressure/memory": "some avg10=37.20 avg60=9.00 avg300=1.00 total=9\n"}),
    ("mem.swap_on_card", {"proc/swaps": "Filename Type Size\n/var/swap file 102396\n"}),
    ("mem.swap_on_card", {"proc/swaps": "Filename Type Size\n/dev/mmcblk0p3 partition 102396\n"}),
    ("net.avahi_alone", {"etc/avahi/avahi-daemon.conf": "[server]\ndisallow-other-stacks = yes\n"}),
]


@pytest.mark.parametrize(("wanted", "planted"), FILES)
def test_what_is_planted_in_the_boards_files_is_found(tmp_path: Path, wanted: str, planted: dict[str, str]) -> None:
    assert ids(examine(Survey(gathered(tmp_path, planted), NODE, CLUSTER))) == [wanted]


def test_swap_elsewhere_than_on_the_card_is_fine(tmp_path: Path) -> None:
    made = gathered(tmp_path, {"proc/swaps": "Filename Type Size\n/srv/swap file 102396\n/dev/sda2 partition 9\n"})
    assert made.card_swaps == ()


def test_a_clock_is_unsynced_when_neither_timesyncd_nor_the_kernel_says_otherwise(tmp_path: Path) -> None:
    board = gathered(tmp_path, {})
    (tmp_path / "root/run/systemd/timesync/synchronized").unlink()
    for told, wanted in ((False, ["clock.unsynced"]), (True, [])):
        seen = survey.gather(tmp_path, tmp_path / "root", firmware_flags=0, llama="", clock_synced=told)
        assert ids(examine(Survey(replace(board, clock_synced=seen.clock_synced), NODE, CLUSTER))) == wanted


TOLD: list[tuple[str, dict[str, Any]]] = [
    ("power.undervolt", {"firmware_flags": 0x10000}),
    ("power.undervolt", {"firmware_flags": 0x1}),
    ("power.throttled", {"firmware_flags": 0x40000}),
    ("isa.dotprod_unused", {"llama": "CPU : NEON = 1 | LLAMAFILE = 1"}),
    ("disk.free", {"state_free": 5 * 10**8}),
    ("disk.slow", {"write_s": 0.2}),
    ("pip.cuda", {"cuda_packages": ("nvidia-cudnn-cu13", "nvidia-nccl-cu13")}),
]


@pytest.mark.parametrize(("wanted", "planted"), TOLD)
def test_what_this_machine_tells_is_judged(tmp_path: Path, wanted: str, planted: dict[str, Any]) -> None:
    assert ids(examine(Survey(replace(gathered(tmp_path, {}), **planted), NODE, CLUSTER))) == [wanted]


def test_it_is_told_whether_it_is_now_or_has_been(tmp_path: Path) -> None:
    made = gathered(tmp_path, {})
    whats = [examine(Survey(replace(made, firmware_flags=f), NODE, CLUSTER))[0].what for f in (0x10001, 0x10000)]
    assert [what.rpartition("(")[2] for what in whats] == ["now)", "since boot)"]


def test_throttling_now_and_32_bit_programs_are_found(tmp_path: Path) -> None:
    made = gathered(tmp_path, {})
    worse = replace(made, readings=replace(made.readings, throttled=True, userland_64bit=False))
    found = examine(Survey(worse, NODE, CLUSTER))
    assert [(finding.id, finding.severity) for finding in found] == [
        ("isa.userland_32bit", "fault"),
        ("power.throttled", "warning"),
    ]


def test_an_almost_full_disk_is_a_fault_a_low_one_a_warning(tmp_path: Path) -> None:
    made = gathered(tmp_path, {})
    severities = [
        examine(Survey(replace(made, state_free=free), NODE, CLUSTER))[0].severity for free in (50 * 10**6, 9 * 10**8)
    ]
    assert severities == ["fault", "warning"]


def test_what_could_not_be_read_is_not_judged(tmp_path: Path) -> None:
    """A PC without any of a Pi's files, seen by a user who may look into nothing."""
    (tmp_path / "empty").mkdir()
    made = survey.gather(
        tmp_path / "missing" / "state", tmp_path / "empty", firmware_flags=None, llama="", clock_synced=True
    )
    assert made.write_s is None
    assert made.state_total > 0, "of the file system that would hold it"
    found = examine(Survey(replace(made, state_free=10**11), Node(running=True, joined=None), Cluster()))
    assert ids(found) == ["mem.psi_off"]


@pytest.mark.parametrize(
    ("wanted", "severity", "changed"),
    [
        ("node.down", "fault", {"running": False}),
        ("node.no_cluster", "note", {"running": False, "joined": False}),
        ("node.certificate", "warning", {"certificate_s": 3 * 86400.0}),
        ("node.certificate", "fault", {"certificate_s": -60.0}),
        ("net.fds", "warning", {"fds": (3900, 4096)}),
        (
            "model.file",
            "fault",
            {"models": (ModelFile("m", "/m.gguf", "its content is not what /m.gguf.sha256 says"),)},
        ),
        ("model.private", "warning", {"models": (ModelFile("m", "/m.gguf", "", public=False),)}),
    ],
)
def test_a_fault_of_the_node_is_found(tmp_path: Path, wanted: str, severity: str, changed: dict[str, Any]) -> None:
    found = examine(Survey(gathered(tmp_path, {}), replace(NODE, **changed), CLUSTER))
    assert [(finding.id, finding.severity) for finding in found] == [(wanted, severity)]


def test_a_port_that_another_program_holds_is_told_while_the_daemon_is_down(tmp_path: Path) -> None:
    taken = {"proc/net/tcp6": f"  sl  local_address\n   0: {'0' * 32}:{8746:04X} {'0' * 32}:0000 0A 0\n"}
    made = gathered(tmp_path, taken)
    found = examine(Survey(made, replace(NODE, running=False), CLUSTER))
    assert ids(found) == ["net.port_taken", "node.down"]
    assert "8746" in found[0].fix
    assert examine(Survey(made, NODE, CLUSTER)) == [], "our own daemon listens there"


@pytest.mark.parametrize(
    ("wanted", "severity", "cluster"),
    [
        ("clock.offset", "warning", Cluster("0.1.0", (replace(PEERS[0], offset_s=-86400.0),))),
        ("net.mdns_blocked", "warning", Cluster("0.1.0", (replace(PEERS[0], advertised=False), PEERS[1]))),
        ("net.unreachable", "note", Cluster("0.1.0", (replace(PEERS[0], reachable=False),))),
        ("net.unreachable", "warning", Cluster("0.1.0", (replace(PEERS[0], reachable=False, state="failed"),))),
        ("node.twin", "fault", Cluster("0.1.0", PEERS, ("10.77.0.14:7946",))),
        ("cluster.versions", "note", Cluster("0.1.0", (replace(PEERS[0], release="0.0.9"),))),
    ],
)
def test_a_fault_between_nodes_is_found(tmp_path: Path, wanted: str, severity: str, cluster: Cluster) -> None:
    found = examine(Survey(gathered(tmp_path, {}), NODE, cluster))
    assert [(finding.id, finding.severity) for finding in found] == [(wanted, severity)]


def test_every_check_has_a_planted_fault_here_and_every_finding_says_what_why_and_fix(tmp_path: Path) -> None:
    made = gathered(tmp_path, dict(pair for _, planted in FILES for pair in planted.items()))
    hot = replace(made.readings, throttled=True, userland_64bit=False, memory_pressure=50.0)
    told = {name: value for _, planted in TOLD for name, value in planted.items() if name != "llama"}
    node = Node(False, True, -1.0, (("api", 53),), (ModelFile("m", "/m", "is missing"),), (99, 100))
    peer = Peer("pi-2", "alive", "0.0.9", reachable=False, offset_s=99.0, advertised=False)
    all_wrong = Survey(
        replace(made, readings=hot, clock_synced=False, **told), node, Cluster("0.1.0", (peer,), ("10.0.0.9:7946",))
    )
    silent = [check.__name__ for check in CHECKS if not list(check(all_wrong))]
    assert silent == []
    for finding in examine(all_wrong):
        assert finding.what, finding.id
        assert finding.why, finding.id
        assert finding.fix, finding.id
        assert finding.severity in doctor.RANK


def test_the_kernel_and_pip_and_llama_are_asked_without_harm() -> None:
    """Their answers are this machine's own; that they come is what counts."""
    assert isinstance(survey.clock_synced(), bool)
    assert all(name.startswith("nvidia-") for name in survey.cuda_packages())
    assert "=" in survey.llama_features() or survey.llama_features() == ""
    assert survey.firmware_flags() is None or isinstance(survey.firmware_flags(), int)
