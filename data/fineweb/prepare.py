"""
FineWeb in GPT-2's tokens. Downloads shards of 100M tokens (200 MB) each to train on, and the first
10,485,761 tokens of another one to validate on, as modded-nanogpt does.

    python data/fineweb/prepare.py --shards=10

Run the same command again to continue after an interruption.
"""
import hashlib
import os
import sys

import numpy as np

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, run_main
from data.dataset import text_size, write_meta
from data.downloads import DownloadError, append_rest, fetch, hub_address
from data.files import DATA_DIR, cannot_write, lock, need_space, take_name
from data.tokenizers import GPT2Tokenizer

shards = 1  # number of training shards, at most 103

VAL_TOKENS = 20 * 524_288 + 1  # 10,240 windows of 1,024 tokens, and the last target
HEADER = 1024  # bytes; the header begins with three int32: magic number, version, number of tokens


def main():
    if not 1 <= shards <= 103:
        fail(f'--shards={shards}: shards is at least 1 and at most 103')
    folder = os.path.join(DATA_DIR, 'fineweb')
    have = sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder) if '.bin' in f)
    need_space(folder, max(0, shards * 200_001_024 + 2 * VAL_TOKENS - have))
    names = {'val': ['fineweb_val_000000.bin'],
             'train': [f'fineweb_train_{i:06}.bin' for i in range(1, shards + 1)]}
    tokenizer = GPT2Tokenizer()
    tokens, sizes = {}, {}
    identity = hashlib.sha256()
    for split in names:
        path = os.path.join(folder, f'{split}.bin')
        try:
            counts = assemble(names[split], path, VAL_TOKENS if split == 'val' else 10**9)
        except DownloadError as e:
            fail(f'{e}: run this again to continue')
        except OSError as e:
            cannot_write(path, e, ': run this again to continue')
        tokens[split] = sum(counts)
        sizes[split] = text_size(path, tokenizer)
        identity.update(repr((names[split], counts)).encode())
    write_meta(folder, tokenizer, 'kjj0/fineweb10B-gpt2', identity.hexdigest(), tokens, sizes)
    print('now train on it: python train.py config/train_gpt2.py --dataset=fineweb')


def assemble(names, path, limit):
    """Download the first `limit` tokens of each shard to path; return their number by shard."""
    urls = [f'{hub_address()}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{name}' for name in names]
    available = [shard_tokens(url) for url in urls]
    counts = [min(n, limit) for n in available]
    if os.path.exists(path) and os.path.getsize(path) == 2 * sum(counts):
        return counts
    part = f'{path}.part'
    if os.path.exists(path):
        os.replace(path, part)  # made with another number of shards
    with open(part, 'ab') as f:
        try:
            lock(f)
        except BlockingIOError:
            fail(f'{part}: another process is downloading it')
        begin = 0
        for url, n, count in zip(urls, available, counts):
            end = begin + 2 * count
            if os.path.getsize(part) < end:
                append_rest(f, url, HEADER + 2 * n, begin, HEADER, end=HEADER + 2 * count)
            begin = end
            print(f'{os.path.basename(path)}: {begin // 2:,} tokens', flush=True)
        f.truncate(begin)  # in case an earlier run had more shards
    take_name(part, path)
    return counts


def shard_tokens(url):
    """Return the number of tokens in the shard at url, from its header."""
    header = b''
    for chunk in fetch(url):
        header += chunk
        if len(header) >= HEADER:
            break
    if len(header) < HEADER:
        raise DownloadError(f'{url}: not a shard of tokens ({len(header)} bytes)')
    magic, version, n = np.frombuffer(header[:12], dtype='<i4')
    if (magic, version) != (20240520, 1) or n < 1:
        raise DownloadError(f'{url}: not a shard of tokens (magic {magic}, version {version}, '
                            f'{n} tokens)')
    return int(n)


if __name__ == '__main__':
    run_main(main, __name__)
