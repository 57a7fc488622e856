"""The plans that have come for a rank: read and unpacked on a thread beside its steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from lightmoe.core import Batch

_LOOK_SECONDS = 1e-4
"""How often a rank looks whether its device is done, while no plan has come."""


class Inbox:
    """Calls `receive` again and again, until it returns None: that is the last thing in here."""

    def __init__(self, receive: Callable[[], Batch | None]) -> None:
        self._receive = receive
        self._plans: deque[Batch | None] = deque()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="lightmoe-inbox", daemon=True).start()

    @property
    def first(self) -> Batch | None:
        """The next plan, waited for; None at the end. Raises what `receive` has raised."""
        return self.look()

    def look(self, until: Callable[[], bool] | None = None) -> Batch | None:
        """The next plan if it comes before `until` is true, else None; None at the end too."""
        with self._changed:
            while not self._plans:
                if until is not None and until():
                    return None
                self._changed.wait(None if until is None else _LOOK_SECONDS)
            plan = self._plans[0]
        if plan is None and self._error is not None:
            raise self._error
        return plan

    def take(self) -> Batch:
        """The plan that was looked at: it is gone then."""
        plan = self._plans.popleft()
        assert plan is not None, "nothing comes after the end"
        return plan

    def _run(self) -> None:
        plan: Batch | None = None
        while True:
            try:
                plan = self._receive()
            except BaseException as error:
                plan, self._error = None, error
            with self._changed:
                self._plans.append(plan)
                self._changed.notify()
            if plan is None:
                return
