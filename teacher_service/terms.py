"""The terms of an account: which answers it is sold, and how much it may ask for at a time."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

MOST_DECIMALS = 7  # what a 32-bit float holds of a probability


class TermsError(ValueError):
    """Terms that cannot be meant, in one line: where, expected, got."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """None, everywhere: as the server has it, or no limit."""

    answers: str | None = None
    """"soft": probabilities; "hard": the index of the most probable class."""
    top_k: int | None = None
    """Of soft answers: only the most probable classes, this many."""
    decimals: int | None = None
    """Of soft answers: probabilities rounded to so many decimals."""
    pictures_per_second: float | None = None
    """Rate of pictures asked for, replays included; a burst may be one second's worth, or one batch."""
    max_streams: int | None = None
    """Most streams open at once on one server."""
    max_outstanding_pictures: int | None = None
    """Most pictures asked for and not yet answered on one server."""

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("answers", self.answers in (None, "soft", "hard"), "soft or hard"),
            ("top_k", _whole(self.top_k, 1, 2**31 - 1), "a whole number, 1 or more"),
            ("decimals", _whole(self.decimals, 1, MOST_DECIMALS), f"a whole number, 1 to {MOST_DECIMALS}"),
            ("pictures_per_second", _positive(self.pictures_per_second), "a number above 0"),
            ("max_streams", _whole(self.max_streams, 1, 2**31 - 1), "a whole number, 1 or more"),
            (
                "max_outstanding_pictures",
                _whole(self.max_outstanding_pictures, 1, 2**31 - 1),
                "a whole number, 1 or more",
            ),
        ):
            if not fine:
                raise TermsError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def over(self, default: "Terms") -> "Terms":
        """These terms, with another's where they say nothing."""
        return Terms(**(_said(default) | _said(self)))

    def to_json(self) -> str:
        """Only what is said, in a fixed order; "{}" for no terms of its own."""
        return json.dumps(_said(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Terms":
        """Raises TermsError."""
        try:
            said = json.loads(text)
        except ValueError:
            raise TermsError(f"expected terms as a JSON object, got {text[:80]!r}") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(said, dict) or not said.keys() <= known:
            raise TermsError(f"expected a JSON object with some of {', '.join(sorted(known))}, got {text[:80]!r}")
        return cls(**said)


def _said(terms: Terms) -> dict[str, Any]:
    return {name: value for name, value in asdict(terms).items() if value is not None}


def _whole(value: object, least: int, most: int) -> bool:
    return value is None or (type(value) is int and least <= value <= most)


def _positive(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < 1e9)  # type: ignore[operator]
