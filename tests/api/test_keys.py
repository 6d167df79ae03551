"""The file of API keys: its form, what is said of a wrong one, and what happens when it changes."""

import asyncio
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api.keys import KeyRing, KeysError, check_source, parse_keys
from tests.waiting import until

KEY, OTHER = "sk-alice-0123456789", "sk-bob-0123456789abc"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def table(name: str, key: str, **fields: object) -> str:
    lines = [f"[{name}]", f'key = "{key}"', *(f"{field} = {value}" for field, value in fields.items())]
    return "\n".join(lines) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    before = os.umask(0o077)
    yield tmp_path / "keys.toml"
    os.umask(before)


def name_of(ring: KeyRing, key: str) -> str | None:
    account = ring.find(digest(key))
    return None if account is None else account.name


def test_a_key_is_found_by_its_hash_and_no_other_is(file: Path) -> None:
    file.write_text(table("alice", KEY) + table("bob", OTHER))
    ring = KeyRing(str(file))
    assert (name_of(ring, KEY), name_of(ring, OTHER)) == ("alice", "bob")
    for wrong in ("", KEY[:-1], KEY + "x", KEY.upper(), digest(KEY).hex(), "alice"):
        assert name_of(ring, wrong) is None
    assert ring.find(b"") is None and ring.find(KEY.encode()) is None


def test_a_file_may_hold_hashes_in_place_of_keys_and_several_for_one_name(file: Path) -> None:
    file.write_text(f'[alice]\nkey = ["sha256:{digest(KEY).hex()}", "{OTHER}"]\n')
    ring = KeyRing(str(file))
    assert name_of(ring, KEY) == name_of(ring, OTHER) == "alice"
    assert name_of(ring, f"sha256:{digest(KEY).hex()}") is None


def test_terms_are_those_of_the_file(file: Path) -> None:
    file.write_text(table("alice", KEY, requests_per_minute=3, tokens_per_minute=100, metrics="true", cache='"team"'))
    account = KeyRing(str(file)).find(digest(KEY))
    assert account is not None
    terms = account.terms
    assert (terms.requests_per_minute, terms.tokens_per_minute) == (3, 100)
    assert (terms.reads_metrics, terms.cache) == (True, "team")


def test_a_caller_has_a_cache_of_its_own_and_no_metrics_unless_the_file_says_so(file: Path) -> None:
    file.write_text(table("alice", KEY))
    account = KeyRing(str(file)).find(digest(KEY))
    assert account is not None and (account.terms.cache, account.terms.reads_metrics) == ("alice", False)


WRONG = [
    ("", "there are none"),
    ("{", "not valid TOML"),
    (f'[alice\nkey = "{KEY}"', "(at line 1, column"),
    (f'{KEY} = "alice"', "entry 1 is not a table"),
    (f'["{KEY} "]\nname = "alice"', "entry 1 is not a table"),
    ("[alice]", "[alice] key: Field required"),
    ('[alice]\nkey = "short"', "[alice] key: a key is 16 to 512"),
    (f'[alice]\nkey = "{KEY} with spaces"', "[alice] key: a key is"),
    ('[alice]\nkey = "sha256:abc"', "or sha256: and 64 hexadecimal digits"),
    ("[alice]\nkey = []", "[alice] key: there is none"),
    ("[alice]\nkey = 7", "[alice] key: "),
    (table("alice", KEY, requests_per_minute=0), "[alice] requests_per_minute: "),
    (table("alice", KEY, requests_per_minute='"9"'), "[alice] requests_per_minute: "),
    (f'[alice]\nkey = "{KEY}"\n"{OTHER}" = 1', "[alice] has a field that is none of key, requests_per_minute"),
    (table("alice", KEY, priority='"high"'), "[alice] priority is above max_priority"),
    (table("alice", KEY) + table("bob", KEY), "[bob] key: another name has the same"),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG)
def test_a_wrong_file_is_refused_with_its_place_and_shows_no_key(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(KeysError) as refused:
        KeyRing(str(file))
    assert complaint in str(refused.value)
    assert str(file) in str(refused.value)
    assert KEY not in repr(refused.value) and OTHER not in repr(refused.value)
    assert refused.value.__suppress_context__


PIECES = st.sampled_from([*'[]{}="\n.,# \\', "key", "alice", KEY, "sha256:", "1", "true"])


@given(st.lists(PIECES, max_size=60))
def test_no_file_makes_an_error_that_shows_a_key_or_one_of_another_kind(pieces: list[str]) -> None:
    try:
        parse_keys("".join(pieces))
    except ValueError as error:
        # A name is shown; who makes one of a key has to expect it.
        assert KEY not in str(error).removeprefix(f"[{KEY}]")  # noqa: PT017  either outcome is right, a third is not


def test_a_file_that_is_not_there_or_no_text_is_refused(file: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        KeyRing(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(KeysError, match="not UTF-8"):
        KeyRing(str(file))


def test_a_variable_holds_the_same_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEYS", table("alice", KEY))
    ring = KeyRing("env:THE_KEYS")
    assert name_of(ring, KEY) == "alice"
    ring.refresh()
    monkeypatch.delenv("THE_KEYS")
    with pytest.raises(KeysError, match="the variable is not set where the ingress runs"):
        KeyRing("env:THE_KEYS")


@pytest.mark.parametrize("source", ["keys.toml", "env:", "env:A B", "", "~/keys", KEY])
def test_a_place_that_is_neither_a_path_nor_a_variable_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        check_source(source)


@pytest.mark.parametrize(("mode", "is_told"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_complained_of(
    file: Path, mode: int, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(table("alice", KEY))
    file.chmod(mode)
    KeyRing(str(file))
    assert ("other users of this machine can read" in caplog.text) is is_told and KEY not in caplog.text


def replace(file: Path, text: str) -> None:
    """As one should: at once."""
    draft = file.with_suffix(".new")
    draft.write_text(text)
    os.replace(draft, file)


def test_a_changed_file_is_read_again(file: Path) -> None:
    file.write_text(table("alice", KEY))
    ring = KeyRing(str(file))
    replace(file, table("bob", OTHER))
    assert name_of(ring, KEY) == "alice", "until somebody looks"
    ring.refresh()
    assert (name_of(ring, KEY), name_of(ring, OTHER)) == (None, "bob")


def test_a_name_keeps_what_it_has_used_when_its_file_changes(file: Path) -> None:
    file.write_text(table("alice", KEY, requests_per_minute=5))
    ring = KeyRing(str(file), clock=lambda: 0.0)
    account = ring.find(digest(KEY))
    assert account is not None
    account.take_request()
    replace(file, table("alice", OTHER, requests_per_minute=7))
    ring.refresh()
    assert ring.find(digest(OTHER)) is account
    assert account.headers()["x-ratelimit-remaining-requests"] == "6"


@pytest.mark.parametrize("text", [None, "", "[bob]\nkey = 1", table("alice", OTHER, requests_per_minute=1) + "["])
def test_a_file_that_went_bad_changes_nothing_and_is_complained_of_once(
    file: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(table("alice", KEY, requests_per_minute=5))
    ring = KeyRing(str(file))
    if text is None:
        file.unlink()
    else:
        replace(file, text)
    ring.refresh()
    ring.refresh()
    assert name_of(ring, KEY) == "alice" and name_of(ring, OTHER) is None
    account = ring.find(digest(KEY))
    assert account is not None and account.terms.requests_per_minute == 5
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "stay good" in caplog.text and KEY not in caplog.text and OTHER not in caplog.text
    replace(file, table("bob", OTHER))
    ring.refresh()
    assert name_of(ring, OTHER) == "bob"


@pytest.fixture
def written(file: Path) -> Path:
    file.write_text(table("alice", KEY))
    return file


async def test_the_watch_finds_a_change_by_itself(written: Path) -> None:
    ring = KeyRing(str(written))
    watch = asyncio.create_task(ring.watch(period_s=0.001))
    replace(written, table("bob", OTHER))
    await until(lambda: name_of(ring, OTHER) is not None)
    watch.cancel()
