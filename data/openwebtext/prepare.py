"""
OpenWebText in GPT-2's tokens: 21 archives of 0.6 GB, one after another, become train.bin (17 GB) and val.bin.

    python data/openwebtext/prepare.py --subsets=21

Documents are read out of the archives in memory, tokenized in all cores and written with an end-of-text token behind
each. An interrupted run goes on with the archive it was at.
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # quill's folder
from configurator import cannot_write, configure, fail
from data.common import DATA_DIR, DownloadError, GPT2Tokenizer, download_resumable, hub_address, need_space, write_atomic

subsets = 21  # archives, of 21
processes = 0  # that tokenize, 0: one for each core

VAL_PART = 0.0005


def is_val(text):
    """Whether a document validates: by a hash of its text, so it does not depend on the number of subsets."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], 'big') < VAL_PART * 2**64


def start_worker():
    global tokenizer
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the others
    tokenizer = GPT2Tokenizer()


def tokenize(archive):
    """Return (ids, bytes of text) for train and for val of the documents in a .tar.xz, given as bytes."""
    ids, size = {False: [], True: []}, {False: 0, True: 0}
    with tarfile.open(fileobj=io.BytesIO(archive), mode='r|xz') as documents:
        for member in documents:
            if member.isfile() and member.name.endswith('.txt'):
                text = documents.extractfile(member).read()
                val = is_val(text)
                ids[val].append(tokenizer.encode(text.decode('utf-8', errors='replace')))
                ids[val].append([tokenizer.eot])
                size[val] += len(text)
    return [(np.concatenate(ids[val]).astype(np.uint16) if ids[val] else np.empty(0, np.uint16), size[val])
            for val in (False, True)]


def archives(path, n):
    """Yield lists of n archives (bytes) in the tar at path."""
    batch = []
    with tarfile.open(path, mode='r|') as tar:
        for member in tar:
            if member.isfile() and member.name.endswith('.xz'):
                batch.append(tar.extractfile(member).read())
                if len(batch) == n:
                    yield batch
                    batch = []
    yield batch


def main():
    if not 1 <= subsets <= 21 or processes < 0:
        fail(f'--subsets={subsets} --processes={processes}: there are 1 to 21 subsets and 0 or more processes')
    folder = os.path.join(DATA_DIR, 'openwebtext')
    paths = [os.path.join(folder, f'{split}.bin.part') for split in ('train', 'val')]
    have = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    need_space(folder, max(0, 860_000_000 * subsets - have) + 625_000_000)  # tokens, and one archive at a time
    progress = os.path.join(folder, 'progress.json')
    state = {'done': 0, 'sizes': [0, 0], 'bytes': [0, 0]}
    if os.path.exists(progress):
        with open(progress, encoding='utf-8') as f:
            state = json.load(f)
    if state['done'] > subsets:
        fail(f'{progress}: {state["done"]} subsets are there already, remove it to start anew')
    for path, size in zip(paths, state['sizes']):
        if state['done'] < subsets and size > (os.path.getsize(path) if os.path.exists(path) else 0):
            fail(f'{path} is shorter than {progress} says: remove {progress} to start anew')
    start_worker()  # downloads the tokenizer once, before the workers want it
    n = processes or os.cpu_count()
    with multiprocessing.get_context('spawn').Pool(n, start_worker) as pool:
        for i in range(state['done'], subsets):
            tar = os.path.join(folder, f'urlsf_subset{i:02}.tar')
            try:
                if not os.path.exists(tar):
                    download_resumable(f'{hub_address()}/datasets/Skylion007/openwebtext/resolve/main/subsets/'
                                       f'urlsf_subset{i:02}.tar', tar)
            except DownloadError as e:
                fail(f'{e}: run this again to go on')
            files = [open(path, 'r+b' if os.path.exists(path) else 'w+b') for path in paths]
            for f, size in zip(files, state['sizes']):
                f.truncate(size)  # what an interrupted run has written of this subset
                f.seek(size)
            try:
                for batch in archives(tar, 4 * n):
                    for result in pool.map(tokenize, batch):
                        for split, (ids, size) in enumerate(result):
                            files[split].write(ids.tobytes())
                            state['bytes'][split] += size
                for f in files:
                    f.flush()
                    os.fsync(f.fileno())
                    f.close()
            except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
                os.remove(tar)
                fail(f'{tar} is damaged ({e}): removed, run this again to go on')
            except OSError as e:
                cannot_write(paths[0], e, ': run this again to go on')
            state['done'], state['sizes'] = i + 1, [os.path.getsize(path) for path in paths]
            write_atomic(progress, [json.dumps(state).encode()])
            os.remove(tar)
            print(f'{i + 1} of {subsets} subsets: {state["sizes"][0] // 2:,} tokens to train on, '
                  f'{state["sizes"][1] // 2:,} to validate', flush=True)
    tokens = dict(zip(('train', 'val'), (size // 2 for size in state['sizes'])))
    meta = {'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size, 'dtype': 'uint16',
            'source': 'Skylion007/openwebtext', 'sha256': hashlib.sha256(repr((subsets, tokens)).encode()).hexdigest(),
            'tokens': tokens, 'bytes': dict(zip(('train', 'val'), state['bytes']))}
    for path in paths:
        if os.path.exists(path):  # else an earlier run has ended between here and meta.json
            os.replace(path, path.removesuffix('.part'))
    write_atomic(os.path.join(folder, 'meta.json'), [json.dumps(meta, indent=1).encode()])
    os.remove(progress)
    print('now train on it: python train.py config/train_gpt2.py')


if __name__ == '__main__':
    configure(globals())
    main()
