"""Which is the first of many rows that has room?

A tree over the rows knows in each node the largest room below it, so that to find a row, and to take from its room,
takes as many steps as the tree has levels.  It grows with the rows.
"""

from __future__ import annotations

NO_ROOM = -1
"""Largest room of no rows: less than that of a full one.  A row that has room but may take no more is further below."""


class Rows:
    """Rows in their order, of at most so many sequences each."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: list[int] = []
        self._width = 1
        """Rows that the tree has leaves for."""
        self._largest = [NO_ROOM, NO_ROOM]
        """Node 1 is the root, below node n are 2 n and 2 n + 1, the last `_width` are the rows; 0 is not used."""

    def append(self, room: int, count: int) -> int:
        """Add a row behind the others.

        Args:
            room: Tokens that it has room for.
            count: Sequences that it has.

        Returns:
            The largest room in a row that may take more; below 0 where there is none.
        """
        if len(self._counts) == self._width:
            self._widen()
        node = self._width + len(self._counts)
        self._counts.append(count)
        if count >= self._most:
            room = closed(room)
        largest = self._largest
        largest[node] = room
        while node > 1 and largest[node // 2] < room:
            node //= 2
            largest[node] = room
        return largest[1]

    def put(self, length: int) -> int:
        """Add a sequence to the first row that has room.

        Args:
            length: Its tokens, at least 1 and no more than the largest room.

        Returns:
            As `append`.
        """
        largest, width = self._largest, self._width
        node = 1
        while node < width:
            node *= 2
            if largest[node] < length:
                node += 1
        room = largest[node] - length
        self._counts[node - width] += 1
        if self._counts[node - width] >= self._most:
            room = closed(room)
        largest[node] = room
        while node > 1:
            beside = largest[node ^ 1]
            room = beside if beside > room else room
            node //= 2
            if largest[node] == room:
                break
            largest[node] = room
        return largest[1]

    def rooms(self) -> list[int]:
        """Tokens that each row has room for, whether it may take more or not."""
        rows = self._largest[self._width : self._width + len(self._counts)]
        return [room if room >= 0 else closed(room) for room in rows]

    def _widen(self) -> None:
        """Each level gets as many nodes again, of no rows, and a root comes on top."""
        wider, level = self._largest[:2], 1
        while level <= self._width:
            wider += self._largest[level : 2 * level] + [NO_ROOM] * level
            level *= 2
        self._largest = wider
        self._width *= 2


def closed(room: int) -> int:
    """The room of a row that may take no more, as a number below `NO_ROOM`; and back."""
    return NO_ROOM - 1 - room
