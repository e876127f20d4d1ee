"""Who a node is: its cluster's CA, its own key and certificate, and the TLS contexts made of them.

    <state_dir>/identity/   0700          every file 0600, written beside, fsynced, renamed, directory fsynced
        ca.key              the CA's private key; only where `create_cluster` ran
        ca-next.*           the CA that takes its place, while it is changed (`succession`)
        ca.pem node.key node.pem
        founding.json       who the first voters are (owned by `cluster.join.Founding`)
        joined.json         peers and voters told at the join: the daemon's first seeds
        cluster.json        names; written last: without it there is no identity and `load` gives None

A node's id is a hash of its public key; the cluster's is one of its first CA's certificate (`certificates`). Chains are
verified by OpenSSL, TLS 1.3 only, both ways. The server *asks* for a client certificate and does not insist, because a
joiner has none yet: who serves must check (`links` does, for /link).

Raspberry Pis have no clock of their own: with `check_time=False` OpenSSL ignores the dates of certificates
(X509_V_FLAG_NO_CHECK_TIME) until the clock is synced; chain and pin are checked always.
Leaves live 30 days and are due for renewal after 20 (k3s renews only at restart, which caused outages).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..board.private import make_private_directory, write_private
from ..errors import Broken, Refused, UserError
from ..ids import NodeId, node_id
from ..wire import Voters
from .certificates import (
    check_certificate,
    check_issuer,
    checked_name,
    cluster_id,
    is_valid_at,
    issue,
    key_of_request,
    make_ca,
    node_of,
    pin,
    trust,
)

DIRECTORY = "identity"
CA, CA_KEY, NEXT_CA, NEXT_CA_KEY = "ca.pem", "ca.key", "ca-next.pem", "ca-next.key"
EXPECT_MAX = 5
"""Voters of one cluster: more would only make every election and every write slower."""


class _Names(msgspec.Struct, frozen=True):
    cluster: str
    name: str
    id: str = ""
    """Of the cluster; "" until its CA is changed for the first time."""


class Told(msgspec.Struct, frozen=True):
    """What the admitting node said: `host:port` of peers, and the voters if they were sealed already."""

    peers: tuple[str, ...] = ()
    voters: Voters | None = None


class NodeKey:
    """A node's Ed25519 key. `public_key` is 32 raw bytes; `sign` gives 64 bytes (the ledger's `Signer`)."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_key: bytes = private.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        return self._private.sign(data)

    def request(self) -> bytes:
        """A certificate signing request (PEM). It carries the key only: the issuer decides every name."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self._private, None).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class Identity:
    node: NodeId
    name: str
    cluster: str
    cluster_id: str
    """16 hex digits: the first 8 bytes of SHA-256 over the first CA certificate (DER)."""
    ca_pem: bytes
    cert_pem: bytes
    signer: NodeKey
    directory: Path
    next_ca_pem: bytes = b""
    """Trusted too, while the CA is changed."""

    @property
    def can_issue(self) -> bool:
        """This node holds the CA's key and can admit others."""
        return (self.directory / CA_KEY).exists()

    @property
    def cas(self) -> tuple[bytes, ...]:
        """Whose certificates are good."""
        return (self.ca_pem, self.next_ca_pem) if self.next_ca_pem else (self.ca_pem,)

    @property
    def ca_pin(self) -> bytes:
        """SHA-256 of the CA certificate (DER) as it is on disk now: what join tokens carry."""
        return pin((self.directory / CA).read_bytes())

    @property
    def renew_after(self) -> float:
        """Unix time from which the certificate should be renewed: two thirds of its life."""
        cert = x509.load_pem_x509_certificate(self.cert_pem)
        life = cert.not_valid_after_utc - cert.not_valid_before_utc
        return (cert.not_valid_before_utc + life * 2 / 3).timestamp()

    def issue(self, request_pem: bytes, name: str, *, by_next: bool = False) -> bytes:
        """A 30-day certificate (PEM) for the key in `request_pem`. Raises `UserError`, or `Refused` without the CA."""
        key = key_of_request(request_pem)
        if not self.can_issue:
            raise Refused("this node cannot issue certificates", "the CA's key is on the node where `init` ran.")
        files = (NEXT_CA, NEXT_CA_KEY) if by_next else (CA, CA_KEY)
        ca_pem, key_pem = ((self.directory / file).read_bytes() for file in files)
        ca_key = serialization.load_pem_private_key(key_pem, None)
        assert isinstance(ca_key, Ed25519PrivateKey)
        return issue(x509.load_pem_x509_certificate(ca_pem), ca_key, key, self.cluster, checked_name(name))

    def renewed(self, cert_pem: bytes) -> Identity:
        """This identity with a newer certificate, made durable. Raises `Refused` if it is not ours."""
        check_certificate(cert_pem, self.cas, self.signer.public_key, self.cluster)
        write_private(self.directory / "node.pem", cert_pem)
        return replace(self, cert_pem=cert_pem)

    def trusting(self, next_ca_pem: bytes) -> Identity:
        """This identity, which trusts a second CA from now on; durable. Raises ValueError if it is none."""
        pin(next_ca_pem)
        names = _Names(self.cluster, self.name, self.cluster_id)
        write_private(self.directory / "cluster.json", msgspec.json.encode(names))  # the id outlives the CA
        write_private(self.directory / NEXT_CA, next_ca_pem)
        return replace(self, next_ca_pem=next_ca_pem)

    def succeeded(self) -> Identity:
        """This identity, which trusts only what was the second CA; durable, and may be repeated."""
        next_key = self.directory / NEXT_CA_KEY
        if next_key.exists():
            write_private(self.directory / CA_KEY, next_key.read_bytes())
        write_private(self.directory / CA, self.next_ca_pem)
        (self.directory / NEXT_CA).unlink(missing_ok=True)
        next_key.unlink(missing_ok=True)
        return replace(self, ca_pem=self.next_ca_pem, next_ca_pem=b"")

    def server_context(self, *, check_time: bool = True) -> ssl.SSLContext:
        """TLS 1.3; asks the client for a certificate of this cluster, and accepts none (a foreign one is refused)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0  # a resumed session would skip the certificate
        return self._prepared(context, check_time)

    def client_context(self, *, check_time: bool = True) -> ssl.SSLContext:
        """TLS 1.3; presents our certificate. Host names mean nothing here: the caller checks `peer_of` instead."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        return self._prepared(context, check_time)

    def _prepared(self, context: ssl.SSLContext, check_time: bool) -> ssl.SSLContext:
        trust(context, self.ca_pem, check_time=check_time)
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Present the certificate on disk, trust our CAs from now on; works on a context in use.

        A CA that is dropped stays in the context until the next start: `peer_of` refuses what it signed.
        """
        for ca_pem in self.cas:
            context.load_verify_locations(cadata=ca_pem.decode())
        context.load_cert_chain(self.directory / "node.pem", self.directory / "node.key")

    def peer_of(self, cert_der: bytes | None, wall: float | None = None) -> NodeId:
        """Whose certificate (verified by OpenSSL) this is; good at `wall` too, where given. Raises `Refused`."""
        if cert_der is None:
            raise Refused("no client certificate", "only members may open a link.")
        cert = x509.load_der_x509_certificate(cert_der)
        if wall is not None and not is_valid_at(cert, wall):
            raise Refused("its certificate is out of date")
        check_issuer(cert, self.cas)
        return node_of(cert, self.cluster)


def create_cluster(state_dir: Path, cluster_name: str, node_name: str, expect: int = 1) -> Identity:
    """Make a CA and the first node of a new cluster whose first `expect` workers will vote. Raises `UserError`."""
    cluster, name = checked_name(cluster_name).lower(), checked_name(node_name)
    if not 1 <= expect <= EXPECT_MAX:
        raise UserError(
            f"{expect} founding voters", f"a cluster has 1 to {EXPECT_MAX} voters.", "Choose an odd number."
        )
    key = new_key(state_dir)
    directory = state_dir / DIRECTORY
    ca_key = Ed25519PrivateKey.generate()
    ca = make_ca(ca_key, cluster)
    cert_pem = issue(ca, ca_key, Ed25519PublicKey.from_public_bytes(key.public_key), cluster, name)
    write_private(directory / CA_KEY, private_pem(ca_key))
    founding = {"expect": expect, "admitted": [node_id(key.public_key)]}
    write_private(directory / "founding.json", msgspec.json.encode(founding))
    return settle(state_dir, key, cluster, name, ca.public_bytes(serialization.Encoding.PEM), cert_pem)


def new_key(state_dir: Path) -> NodeKey:
    """The key of a node that belongs to no cluster yet; a key left by an interrupted join is used again."""
    directory = state_dir / DIRECTORY
    if (directory / "cluster.json").exists():
        raise UserError(
            "this node already belongs to a cluster", f"{directory} exists.", "Use another state directory, or reset."
        )
    make_private_directory(directory)
    path = directory / "node.key"
    if not path.exists():
        write_private(path, private_pem(Ed25519PrivateKey.generate()))
    return _read_key(path)


def settle(
    state_dir: Path,
    key: NodeKey,
    cluster: str,
    name: str,
    ca_pem: bytes,
    cert_pem: bytes,
    told: Told | None = None,
    id_: str = "",
) -> Identity:
    """Make a membership durable; `cluster.json` is its commit mark. Raises `Refused` for another's certificate."""
    check_certificate(cert_pem, (ca_pem,), key.public_key, cluster)
    directory = state_dir / DIRECTORY
    if told is not None:
        write_private(directory / "joined.json", msgspec.json.encode(told))
    write_private(directory / CA, ca_pem)
    write_private(directory / "node.pem", cert_pem)
    write_private(directory / "cluster.json", msgspec.json.encode(_Names(cluster, name, id_)))
    found = id_ or cluster_id(pin(ca_pem))
    return Identity(node_id(key.public_key), name, cluster, found, ca_pem, cert_pem, key, directory)


def load(state_dir: Path) -> Identity | None:
    """The identity in `state_dir`; None where there is none. Raises `Broken` where it is there and damaged."""
    directory = state_dir / DIRECTORY
    if not (directory / "cluster.json").exists():
        return None
    try:
        names = msgspec.json.decode((directory / "cluster.json").read_bytes(), type=_Names)
        ca_pem, cert_pem = (directory / CA).read_bytes(), (directory / "node.pem").read_bytes()
        key = _read_key(directory / "node.key")
        next_ca = (directory / NEXT_CA).read_bytes() if (directory / NEXT_CA).exists() else b""
        check_certificate(cert_pem, (ca_pem, next_ca) if next_ca else (ca_pem,), key.public_key, names.cluster)
    except (OSError, ValueError, Refused) as fault:
        raise Broken(
            "cannot read this node's identity", f"{directory}: {fault}.", "Restore it or join again."
        ) from fault
    node = node_id(key.public_key)
    found = names.id or cluster_id(pin(ca_pem))
    return Identity(node, names.name, names.cluster, found, ca_pem, cert_pem, key, directory, next_ca)


def joined(directory: Path) -> Told | None:
    """What was told at the join, from the identity directory; None where this node founded the cluster.

    Raises `Broken` if it cannot be read.
    """
    path = directory / "joined.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Told)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as fault:
        raise Broken("cannot read what was told at the join", f"{path}: {fault}.", "Remove it, set seeds.") from fault


def verify(key: bytes, signature: bytes, data: bytes) -> bool:
    """Did the owner of the raw Ed25519 public `key` sign `data`? False also for keys that are none."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(path: Path) -> NodeKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} is not an Ed25519 key")
    return NodeKey(key)
