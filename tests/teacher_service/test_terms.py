import dataclasses

import pytest

from teacher_service.terms import FIELDS, Terms, TermsError

EVERY = Terms(
    answers="hard",
    top_k=1,
    decimals=7,
    pictures_per_second=0.5,
    max_streams=1,
    max_outstanding_pictures=9,
    suspended=True,
)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("answers", "loud", "soft or hard"),
        ("answers", "", "soft or hard"),
        ("top_k", 0, "a whole number, 1 to 2147483647"),
        ("top_k", -1, "a whole number"),
        ("top_k", 2**31, "a whole number"),
        ("top_k", 3.0, "a whole number"),
        ("top_k", True, "a whole number"),
        ("decimals", 0, "a whole number, 1 to 7"),
        ("decimals", 8, "a whole number, 1 to 7"),
        ("pictures_per_second", 0, "a number above 0"),
        ("pictures_per_second", float("nan"), "a number above 0"),
        ("pictures_per_second", float("inf"), "a number above 0"),
        ("max_streams", 0, "a whole number"),
        ("max_outstanding_pictures", "5", "a whole number"),
        ("suspended", 1, "true or false"),
    ],
)
def test_terms_that_cannot_be_meant_are_refused_by_name(field: str, value: object, expected: str) -> None:
    with pytest.raises(TermsError) as refused:
        dataclasses.replace(EVERY, **{field: value})  # type: ignore[arg-type]
    assert (refused.value.field, refused.value.got) == (field, value)
    assert str(refused.value).startswith(f"{field}: expected {expected}") and "\n" not in str(refused.value)


@pytest.mark.parametrize("terms", [Terms(), EVERY, Terms(top_k=3), Terms(pictures_per_second=100)])
def test_terms_survive_as_json_that_holds_only_what_is_said(terms: Terms) -> None:
    assert Terms.from_json(terms.to_json()) == terms
    assert all(f'"{name}"' in terms.to_json() for name in terms.said())
    assert "null" not in terms.to_json()
    assert Terms().to_json() == "{}"


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"budget": 5}', '{"top_k": "many"}', '{"decimals": 70}'])
def test_other_text_is_no_terms(text: str) -> None:
    with pytest.raises(TermsError):
        Terms.from_json(text)


def test_terms_over_others_win_where_they_say_something() -> None:
    server = Terms(answers="soft", max_streams=64)
    assert Terms().over(server) == server
    assert Terms(answers="hard", top_k=3).over(server) == Terms(answers="hard", top_k=3, max_streams=64)
    assert EVERY.over(server) == EVERY


def test_a_change_sets_unsets_and_leaves_the_rest() -> None:
    assert EVERY.changed(Terms(top_k=5), ["decimals", "answers"]) == dataclasses.replace(
        EVERY, top_k=5, decimals=None, answers=None
    )
    assert EVERY.changed(Terms()) == EVERY
    assert EVERY.changed(Terms(), FIELDS) == Terms()
    assert Terms().changed(Terms(), ["top_k"]) == Terms()
    with pytest.raises(TermsError, match=r"unset: expected some of answers, .*, got 'top-k'"):
        EVERY.changed(Terms(), ["top-k"])
    with pytest.raises(TermsError, match="decimals: expected to be set or unset, got 'both'"):
        EVERY.changed(Terms(decimals=3), ["decimals"])
