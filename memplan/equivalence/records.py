"""What a child measured, as plain data that goes through JSON, and back."""

from __future__ import annotations

from typing import Any

from memplan.equivalence.diagnosis import Loop, Match, Subject, Window

Record = dict[str, Any]


def subject_record(subject: Subject) -> Record:
    """As plain data."""
    return {**subject._asdict(), "without": [[list(names), error] for names, error in subject.without]}


def parse_subject(record: Record) -> Subject:
    """The inverse of `subject_record`."""
    return Subject(**{**record, "without": [(tuple(names), error) for names, error in record["without"]]})


def loop_record(loop: Loop) -> Record:
    """As plain data."""
    windows = {name: [_window_record(one) for one in getattr(loop, name)] for name in ("windows", "unclipped")}
    return {**loop._asdict(), **windows}


def parse_loop(record: Record) -> Loop:
    """The inverse of `loop_record`."""
    windows = {name: [_parse_window(one) for one in record[name]] for name in ("windows", "unclipped")}
    return Loop(**{**record, **windows})


def _window_record(window: Window) -> Record:
    return {**window._asdict(), "matches": {name: match._asdict() for name, match in window.matches.items()}}


def _parse_window(record: Record) -> Window:
    return Window(**{**record, "matches": {name: Match(**match) for name, match in record["matches"].items()}})
