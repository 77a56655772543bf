"""
Tests run offline, on the CPU, on a copy of the scripts in a temporary folder.

The copy comes first on sys.path, so `import train` imports the copy, with its own data/ and
checkpoints.log. It holds the dataset `topics`, a made-up manual, in characters.
"""
import atexit
import gc
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run in parallel: more threads only wait

import pytest
import torch

# under `nohup ... &` and in xdist's processes, signals are ignored, also by the programs they start
for _name in ('SIGINT', 'SIGHUP'):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, _name), signal.SIG_DFL)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROJECT = pathlib.Path(tempfile.mkdtemp(prefix='quill-'))
atexit.register(shutil.rmtree, PROJECT, ignore_errors=True)
for _name in os.listdir(ROOT):
    if _name.endswith('.py'):
        shutil.copy(os.path.join(ROOT, _name), PROJECT)
shutil.copytree(os.path.join(ROOT, 'config'), PROJECT / 'config')
shutil.copytree(os.path.join(ROOT, 'data'), PROJECT / 'data', ignore=shutil.ignore_patterns(
    '*.bin', 'meta.json', '*.txt', '*.jsonl', '*.tar', '__pycache__', 'gpt2_weights',
    'hub_weights'))
sys.path.insert(0, str(PROJECT))

import train
from configurator import Process
from data import build

TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--batch_size=4', '--block_size=32',
        '--eval_iters=2', '--eval_interval=5', '--log_interval=1', '--max_iters=10',
        '--sample_tokens=4', '--dataset=topics', '--warmup_iters=2', '--dropout=0.2',
        '--dtype=float32']


# all of ASCII but $, J, \\ and `: some tests need characters that are not in the vocabulary
CHARACTERS = ('!"#%&\'()*+,-./0123456789:;<=>?@ABCDEFGHIKLMNOPQRSTUVWXYZ[]^_'
              'abcdefghijklmnopqrstuvwxyz{|}~')


def made_up_text(length):
    """Return a text that looks like a manual, the same one in every version of Python.

    Words are made of syllables. The k-th word occurs about 1/k times as often as the first one, as
    in natural languages. The examples between the sentences use all of CHARACTERS.
    """
    rng = random.Random(1)

    def pick(things):
        return things[int(rng.random() * len(things))]  # rng.choice may differ between versions

    def word(syllables):
        return ''.join(pick('bcdfghklmnprstvwyz') + pick('aeiou') + pick(['', '', *'dlnrst'])
                       for _ in range(syllables))
    words = [word(1 + i % 3) for i in range(3000)]
    text = ''
    while len(text) < length:
        sentence = [words[int(len(words)**rng.random()) - 1] for _ in range(pick(range(4, 14)))]
        text += ' '.join(sentence).capitalize() + pick('..,:;?') + '\n'
        if rng.random() < 0.25:
            example = ''.join(pick(CHARACTERS) for _ in range(8))
            text += f'\n    {pick(words)} = {example}\n\n'
    return text[:length]


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """The path of a text of 150,000 characters, 92 different ones."""
    path = tmp_path_factory.mktemp('text') / 'topics.txt'
    path.write_text(made_up_text(150_000), encoding='utf-8')
    return path


@pytest.fixture(scope='session', autouse=True)
def project(text):
    """The copy of the scripts, with the dataset `topics`."""
    build.write_dataset('topics', str(text), 'char')
    return PROJECT


@pytest.fixture(autouse=True)
def same_kernels(monkeypatch):
    """Undo what place_for_generation switches for the whole process."""
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', True)


@pytest.fixture
def bpe(monkeypatch):
    """Provide the files of GPT-2's tokenizer, or skip the test."""
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(ROOT, 'data', 'gpt2_bpe')
    if not os.path.isdir(cache):
        pytest.skip('needs the GPT-2 tokenizer: python data/shakespeare/prepare.py downloads it')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', os.path.abspath(cache))


@pytest.fixture
def process():
    return Process(torch.device('cpu'), torch.float32, seed=1)


@pytest.fixture
def train_run(tmp_path):
    """A function that runs train.main on a tiny model and returns the checkpoint it leaves."""
    def go(*arguments, out=tmp_path / 'out'):
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        tiny = [] if '--init_from=resume' in arguments else TINY
        try:
            train.main([*tiny, f'--out_dir={out}', *arguments])
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            gc.collect()  # ends the lock of out_dir, which a reference cycle may hold
        return torch.load(os.path.join(out, 'ckpt.pt'), weights_only=True)
    return go


def metrics(out):
    """(rows of logged steps, rows of evaluations) in out/metrics.jsonl."""
    with open(os.path.join(out, 'metrics.jsonl'), encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    return [r for r in rows if 'loss' in r], [r for r in rows if 'val_loss' in r]


def script(project, *command, nproc=0, cwd=None, code=0, env=None, torchrun=()):
    """Run a script of the project copy; return (stdout, stderr).

    nproc: the number of processes under torchrun; 0 runs it without torchrun. torchrun: further
    arguments of torchrun. code: the expected exit code.
    """
    name, *arguments = command
    launcher = []
    if nproc:
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}',
                    *torchrun]
    done = subprocess.run(
        [sys.executable, *launcher, str(project / name), *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd or project, timeout=100,
        env=os.environ | (env or {}))
    message = f'exit code {done.returncode}\n{done.stdout}\n{done.stderr}'
    assert done.returncode == code, message
    return done.stdout, done.stderr


def snapshot(*folders):
    """{path: content} of all files below folders."""
    contents = {}
    for folder in folders:
        for path in pathlib.Path(folder).rglob('*'):
            if path.is_file() and '__pycache__' not in str(path.parent):
                contents[str(path)] = path.read_bytes()
    return contents


def unigram_entropy(text):
    counts = Counter(text)
    return -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())


def same_tensors(a, b):
    """Whether two nested structures are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b
