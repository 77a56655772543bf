"""
Files that an interruption never leaves half-written; locks between processes; progress.
"""
import contextlib
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from configurator import fail, first_line

DATA_DIR = os.path.dirname(os.path.abspath(__file__))


@contextlib.contextmanager
def replace_file(path, keep=None):
    """Open a new file that takes the name `path` when it is complete and on the disk.

    At every moment, also after an exception, `path` is the old file or the new one, whole.
    keep: a second path, under which the old file stays.
    """
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            Path(keep).unlink(missing_ok=True)
            try:
                os.link(path, keep)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, keep)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def cannot_write(path, e):
    """Fail with exit code 1 because writing `path` raised the OSError e."""
    fail(f'cannot write {path} ({e.strerror or first_line(e)})', code=1)


def sha256_file(path):
    """Return the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def lock(file, waiting=''):
    """Lock an open file for this process until the file is closed.

    If another process holds the lock: print `waiting` and wait, or raise BlockingIOError if
    `waiting` is empty.
    """
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not waiting:
            raise
        print(waiting, file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError) as e:  # on Windows and some network disks
        print(f'note: files cannot be locked here ({first_line(e)})', file=sys.stderr)


@contextlib.contextmanager
def take_turns(folder):
    """Let one process at a time work in a folder. Nobody waits where a folder cannot be locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, f'waiting for another process to finish {folder}')
        yield
    finally:
        os.close(descriptor)


def show_progress(items, work, size=None, position=None):
    """Yield from `items`, and show the progress of long work on a terminal.

    work: its name, for example 'evaluating'. The items of a sequence are counted. For a stream,
    position() is the number of bytes done, and size that of all bytes.
    """
    began = shown = time.monotonic()
    size = size if position else len(items)
    try:
        for i, item in enumerate(items):
            now = time.monotonic()
            if i and size and now - shown > 0.5 and sys.stderr.isatty():
                shown = now
                done = position() if position else i
                left = (now - began) / max(1, done) * (size - done)
                line = f'{work}: {done / size:.0%}, {left:.0f} s left'
                print(f'\r{line:<79}', end='', file=sys.stderr, flush=True)
            yield item
    finally:
        if shown > began:  # remove the line
            print(f'\r{"":<79}\r', end='', file=sys.stderr, flush=True)
