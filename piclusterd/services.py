"""What runs are made of on this node: the workflows, the services they call, and how patient the engine is.

configuration ─┬▶ workflows   spec, triage, moderation, notice, deploy, reconcile, errand
               ├▶ services    linear, notion, notify, github, deployer, upgrades, hub, post, cluster (where configured)
               └▶ patience and agenda: what the coordinator does unasked, and when
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from .config import Config
from .desk import Desk
from .errors import ConfigError
from .events import ClockTold
from .hands import Service
from .inference.library import Library
from .inference.pool import Pool
from .integrations.deployer import Deployer
from .integrations.echo import Echo
from .integrations.errands import HubHealth, Poster
from .integrations.github import GithubClient
from .integrations.linear_flows import LinearFlows
from .integrations.notify import NotifyClient
from .integrations.notion import NotionClient
from .mailbox import Mailbox
from .memory import Memory
from .node import Node
from .notices import Crier, TakeHook
from .views import RunView
from .workflows import triage_policy
from .workflows.batch import Batch
from .workflows.deploy import Deploy
from .workflows.errands import Errands, triage_report
from .workflows.flight import Patience
from .workflows.moderation import Moderation
from .workflows.notice import Notices
from .workflows.notifying import Sinks
from .workflows.reconcile import Reconcile
from .workflows.schedule import Agenda, Line
from .workflows.selftest import Selftest
from .workflows.spec import Spec
from .workflows.triage import Triage
from .workflows.triage_commands import Commands
from .workflows.triage_watch import Watch
from .workflows.workflow import Workflow

CLOCK_EVERY_S = 10.0
"""Between two looks at the wall clock: a line of the schedule begins that late at most."""
HOUR_S = 3600.0
WRITERS = (Triage.name, Commands.name)
"""Workflows that write to issues what `Watch` would learn from."""
REPORTED = 1000
"""Newest runs that a report counts."""

Secret = Callable[[str], tuple[str, ...]]


class Here:
    """The service `cluster`: what this node knows of the runs."""

    def __init__(self, runs: Callable[[], Iterable[RunView]]) -> None:
        self._runs = runs

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        return {"text": triage_report(self._runs())}


class Cloud:
    """The service `cloud`: a provider that a team's policy names answers."""

    def __init__(self, ask: Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]) -> None:
        self._ask = ask

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        return await self._ask(str(arguments["provider"]), arguments["request"])


def make_workflows(config: Config, model: str) -> dict[str, Workflow]:
    """By name; the first that wants an event gets it. `model`: the one that answers."""
    actor = config.linear.actor_id
    triage = Triage(config.triage, model, actor, load_policies(config))
    all_: tuple[Workflow, ...] = (
        Spec(config.spec, model, actor), triage, Commands(triage, actor), Watch(triage, actor),
        Moderation(config.moderation, make_sinks(config), model, actor),
        Notices(make_sinks(config)), Deploy(config.deploy, bool(config.upgrade.source)), Selftest(), Reconcile(),
        Errands(model), Batch(),
    )  # fmt: skip
    return {workflow.name: workflow for workflow in all_}


def load_policies(config: Config) -> triage_policy.Policies:
    """The teams' policies of triage. Raises ConfigError with every fault of their file."""
    file = config.triage.policy_file
    if not file:
        return triage_policy.of_config(config.triage)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError([f"{file}: cannot be read as a policy: {fault}"]) from None
    policies = triage_policy.parse(text, file, config.triage)
    known = {provider.name for provider in config.providers}
    named = {policy.cloud_provider for policy in (policies.default, *policies.teams.values())} - {""}
    if missing := sorted(named - known):
        raise ConfigError([f"{file}: cloud_provider: no [[providers]] is called {name}" for name in missing])
    return policies


def make_library(
    config: Config, pool: Pool, secret: Secret, environ: Mapping[str, str], on_change: Callable[[], None]
) -> Library:
    """The models on this node's disk."""
    token = secret(config.store.token_file)[0] if config.store.token_file else ""
    root, hub = config.state_dir / "models", environ.get("HF_ENDPOINT", "")
    return Library(root, pool, config.store, config.inference.queue_max, hub, token, on_change)


def make_sinks(config: Config) -> Sinks:
    files = {"webhook": config.notify.webhook_url_file, "ntfy": config.notify.ntfy_url_file}
    return Sinks(tuple(name for name, file in files.items() if file), config.notify.linear_team)


def make_services(config: Config, name: str, secret: Secret, stack: AsyncExitStack, desk: Desk) -> dict[str, Service]:
    """By name, for the node `name`; what must be closed is entered on `stack`."""
    services: dict[str, Service] = {
        "cluster": Here(lambda: desk.journal().views(REPORTED)),
        "cloud": Cloud(desk.fallback.complete_at),
        "memory": Memory(lambda: desk.journal().cases, desk.serving.embed, lambda: desk.journal().open_titles(WRITERS)),
        "batch": desk.batches,
        "selftest": Echo(name),
        "upgrades": desk.upgrades,
    }
    stack.push_async_callback(desk.fallback.close)
    stack.push_async_callback(desk.splits.close)
    stack.push_async_callback(desk.upgrades.close)
    if config.linear.token_file:
        linear = LinearFlows(
            config.linear.url, secret(config.linear.token_file)[0], writes_per_hour=config.linear.writes_per_hour
        )
        stack.push_async_callback(linear.close)
        services["linear"] = linear
    if config.notion.token_file:
        token = secret(config.notion.token_file)[0]
        notion = NotionClient(config.notion.url, token, config.notion.version)
        stack.push_async_callback(notion.close)
        services["notion"] = notion
    if config.github.token_file:
        github = GithubClient(config.github.url, secret(config.github.token_file)[0], config.github.hook)
        stack.push_async_callback(github.close)
        services["github"] = github
    if make_sinks(config).names:
        files = (config.notify.webhook_url_file, config.notify.ntfy_url_file, config.notify.ntfy_token_file)
        webhook, ntfy, token = (secret(file)[0] if file else "" for file in files)
        services["notify"] = NotifyClient(webhook, ntfy, token)
    deploy = config.deploy
    if deploy.cloudflare_token_file:
        token = secret(deploy.cloudflare_token_file)[0]
        services["deployer"] = Deployer(deploy.cloudflare_account, token, deploy.cloudflare_url)
    if config.hub.url:
        services["hub"] = HubHealth(config.hub.url)
    urls = {line.name: secret(line.post_url_file)[0] for line in config.schedule if line.post_url_file}
    return {**services, "post": Poster(urls)} if urls else services


def make_patience(config: Config) -> Patience:
    return Patience(config.triage.attempts_max, config.runs.approval_hours * HOUR_S)


def make_agenda(config: Config) -> Agenda:
    lines = tuple(
        Line(
            line.name,
            line.cron,
            line.timezone,
            line.what,
            line.prompt,
            line.missed,
            bool(line.post_url_file),
            line.prompts,
        )
        for line in config.schedule
    )
    configured = {"linear": config.linear.token_file, "github": config.github.token_file}
    reconciled = tuple(name for name, file in configured.items() if file)
    return Agenda(lines, reconciled, config.runs.reconcile_hours * HOUR_S)


def make_crier(
    config: Config, name: str, take_hook: TakeHook, node: Callable[[], Node], stack: AsyncExitStack
) -> Crier:
    """Who tells people what this node hears of."""
    crier = Crier(config.notify, name, take_hook, lambda: node().journal, lambda: node().replicate.active)
    stack.push_async_callback(crier.close)
    return crier


async def tell_clock(mailbox: Mailbox, is_synced: Callable[[], bool]) -> None:
    """Tell the node the minute, until cancelled."""
    while True:
        await mailbox.post(ClockTold(int(time.time() // 60), await asyncio.to_thread(is_synced)))
        await asyncio.sleep(CLOCK_EVERY_S)
