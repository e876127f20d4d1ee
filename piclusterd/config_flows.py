"""The part of the configuration that the workflows after triage stand on: specs, moderation, notices, deploys.

As in `config`: each key has a default, a unit in its name or text, and a legal range. All of it is off by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta


@dataclass(frozen=True, slots=True)
class Notion:
    url: Annotated[str, Meta(description="REST endpoint")] = "https://api.notion.com"
    version: Annotated[
        str, Meta(pattern=r"^\d{4}-\d{2}-\d{2}$", description="of the API; pages are made of markdown since 2026-03-11")
    ] = "2026-03-11"
    token_file: Annotated[str, Meta(description="file with an integration's token; empty: Notion is off")] = ""


@dataclass(frozen=True, slots=True)
class Spec:
    mode: Annotated[
        Literal["off", "on"], Meta(description="write a spec of each Linear issue that is completed into Notion")
    ] = "off"
    data_source: Annotated[
        str,
        Meta(
            pattern=r"^[0-9a-fA-F-]{0,36}$",
            description="id of the data source (not its database) that gets the pages; share it with the integration",
        ),
    ] = ""
    title_property: Annotated[str, Meta(min_length=1, max_length=100, description="name of its title property")] = (
        "Name"
    )
    id_property: Annotated[
        str,
        Meta(
            min_length=1, max_length=100, description="name of a text property that holds the issue's id: one page each"
        ),
    ] = "Linear ID"
    teams: Annotated[
        tuple[str, ...], Meta(max_length=64, description="keys of the teams whose issues get specs; empty: all")
    ] = ()
    model: Annotated[str, Meta(description="the model that writes; empty: the default model")] = ""
    long_bytes: Annotated[
        int, Meta(ge=256, le=1_000_000, description="of text, from which the relay's model is asked first")
    ] = 4000
    prompt_bytes: Annotated[
        int, Meta(ge=512, le=200_000, description="of an issue and its comments that the model is shown")
    ] = 6000


@dataclass(frozen=True, slots=True)
class Moderation:
    mode: Annotated[
        Literal["off", "on"], Meta(description="look at each comment of Linear's issues, new or edited")
    ] = "off"
    model: Annotated[str, Meta(description="of the quick look; empty: the default model")] = ""
    how: Annotated[
        Literal["choice", "classify"],
        Meta(description="choice: a model that chats weighs two options; classify: a text-classification model"),
    ] = "choice"
    labels: Annotated[
        tuple[str, ...], Meta(max_length=64, description="of a text-classification model, those that mean abuse")
    ] = ("toxic", "hate", "offensive", "abuse", "LABEL_1")
    deep_model: Annotated[
        str, Meta(description="of the second look at what is borderline, the relay's first; empty: the default model")
    ] = ""
    clean_below: Annotated[
        float, Meta(ge=0.0, le=1.0, description="probability of abuse below which a comment is clean")
    ] = 0.2
    flagged_from: Annotated[
        float, Meta(ge=0.0, le=1.0, description="probability from which it is flagged; between the two: a second look")
    ] = 0.9
    words: Annotated[
        tuple[str, ...], Meta(max_length=256, description="words with which a comment is never clean at the first look")
    ] = ()
    delete: Annotated[
        Literal["never", "ask"], Meta(description="ask a person whether to delete what was flagged; never without one")
    ] = "never"


@dataclass(frozen=True, slots=True)
class Notify:
    """Where notices go: all that are set. They carry no text of strangers."""

    webhook_url_file: Annotated[str, Meta(description="file with a URL that gets each notice as JSON")] = ""
    ntfy_url_file: Annotated[str, Meta(description="file with the URL of an ntfy topic")] = ""
    ntfy_token_file: Annotated[str, Meta(description="file with its access token; empty: none is sent")] = ""
    linear_team: Annotated[
        str,
        Meta(pattern=r"^[0-9a-fA-F-]{0,36}$", description="id of the Linear team that gets an issue of each notice"),
    ] = ""
    dead_letters: Annotated[bool, Meta(description="also of runs that were given up")] = True
    alarms: Annotated[bool, Meta(description="also of the ledger's alarms")] = True


@dataclass(frozen=True, slots=True)
class Deploy:
    mode: Annotated[
        Literal["off", "ask", "auto"],
        Meta(description="what GitHub's news of a workflow that succeeded causes: nothing, a question, or a deploy"),
    ] = "off"
    repository: Annotated[
        str, Meta(pattern=r"^([A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+)?$", description="owner/name whose workflow counts")
    ] = ""
    workflow: Annotated[str, Meta(max_length=200, description="path of the workflow's file that counts")] = (
        ".github/workflows/ci.yml"
    )
    cloudflare_account: Annotated[
        str,
        Meta(pattern=r"^[0-9a-f]{0,32}$", description="id of the account that holds the hub; empty: hub left alone"),
    ] = ""
    cloudflare_token_file: Annotated[str, Meta(description="file with its API token (Workers Scripts: Edit)")] = ""
    cloudflare_url: Annotated[str, Meta(description="REST endpoint")] = "https://api.cloudflare.com/client/v4"


@dataclass(frozen=True, slots=True)
class Upgrade:
    source: Annotated[
        str, Meta(description="directory or https URL with wheels and their SHA256SUMS; empty: no upgrades by itself")
    ] = ""
    gate_s: Annotated[
        float, Meta(ge=1.0, le=3600.0, description="seconds in which a new release must be ready, else the old is back")
    ] = 120.0
    settle_s: Annotated[float, Meta(ge=0.0, le=3600.0, description="seconds for which it must then stay well")] = 10.0
    drain_s: Annotated[
        float, Meta(ge=0.0, le=3600.0, description="seconds that answers under way are given before the restart")
    ] = 60.0
