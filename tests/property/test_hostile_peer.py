"""Front ends and guests that send anything: the device process serves or refuses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import hostile

T = TypeVar("T")


class Drawn:
    """A source whose decisions Hypothesis draws."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        """See `hostile.Source`."""
        return self._data.draw(st.integers(low, high))

    def blob(self, most: int) -> bytes:
        """See `hostile.Source`."""
        return self._data.draw(st.binary(max_size=most))

    def pick(self, options: Sequence[T]) -> T:
        """See `hostile.Source`."""
        return options[self._data.draw(st.integers(0, len(options) - 1))]


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
)
@given(st.data())
def test_any_input_is_served_or_refused(data: st.DataObject) -> None:
    hostile.attack(Drawn(data))
