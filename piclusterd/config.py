"""The configuration: one frozen tree. Each key has a default, a unit in its name or text, and a legal range.

Sources, later ones win: the defaults below, one TOML file, environment variables `PICLUSTER_<SECTION>_<KEY>`.
All faults are reported at once, each with file and line (`errors.ConfigError`).
`config/piclusterd.toml` holds every key at its default; a test keeps it so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from .config_flows import Deploy as Deploy
from .config_flows import Moderation as Moderation
from .config_flows import Notify as Notify
from .config_flows import Notion as Notion
from .config_flows import Spec as Spec
from .config_flows import Upgrade as Upgrade

Port = Annotated[int, Meta(ge=0, le=65535)]


@dataclass(frozen=True, slots=True)
class Node:
    name: Annotated[
        str,
        Meta(
            max_length=63, pattern=r"^[A-Za-z0-9-]*$", description="what people call this node; empty: the host's name"
        ),
    ] = ""
    state_dir: Annotated[
        str, Meta(description="keys, ledger, models; empty: $STATE_DIRECTORY, else /var/lib/piclusterd")
    ] = ""
    role: Annotated[
        Literal["worker", "relay"],
        Meta(description="a relay (the droplet) never votes and is asked first for what nobody waits for"),
    ] = "worker"


@dataclass(frozen=True, slots=True)
class Peers:
    host: Annotated[str, Meta(description="address the peer listener (mutual TLS) binds")] = "0.0.0.0"
    port: Annotated[Port, Meta(description="its TCP port")] = 7946
    advertise: Annotated[
        tuple[str, ...], Meta(max_length=8, description="addresses told to peers; empty: every LAN address")
    ] = ()
    seeds: Annotated[
        tuple[str, ...], Meta(max_length=32, description="host:port of nodes to dial whatever mDNS says")
    ] = ()


@dataclass(frozen=True, slots=True)
class Api:
    host: Annotated[str, Meta(description="address the client listener (OpenAI API, pages) binds")] = "0.0.0.0"
    port: Annotated[Port, Meta(description="its TCP port")] = 8746
    socket: Annotated[
        str,
        Meta(
            description="unix socket of the local client; empty: $RUNTIME_DIRECTORY/api.sock, else <state_dir>/api.sock"
        ),
    ] = ""
    keys_file: Annotated[
        str, Meta(description="file with one bearer key a line (`picluster keys create`); empty: no key is asked for")
    ] = ""
    allowed_hosts: Annotated[
        tuple[str, ...],
        Meta(max_length=32, description="names accepted in Host beside addresses, localhost and *.local"),
    ] = ()


@dataclass(frozen=True, slots=True)
class Discovery:
    enabled: Annotated[bool, Meta(description="advertise and browse over mDNS")] = True
    interfaces: Annotated[
        tuple[str, ...],
        Meta(max_length=16, description="addresses of the interfaces to use; empty: all but docker, bridges and veth"),
    ] = ()


@dataclass(frozen=True, slots=True)
class Cluster:
    preset: Annotated[
        Literal["pi", "lan"], Meta(description="timings: pi for SD cards and busy boards, lan for SSDs and idle cores")
    ] = "pi"


@dataclass(frozen=True, slots=True)
class Ledger:
    commit_entries_max: Annotated[int, Meta(ge=1, le=4096, description="entries in one group commit")] = 64
    commit_delay_s: Annotated[
        float, Meta(ge=0.0, le=1.0, description="how long a commit waits for as many as came last, seconds")
    ] = 0.01
    checkpoint_entries: Annotated[
        int, Meta(ge=16, le=1_000_000, description="new entries of this node's before it ends what is closed")
    ] = 4096
    keep_bodies_days: Annotated[
        float,
        Meta(ge=0.0, le=3650.0, description="how long what is closed is kept whole; 1,000 webhooks a day: 100 MB"),
    ] = 14.0
    keep_rows_days: Annotated[
        float,
        Meta(ge=0.0, le=3650.0, description="how long its headers and signatures are kept; never less than bodies"),
    ] = 30.0
    lapse_days: Annotated[
        float,
        Meta(ge=1.0, le=3650.0, description="an absent member is waited for so long before what it lacks may go"),
    ] = 30.0


@dataclass(frozen=True, slots=True)
class Model:
    """One `[[models]]` table: a GGUF file, or a directory of transformers, that this node serves."""

    name: Annotated[str, Meta(min_length=1, max_length=128, description="the name clients use")]
    path: Annotated[
        str,
        Meta(
            min_length=1,
            description="GGUF file, or a directory as transformers saves it (safetensors only; needs the extra hf);"
            " `builtin:triage-demo` is the demo model in the package",
        ),
    ]
    context: Annotated[int, Meta(ge=128, le=1_048_576, description="tokens of context over all slots")] = 4096
    slots: Annotated[int, Meta(ge=1, le=64, description="requests answered side by side")] = 4
    threads: Annotated[int, Meta(ge=0, le=256, description="threads for decoding; 0: half the cores")] = 0
    aliases: Annotated[tuple[str, ...], Meta(max_length=16, description="other names for the same model")] = ()
    kind: Annotated[
        Literal["auto", "llama", "hf"],
        Meta(description="who runs it: llama.cpp or transformers; auto: the latter where the path is a directory"),
    ] = "auto"
    adapters: Annotated[
        dict[str, str],
        Meta(
            max_length=16,
            description="LoRA adapters, name = GGUF file, or file@scale; clients ask for <name of the model>:<name>,"
            " which has a context and a child of its own over the same weights",
        ),
    ] = field(default_factory=dict)
    task: Annotated[
        Literal["", "text-generation", "summarization", "text-classification", "feature-extraction"],
        Meta(description="what a model of transformers is for; empty: what its architecture is for"),
    ] = ""
    drafts: Annotated[int, Meta(ge=-1, le=15, description="as in [inference]; -1: what stands there")] = -1


@dataclass(frozen=True, slots=True)
class Inference:
    queue_max: Annotated[
        int, Meta(ge=1, le=4096, description="requests waiting for one model on this node before 429")
    ] = 64
    load_timeout_s: Annotated[float, Meta(ge=1.0, le=3600.0, description="seconds a model may take to load")] = 300.0
    worker_socket: Annotated[
        str,
        Meta(
            description="unix socket where systemd starts a confined worker for each model;"
            " empty or missing: children of the daemon"
        ),
    ] = ""
    default_model: Annotated[str, Meta(description="the model workflows use; empty: the first of [[models]]")] = ""
    outside: Annotated[
        bool, Meta(description="what clients ask may leave the house for a provider, when no node can answer")
    ] = False
    cache_bytes: Annotated[
        int, Meta(ge=0, le=2**30, description="memory for answers that can only be the same again; 0: none are kept")
    ] = 0
    cache_minutes: Annotated[float, Meta(ge=0.1, le=10080.0, description="how long such an answer is kept")] = 60.0
    cache_shared: Annotated[
        bool, Meta(description="who asks the same under another key or address hears the same answer")
    ] = False
    kv_ship_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=2**28,
            description="largest state of a prompt's beginning taken from, or given to, another node; 0: none is",
        ),
    ] = 2**27
    kv_disk_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=2**36,
            description="disk for prompts' beginnings that were asked for twice, at most four times as much is written"
            " a day; 0: none, as SD cards wear out by it",
        ),
    ] = 0
    drafts: Annotated[
        int,
        Meta(
            ge=0,
            le=15,
            description="tokens guessed from the prompt and read at a time where an answer is alone with its model:"
            " 7 pays where answers repeat their prompts; 0: none",
        ),
    ] = 0
    split: Annotated[
        bool, Meta(description="divide models too big for one board over several, and hold parts of others' models")
    ] = False


@dataclass(frozen=True, slots=True)
class Provider:
    """One `[[providers]]` table: who answers chats when no node can, in this order."""

    name: Annotated[
        str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]*$", description="what to call it in answers")
    ]
    kind: Annotated[
        Literal["openai", "huggingface", "workers-ai"],
        Meta(description="openai: any server that speaks its API, as vLLM and llama-server do"),
    ]
    model: Annotated[str, Meta(min_length=1, max_length=256, description="the model's name there")]
    url: Annotated[
        str, Meta(description="base URL, up to /v1; empty: the service's own (of openai it must be given)")
    ] = ""
    account: Annotated[str, Meta(max_length=64, description="Cloudflare account id, for workers-ai")] = ""
    key_file: Annotated[str, Meta(description="file with its key; empty: it asks for none")] = ""
    models: Annotated[
        tuple[str, ...], Meta(max_length=32, description="names it stands in for, with * for any letters")
    ] = ("*",)
    at_home: Annotated[
        bool, Meta(description="it stands in the house: what clients ask may go there whatever inference.outside says")
    ] = False
    requests_per_day: Annotated[int, Meta(ge=0, le=10**9, description="asked of it in a UTC day; 0: no limit")] = 0
    tokens_per_day: Annotated[int, Meta(ge=0, le=10**12, description="read and written; 0: no limit")] = 0
    neurons_per_day: Annotated[int, Meta(ge=0, le=10**9, description="of workers-ai; 0: no limit")] = 0
    timeout_s: Annotated[float, Meta(ge=1.0, le=600.0, description="until its first byte, seconds")] = 60.0


@dataclass(frozen=True, slots=True)
class Store:
    """Models that were pulled: kept in state_dir, loaded when they are first asked for."""

    hub_url: Annotated[
        str, Meta(description="the hub models are pulled from; empty: $HF_ENDPOINT, else https://huggingface.co")
    ] = ""
    token_file: Annotated[str, Meta(description="file with the hub's token; empty: what needs none")] = ""
    on_demand: Annotated[bool, Meta(description="a model in the store is loaded at its first request")] = True
    keep_alive_minutes: Annotated[
        float, Meta(ge=0.1, le=10080.0, description="a model loaded so that nobody asked for so long is unloaded")
    ] = 10.0
    client_pulls: Annotated[
        Literal["none", "catalogue", "any"], Meta(description="what clients may pull over the Ollama API")
    ] = "none"
    context: Annotated[int, Meta(ge=128, le=1_048_576, description="tokens of context of a model loaded so")] = 4096
    slots: Annotated[int, Meta(ge=1, le=64, description="requests it answers side by side")] = 4


@dataclass(frozen=True, slots=True)
class Hub:
    url: Annotated[str, Meta(description="https URL of the forwarder; empty: no hub")] = ""
    token_file: Annotated[str, Meta(description="file with the hub's bearer token")] = ""


@dataclass(frozen=True, slots=True)
class Webhooks:
    """Secrets the cluster verifies with again, so that a stolen hub cannot forge events. Two lines: two secrets."""

    linear_secret_file: Annotated[str, Meta(description="file with Linear's signing secret(s)")] = ""
    github_secret_file: Annotated[str, Meta(description="file with GitHub's secret(s)")] = ""
    notion_secret_file: Annotated[str, Meta(description="file with Notion's verification token(s)")] = ""
    github_repos: Annotated[
        tuple[str, ...],
        Meta(max_length=64, description="owner/name of repositories whose events are taken; empty: of all that sign"),
    ] = ()
    github_events: Annotated[
        tuple[str, ...], Meta(max_length=64, description="names of GitHub's events that are taken; empty: all")
    ] = ()


@dataclass(frozen=True, slots=True)
class Linear:
    url: Annotated[str, Meta(description="GraphQL endpoint")] = "https://api.linear.app/graphql"
    token_file: Annotated[
        str, Meta(description="file with an API key, or `Bearer …` for an OAuth app; empty: Linear is off")
    ] = ""
    actor_id: Annotated[str, Meta(description="our own actor id, so that our writes do not start runs")] = ""
    writes_per_hour: Annotated[
        int, Meta(ge=1, le=2500, description="changes of issues and comments an hour, at most; more wait")
    ] = 600


@dataclass(frozen=True, slots=True)
class Triage:
    mode: Annotated[
        Literal["off", "shadow", "suggest", "apply"],
        Meta(description="shadow decides and records; suggest comments, too; apply also writes what is certain enough"),
    ] = "apply"
    labels: Annotated[
        dict[str, str],
        Meta(max_length=64, description="type the model names = label in Linear; types left out get none"),
    ] = field(default_factory=lambda: {"bug": "Bug", "feature": "Feature", "question": "Question", "chore": "Chore"})
    policy_file: Annotated[
        str,
        Meta(description="TOML file with each team's policy, the same on every node (config/triage.toml); empty: none"),
    ] = ""
    attempts_max: Annotated[int, Meta(ge=1, le=100, description="tries of one step before the run is given up")] = 8
    copy_urgent: Annotated[
        bool, Meta(description="P0 and P1 end only once the relay, where one is a member, holds a copy of the run")
    ] = True


@dataclass(frozen=True, slots=True)
class Github:
    """Deliveries that failed are asked for again after an outage; webhooks themselves need [webhooks] only."""

    url: Annotated[str, Meta(description="REST endpoint")] = "https://api.github.com"
    token_file: Annotated[
        str,
        Meta(description="file with a token that may read and write the repository's webhooks; empty: GitHub is off"),
    ] = ""
    hook: Annotated[
        str,
        Meta(
            pattern=r"^([A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+/[0-9]+)?$",
            description="owner/repository/id of the webhook whose deliveries are looked after",
        ),
    ] = ""


@dataclass(frozen=True, slots=True)
class Runs:
    approval_hours: Annotated[
        float, Meta(ge=0.01, le=8760.0, description="a question that nobody answered for so long is answered with no")
    ] = 72.0
    reconcile_hours: Annotated[
        float, Meta(ge=0.1, le=72.0, description="between two looks for events that never came; also at every takeover")
    ] = 6.0


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One `[[schedule]]` table: something the coordinator does by the clock."""

    name: Annotated[
        str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9-]*$", description="what to call it in runs")
    ]
    cron: Annotated[str, Meta(min_length=1, max_length=128, description="minute hour day month weekday, as in cron")]
    what: Annotated[
        Literal["hub-health", "triage-report", "prompt", "batch"],
        Meta(description="look at the hub, count the runs of triage, ask the default model, or ask it many things"),
    ]
    timezone: Annotated[str, Meta(max_length=64, description="of the cron line, as in /usr/share/zoneinfo")] = "UTC"
    prompt: Annotated[str, Meta(max_length=8000, description="what the model is asked")] = ""
    prompts: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=8000)], ...],
        Meta(max_length=64, description="what a batch asks, each by itself, of the droplet first"),
    ] = ()
    missed: Annotated[
        Literal["skip", "run-once"],
        Meta(description="what to do about times at which no coordinator was there: nothing, or the newest of them"),
    ] = "skip"
    post_url_file: Annotated[
        str, Meta(description="file with a URL that gets what was found out, as JSON; empty: the ledger keeps it")
    ] = ""


@dataclass(frozen=True, slots=True)
class Log:
    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severe level written to stderr")
    ] = "info"


@dataclass(frozen=True, slots=True)
class Config:
    node: Node = field(default_factory=Node)
    peers: Peers = field(default_factory=Peers)
    api: Api = field(default_factory=Api)
    discovery: Discovery = field(default_factory=Discovery)
    cluster: Cluster = field(default_factory=Cluster)
    ledger: Ledger = field(default_factory=Ledger)
    inference: Inference = field(default_factory=Inference)
    store: Store = field(default_factory=Store)
    hub: Hub = field(default_factory=Hub)
    webhooks: Webhooks = field(default_factory=Webhooks)
    linear: Linear = field(default_factory=Linear)
    github: Github = field(default_factory=Github)
    triage: Triage = field(default_factory=Triage)
    notion: Notion = field(default_factory=Notion)
    spec: Spec = field(default_factory=Spec)
    moderation: Moderation = field(default_factory=Moderation)
    notify: Notify = field(default_factory=Notify)
    deploy: Deploy = field(default_factory=Deploy)
    upgrade: Upgrade = field(default_factory=Upgrade)
    runs: Runs = field(default_factory=Runs)
    log: Log = field(default_factory=Log)
    models: tuple[Model, ...] = ()
    schedule: tuple[Scheduled, ...] = ()
    providers: tuple[Provider, ...] = ()

    @property
    def state_dir(self) -> Path:
        return Path(self.node.state_dir or "/var/lib/piclusterd")
