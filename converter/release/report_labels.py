"""Places for the labels of a picture's points, so that none covers a point or another label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LETTER, _LINE, _MARK = 7.2, 14.0, 8.0
"""Width of a letter, height of a line, half the size of a mark, in units of the picture."""

_STEPS = (0.0, 10.0, 20.0, 32.0, 46.0)
"""Distances between a mark and its label that are tried, the nearest first."""

_MOST = 40
"""Points that get a label; more have no room."""

_SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))


@dataclass(frozen=True, slots=True)
class Label:
    """The centre of a label; a line must lead to one that is far from its point."""

    x: float
    y: float
    is_far: bool


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle by its centre and half its sizes."""

    x: float
    y: float
    width: float
    height: float

    def touches(self, other: "Box") -> bool:
        """Whether they share a point."""
        wide, high = self.width + other.width, self.height + other.height
        return abs(self.x - other.x) < wide and abs(self.y - other.y) < high

    def within(self, other: "Box") -> bool:
        """Whether all of it is in the other."""
        across = abs(self.x - other.x) + self.width <= other.width
        return across and abs(self.y - other.y) + self.height <= other.height


def place_labels(points: Sequence[tuple[str, float, float]], frame: Box) -> list[Label | None]:
    """The place of each point's label, or None if there is no room for it.

    Args:
        points: labels, and places of points; the first ones get the nearest places.
        frame: that labels stay within.
    """
    taken = [Box(x, y, _MARK, _MARK) for _, x, y in points]
    found: list[Label | None] = []
    for text, x, y in points[:_MOST]:
        label = None
        for step in _STEPS:
            boxes = (box for box in _around(text, x, y, step) if box.within(frame))
            if free := next((b for b in boxes if not any(map(b.touches, taken))), None):
                label = Label(round(free.x, 2), round(free.y, 2), step > 0)
                taken.append(free)
                break
        found.append(label)
    return found + [None] * (len(points) - len(found))


def _around(text: str, x: float, y: float, step: float) -> Iterator[Box]:
    """Boxes for a text on all sides of a point, at one distance."""
    width, height = _LETTER * len(text) / 2, _LINE / 2
    far = _MARK + step
    for right, down in _SIDES:
        across = width if right and down else far + width  # a corner's box begins above the point
        yield Box(x + right * across, y + down * (far + height), width, height)
