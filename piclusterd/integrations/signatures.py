"""Who sent this webhook, and have we had it before? Two pure functions over raw bytes.

    provider ──signed body──► hub (verifies, judges freshness) ──► cluster: verify() AGAIN, dedupe_key()

The hub is a rented machine: the cluster believes the provider's signature, not the hub's word. It must never apply
a freshness window of its own, since a hook may rightly arrive after a day of outage; what protects it from replays
is the dedupe key.

Refuses: sources it does not know, signatures that are not 64 hex digits, empty secrets (an unset environment
variable must never become a key that anybody can guess). At the doors themselves (the hub's, and a node's own): what
was signed longer ago than anybody remembers what came (`outlived`).

Facts, from the providers' webhook documentation:

    Linear   Linear-Signature:     <hex>            HMAC-SHA256 of the raw body
    GitHub   X-Hub-Signature-256:  sha256=<hex>     X-GitHub-Delivery is NOT signed
    Notion   X-Notion-Signature:   sha256=<hex>     retries change `attempt_number`, so the body differs: key on `id`

`selftest` is ourselves: `picluster selftest` signs with a secret derived from the hub's token, which nobody else holds.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

NUMBER_MAX = 1e300  # beyond it a float is about to overflow; no provider counts so far
DATED = ("linear",)  # sources that sign when they sent
REPLAY_MS = 7 * 86_400_000  # the hub remembers so long what it handed over; Linear's last retry comes after 6 h
ID_MAX = 200  # characters of a delivery id; GUIDs have 36, and the key is stored and gossiped

_HEX_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_PLAIN = re.compile(rf"[\x20-\x7e]{{1,{ID_MAX}}}")


@dataclass(frozen=True, slots=True)
class Provider:
    """How one provider signs: its header (lower case), the prefix before the hex digits, its delivery-id header."""

    signature: str
    prefix: str
    delivery: str | None


PROVIDERS: Mapping[str, Provider] = {
    "linear": Provider("linear-signature", "", "linear-delivery"),
    "github": Provider("x-hub-signature-256", "sha256=", "x-github-delivery"),
    "notion": Provider("x-notion-signature", "sha256=", None),
    "selftest": Provider("x-picluster-signature", "sha256=", None),
}


class Verdict(Enum):
    """The outcome of `verify`; the value is the reason in words. Only `OK` may be acted on."""

    OK = "the signature matches"
    UNKNOWN_SOURCE = "the source is none of linear, github, notion, selftest"
    NO_SECRET = "no secret is configured for this source"
    MISSING = "the signature header is missing"
    MALFORMED = "the signature is not 64 hex digits behind its prefix"
    MISMATCH = "the signature was made with another secret or over another body"

    @property
    def ok(self) -> bool:
        """True for `OK` alone."""
        return self is Verdict.OK


def verify(source: str, headers: Mapping[str, str], body: bytes, secrets: Iterable[str]) -> Verdict:
    """Check the provider's HMAC over the raw `body` against each active secret (two during a rotation).

    Header names match in any case. The comparison takes the same time whichever secret matches, or none.
    """
    provider = PROVIDERS.get(source)
    if provider is None:
        return Verdict.UNKNOWN_SOURCE
    active = [secret for secret in secrets if secret]
    if not active:
        return Verdict.NO_SECRET
    given = header(headers, provider.signature)
    if given is None:
        return Verdict.MISSING
    digits = given.removeprefix(provider.prefix)
    if not given.startswith(provider.prefix) or not _HEX_DIGEST.fullmatch(digits):
        return Verdict.MALFORMED
    mac = bytes.fromhex(digits)
    matches = [hmac.compare_digest(digest(secret, body), mac) for secret in active]  # a list: no early exit
    return Verdict.OK if any(matches) else Verdict.MISMATCH


def selftest_secret(token: str) -> str:
    """What signs the webhooks of `picluster selftest`: only who may fetch from the hub can make it."""
    return digest(token, b"picluster selftest").hex()


def digest(secret: str, body: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes."""
    return hmac.digest(secret.encode(), body, "sha256")


def outlived(source: str, event: Mapping[str, Any], now_ms: int) -> bool:
    """Signed longer ago than anybody remembers what came: nothing tells its first arrival from a replay.

    Linear alone signs when it sent (`webhookTimestamp`, milliseconds). A time as far ahead is as wrong.
    """
    sent = event.get("webhookTimestamp") if source in DATED else None
    return isinstance(sent, int | float) and not isinstance(sent, bool) and abs(now_ms - sent) > REPLAY_MS


def dedupe_key(source: str, headers: Mapping[str, str], body: bytes) -> str:
    """The key under which one event is the same event again, however often it is sent.

    Signed content decides: the hash of the body, or Notion's signed `id`. GitHub's unsigned GUID is added so that two
    events with equal bodies (two identical `repository_dispatch`es) stay two; a redelivery repeats the GUID.
    """
    delivery = delivery_id(source, headers, body)
    if source == "notion" and delivery:
        return f"notion:{delivery}"
    hashed = hashlib.sha256(body).hexdigest()
    return f"github:{delivery}:{hashed}" if source == "github" else f"{source}:{hashed}"


def event_key(source: str, headers: Mapping[str, str], event: Mapping[str, Any], body: bytes) -> str:
    """The key under which the cluster knows one event, made of signed content only: `event` is the `body`, decoded.

    A thing is created once at Linear, however the news of it is worded or whoever found out (`workflows.reconcile`).
    GitHub's GUID is under no signature: with it, whoever kept a signed body could have it worked on again.
    """
    data = event.get("data")
    created = (
        data.get("id") if source == "linear" and event.get("action") == "create" and isinstance(data, dict) else ""
    )
    kind = event.get("type")
    if isinstance(created, str) and _PLAIN.fullmatch(created) and isinstance(kind, str) and _PLAIN.fullmatch(kind):
        return f"linear:create:{kind}:{created}"
    return f"github:{hashlib.sha256(body).hexdigest()}" if source == "github" else dedupe_key(source, headers, body)


def delivery_id(source: str, headers: Mapping[str, str], body: bytes) -> str:
    """The provider's own id of the delivery, or "" when it is absent, too long or not printable ASCII."""
    provider = PROVIDERS.get(source)
    if provider is None:
        return ""
    found = body_object(body).get("id") if provider.delivery is None else header(headers, provider.delivery)
    return found if isinstance(found, str) and _PLAIN.fullmatch(found) else ""


def header(headers: Mapping[str, str], name: str) -> str | None:
    """The value of a header whose `name` is given in lower case, in whatever case it was sent."""
    found = headers.get(name)  # a request's headers know no case
    return found if found is not None else next((value for key, value in headers.items() if key.lower() == name), None)


def body_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object, {} for anything else. As strict as a browser's JSON.parse: no NaN, UTF-8 only."""
    try:
        value = json.loads(body.decode("utf-8-sig", "replace"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def strict_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object that says one thing to everybody who reads it. Raises ValueError for all others.

    Refused: what is no object, no UTF-8, nested past Python's limit, has a name twice, half of a surrogate pair, or a
    number that overflows. Of such a body two readers may make two different events.
    """
    try:
        text = body.decode("utf-8-sig")
        value = _STRICT.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice")
    return found


def _finite_float(text: str) -> float:
    number = float(text)
    if abs(number) > NUMBER_MAX:
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_unique_names)
"""Made once: `json.loads` would make one for every body."""
