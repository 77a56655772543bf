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
from data.downloads import DownloadError, download_resumable, hub_address
from data.files import DATA_DIR, cannot_write, lock, need_space
from data.tokenizers import GPT2Tokenizer

shards = 1  # number of training shards, at most 103

FOLDER = os.path.join(DATA_DIR, 'fineweb')
SHARD_TOKENS = 100_000_000  # in each shard; fewer in the last one
VAL_TOKENS = 20 * 524_288 + 1  # 10,240 windows of 1,024 tokens, and the last target
HEADER = 1024  # bytes; the header begins with three int32: 20240520, 1, number of tokens


def main():
    if not 1 <= shards <= 103:
        fail(f'--shards={shards}: shards is at least 1 and at most 103')
    script = open(__file__)  # stays open, and so locked, until the end
    lock(script, 'waiting for another process, which prepares FineWeb')
    have = sum(os.path.getsize(os.path.join(FOLDER, f)) for f in os.listdir(FOLDER) if '.bin' in f)
    need_space(FOLDER, max(0, 2 * SHARD_TOKENS * (shards + 1) + 2 * VAL_TOKENS - have))
    tokenizer = GPT2Tokenizer()
    tokens, sizes, identity = {}, {}, hashlib.sha256()
    val = ['fineweb_val_000000.bin']
    train = [f'fineweb_train_{i:06}.bin' for i in range(1, shards + 1)]
    for split, names, count in (('val', val, VAL_TOKENS), ('train', train, SHARD_TOKENS)):
        path = os.path.join(FOLDER, f'{split}.bin')
        try:
            assemble(path, names, count)
        except DownloadError as e:
            fail(str(e))
        except OSError as e:
            cannot_write(path, e, ': run this again to continue')
        tokens[split] = os.path.getsize(path) // 2
        sizes[split] = text_size(path, tokenizer)
        identity.update(repr((names, [count] * len(names))).encode())
    write_meta(FOLDER, tokenizer, 'kjj0/fineweb10B-gpt2', identity.hexdigest(), tokens, sizes)
    print('now train on it: python train.py config/train_gpt2_fineweb.py')


def assemble(path, names, count):
    """Write the first `count` tokens of each shard to path, after those that are there."""
    part = f'{path}.part'
    before = path if os.path.exists(path) else part
    done = os.path.getsize(before) // (2 * count) if os.path.exists(before) else 0
    for i in range(done, len(names)):
        shard = os.path.join(FOLDER, names[i])
        url = f'{hub_address()}/datasets/kjj0/fineweb10B-gpt2/resolve/main/{names[i]}'
        download_resumable(url, shard, end=HEADER + 2 * count)
        ids = read_shard(shard, count)
        if os.path.exists(path):  # made with fewer shards
            os.replace(path, part)
        with open(part, 'ab') as f:
            f.truncate(2 * count * i)  # without a shard that was cut off
            f.write(ids.tobytes())
            f.flush()
            os.fsync(f.fileno())
        os.remove(shard)
        print(f'{os.path.basename(path)}: {count * i + len(ids):,} tokens', flush=True)
    if os.path.exists(part):
        os.replace(part, path)
    if os.path.getsize(path) > 2 * count * len(names):  # an earlier run had more shards
        os.truncate(path, 2 * count * len(names))


def read_shard(path, count):
    """Return the first `count` tokens of the shard at path."""
    header = np.fromfile(path, '<i4', count=3).tolist()
    ids = np.fromfile(path, '<u2')[HEADER // 2:]
    if header[:2] != [20240520, 1] or len(ids) != min(header[2], count):
        os.remove(path)
        fail(f'{path} was not a shard of tokens ({len(ids):,} tokens after the header {header}), '
             'so it is removed: run this again')
    return ids


if __name__ == '__main__':
    run_main(main, __name__)
