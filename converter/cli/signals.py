"""Ctrl-C and its like end a run within a second, and it can be gone on with.

Python tells a program of a signal between two of its own steps, and a matrix product or an upload
may take longer than anybody wants to wait. So there is a thread that the signal wakes at once: it
gives the run ``_PATIENCE`` to tidy up, and then ends the process, which nothing that is written
minds, as it does not mind a power failure.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import NoReturn

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run; the exit code is 128 and their number."""

_PATIENCE = 0.6
"""Seconds from the signal to the end of the process."""


class Stopped(KeyboardInterrupt):
    """A signal, in the main thread; its argument is the number."""


def leave(number: int) -> NoReturn:
    """End the process with one sentence, and without taking Python down, which takes seconds."""
    said = (
        f"stopped by {signal.Signals(number).name}; no half-written checkpoint was left; "
        "the same command again goes on from what is finished\n"
    )
    with suppress(OSError):
        os.write(2, said.encode())
    os._exit(128 + number)


@contextmanager
def stopping() -> Iterator[None]:
    """Within this context, the first signal of ``_STOPPING`` raises ``Stopped``; others are
    ignored.

    Only in the main thread. If the block does not end soon after, the process does.
    """
    before = {number: signal.getsignal(number) for number in _STOPPING}
    stopped, over = Event(), Event()

    def stop(number: int, frame: object) -> None:
        if not stopped.is_set():
            stopped.set()
            raise Stopped(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = Thread(target=_watch, args=(ours, over), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()
        watcher.join()
        ours.close()


def _watch(ours: socket.socket, over: Event) -> None:
    """Wait for the number of a signal, which is a byte here; none comes after the end."""
    while said := ours.recv(1):
        if said[0] in _STOPPING:
            if not over.wait(_PATIENCE):
                leave(said[0])
            return
