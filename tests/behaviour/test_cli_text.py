"""No text reaches a terminal raw."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from harness.budget import Spent, Usage
from harness.cli.ledger import cost
from harness.cli.text import age, one_line, safe, seconds, shorten

ANY_TEXT = st.text(st.characters(exclude_categories=()))
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def assert_harmless(text: str) -> None:
    for char in text:
        assert char == "\n" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp"), ascii(char)
        assert unicodedata.bidirectional(char) not in BIDI, ascii(char)
        assert char not in "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u061c\u00ad", ascii(char)


@given(ANY_TEXT)
def test_nothing_that_moves_hides_or_turns_text_is_left(text: str) -> None:
    assert_harmless(safe(text))
    assert_harmless(one_line(text, 40))
    assert "\n" not in one_line(text, 40)
    assert len(one_line(text, 40)) <= 40
    for line in shorten(text, 3, 40):
        assert_harmless(line)
        assert "\n" not in line


def test_every_character_by_itself() -> None:
    for code in range(0x110000):
        char = chr(code)
        shown = safe(char)
        if shown == char:
            assert char == "\n" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp"), hex(code)
            assert unicodedata.bidirectional(char) not in BIDI, hex(code)
        else:
            assert shown.isascii(), hex(code)


@given(st.text(st.characters(categories=("L", "N", "P"), exclude_characters="\u115f\u1160\u3164\uffa0")))
def test_ordinary_text_is_left_as_it_is(text: str) -> None:
    assert safe(text) == text
    assert safe("tab\tand\r\nline ⚠️") == "tab    and\nline ⚠️"


def test_what_is_left_out_is_said() -> None:
    assert shorten("a\nb\nc\nd\n", 2, 10) == ["a", "b", "… 2 more lines"]
    assert shorten("x" * 20, 2, 10) == ["x" * 9 + "…"]


def test_an_unknown_price_is_never_zero() -> None:
    assert cost(Spent(Usage(10, 5, unpriced=1), 1)) == "unpriced"
    assert cost(Spent(Usage(10, 5, unpriced=1), 1), 2.0) == "unpriced"
    assert cost(Spent(Usage(10, 5, cost_microusd=1500, unpriced=2), 3), 2.0) == "$0.0015 of $2.00 + 2 unpriced calls"
    assert cost(Spent(Usage(10, 5, cost_microusd=1500), 1), 2.0) == "$0.0015 of $2.00"
    assert cost(Spent(Usage(), 1), 2.0) == "no cost yet"


def test_durations_in_words() -> None:
    assert [seconds(s) for s in (0.04, 59.9, 61, 3700)] == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 1 min"]
    assert [age(s) for s in (-1, 59, 60, 7200, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
