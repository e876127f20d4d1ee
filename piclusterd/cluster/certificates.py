"""X.509 as the cluster uses it: an Ed25519 CA, node certificates that name their own key, and the checks of both.

    CA, 10 years ──signs──▶ leaf, 30 days: URI spiffe://<cluster>/node/<id>, DNS <name>.<cluster>.picluster.internal

A leaf proves its own id: <id> must be `ids.node_id` of the key in the same certificate. OpenSSL verifies chains during
handshakes; this module issues, and reads what has been verified. Both issue and read are pure but for the clock and the
random serial number.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import ssl
from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import Refused, UserError
from ..ids import NodeId, node_id

CA_LIFE = dt.timedelta(days=3650)
LEAF_LIFE = dt.timedelta(days=30)
BACKDATED = dt.timedelta(hours=1)
"""Certificates start in the past: clocks of two Pis may differ by minutes before NTP has settled."""
NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; Python's `ssl` has no name for it."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def pin(ca_pem: bytes) -> bytes:
    """SHA-256 of the CA certificate (DER). Raises ValueError if it is not one."""
    der = x509.load_pem_x509_certificate(ca_pem).public_bytes(serialization.Encoding.DER)
    return hashlib.sha256(der).digest()


def cluster_id(ca_pin: bytes) -> str:
    return ca_pin.hex()[:16]


def trust(context: ssl.SSLContext, ca_pem: bytes, *, check_time: bool) -> None:
    """TLS 1.3 only, and this one CA."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_pem.decode())
    if not check_time:
        context.verify_flags |= NO_CHECK_TIME


def node_of(cert: x509.Certificate, cluster: str) -> NodeId:
    """The node `cert` speaks for, checked against its own key. Raises `Refused`."""
    key = cert.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise Refused("not a node's certificate", "its key is not Ed25519.")
    node = node_id(key.public_bytes_raw())
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        uris = []
    if uris != [f"spiffe://{cluster}/node/{node}"]:
        raise Refused("not a node's certificate", f"it names {uris}, its key is that of {node} in {cluster}.")
    return node


def is_valid_at(cert: x509.Certificate, wall: float) -> bool:
    """`wall`: Unix seconds."""
    return cert.not_valid_before_utc.timestamp() <= wall <= cert.not_valid_after_utc.timestamp()


def check_certificate(cert_pem: bytes, cas: Iterable[bytes], key: bytes, cluster: str) -> None:
    """Raises `Refused` unless `cert_pem` is for the raw public `key` in `cluster` and signed by one of its CAs."""
    try:
        cert = x509.load_pem_x509_certificate(cert_pem)
        if node_of(cert, cluster) != node_id(key):
            raise Refused("the certificate is not for this node's key")
    except (ValueError, TypeError):
        raise Refused("this is no certificate") from None
    check_issuer(cert, cas)


def check_issuer(cert: x509.Certificate, cas: Iterable[bytes]) -> None:
    """Raises `Refused` unless one of the CAs (PEM) signed `cert`."""
    for ca_pem in cas:
        try:
            cert.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem))
        except (InvalidSignature, ValueError, TypeError):
            continue
        return
    raise Refused("the certificate is not signed by the cluster's CA")


def key_of_request(request_pem: bytes) -> Ed25519PublicKey:
    """The key that asks for a certificate, once it has shown that it is held. Raises `UserError`."""
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key = request.public_key()
        held = request.is_signature_valid
    except Exception as fault:  # hostile input: ValueError, UnsupportedAlgorithm and others
        raise UserError("not a certificate request", type(fault).__name__) from None
    if not held or not isinstance(key, Ed25519PublicKey):
        raise UserError("not a certificate request", "it must be signed by the Ed25519 key it carries.")
    return key


def checked_name(name: str) -> str:
    """`name` if it can stand in a DNS name (letters, digits, inner dashes, at most 63). Raises `UserError`."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name[:80]!r} cannot be a name", "letters, digits and inner dashes only, at most 63.")
    return name


def _builder(
    subject: str, issuer: x509.Name | None, key: Ed25519PublicKey, life: dt.timedelta
) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer or name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make_ca(key: Ed25519PrivateKey, cluster: str) -> x509.Certificate:
    """A self-signed CA for ten years that may sign nodes and no further CA."""
    builder = _builder(f"{cluster} piclusterd CA"[:64], None, key.public_key(), CA_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(_usage(signs_certificates=True), critical=True).sign(key, None)


def issue(ca: x509.Certificate, ca_key: Ed25519PrivateKey, key: Ed25519PublicKey, cluster: str, name: str) -> bytes:
    node = node_id(key.public_bytes_raw())
    names = x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(f"spiffe://{cluster}/node/{node}"),
            x509.DNSName(f"{name.lower()}.{cluster}.picluster.internal"),
        ]
    )
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        _builder(node, ca.subject, key, LEAF_LIFE)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(both, critical=False)
        .add_extension(names, critical=False)
        .sign(ca_key, None)
        .public_bytes(serialization.Encoding.PEM)
    )
