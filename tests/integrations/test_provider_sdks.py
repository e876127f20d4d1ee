"""The providers' own code judges what we sign, and we judge what it signs: npm packages, pinned, outside the tree.

    @linear/sdk       its webhook handler takes our request (200), refuses a changed one; it has no signer, so what it
                      checks against is computed as it does: Node's HMAC over the raw bytes
    @octokit/webhooks verify and sign
    @notionhq/client  verifyWebhookSignature and signWebhookPayload; with them the handshake, end to end through the hub

Skipped, with the reason, where node or the packages are not to be had.
"""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from piclusterd.demo import npm
from piclusterd.demo.signing import sign
from piclusterd.integrations.signatures import Verdict, verify
from tests.integrations.rig import TOKEN, Rig, body_of, fresh

pytestmark = pytest.mark.e2e

SECRET = "wh_secret"
SOURCES = ("linear", "github", "notion")
HEADER = {"linear": "Linear-Signature", "github": "X-Hub-Signature-256", "notion": "X-Notion-Signature"}
SDKS = {
    "linear": ("@linear/sdk", "98.0.0", """
        import { createHmac } from "node:crypto";
        import { LinearWebhookClient } from "@linear/sdk/webhooks";
        const judge = async (body, headers, secret) => {
          const handler = new LinearWebhookClient(secret).createHandler();
          return (await handler(new Request("http://localhost/", { method: "POST", headers, body }))).status === 200;
        };
        const makeSignature = (body, secret) => createHmac("sha256", secret).update(body).digest("hex");"""),
    "github": ("@octokit/webhooks", "14.2.0", """
        import { Webhooks } from "@octokit/webhooks";
        const judge = (body, headers, secret) => new Webhooks({ secret }).verify(body, headers["X-Hub-Signature-256"]);
        const makeSignature = (body, secret) => new Webhooks({ secret }).sign(body);"""),
    "notion": ("@notionhq/client", "5.26.0", """
        import { signWebhookPayload, verifyWebhookSignature } from "@notionhq/client";
        const judge = (body, headers, secret) =>
          verifyWebhookSignature({ body, signature: headers["X-Notion-Signature"], verificationToken: secret });
        const makeSignature = (body, secret) => signWebhookPayload({ body, verificationToken: secret });"""),
}  # fmt: skip
ASK = """
const [body, headers, secret] = JSON.parse(process.argv[2]);
const verdict = async (text) => { try { return await judge(text, headers, secret); } catch { return false; } };
const changed = body.replace("ö", "o");
console.log(JSON.stringify([await verdict(body), await verdict(changed), await makeSignature(body, secret)]));
"""


def ask(source: str, body: bytes, headers: dict[str, str], home: Path, secret: str = SECRET) -> tuple[bool, bool, str]:
    """(their verdict on body, on a changed body, the signature they would make). Skips where it cannot be had."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    package, version, code = SDKS[source]
    found = npm.install(package, version)
    if found.path is None:
        pytest.skip(found.why)
    (home / "node_modules").unlink(missing_ok=True)
    (home / "node_modules").symlink_to(found.path / "node_modules")
    (home / "judge.mjs").write_text(code + ASK)
    question = json.dumps([body.decode(), headers, secret])
    done = subprocess.run([node, home / "judge.mjs", question], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    good, changed, signature = json.loads(done.stdout)
    return good, changed, signature


def event(**fields: Any) -> bytes:
    """A body with a letter of two bytes, so that who signs characters instead of bytes is found out."""
    about = {"id": "e1", "type": "Issue", "action": "create", "data": {"id": "i1"}, "title": "größer"}
    return fresh(**about, **fields).decode().replace("\\u00f6", "ö").encode()


@pytest.mark.parametrize("source", SOURCES)
def test_the_providers_sdk_accepts_what_we_sign_and_we_what_it_signs(source: str, tmp_path: Path) -> None:
    body = event()
    good, changed, signature = ask(source, body, sign(source, body, SECRET), tmp_path)
    assert (good, changed) == (True, False)
    theirs = {HEADER[source]: signature}
    assert verify(source, theirs, body, [SECRET]) is Verdict.OK
    assert verify(source, theirs, body + b" ", [SECRET]) is Verdict.MISMATCH
    assert verify(source, theirs, body, ["another"]) is Verdict.MISMATCH


@pytest.mark.parametrize("source", SOURCES)
async def test_the_hub_takes_what_the_providers_sdk_signed(hub: Rig, source: str, tmp_path: Path) -> None:
    body = event()
    ours = sign(source, body, f"{source}-secret")
    _, _, signature = await asyncio.to_thread(ask, source, body, ours, tmp_path, f"{source}-secret")
    assert (await hub.send_hook(source, body, ours | {HEADER[source]: signature}))[0] == 200
    assert (await hub.send_hook(source, body + b" ", ours | {HEADER[source]: signature}))[0] == 401


async def test_notions_handshake_from_the_subscription_to_the_cluster(any_rig: Rig, tmp_path: Path) -> None:
    """Subscribe → token posted → operator reads it → Notion's client signs with it → stored → verified again."""
    await any_rig.start({"HUB_TOKEN": TOKEN})
    token = "secret_tMrlL1qK5vuQAh1b6cZGhFChZTSYJlce98V0pYn7yBl"
    posted = json.dumps({"verification_token": token})
    assert (await any_rig.send_hook("notion", posted, {"Content-Type": "application/json"}))[0] == 200
    assert await any_rig.call("GET", "/notion/token") == (200, {"token": token})
    body = event(attempt_number=1)
    _, _, signature = await asyncio.to_thread(ask, "notion", body, sign("notion", body, token), tmp_path, token)
    headers = {"X-Notion-Signature": signature, "Content-Type": "application/json"}
    assert await any_rig.send_hook("notion", body, headers) == (200, {"seq": 1, "duplicate": False})
    retry = event(attempt_number=2)
    _, _, again = await asyncio.to_thread(ask, "notion", retry, sign("notion", retry, token), tmp_path, token)
    answer = await any_rig.send_hook("notion", retry, headers | {"X-Notion-Signature": again})
    assert answer == (200, {"seq": 1, "duplicate": True})
    line = await any_rig.dial()
    [hook] = await line.hooks(1)
    assert verify("notion", hook["headers"], body_of(hook), [token]) is Verdict.OK
