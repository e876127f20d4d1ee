"""The cluster's CA is changed while it runs; for as long as that takes, two CAs are trusted.

    owner: ca rotate ─▶ announced ──all members trust both──▶ issuing ──all were re-issued──▶ over
    node ──request("ca", {trusts, leaf})──▶ holder of the keys ──{next, proof} | reissue | {only, proof}──▶ node
            next: kept in ca-next.pem, trusted beside the old one       reissue: the node renews (`renewal`)
            only: ca-next.pem takes the place of ca.pem; links by old certificates end and come again

Nobody has to believe whoever says that it is the holder: the old CA's key signs the next certificate, and the next CA's
key signs the word that it is the only one. A member that is away holds each step up until it comes back, is removed, or
the owner says `--finish`: then it must join anew. The cluster keeps its id, which was that of its first CA. Nobody is
admitted meanwhile. Every step is durable before it is told, and may be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from ..board.private import write_private
from ..errors import Broken, Refused
from ..ids import NodeId
from .certificates import make_ca, pin
from .identity import CA_KEY, NEXT_CA, NEXT_CA_KEY, Identity, private_pem

REQUEST = "ca"
FILE = "succession.json"
NEXT_PREFIX, ONLY_PREFIX = b"piclusterd next ca v1\0", b"piclusterd only ca v1\0"
"""Keep a CA's signature under one statement from being one under another, or under a certificate."""
PEM_CHARS_MAX = 4096

Pin = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Asked(msgspec.Struct, frozen=True):
    """What a node says of itself: the CAs it trusts, and the one that signed its certificate."""

    trusts: Annotated[tuple[Pin, ...], Meta(max_length=2)]
    leaf: Pin


class Told(msgspec.Struct, frozen=True):
    """At most one of the three is set. `proof`: of `next` by the CA before it, of `only` by itself."""

    next: Annotated[str, Meta(max_length=PEM_CHARS_MAX)] = ""
    reissue: bool = False
    only: str = ""
    proof: Annotated[bytes, Meta(max_length=128)] = b""


class _State(msgspec.Struct):
    stage: Literal["announced", "issuing"] = "announced"
    trust: list[NodeId] = msgspec.field(default_factory=list)
    renewed: list[NodeId] = msgspec.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Progress:
    """`stage`: announced, issuing, or over. `waiting`: members whose turn it is, by id."""

    stage: str
    waiting: tuple[NodeId, ...] = ()


class Succession:
    """The change as the holder of the CA's keys leads it. Blocking; one caller at a time."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the identity directory. Raises `Broken`."""
        self._directory, self._path = directory, directory / FILE
        try:
            if not (directory / NEXT_CA).exists():
                self._path.unlink(missing_ok=True)  # the last step of the swap, where a crash came before it
            self._state = msgspec.json.decode(self._path.read_bytes(), type=_State) if self._path.exists() else None
        except (OSError, msgspec.DecodeError) as fault:
            raise Broken("cannot read how far the change of the CA is", f"{self._path}: {fault}.") from fault

    @property
    def issuing(self) -> bool:
        """Certificates are signed by the next CA."""
        return self._state is not None and self._state.stage == "issuing"

    def begin(self, me: Identity) -> Identity:
        """Make the next CA, unless there is one. This node trusts it from now on."""
        if self._state is None:
            key = Ed25519PrivateKey.generate()
            ca = make_ca(key, me.cluster).public_bytes(serialization.Encoding.PEM)
            write_private(self._directory / NEXT_CA_KEY, private_pem(key))
            me = me.trusting(ca)
            self._save(_State())
        return me

    def answer(self, me: Identity, asker: NodeId, asked: Asked) -> Told:
        """What `asker` should do next; what it has done is noted."""
        if self._state is None:
            current = pin(me.ca_pem).hex()
            stale = asked.trusts != (current,) and current in asked.trusts
            return Told(only=current, proof=_key(me, CA_KEY).sign(ONLY_PREFIX + pin(me.ca_pem))) if stale else Told()
        following = pin(me.next_ca_pem).hex()
        if following not in asked.trusts:
            proof = _key(me, CA_KEY).sign(NEXT_PREFIX + pin(me.next_ca_pem))
            return Told(next=me.next_ca_pem.decode(), proof=proof)
        self._note(asker, asked.leaf == following)
        return Told(reissue=self.issuing and asked.leaf != following)

    def progress(self, me: NodeId, members: Iterable[NodeId]) -> Progress:
        """`members`: all that are listed."""
        if self._state is None:
            return Progress("over")
        done = self._state.renewed if self.issuing else self._state.trust
        return Progress(self._state.stage, tuple(n for n in sorted(members) if n != me and n not in done))

    def advance(self, me: Identity, members: Iterable[NodeId], *, force: bool = False) -> Identity:
        """The next stage where nobody is waited for, or by `force`. This node's identity in it."""
        progress = self.progress(me.node, members)
        if self._state is None or (progress.waiting and not force):
            return me
        if not self.issuing:
            self._save(msgspec.structs.replace(self._state, stage="issuing"))
        elif _issuer(me) == pin(me.next_ca_pem):
            me = me.succeeded()
            self._path.unlink()
            self._state = None
        return me

    def _note(self, asker: NodeId, renewed: bool) -> None:
        assert self._state is not None
        before = (len(self._state.trust), len(self._state.renewed))
        for holds, nodes in ((True, self._state.trust), (renewed, self._state.renewed)):
            if holds and asker not in nodes:
                nodes.append(asker)
        if before != (len(self._state.trust), len(self._state.renewed)):
            self._save(self._state)

    def _save(self, state: _State) -> None:
        write_private(self._path, msgspec.json.encode(state))
        self._state = state


def ask(me: Identity) -> Asked:
    return Asked(tuple(pin(ca).hex() for ca in me.cas), _issuer(me).hex())


def obey(me: Identity, told: Told) -> Identity:
    """This identity after what the holder said, durable. Raises `Refused` where it is not proved. Blocking."""
    try:
        if told.next and not me.next_ca_pem:
            following = told.next.encode()
            _public(me.ca_pem).verify(told.proof, NEXT_PREFIX + pin(following))
            return me.trusting(following)
        if told.only and me.next_ca_pem and told.only == pin(me.next_ca_pem).hex() == _issuer(me).hex():
            _public(me.next_ca_pem).verify(told.proof, ONLY_PREFIX + pin(me.next_ca_pem))
            return me.succeeded()
    except (InvalidSignature, ValueError):
        raise Refused("a change of the CA was told without proof", "the CA's own key did not sign it.") from None
    return me


def _issuer(me: Identity) -> bytes:
    """Pin of the CA that signed our certificate."""
    leaf = x509.load_pem_x509_certificate(me.cert_pem)
    for ca_pem in me.cas:
        try:
            leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem))
        except (InvalidSignature, ValueError):
            continue
        return pin(ca_pem)
    raise Broken("our certificate is of no CA that we trust", str(me.directory))


def _key(me: Identity, file: str) -> Ed25519PrivateKey:
    key = serialization.load_pem_private_key((me.directory / file).read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return key


def _public(ca_pem: bytes) -> Ed25519PublicKey:
    key = x509.load_pem_x509_certificate(ca_pem).public_key()
    assert isinstance(key, Ed25519PublicKey), "make_ca makes no others"
    return key
