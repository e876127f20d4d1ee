"""Signs webhooks as Linear, GitHub and Notion do: for the demo's doubles and for tests.

    sign("linear", body, secret) ──► headers to POST beside the very same bytes

Owns nothing. Each call invents a fresh delivery id, as the providers do for a new event; give `delivery` to imitate a
redelivery. Header names and forms are the providers' own: tests/integrations/test_signatures.py has the
providers' own SDKs accept them.
"""

import uuid

from piclusterd.integrations.signatures import PROVIDERS, digest

_EVENTS = {"linear": "Issue", "github": "push"}


def sign(
    source: str, body: bytes, secret: str, *, event: str | None = None, delivery: str | None = None
) -> dict[str, str]:
    """Headers for `body` from `source` (linear, github, notion or selftest). Raises KeyError for any other source."""
    provider = PROVIDERS[source]
    event = _EVENTS.get(source, "") if event is None else event
    delivery = delivery or str(uuid.uuid4())
    signature = provider.prefix + digest(secret, body).hex()
    headers = {"Content-Type": "application/json; charset=utf-8"}
    if source == "linear":
        own = {"Linear-Delivery": delivery, "Linear-Event": event, "User-Agent": "Linear-Webhook"}
        return headers | own | {"Linear-Signature": signature}
    if source == "github":
        own = {"X-GitHub-Delivery": delivery, "X-GitHub-Event": event, "User-Agent": "GitHub-Hookshot/piclusterd"}
        return headers | own | {"X-GitHub-Hook-ID": "1", "X-Hub-Signature-256": signature}
    if source == "selftest":
        return headers | {"User-Agent": "picluster", "X-Picluster-Signature": signature}
    return headers | {"User-Agent": "notion-api", "X-Notion-Signature": signature}
