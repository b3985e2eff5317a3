"""The progress bars of our long loops, which somebody else may follow too."""

from collections.abc import Callable, Iterator
from typing import Any

from tqdm import auto

listener: Callable[[str, float, float | None], None] | None = None  # told: what, how much is done, of how much


class tqdm(auto.tqdm):
    """tqdm's bar, which goes when the loop is done. Where it is not shown, its count still goes to the listener."""

    def __init__(self, iterable: Any = None, desc: str = "", total: float | None = None, **how: Any) -> None:
        super().__init__(iterable, desc, total, leave=False, **how)
        self._told, self._what, self._of = how.get("initial", 0), desc, self.total if total is None else total

    def update(self, n: float | None = 1) -> bool | None:
        """As in tqdm: n more are done."""
        self._told += n or 0
        if listener is not None:
            listener(self._what, self._told, self._of)
        return super().update(n)

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()
        self.close()
