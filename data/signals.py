"""
The signals that end a training run, and a standard output that may go away.
"""
import contextlib
import os
import signal
import sys
import time

# Ctrl-C, kill, a closed terminal, Slurm's --signal=USR1; Windows has the first two
SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
           if hasattr(signal, name)]


def catch_signals(process):
    """Return a list to which SIGNALS are appended; a second Ctrl-C exits at once."""
    signals, times = [], []
    # torchrun repeats the terminal's Ctrl-C, so within a second it is not a second one
    echo_s = 1 if process.world_size > 1 else 0

    def on_signal(number, frame):
        if signals and number == signal.SIGINT and time.monotonic() - times[0] > echo_s:
            os._exit(130)
        if not signals and process.is_main:
            with contextlib.suppress(OSError):  # os.write, because print must not be interrupted
                os.write(2, b'stopping after this update; Ctrl-C again quits without saving\n')
        signals.append(number)
        times.append(time.monotonic())
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, on_signal)
    return signals


class Output:
    """A standard output whose failure ends no run: what cannot be written is lost."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, work, *arguments):
        try:
            work(*arguments)
        except OSError:  # a closed pipe or a full disk: nothing more goes there
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def guarded():
    """Survive a failing standard output; at the end, put signal handlers and output back."""
    stdout, handlers = sys.stdout, {number: signal.getsignal(number) for number in SIGNALS}
    sys.stdout = Output(stdout)
    try:
        yield
    finally:
        sys.stdout = stdout
        for number, handler in handlers.items():
            signal.signal(number, handler)
