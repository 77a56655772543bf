"""
OpenWebText in GPT-2's tokens. Makes train.bin (17 GB) and val.bin from 21 subsets of 0.6 GB each.

    python data/openwebtext/prepare.py --subsets=21

Run the same command again to continue after an interruption.
"""
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import signal
import sys
import tarfile

import numpy as np

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, run_main
from data.dataset import SPLITS, is_val, write_meta
from data.downloads import DownloadError, download_resumable, hub_address
from data.files import DATA_DIR, cannot_write, need_space, write_atomic
from data.tokenizers import GPT2Tokenizer

subsets = 21  # number of subsets, at most 21
processes = 0  # number of processes that tokenize; 0 uses all cores

VAL_FRACTION = 0.0005  # of the documents


def main():
    if not 1 <= subsets <= 21 or processes < 0:
        fail(f'--subsets={subsets} --processes={processes}: subsets is at least 1 and at most 21, '
             'processes is at least 0')
    folder = os.path.join(DATA_DIR, 'openwebtext')
    progress = os.path.join(folder, 'progress.json')
    parts = [os.path.join(folder, f'{split}.bin.part') for split in SPLITS]
    have = sum(os.path.getsize(part) for part in parts if os.path.exists(part))
    # the tokens, and the subset that is being read
    need_space(folder, max(0, 860_000_000 * subsets - have) + 625_000_000)
    state = read_progress(progress, parts)
    start_worker()  # downloads the tokenizer before the workers need it
    n_workers = processes or os.cpu_count()
    with multiprocessing.get_context('spawn').Pool(n_workers, start_worker) as pool:
        for i in range(state['done'], subsets):
            tar = os.path.join(folder, f'urlsf_subset{i:02}.tar')
            download_subset(tar)
            sizes = append_subset(tar, parts, state['sizes'], pool, 4 * n_workers)
            state = {'done': i + 1,
                     'sizes': [os.path.getsize(part) for part in parts],
                     'bytes': [old + new for old, new in zip(state['bytes'], sizes)]}
            write_atomic(progress, [json.dumps(state).encode()])
            os.remove(tar)
            train, val = (size // 2 for size in state['sizes'])
            print(f'{i + 1} of {subsets} subsets: {train:,} tokens for training, '
                  f'{val:,} for validation', flush=True)
    tokens = {split: size // 2 for split, size in zip(SPLITS, state['sizes'])}
    sizes = dict(zip(SPLITS, state['bytes']))
    identity = hashlib.sha256(repr((subsets, tokens)).encode()).hexdigest()
    for part in parts:
        if os.path.exists(part):  # otherwise an earlier run was interrupted just after this
            os.replace(part, part.removesuffix('.part'))
    write_meta(folder, tokenizer, 'Skylion007/openwebtext', identity, tokens, sizes)
    os.remove(progress)
    print('now train on it: python train.py config/train_gpt2.py')


def read_progress(path, parts):
    """Return what earlier runs have done, as a dict.

    done: the number of subsets. sizes: the bytes in each of the two parts. bytes: the bytes of
    their text.
    """
    if not os.path.exists(path):
        return {'done': 0, 'sizes': [0, 0], 'bytes': [0, 0]}
    with open(path, encoding='utf-8') as f:
        state = json.load(f)
    if state['done'] > subsets:
        fail(f'{path}: {state["done"]} subsets are done already: remove this file to start again')
    if state['done'] < subsets:
        for part, size in zip(parts, state['sizes']):
            if size > (os.path.getsize(part) if os.path.exists(part) else 0):
                fail(f'{part} is shorter than {path} says: remove {path} to start again')
    return state


def download_subset(tar):
    """Download a subset to the path `tar` unless it is there."""
    url = f'{hub_address()}/datasets/Skylion007/openwebtext/resolve/main/subsets/'
    try:
        if not os.path.exists(tar):
            download_resumable(url + os.path.basename(tar), tar)
    except DownloadError as e:
        fail(f'{e}: run this again to continue')


def append_subset(tar, parts, begins, pool, batch_size):
    """Append the tokens of a subset to the parts, each from its byte `begins` on.

    Returns the bytes of text for training and for validation.
    """
    sizes = [0, 0]
    files = [open(part, 'r+b' if os.path.exists(part) else 'w+b') for part in parts]
    try:
        for f, begin in zip(files, begins):
            f.truncate(begin)  # remove what an interrupted run wrote of this subset
            f.seek(begin)
        for archives in read_archives(tar, batch_size):
            for result in pool.map(tokenize, archives):
                for i, (ids, size) in enumerate(result):
                    files[i].write(ids.tobytes())
                    sizes[i] += size
        for f in files:
            f.flush()
            os.fsync(f.fileno())
            f.close()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
        os.remove(tar)
        fail(f'{tar} was damaged ({e}) and is removed: run this again to continue')
    except OSError as e:
        cannot_write(parts[0], e, ': run this again to continue')
    return sizes


def read_archives(tar, n):
    """Yield lists of at most n archives (bytes) in the tar file of a subset."""
    archives = []
    with tarfile.open(tar, mode='r|') as members:
        for member in members:
            if member.isfile() and member.name.endswith('.xz'):
                archives.append(members.extractfile(member).read())
            if len(archives) == n:
                yield archives
                archives = []
    yield archives


def start_worker():
    """Make the tokenizer of this process."""
    global tokenizer
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the main process ends this one
    tokenizer = GPT2Tokenizer()


def tokenize(archive):
    """Tokenize the documents in a .tar.xz archive, given as bytes.

    Returns (ids, bytes of text) for training and for validation. An end-of-text token follows each
    document.
    """
    ids = [[np.empty(0, np.uint16)] for _ in SPLITS]
    sizes = [0, 0]
    with tarfile.open(fileobj=io.BytesIO(archive), mode='r|xz') as documents:
        for member in documents:
            if not member.isfile() or not member.name.endswith('.txt'):
                continue
            text = documents.extractfile(member).read()
            i = int(is_val(text, VAL_FRACTION))
            ids[i] += [tokenizer.encode(text.decode('utf-8', errors='replace')), [tokenizer.eot]]
            sizes[i] += len(text)
    return [(np.concatenate(ids[i]).astype(np.uint16), sizes[i]) for i in (0, 1)]


if __name__ == '__main__':
    run_main(main, __name__)
