import random
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from piclusterd.board.private import write_private
from piclusterd.cluster import certificates, identity
from piclusterd.cluster.identity import NodeKey
from piclusterd.errors import Broken, Refused, UserError
from piclusterd.ids import node_id

_MADE_UNDER_UMASK_000 = """
import os, sys
from pathlib import Path
from piclusterd.cluster import certificates, identity
os.umask(0)
identity.create_cluster(Path(sys.argv[1]), "home", "pi-1")
"""


def member(tmp_path: Path, first: identity.Identity, name: str) -> identity.Identity:
    """A second node, admitted without a network."""
    state = tmp_path / name
    key = identity.new_key(state)
    return identity.settle(state, key, first.cluster, name, first.ca_pem, first.issue(key.request(), name))


def test_a_created_identity_is_loaded_again(tmp_path: Path) -> None:
    made = identity.create_cluster(tmp_path, "Home", "pi-1", expect=3)
    found = identity.load(tmp_path)
    assert found is not None
    assert (found.node, found.name, found.cluster, found.cluster_id) == (made.node, "pi-1", "home", made.cluster_id)
    assert found.node == node_id(found.signer.public_key)
    assert found.can_issue


def test_no_identity_is_none_and_half_of_one_too(tmp_path: Path) -> None:
    assert identity.load(tmp_path) is None
    identity.new_key(tmp_path)
    assert identity.load(tmp_path) is None


def test_a_damaged_identity_is_broken_and_not_absent(tmp_path: Path) -> None:
    identity.create_cluster(tmp_path, "home", "pi-1")
    (tmp_path / "identity" / "node.pem").write_bytes(b"junk")
    with pytest.raises(Broken, match="identity"):
        identity.load(tmp_path)


def test_a_node_belongs_to_one_cluster(tmp_path: Path) -> None:
    identity.create_cluster(tmp_path, "home", "pi-1")
    with pytest.raises(UserError, match="already belongs"):
        identity.create_cluster(tmp_path, "other", "pi-1")


def test_an_interrupted_join_uses_its_key_again(tmp_path: Path) -> None:
    assert identity.new_key(tmp_path).public_key == identity.new_key(tmp_path).public_key


def test_modes_are_private_under_umask_000(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _MADE_UNDER_UMASK_000, str(tmp_path / "state")], check=True)
    directory = tmp_path / "state" / "identity"
    assert directory.stat().st_mode & 0o777 == 0o700
    files = sorted(directory.iterdir())
    assert [f.name for f in files] == ["ca.key", "ca.pem", "cluster.json", "founding.json", "node.key", "node.pem"]
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}


def test_what_a_node_signs_verifies_with_its_key_only(tmp_path: Path) -> None:
    key = identity.new_key(tmp_path / "a")
    signature = key.sign(b"entry")
    assert identity.verify(key.public_key, signature, b"entry")
    assert not identity.verify(key.public_key, signature, b"entrY")
    assert not identity.verify(identity.new_key(tmp_path / "b").public_key, signature, b"entry")
    assert not identity.verify(b"short", signature, b"entry")


def test_the_certificate_names_the_node_and_its_host(tmp_path: Path) -> None:
    made = identity.create_cluster(tmp_path, "home", "Pi-1")
    cert = x509.load_pem_x509_certificate(made.cert_pem)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://home/node/{made.node}"]
    assert names.get_values_for_type(x509.DNSName) == ["pi-1.home.picluster.internal"]
    assert certificates.node_of(cert, "home") == made.node
    with pytest.raises(Refused):
        certificates.node_of(cert, "another")


def test_a_certificate_for_another_key_is_not_accepted_as_ours(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    second = member(tmp_path, first, "pi-2")
    with pytest.raises(Refused, match="not for this node's key"):
        second.renewed(first.cert_pem)


def test_a_renewed_certificate_is_kept(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path, "home", "pi-1")
    renewed = first.renewed(first.issue(first.signer.request(), "pi-1"))
    assert renewed.cert_pem != first.cert_pem
    found = identity.load(tmp_path)
    assert found is not None
    assert found.cert_pem == renewed.cert_pem
    life_s = certificates.LEAF_LIFE.total_seconds()
    assert 0.6 * life_s < renewed.renew_after - tmp_path.stat().st_mtime < 0.7 * life_s


def test_only_the_node_with_the_ca_issues(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    second = member(tmp_path, first, "pi-2")
    assert not second.can_issue
    with pytest.raises(Refused):
        second.issue(NodeKey(Ed25519PrivateKey.generate()).request(), "pi-3")


@pytest.mark.parametrize("junk", [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----"])
def test_junk_is_not_a_request(tmp_path: Path, junk: bytes) -> None:
    first = identity.create_cluster(tmp_path, "home", "pi-1")
    with pytest.raises(UserError):
        first.issue(junk, "pi-2")


@pytest.mark.parametrize("name", ["", "a.b", "-a", "a-", "a" * 64, "pi/../1", "pi\n1", "ö"])
def test_names_that_cannot_stand_in_dns_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        identity.create_cluster(tmp_path, name, "pi-1")


@pytest.mark.parametrize("expect", [0, 6])
def test_the_number_of_founders_has_limits(tmp_path: Path, expect: int) -> None:
    with pytest.raises(UserError):
        identity.create_cluster(tmp_path, "home", "pi-1", expect)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A TLS handshake in memory. Raises ssl.SSLError."""
    c2s, s2c = ssl.MemoryBIO(), ssl.MemoryBIO()
    here, there = client.wrap_bio(s2c, c2s), server.wrap_bio(c2s, s2c, server_side=True)
    waiting = [here, there]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
        if not waiting:
            return here, there
    raise AssertionError("the handshake does not end")


def test_members_know_each_other_over_tls_13(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    second = member(tmp_path, first, "pi-2")
    here, there = handshake(first.server_context(), second.client_context())
    assert here.version() == "TLSv1.3"
    assert second.peer_of(here.getpeercert(True)) == first.node
    assert first.peer_of(there.getpeercert(True)) == second.node


def test_tls_12_is_refused(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path, "home", "pi-1")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(first.server_context(), old)


def test_another_cluster_of_the_same_name_is_refused(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    foreign = identity.create_cluster(tmp_path / "b", "home", "pi-1")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(foreign.server_context(), first.client_context())


def test_expired_certificates_pass_only_while_the_clock_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    monkeypatch.setattr(certificates, "LEAF_LIFE", -certificates.BACKDATED / 2)
    stale = first.renewed(first.issue(first.signer.request(), "pi-1"))
    second = member(tmp_path, first, "pi-2")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(stale.server_context(), second.client_context())
    handshake(stale.server_context(check_time=False), second.client_context(check_time=False))


def test_damage_to_what_was_told_is_said(tmp_path: Path) -> None:
    (tmp_path / "joined.json").write_bytes(b"{")
    with pytest.raises(Broken, match="told at the join"):
        identity.joined(tmp_path)


def test_a_write_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.new").write_bytes(b"left by a crash")
    data = random.Random(1).randbytes(10_000)
    write_private(path, data)
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
