"""Identity: who is asking, told from an API key or from an address."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from starlette.types import Scope

from service.keys import KeyStore
from service.problems import bad_input, forbidden, unauthorized

ForwardedHeader = Literal["x-forwarded-for", "forwarded"]

MAX_HOPS = 32
"""Entries of a forwarding header that are looked at, from the right."""

_HOW = "send it as 'Authorization: Bearer <key>' or as 'X-API-Key: <key>'"
# The lengths bound what is remembered of a caller's own words.
_ADDRESS = r"[0-9A-Fa-f:.]{2,45}"
_NODE = re.compile(rf"\[({_ADDRESS})\](?::[0-9]{{1,5}})?|([0-9.]{{7,15}})(?::[0-9]{{1,5}})?|({_ADDRESS})")
_PAIR = re.compile(r"([\w!#$%&'*+.^`|~-]+)=(?:([\w!#$%&'*+.^`|~-]+)|\"([^\"\\]*)\")", re.ASCII)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking.

    Attributes:
        id: Whose quota is charged: ``key:<id>``, or an address as :func:`caller_of` gives it.
        tier: Whose limits and policy hold: ``anonymous``, ``standard`` or ``trusted``.
    """

    id: str
    tier: str


class Identifier:
    """Tells callers apart, before anything of their request but its headers is read.

    Args:
        keys: Where keys are looked up; ``None`` knows none.
        anonymous: Whether callers without a key are served.
        trusted_proxies: Networks of the proxies whose word on a caller's address counts.
        forwarded_header: The one header in which they say it. Any other is the caller's own invention: a proxy that sets one of
            these headers hands the other one on as it came.
    """

    def __init__(
        self,
        keys: KeyStore | None,
        anonymous: bool,
        trusted_proxies: Sequence[IPv4Network | IPv6Network] = (),
        forwarded_header: ForwardedHeader = "x-forwarded-for",
    ) -> None:
        self._keys = keys
        self._anonymous = anonymous
        self._trusted_proxies = tuple(trusted_proxies)
        self._forwarded_header = forwarded_header.encode()

    def identify(self, scope: Scope) -> Caller:
        """Return who sent a request, from its ASGI scope: ``headers`` with names in lower case, and ``client``.

        Raises:
            Problem: 400 for several different keys, 401 for no key where one is needed or one that is not known, 403 for one
                that is expired or revoked. A caller with a bad key is never taken for one without.
        """
        presented: list[str] = []
        forwarded: list[bytes] = []
        for name, value in scope["headers"]:
            if name == b"authorization":
                presented.append(_bearer(value))
            elif name == b"x-api-key":
                presented.append(value.decode("latin-1").strip())
            elif name == self._forwarded_header:
                forwarded.append(value)
        if presented:
            if len(set(presented)) > 1:
                raise bad_input("the request has several different API keys: send one")
            return self._holder(presented[0])
        if not self._anonymous:
            raise unauthorized(f"an API key is needed: {_HOW}")
        peer = scope["client"][0] if scope.get("client") else None
        if forwarded and self._trusts(peer):
            peer = self._behind(peer, forwarded)
        return Caller(caller_of(peer), "anonymous")

    def _holder(self, presented: str) -> Caller:
        if self._keys is None:
            raise unauthorized("this service knows no API keys: send the request without one")
        key = self._keys.find(presented)
        if key is None:
            raise unauthorized("the API key is not known: check that it is whole, or ask the operator for one")
        state = self._keys.state(key)
        if state != "active":
            raise forbidden(f"the API key {key.id} is {state}: ask the operator for a new one")
        return Caller(f"key:{key.id}", key.tier)

    def _behind(self, proxy: str | None, lines: list[bytes]) -> str | None:
        """Return the address of the first one behind a trusted proxy who is none.

        Every proxy appends whom it saw, so an entry is as trustworthy as its writer: the address to its right. An entry that
        cannot be read leaves its writer.
        """
        nearest = proxy
        for address in _entries(b",".join(lines).decode("latin-1"), self._forwarded_header == b"forwarded"):
            if address is None:
                break
            nearest = address
            if not self._trusts(address):
                break
        return nearest

    def _trusts(self, address: str | None) -> bool:
        if not self._trusted_proxies:
            return False
        parsed = _parse(address)
        return parsed is not None and any(parsed in network for network in self._trusted_proxies)


def caller_of(address: str | None) -> str:
    """Return the identity of an anonymous caller: its IPv4 address, or the /64 network of its IPv6 address."""
    parsed = _parse(address)
    if parsed is None:
        return "unknown"
    if isinstance(parsed, IPv6Address):
        return f"{IPv6Address(int(parsed) >> 64 << 64)}/64"
    return str(parsed)


def parse_networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Parse ``"10.0.0.0/8, 2001:db8::1"``; an empty text means no network.

    Raises:
        ValueError: A part is no address or network, or is a whole address family: then everybody could choose an address.
    """
    networks = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            network = ipaddress.ip_network(part)
        except ValueError:
            raise ValueError(
                f"'{part}' is no address or network; write addresses or CIDR networks, as 10.0.0.0/8,2001:db8::1"
            ) from None
        if network.prefixlen == 0:
            raise ValueError(f"'{part}' is everybody; name the proxies' own addresses or networks")
        networks.append(network)
    return tuple(networks)


@lru_cache(maxsize=8192)
def _parse(address: str | None) -> IPv4Address | IPv6Address | None:
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return None
    # A socket for both families gives an IPv4 peer this form.
    return parsed.ipv4_mapped or parsed if isinstance(parsed, IPv6Address) else parsed


def _bearer(value: bytes) -> str:
    scheme, _, token = value.decode("latin-1").strip().partition(" ")
    if scheme.lower() != "bearer":
        raise unauthorized(f"an Authorization header of another scheme than Bearer is not taken; for an API key, {_HOW}")
    return token.strip()


def _entries(header: str, is_forwarded: bool) -> Iterator[str | None]:
    """Yield a header's addresses from the right; ``None`` for what is none.

    ``Forwarded`` (RFC 7239) is split at every comma, quoted ones too: a quotation mark that a caller leaves open in its own
    part then can't reach into a proxy's, and the pieces of a quoted comma are malformed.
    """
    for entry in reversed(header.rsplit(",", MAX_HOPS - 1)):  # of more entries, the rest is one that cannot be read
        node = _forwarded_for(entry) if is_forwarded else entry
        match = _NODE.fullmatch(node.strip()) if node is not None else None
        address = match and next(filter(None, match.groups()))
        yield address if address and _parse(address) else None


def _forwarded_for(element: str) -> str | None:
    """Return the ``for`` of one element of a ``Forwarded`` header, or ``None`` if it is missing, doubled or in bad company."""
    found = None
    for pair in element.split(";"):
        match = _PAIR.fullmatch(pair.strip())
        if match is None or (match[1].lower() == "for" and found is not None):
            return None
        if match[1].lower() == "for":
            found = match[2] or match[3]
    return found
