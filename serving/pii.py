"""Personal data in text, masked: e-mail addresses, phone numbers, payment cards, Chinese identity numbers, IBANs, IPs.

What can be checked is checked (a check digit, a numbering plan), so that most other numbers stay; names and addresses
of people are not recognised. Masking is for logs that somebody will read, not a proof that nobody can be identified.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import phonenumbers
from stdnum import iban, luhn
from stdnum.cn import ric

REGIONS = ("CN", "US")  # whose phone numbers are known also without +86 or +1 in front

# ASCII, so that a Chinese character beside a number ends it; bounded, so that no text takes long.
_EMAIL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}", re.ASCII | re.IGNORECASE)
_IBAN = re.compile(r"\b[a-z]{2}\d{2}(?: ?[a-z0-9]){11,30}\b", re.ASCII | re.IGNORECASE)
_IDENTITY = re.compile(r"(?<!\d)\d{17}[\dXx](?!\d)", re.ASCII)
_CARD = re.compile(r"(?<![\d+])\d(?:[ -]?\d){12,18}(?!\d)", re.ASCII)
_IP4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d)", re.ASCII)
_IP6 = re.compile(r"(?<![\w:])(?:[0-9a-f]{0,4}:){2,7}(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9a-f]{0,4})(?![\w:])",
                  re.ASCII | re.IGNORECASE)
_SHORTEST_IBAN = 15

Span = tuple[int, int]


def mask(text: str, regions: Sequence[str] = REGIONS) -> str:
    """The text with what it holds of personal data replaced by its kind: `[email]`, `[phone]`, `[card]`, `[id]` …

    Args:
      text: any.
      regions: two-letter codes of countries whose phone numbers are looked for in their national form, too.
    """
    finders: tuple[tuple[str, Callable[[str], Iterable[Span]]], ...] = (
        ("email", _emails), ("iban", _ibans), ("id", _identities), ("card", _cards), ("ip", _addresses),
        ("phone", lambda t: _phones(t, regions)))
    taken = bytearray(len(text))  # what an earlier kind has found is not looked at by a later one
    found: list[tuple[int, int, str]] = []
    for kind, finder in finders:
        for start, end in finder(text):
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, kind))
    pieces, done = [], 0
    for start, end, kind in sorted(found):
        pieces += [text[done:start], f"[{kind}]"]
        done = end
    return "".join([*pieces, text[done:]])


def _emails(text: str) -> Iterator[Span]:
    return (one.span() for one in _EMAIL.finditer(text)) if "@" in text else iter(())


def _ibans(text: str) -> Iterator[Span]:
    for one in _IBAN.finditer(text):
        start, end = one.span()
        while end - start >= _SHORTEST_IBAN:  # words behind it look like more of it
            if text[end - 1] != " " and iban.is_valid(text[start:end]):
                yield start, end
                break
            end -= 1


def _identities(text: str) -> Iterator[Span]:
    return (one.span() for one in _IDENTITY.finditer(text) if ric.is_valid(one[0]))


def _cards(text: str) -> Iterator[Span]:
    return (one.span() for one in _CARD.finditer(text) if luhn.is_valid(re.sub(r"\D", "", one[0])))


def _addresses(text: str) -> Iterator[Span]:
    for pattern in (_IP6, _IP4):  # the first may end in the second
        for one in pattern.finditer(text):
            if one[0] != "::":  # an address of no machine, and an operator in many a program
                with contextlib.suppress(ValueError):
                    ipaddress.ip_address(one[0])
                    yield one.span()


def _phones(text: str, regions: Sequence[str]) -> Iterator[Span]:
    for region in regions:
        for one in phonenumbers.PhoneNumberMatcher(text, region):
            yield one.start, one.end
