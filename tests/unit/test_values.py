"""memplan's values behave as the standard library's frozen, keyword-only dataclasses do."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from memplan.specs import values


@values.dataclass(frozen=True, kw_only=True)
class Point:
    """A value with a default, and one that is made anew."""

    x: int
    y: int = 2
    seen: dict[str, int] = values.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x")


@values.dataclass(frozen=True, kw_only=True)
class Named(Point):
    """A value that inherits fields."""

    name: str = ""


def test_fields_and_defaults() -> None:
    """Given fields are kept, others take their default, made anew for each value."""
    one, other = Point(x=1), Point(x=1)
    assert (one.x, one.y, one.seen) == (1, 2, {})
    assert one.seen is not other.seen
    assert repr(one) == "Point(x=1, y=2, seen={})"
    assert Named(x=1, name="n") == Named(x=1, name="n") != Named(x=1)


def test_equal_values_are_equal_and_hash_alike() -> None:
    """By class and fields; a field may be left out of the hash."""
    assert Point(x=1) == Point(x=1) != Point(x=2)
    assert hash(Point(x=1)) == hash(Point(x=1, seen={"a": 1}))
    assert Point(x=1) != Named(x=1)


def test_values_cannot_be_changed() -> None:
    """Neither set nor deleted; `replace` gives another one and checks it."""
    point = Point(x=1)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    assert values.replace(point, x=3) == Point(x=3)
    with pytest.raises(ValueError, match="x"):
        values.replace(point, x=-1)


def test_wrong_arguments_are_type_errors() -> None:
    """Missing, unknown and positional ones."""
    for wrong in ({}, {"x": 1, "z": 2}):
        with pytest.raises(TypeError):
            Point(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Point(1)  # type: ignore[misc]


def test_the_standard_library_takes_them_for_dataclasses() -> None:
    """fields, asdict and replace of `dataclasses` work, and so does pickle."""
    point = Point(x=1)
    assert [field.name for field in dataclasses.fields(point)] == ["x", "y", "seen"]
    assert dataclasses.asdict(point) == {"x": 1, "y": 2, "seen": {}}
    assert dataclasses.replace(point, y=5).y == 5
    assert pickle.loads(pickle.dumps(point)) == point
