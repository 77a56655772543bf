"""
Files that an interruption never leaves half-written; locks between processes; progress.
"""
import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time

from configurator import fail, first_line

DATA_DIR = os.path.dirname(os.path.abspath(__file__))


def write_atomic(path, chunks):
    """Write an iterable of bytes to path. The file gets its name when it is complete."""
    try:
        with replace_file(path) as f:
            f.writelines(chunks)
    except OSError as e:
        cannot_write(path, e)


@contextlib.contextmanager
def replace_file(path, keep=None):
    """Open a new file that takes the name `path` when it is complete and on the disk.

    At every moment `path` is the old file or the new one, whole. keep: a second path, under which
    the old file stays. An exception, which the caller handles, leaves the old file as it was.
    """
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            with contextlib.suppress(FileNotFoundError):
                os.remove(f'{keep}.tmp')
            try:
                os.link(path, f'{keep}.tmp')
            except OSError:  # a file system without hard links
                shutil.copyfile(path, f'{keep}.tmp')
            os.replace(f'{keep}.tmp', keep)
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or '.')
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def sync_folder(path):
    """Make the names in a folder survive a power cut. Some network disks cannot do that."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def cannot_write(path, e, more='', name=''):
    """Fail with exit code 1 because writing `path` raised e.

    more: added at the end of the message. name: printed instead of the path.
    """
    message = f'cannot write {name or path} ({getattr(e, "strerror", None) or first_line(e)})'
    if getattr(e, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        folder = os.path.abspath(path)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        message += f': {shutil.disk_usage(folder).free / 1e6:.1f} MB are free'
    fail(message + more, code=1)


def need_space(folder, size, what='this takes'):
    """Fail if fewer than size bytes are free in folder."""
    free = shutil.disk_usage(folder).free
    if free < size:
        fail(f'{folder}: {what} {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free', code=1)


def sha256_file(path):
    """Return the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def lock(file, note=''):
    """Lock an open file for this process until the file is closed.

    If another process holds the lock: print note and wait, or raise BlockingIOError without a note.
    Returns None, or the reason if locking is not possible here (Windows, some network disks).
    """
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not note:
            raise
        print(note, file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError) as e:
        return first_line(e)


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
    position() is the number of bytes done, and size, if it is known, that of all bytes.
    """
    began = shown = time.monotonic()
    size = size if position else len(items)
    try:
        for i, item in enumerate(items):
            now = time.monotonic()
            if i and now - shown > 0.5 and sys.stderr.isatty():
                shown = now
                done = position() if position else i
                words = f'{done:,} bytes'
                if size:
                    left = (now - began) / max(1, done) * (size - done)
                    words = f'{done / size:.0%}, {left:.0f} s left'
                print(f'\r{work + ": " + words:<79}', end='', file=sys.stderr, flush=True)
            yield item
    finally:
        if shown > began:  # remove the line
            print(f'\r{"":<79}\r', end='', file=sys.stderr, flush=True)
