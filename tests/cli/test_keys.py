"""`picluster keys` on a file, as an owner would."""

from __future__ import annotations

from pathlib import Path

from piclusterd.web.key_file import digest_of, read

from .command import picluster


async def test_a_key_is_made_listed_and_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    config = tmp_path / "c.toml"
    config.write_text(f'[api]\nkeys_file = "{file}"\n')
    at = ("--config", str(config))
    limits = ("--model", "small", "--model", "qwen*", "--rpm", "60", "--tpm", "9000", "--expires", "90d")
    made = await picluster("keys", "create", "ha", *limits, *at)
    assert made.code == 0, made.err
    key = made.out.strip()
    assert key.startswith("pck_")
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    (grant,), faults = read(file.read_text().splitlines())
    assert (grant.digest, grant.name, grant.models) == (digest_of(key.encode()), "ha", ("small", "qwen*"))
    assert (grant.requests_per_minute, grant.tokens_per_minute, faults) == (60, 9000, [])
    file.chmod(0o640)
    assert (await picluster("keys", "create", "ui", "--file", str(file))).code == 0
    assert file.stat().st_mode & 0o777 == 0o640
    listed = await picluster("keys", "ls", *at)
    assert "in 89d" in listed.out or "in 90d" in listed.out
    assert [row.split()[0] for row in listed.out.splitlines()] == ["KEY", "ha", "ui"]
    assert (await picluster("keys", "revoke", "ha", *at)).code == 0
    assert [grant.name for grant in read(file.read_text().splitlines())[0]] == ["ui"]


async def test_what_cannot_be_is_told_and_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    at = ("--file", str(file))
    assert (await picluster("keys", "create", "ha", *at)).code == 0
    before = file.read_text()
    for words in (("create", "ha"), ("create", "a b"), ("create", "x", "--expires", "soon"), ("revoke", "nobody")):
        result = await picluster("keys", *words, *at)
        assert (result.code, result.out) == (1, ""), words
        assert file.read_text() == before
    empty = tmp_path / "c.toml"
    empty.write_text("")
    result = await picluster("keys", "ls", "--config", str(empty))
    assert (result.code, "keys_file" in result.err) == (1, True)
