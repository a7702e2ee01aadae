"""Who is asking: keys, addresses, and proxies that may or may not be believed."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.identity import Caller, ForwardedHeader, Identifier, caller_of, parse_networks
from service.keys import KeyStore, create_key, revoke_key
from service.problems import Problem

NOW = datetime(2026, 5, 1, tzinfo=UTC)
PROXY = "10.0.0.1"
CLIENT = "192.0.2.7"
FORGED = "6.6.6.6"


def scope(*headers: tuple[str, str], address: str | None = CLIENT) -> dict[str, Any]:
    """What the HTTP server passes on of a request."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "headers": [(b"host", b"palisade"), *raw], "client": None if address is None else (address, 4711)}


class Keys:
    """A store with a key of each kind."""

    def __init__(self, path: Path) -> None:
        self.now = NOW.timestamp()
        self.path = path
        standard, self.standard = create_key(path, "s", "standard", None, NOW)
        trusted, self.trusted = create_key(path, "t", "trusted", None, NOW)
        self.ids = {self.standard: standard.id, self.trusted: trusted.id}
        _, self.expired = create_key(path, "e", "trusted", NOW - timedelta(seconds=1), NOW)
        revoked, self.revoked = create_key(path, "r", "trusted", None, NOW)
        revoke_key(path, revoked.id, NOW)
        self.store = KeyStore(path, lambda: self.now)
        self.unknown = f"palisade_{'a' * 10}_{'S3cret' * 7}x"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture
def identifier(keys: Keys) -> Identifier:
    return Identifier(keys.store, anonymous=True)


@pytest.mark.parametrize(
    ("address", "caller"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix:", "unknown"),
        ("192.0.2.1, 198.51.100.7", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_caller_without_a_key_is_an_ipv4_address_or_an_ipv6_network(address: str | None, caller: str) -> None:
    assert caller_of(address) == caller
    assert Identifier(None, anonymous=True).identify(scope(address=address)) == Caller(caller, "anonymous")


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer    "])
def test_a_bearer_key_tells_who_asks_and_in_which_tier(keys: Keys, identifier: Identifier, scheme: str) -> None:
    for text, tier in ((keys.standard, "standard"), (keys.trusted, "trusted")):
        caller = identifier.identify(scope(("authorization", scheme + text)))
        assert caller == Caller(f"key:{keys.ids[text]}", tier)


def test_a_key_may_come_in_its_own_header_and_is_the_same_caller_from_everywhere(keys: Keys, identifier: Identifier) -> None:
    expected = Caller(f"key:{keys.ids[keys.standard]}", "standard")
    for address in (CLIENT, "2001:db8::1", None):
        assert identifier.identify(scope(("x-api-key", keys.standard), address=address)) == expected


def test_the_same_key_in_both_headers_is_one_key(keys: Keys, identifier: Identifier) -> None:
    both = scope(("x-api-key", keys.standard), ("authorization", f"Bearer {keys.standard}"))
    assert identifier.identify(both).tier == "standard"


def refusal(identifier: Identifier, *headers: tuple[str, str]) -> Problem:
    with pytest.raises(Problem) as refused:
        identifier.identify(scope(*headers))
    for _, value in headers:
        for word in value.split():
            assert len(word) < 12 or word not in refused.value.detail, "what may be a secret is not repeated"
    return refused.value


def test_different_keys_in_one_request_are_a_400(keys: Keys, identifier: Identifier) -> None:
    one, other = keys.standard, keys.trusted
    assert refusal(identifier, ("x-api-key", one), ("authorization", f"Bearer {other}")).status == 400
    assert refusal(identifier, ("authorization", f"Bearer {one}"), ("authorization", f"Bearer {other}")).status == 400
    assert refusal(identifier, ("x-api-key", one), ("x-api-key", other)).status == 400
    assert refusal(identifier, ("x-api-key", one), ("x-api-key", "")).status == 400


BASIC = "Basic " + base64.b64encode(b"user:long-password").decode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer {unknown}"),
        ("authorization", "Bearer"),
        ("authorization", "Bearer "),
        ("authorization", ""),
        ("authorization", "{standard}"),
        ("authorization", "Token {standard}"),
        ("authorization", "Bearer x {standard}"),
        ("authorization", BASIC),
        ("authorization", "Bearer \xe9\xff"),
        ("authorization", "Bearer " + "x" * 60_000),
        ("x-api-key", "{unknown}"),
        ("x-api-key", "Bearer {standard}"),
        ("x-api-key", ""),
        ("x-api-key", "{standard}, {standard}"),
    ],
)
@pytest.mark.parametrize("anonymous", [True, False])
def test_a_key_that_is_not_known_is_a_401_and_never_taken_for_none(keys: Keys, anonymous: bool, name: str, value: str) -> None:
    presented = value.format(unknown=keys.unknown, standard=keys.standard)
    problem = refusal(Identifier(keys.store, anonymous), (name, presented))
    assert problem.status == 401
    assert problem.headers["WWW-Authenticate"].startswith("Bearer ")


def test_a_service_without_keys_refuses_every_key(keys: Keys) -> None:
    assert refusal(Identifier(None, anonymous=True), ("x-api-key", keys.standard)).status == 401


def test_another_scheme_is_a_401_even_beside_a_good_key(keys: Keys, identifier: Identifier) -> None:
    assert refusal(identifier, ("x-api-key", keys.standard), ("authorization", BASIC)).status == 401


@pytest.mark.parametrize("state", ["expired", "revoked"])
def test_a_key_that_was_good_once_is_a_403_that_says_why(keys: Keys, identifier: Identifier, state: str) -> None:
    problem = refusal(identifier, ("authorization", f"Bearer {getattr(keys, state)}"))
    assert problem.status == 403
    assert state in problem.detail


def test_a_guess_at_a_revoked_key_learns_nothing_of_it(keys: Keys, identifier: Identifier) -> None:
    guess = keys.revoked[:-5] + "AAAAA"
    assert refusal(identifier, ("x-api-key", guess)).status == 401


def test_a_key_revoked_after_it_was_used_is_refused_a_second_later(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    identifier = Identifier(keys.store, anonymous=True)
    assert identifier.identify(scope(("x-api-key", keys.standard))).tier == "standard"
    revoke_key(keys.path, keys.ids[keys.standard], NOW)
    keys.now += 1
    assert refusal(identifier, ("x-api-key", keys.standard)).status == 403


def test_where_anonymous_callers_are_not_served_a_key_is_needed(keys: Keys) -> None:
    strict = Identifier(keys.store, anonymous=False)
    problem = refusal(strict)
    assert problem.status == 401
    assert problem.headers["WWW-Authenticate"].startswith("Bearer ")
    assert "X-API-Key" in problem.detail
    assert strict.identify(scope(("x-api-key", keys.standard))).tier == "standard"


def behind(networks: str, *lines: str, peer: str | None = PROXY, header: ForwardedHeader = "x-forwarded-for") -> str:
    """Identity of an anonymous caller whose request ``peer`` passed on."""
    identifier = Identifier(None, True, parse_networks(networks), header)
    return identifier.identify(scope(*((header, line) for line in lines), address=peer)).id


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "x-real-ip", "cf-connecting-ip", "true-client-ip"])
def test_a_caller_cannot_choose_its_address(header: str) -> None:
    for networks in ("", "10.0.0.0/8,2001:db8:1::/48"):
        identifier = Identifier(None, True, parse_networks(networks))
        for value in (FORGED, f"{FORGED}, {PROXY}", f"for={FORGED}", PROXY):
            assert identifier.identify(scope((header, value))).id == CLIENT


@pytest.mark.parametrize(
    ("lines", "caller"),
    [
        ([CLIENT], CLIENT),
        ([f"{FORGED}, {CLIENT}"], CLIENT),
        ([FORGED, CLIENT], CLIENT),  # a proxy may append a line instead of a word
        ([f"{FORGED},{CLIENT},10.0.0.9 , 10.200.0.1"], CLIENT),
        ([f"{FORGED}, {CLIENT}, 10.0.0.9", "10.200.0.1"], CLIENT),
        ([f"{CLIENT}:51234"], CLIENT),
        ([f"::ffff:{CLIENT}"], CLIENT),
        (["2001:db8:7:8:9::1"], "2001:db8:7:8::/64"),
        (["[2001:db8:7:8:9::1]:443"], "2001:db8:7:8::/64"),
        ([f"{CLIENT}, 2001:db8:1::5"], CLIENT),  # an IPv6 proxy behind an IPv4 one
        (["10.0.0.9"], "10.0.0.9"),  # trusted all the way: a caller within the proxies' network
        (["10.0.0.9, 10.0.0.8"], "10.0.0.9"),
        # Nothing to the left of what cannot be read is believed.
        ([f"{CLIENT}, unknown"], PROXY),
        ([f"{CLIENT}, "], PROXY),
        ([f"{CLIENT}, 10.0.0.300"], PROXY),
        ([f"{CLIENT}, 10.0.0.9:https"], PROXY),
        ([f"{CLIENT}, _hidden, 10.0.0.9"], "10.0.0.9"),
        ([f"{CLIENT} 10.0.0.9"], PROXY),
        (["\u0661\u0660.0.0.1".encode().decode("latin-1")], PROXY),
        ([""], PROXY),
        ([], PROXY),
        ([f"for={CLIENT}"], PROXY),
        ([f"{CLIENT}, " + "10.0.0.9, " * 9000 + "10.0.0.8"], "10.0.0.9"),  # there are no 9,000 proxies
    ],
)
def test_behind_trusted_proxies_the_caller_is_the_nearest_address_that_is_none(lines: list[str], caller: str) -> None:
    assert behind("10.0.0.0/8, 2001:db8:1::/48", *lines) == caller


@pytest.mark.parametrize(
    ("peer", "believed"),
    [
        ("2001:db8:1::1", True),
        ("2001:db8:2::1", False),
        ("::ffff:10.0.0.1", True),  # a socket for both families
        ("::ffff:11.0.0.1", False),
        ("10.255.255.255", True),
        ("11.0.0.0", False),
        ("unix:", False),
        (None, False),
    ],
)
def test_only_a_listed_proxy_is_believed(peer: str | None, believed: bool) -> None:
    identity = behind("10.0.0.0/8,2001:db8:1::/48", CLIENT, peer=peer)
    assert identity == (CLIENT if believed else caller_of(peer))


@pytest.mark.parametrize(
    ("line", "caller"),
    [
        (f"for={CLIENT}", CLIENT),
        (f'for="{CLIENT}:80"', CLIENT),
        (f"For={CLIENT};proto=https;by=10.0.0.1", CLIENT),
        (f"for={FORGED}, by=10.0.0.1; FOR={CLIENT} ,for=10.0.0.9", CLIENT),
        ('for="[2001:db8:7:8:9::1]:4711";host=palisade', "2001:db8:7:8::/64"),
        (f"for={FORGED}, proto=https", PROXY),
        (f"for={FORGED};for={CLIENT}", PROXY),
        (f"for={FORGED}, for=unknown", PROXY),
        (f"for={FORGED}, for=_gazonk", PROXY),
        (f'for="{FORGED}', PROXY),
        (f'for="a, for={CLIENT}', CLIENT),  # a caller's open quotation mark does not swallow the proxy's word
        (f'for={CLIENT};host="x, for={FORGED}"', PROXY),
        (f'for={CLIENT};host="x, for={FORGED};a=b";proto=https', PROXY),
        (CLIENT, PROXY),
    ],
)
def test_the_standard_header_is_read_where_the_proxies_are_said_to_set_it(line: str, caller: str) -> None:
    assert behind("10.0.0.0/8", line, header="forwarded") == caller


@pytest.mark.parametrize(("header", "other"), [("x-forwarded-for", "forwarded"), ("forwarded", "x-forwarded-for")])
def test_the_header_that_the_proxies_do_not_set_is_the_callers_own_and_ignored(header: ForwardedHeader, other: str) -> None:
    identifier = Identifier(None, True, parse_networks("10.0.0.0/8"), header)
    said = (header, CLIENT if header == "x-forwarded-for" else f"for={CLIENT}")
    for invented in ((other, FORGED), (other, f"for={FORGED}")):
        assert identifier.identify(scope(invented, said, address=PROXY)).id == CLIENT
        assert identifier.identify(scope(said, invented, address=PROXY)).id == CLIENT
        assert identifier.identify(scope(invented, address=PROXY)).id == PROXY


LATIN = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"))
HOSTILE = st.text(f'for=,;: "\\[]{FORGED}:ab')


@given(invented=st.one_of(LATIN, HOSTILE))
def test_whatever_a_caller_writes_the_proxys_word_counts(invented: str) -> None:
    assert behind("10.0.0.0/8", f"{invented}, {CLIENT}") == CLIENT
    assert behind("10.0.0.0/8", f"{invented}, for={CLIENT};proto=https", header="forwarded") == CLIENT


@given(host=st.one_of(LATIN, HOSTILE, st.just(f'",for={FORGED};a="'), st.just(f"x,for={FORGED};a=b")))
def test_a_host_name_that_a_proxy_quotes_cannot_pose_as_an_address(host: str) -> None:
    quoted = host.replace("\\", "\\\\").replace('"', '\\"')
    for line in (f'for={CLIENT};host="{quoted}"', f'host="{quoted}";for={CLIENT};proto=https'):
        assert behind("10.0.0.0/8", line, header="forwarded") in (CLIENT, PROXY)


NAMES = st.sampled_from(["authorization", "x-api-key", "x-forwarded-for", "forwarded", "accept"])
VALUES = st.one_of(LATIN, HOSTILE, LATIN.map("Bearer ".__add__), st.just("Basic eDp5"))


@given(headers=st.lists(st.tuples(NAMES, VALUES), max_size=5), anonymous=st.booleans(), address=st.none() | st.text())
def test_odd_headers_are_a_refusal_or_an_anonymous_caller_and_never_a_bug(
    keys: Keys, headers: list[tuple[str, str]], anonymous: bool, address: str | None
) -> None:
    identifier = Identifier(keys.store, anonymous, parse_networks("10.0.0.0/8"))
    offers_key = any(name in ("authorization", "x-api-key") for name, _ in headers)
    outcome: Caller | Problem
    try:
        outcome = identifier.identify(scope(*headers, address=address))
    except Problem as problem:
        outcome = problem
    if offers_key or not anonymous:
        assert isinstance(outcome, Problem)
        assert outcome.status in (400, 401)
    else:
        assert isinstance(outcome, Caller)
        assert outcome.tier == "anonymous"


def test_networks_are_parsed() -> None:
    assert [str(network) for network in parse_networks(" 10.0.0.0/8,2001:db8::1 ,, 192.0.2.1")] == [
        "10.0.0.0/8",
        "2001:db8::1/128",
        "192.0.2.1/32",
    ]
    assert parse_networks("") == ()


@pytest.mark.parametrize("text", ["proxy.example", "10.0.0.0/33", "10.0.0.1/8", "10.0.0.0/8;11.0.0.0/8", "*"])
def test_what_is_no_network_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/8"):
        parse_networks(text)


@pytest.mark.parametrize("everybody", ["0.0.0.0/0", "::/0"])
def test_everybody_is_no_proxy(everybody: str) -> None:
    with pytest.raises(ValueError, match="everybody"):
        parse_networks(everybody)
