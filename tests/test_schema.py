"""schema.py: what a file must hold, said as types."""

from typing import Any, TypedDict

import pytest

from schema import MalformedError, check, parse_json, parse_yaml


class File(TypedDict):
    bytes: int
    note: str | None


class Content(TypedDict):
    files: dict[str, File]
    shape: list[int]
    loss: float | None
    where: str | list[str] | None
    anything: Any


GOOD = {"files": {"a": {"bytes": 1}}, "shape": [3, 4], "where": ["x"], "anything": {"y": [None]}}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"more": 1},
        {"loss": 1},
        {"loss": float("nan")},
        {"where": "x"},
        {"where": "\udcff \U0001f600"},
        {"where": None},
        {"files": {}},
        {"files": {"a": {"bytes": -5, "note": None}}},
    ],
)
def test_what_fits(change):
    check(GOOD | change, Content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": None}, "files is None, not an object"),
        ({"files": [1]}, "files is a list, not an object"),
        ({"files": {"a": {}}}, "files.a has no bytes"),
        ({"files": {"a": {"bytes": "1"}}}, "files.a.bytes is '1', not an integer"),
        ({"files": {"a": {"bytes": True}}}, "files.a.bytes is True, not an integer"),
        ({"files": {"a": {"bytes": 1.0}}}, "files.a.bytes is 1.0, not an integer"),
        ({"files": {"a": {"bytes": 2**63}}}, "files.a.bytes is 9223372036854775808, not an integer"),
        ({"files": {"a": {"bytes": 1, "note": 2}}}, "files.a.note is 2, not a string"),
        ({"files": {5: {"bytes": 1}}}, "files: the key 5 is 5, not a string"),
        ({"shape": [3, None]}, "shape[1] is None, not an integer"),
        ({"loss": "x" * 80}, f"loss is '{'x' * 36}…, not a number"),
        ({"where": 3}, "where is 3, not a string or a list"),
        ({"where": "\ud800"}, r"where is '\ud800', not a string or a list"),
    ],
)
def test_the_first_place_that_does_not_fit_is_named(change, message):
    with pytest.raises(MalformedError) as error:
        check(GOOD | change, Content)
    assert str(error.value) == message


def test_other_keys_are_refused_where_people_write_the_file():
    check({"bytes": 1, "byte": 2}, File)
    with pytest.raises(MalformedError, match=r"^it: byte is not known; there are bytes, note$"):
        check({"bytes": 1, "byte": 2}, File, exact=True)
    with pytest.raises(MalformedError, match=r"^files\.a: byte is not known"):
        check(GOOD | {"files": {"a": {"bytes": 1, "byte": 2}}}, Content, exact=True)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff\xfe{", b'{"a": 1e5', b"NaN", b"\x00", b"5" * 5000])
def test_what_is_no_json_is_one_line(data):
    with pytest.raises(MalformedError) as error:
        parse_json(data)
    assert len(str(error.value).splitlines()) == 1


def test_json_of_a_windows_editor_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert parse_json('{"a": 1}'.encode("utf-16")) == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        *("a: [", "a: b: c", "\t- a", "&a [*a]", "[" * 3000, "a: !!python/object/apply:os.system [echo]", "a: \x07"),
        *(
            "!!int ''",
            "!!float x",
            "!!bool x",
            "!!timestamp x",
            "a: 2001-13-45",
            "? [a]\n: b",
            "!!binary é",
            "=",
            "- a",
        ),
    ],
)
def test_what_is_no_yaml_is_one_line(data):
    with pytest.raises(MalformedError) as error:
        parse_yaml(data)
    assert len(str(error.value).splitlines()) == 1
