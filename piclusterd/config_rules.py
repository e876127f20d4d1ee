"""What the workflows of `config_flows` cannot do without: faults that no single value shows.

Config ─▶ flow_faults ─▶ (section, key), what is wrong      `config_file` tells them with file and line
"""

from __future__ import annotations

from collections.abc import Iterator

from .config import Config


def flow_faults(config: Config) -> Iterator[tuple[tuple[str, str], str]]:
    needs = {
        "spec": (config.spec.mode, "notion.token_file", "spec.data_source", "linear.token_file"),
        "deploy": (config.deploy.mode, "deploy.repository", "github.token_file"),
        "moderation": (config.moderation.mode if config.moderation.delete != "never" else "off", "linear.token_file"),
    }
    for section, (mode, *keys) in needs.items():
        for key in keys if mode != "off" else ():
            part, _, name = key.partition(".")
            if not getattr(getattr(config, part), name):
                yield (section, "mode"), f"needs {key}, which is empty"
    if config.deploy.cloudflare_account and not config.deploy.cloudflare_token_file:
        yield ("deploy", "cloudflare_account"), "needs deploy.cloudflare_token_file, which is empty"
    if config.moderation.clean_below > config.moderation.flagged_from:
        yield ("moderation", "clean_below"), "is above flagged_from: every comment would be both"
    if config.notify.linear_team and not config.linear.token_file:
        yield ("notify", "linear_team"), "needs linear.token_file, which is empty"
