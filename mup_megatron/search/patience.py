"""A storage that is away for a while: what was asked of it is asked again, until it is back or patience is at an end.

Asking again is safe although the first time may have been heard. What is set is set to the same; a trial that has ended
has ended; and a trial that was created or taken without this process knowing is found as an orphan (`claims.py`).
"""

import functools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0

Away = Callable[[Exception], str | None]
"""Returns what an error says if it means that the storage is away for now; None if asking again is of no use."""


def _wait(seconds: float) -> bool:
    time.sleep(seconds)
    return True


@dataclass
class Patience:
    """Waits for a storage that is away, up to a limit."""

    seconds: float = 0.0
    """How long it may be away."""
    sleep: Callable[[float], bool] = _wait
    """Waits so long; False: not to be patient any longer."""
    say: Callable[[str], None] = field(default=lambda text: None)
    """Tells the user."""
    outages: int = 0
    """How often the storage was away: others could not show that they are alive either."""
    _at_end: bool = False

    def have_with(self, storage: BaseStorage, away: Away) -> None:
        """Has every method of a storage wait for it while it is away. At the end it raises StorageInternalError."""
        for name, general in vars(BaseStorage).items():
            # What a storage leaves as Optuna has it for all of them asks through its other methods.
            if not name.startswith("_") and getattr(type(storage), name, None) is not general:
                setattr(storage, name, self._repeating(getattr(storage, name), away))

    def _repeating(self, ask: Callable[..., Any], away: Away) -> Callable[..., Any]:
        @functools.wraps(ask)
        def repeating(*args: Any, **kwargs: Any) -> Any:
            begun, wait = time.monotonic(), FIRST_WAIT_S
            while True:
                try:
                    return ask(*args, **kwargs)
                except Exception as error:
                    if (reason := away(error)) is None:
                        raise
                    left = begun + self.seconds - time.monotonic()
                    if wait == FIRST_WAIT_S:
                        self.outages += 1
                        if left > 0 and not self._at_end:
                            self.say(f"the storage is away ({reason}), and is waited for")
                    # Workers that lost it together are not to come back together.
                    if self._at_end or left <= 0 or not self.sleep(min(left, wait * random.uniform(0.5, 1.0))):
                        self._at_end = True
                        raise StorageInternalError(reason) from error
                    wait = min(2 * wait, LONGEST_WAIT_S)

        return repeating
