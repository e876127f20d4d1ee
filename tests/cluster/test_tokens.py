from pathlib import Path

import pytest

from piclusterd.cluster import tokens
from piclusterd.cluster.tokens import FAILURES_MAX, FAILURES_WINDOW_S, Token, Tokens, parse
from piclusterd.errors import Broken, NotFound, Overloaded, Refused, UserError

PIN = bytes(range(32))


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(tmp_path: Path, clock: Clock) -> Tokens:
    return Tokens(tmp_path, PIN, clock)


def test_a_token_reads_back_as_it_was_written(book: Tokens) -> None:
    text = book.create()
    token = parse(text)
    assert str(token) == text
    assert token.ca_pin == PIN
    assert token.cluster_id == PIN.hex()[:16]
    assert token.secret not in repr(token)


@pytest.mark.parametrize(
    "text", ["", "pcl1", "pcl1.a.b.c", "pcl2." + "A" * 43 + ".id.secretsecretsecret", "x" * 5000, "pcl1...", "K10abc"]
)
def test_what_is_not_a_token_is_said_without_repeating_it(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert text == "" or text not in str(caught.value) or text == "pcl1"


def test_the_secret_is_not_on_disk(book: Tokens, tmp_path: Path) -> None:
    token = parse(book.create())
    stored = (tmp_path / "tokens.json").read_bytes()
    assert token.id.encode() in stored
    assert token.secret.encode() not in stored
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}


def test_a_token_admits_one_node_and_the_same_node_again(book: Tokens) -> None:
    token = parse(book.create())
    book.redeem(token, "node-a")
    book.redeem(token, "node-a")
    with pytest.raises(Refused, match="used"):
        book.redeem(token, "node-b")


def test_uses_are_counted_over_a_restart(book: Tokens, tmp_path: Path, clock: Clock) -> None:
    token = parse(book.create(uses=2))
    book.redeem(token, "node-a")
    again = Tokens(tmp_path, PIN, clock)
    assert [(t.uses_left, t.state) for t in again.list()] == [(1, "valid")]
    again.redeem(token, "node-b")
    with pytest.raises(Refused, match="used"):
        again.redeem(token, "node-c")


def test_an_expired_token_is_refused_even_to_its_holder(book: Tokens, clock: Clock) -> None:
    token = parse(book.create(ttl_s=10))
    book.redeem(token, "node-a")
    clock.now += 10
    with pytest.raises(Refused, match="expired"):
        book.redeem(token, "node-a")


def test_a_revoked_token_is_refused(book: Tokens) -> None:
    token = parse(book.create())
    book.revoke(token.id)
    with pytest.raises(Refused, match="revoked"):
        book.redeem(token, "node-a")
    with pytest.raises(NotFound):
        book.revoke("nothing")


def test_a_token_admits_the_kind_of_node_it_was_made_for(book: Tokens) -> None:
    relays, either = parse(book.create(role="relay")), parse(book.create(uses=2))
    with pytest.raises(Refused, match="admits a relay, not a worker"):
        book.redeem(relays, "node-a", role="worker")
    book.redeem(relays, "node-a", role="relay")
    book.redeem(either, "node-b", role="worker")
    book.redeem(either, "node-c", role="relay")
    assert [(t.role, t.uses_left) for t in book.list()] == [("relay", 0), ("", 0)]


def test_a_wrong_secret_learns_nothing_of_the_state(book: Tokens) -> None:
    token = parse(book.create())
    book.revoke(token.id)
    for wrong in (Token(PIN, token.id, "A" * 22), Token(PIN, "ffffffff", token.secret)):
        with pytest.raises(Refused, match="not known"):
            book.redeem(wrong, "node-a")


def test_guessing_is_slowed_for_the_guesser_only(book: Tokens, clock: Clock) -> None:
    good = parse(book.create(uses=9))
    wrong = Token(PIN, good.id, "A" * 22)
    for _ in range(FAILURES_MAX):
        with pytest.raises(Refused):
            book.redeem(wrong, "x", "10.0.0.9")
    with pytest.raises(Overloaded):
        book.redeem(good, "x", "10.0.0.9")
    book.redeem(good, "y", "10.0.0.1")
    clock.now += FAILURES_WINDOW_S
    book.redeem(good, "x", "10.0.0.9")


def test_memory_of_guessers_is_bounded(book: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SOURCES_MAX", 4)
    for number in range(50):
        with pytest.raises(Refused):
            book.redeem(Token(PIN, "ffffffff", "A" * 22), "x", f"10.0.0.{number}")
    assert len(book._failures) == 4


@pytest.mark.parametrize(("ttl_s", "uses"), [(0, 1), (1e9, 1), (60, 0), (60, 10_000)])
def test_lives_and_uses_have_limits(book: Tokens, ttl_s: float, uses: int) -> None:
    with pytest.raises(UserError):
        book.create(ttl_s, uses)


def test_a_damaged_file_is_said(book: Tokens, tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_bytes(b"{")
    with pytest.raises(Broken, match="tokens"):
        book.list()
