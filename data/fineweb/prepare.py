"""
FineWeb in GPT-2's tokens: streams tokenized shards of 100M tokens into train.bin and val.bin (200 MB a shard).

    python data/fineweb/prepare.py --shards=10

An interrupted run goes on where it was.
"""
import hashlib
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # quill's folder
from configurator import cannot_write, configure, fail, lock
from data.common import DATA_DIR, DownloadError, GPT2Tokenizer, append_rest, fetch, hub_address, need_space, write_atomic

shards = 1  # training shards, of 103

HEADER = 1024  # bytes: 256 int32, of which magic number, version and token count are in use


def shard_tokens(url):
    """Return the number of tokens that the header of the shard at url states."""
    header = b''
    for chunk in fetch(url):
        header += chunk
        if len(header) >= HEADER:
            break
    magic, version, n = np.frombuffer(header[:12], dtype='<i4') if len(header) >= HEADER else (0, 0, 0)
    if (magic, version) != (20240520, 1) or n < 1:
        raise DownloadError(f'{url}: not a shard of tokens (magic {magic}, version {version}, {n} tokens)')
    return int(n)


def assemble(names, path):
    """Stream the tokens of the named shards into path; returns their numbers."""
    urls = [f'{hub_address()}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}' for name in names]
    counts = [shard_tokens(url) for url in urls]
    if os.path.exists(path) and os.path.getsize(path) == 2 * sum(counts):
        return counts
    begin, part = 0, f'{path}.part'
    if os.path.exists(path):
        os.replace(path, part)  # of fewer shards, or of more
    with open(part, 'ab') as f:
        try:
            lock(f)
        except BlockingIOError:
            fail(f'{part}: another process is at it')
        for url, count in zip(urls, counts):
            end = begin + 2 * count
            if os.path.getsize(part) < end:
                append_rest(f, url, HEADER + 2 * count, begin, HEADER)
            begin = end
            print(f'{os.path.basename(path)}: {begin // 2:,} tokens', flush=True)
        f.truncate(begin)  # of an earlier run with more shards
    os.replace(part, path)
    return counts


def main():
    if not 1 <= shards <= 103:
        fail(f'--shards={shards}: there are 1 to 103')
    folder = os.path.join(DATA_DIR, 'fineweb')
    have = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder) if '.bin' in f)
    need_space(folder, max(0, (shards + 1) * 200_001_024 - have))
    names = {'val': ['fineweb_val_000000.bin'], 'train': [f'fineweb_train_{i:06}.bin' for i in range(1, shards + 1)]}
    tokenizer = GPT2Tokenizer()
    # for bits per byte; end-of-text is no text
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.eot)] + [0])
    tokens, sizes, identity = {}, {}, hashlib.sha256()
    for split in names:
        path = os.path.join(folder, f'{split}.bin')
        try:
            counts = assemble(names[split], path)
        except DownloadError as e:
            fail(f'{e}: run this again to go on')
        except OSError as e:
            cannot_write(path, e, ': run this again to go on')
        tokens[split], sizes[split] = sum(counts), 0
        identity.update(repr((names[split], counts)).encode())
        with open(path, 'rb') as f:
            while chunk := f.read(1 << 24):
                ids = np.frombuffer(chunk, dtype='<u2')
                if ids.max() > tokenizer.eot:
                    fail(f'{path}: token id {ids.max()} is not one of GPT-2\'s')
                sizes[split] += int(lengths[ids].sum())
    meta = {'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size, 'dtype': 'uint16',
            'source': 'kjj0/fineweb10B-gpt2', 'sha256': identity.hexdigest(), 'tokens': tokens, 'bytes': sizes}
    write_atomic(os.path.join(folder, 'meta.json'), [json.dumps(meta, indent=1).encode()])
    print('now train on it: python train.py config/train_gpt2.py --dataset=fineweb')


if __name__ == '__main__':
    configure(globals())
    main()
