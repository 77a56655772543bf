"""
Files that an interruption never leaves half-written, locks on files, free space, and progress.
"""
import contextlib
import hashlib
import os
import shutil
import sys
import time

from configurator import fail, first_line

DATA_DIR = os.path.dirname(os.path.abspath(__file__))
NOTED = set()  # folders for which a note was printed

def cannot_write(path, e, more='', name=''):
    """Fail with exit code 1 because writing `path` raised e; report the free disk space too.

    more: added at the end of the message. name: printed instead of the path.
    """
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    reason = getattr(e, 'strerror', None) or first_line(e)
    free = shutil.disk_usage(folder).free
    fail(f'cannot write {name or path} ({reason}): {free / 1e6:.1f} MB are free{more}', code=1)


def need_space(folder, size, what='this takes'):
    """Fail if fewer than size bytes are free in folder."""
    free = shutil.disk_usage(folder).free
    if free < size:
        fail(f'{folder}: {what} {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free', code=1)


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
            take_name(f'{keep}.tmp', keep)
        take_name(temporary, path)
        sync_folder(os.path.dirname(path) or '.')
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def take_name(temporary, path):
    """Rename a file, and replace the one at `path`.

    Windows refuses that while another process, a virus scanner for example, reads one of them:
    then try again for six seconds.
    """
    for wait in (0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 0):
        try:
            return os.replace(temporary, path)
        except PermissionError as e:
            if not wait or not getattr(e, 'winerror', None):
                raise
            time.sleep(wait)


def sync_folder(path):
    """Make the names in a folder survive a power cut, if its file system can do that."""
    if os.name != 'posix':
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as e:  # some network disks and shared folders
        if path not in NOTED:
            print(f'note: {path} cannot be synced ({e.strerror}): after a power cut its newest '
                  'files may be missing', flush=True)
        NOTED.add(path)
    finally:
        os.close(folder)


def write_atomic(path, chunks):
    """Write an iterable of bytes to path. The file gets its name when it is complete."""
    try:
        with replace_file(path) as f:
            f.writelines(chunks)
    except OSError as e:
        cannot_write(path, e)


def write_chunks(f, chunks, skip=0):
    """Write chunks to the open file f, without their first `skip` bytes, and wait for the disk."""
    for chunk in chunks:
        f.write(chunk[skip:])
        skip = max(0, skip - len(chunk))
    f.flush()
    os.fsync(f.fileno())


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def lock(file):
    """Lock an open file for this process until the file is closed.

    Returns None, or the reason if locking is not possible here (Windows, some network disks).
    Raises BlockingIOError if another process holds the lock.
    """
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError) as e:
        return first_line(e)


def show_progress(items, work, size=0, position=None):
    """Yield from `items`, and show the progress of long work on a terminal.

    work: its name, for example 'evaluating'. The items of a sequence are counted. For those of a
    stream, position() returns how many bytes are done, of `size` bytes or, if None, nobody knows.
    The line is removed at the end.
    """
    began = shown = time.monotonic()
    line = ''
    try:
        for i, item in enumerate(items):
            now = time.monotonic()
            if i and now - shown > 0.5 and sys.stderr.isatty():
                shown = now
                done, total = (position(), size) if position else (i, len(items))
                line = f'{work}: {progress(done, total, now - began, bool(position))}'
                print(f'\r{line:<60}', end='', file=sys.stderr, flush=True)
            yield item
    finally:
        if line:
            print(f'\r{"":<60}\r', end='', file=sys.stderr, flush=True)


def progress(done, total, seconds, in_bytes):
    """Return a few words about work of which `done` of `total` units took so many seconds."""
    rate = f', {done / 1e6 / seconds:,.1f} MB/s'
    if not total:
        return f'{done / 1e6:,.0f} MB{rate}'
    left = f'{seconds / max(1, done) * (total - done):.0f} s left'
    if in_bytes:
        return f'{done / 1e6:,.0f} of {total / 1e6:,.0f} MB{rate}, {left}'
    return f'{done} of {total}, {left}'
