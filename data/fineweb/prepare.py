"""
FineWeb in GPT-2's tokens. Downloads shards of 100M tokens (200 MB) each to train on, and the first
10,485,761 tokens of another one to validate on, as modded-nanogpt does.

    python data/fineweb/prepare.py --shards=10

Run the same command again to continue after an interruption. Later, you can remove the shards,
fineweb_*.bin; with them, another number of shards downloads only what is missing.
"""
import hashlib
import os
import sys

import numpy as np

sys.path.insert(0, os.path.abspath(__file__ + '/../../..'))  # the project's folder
from configurator import fail, one_line_errors, run_main
from data.build import write_tokens
from data.dataset import token_lengths
from data.downloads import download, hub_address
from data.tokenizers import GPT2Tokenizer

shards = 1  # number of training shards
LIMITS = {'shards': (1, 103)}

FOLDER = os.path.dirname(os.path.abspath(__file__))
VAL_TOKENS = 20 * 524_288 + 1  # 10,240 windows of 1,024 tokens, and the last target
HEADER = 1024  # bytes; the header begins with three int32: 20240520, 1, number of tokens


def main():
    tokenizer = GPT2Tokenizer()
    val, *train = names = ['fineweb_val_000000.bin',
                           *(f'fineweb_train_{i:06}.bin' for i in range(1, shards + 1))]
    base = f'{hub_address()}/datasets/kjj0/fineweb10B-gpt2/resolve/main'
    with one_line_errors(f'{val} and {train[0]} to {train[-1]} of {base} belong in {FOLDER}: '):
        for name in names:
            end = HEADER + 2 * VAL_TOKENS if name == val else 0
            download(f'{base}/{name}', os.path.join(FOLDER, name), end=end)
    write_tokens(FOLDER, read_shards(names, tokenizer), tokenizer, 'kjj0/fineweb10B-gpt2',
                 hashlib.sha256(repr(names).encode()).hexdigest())
    print('now train on it: python train.py config/train_gpt2_fineweb.py')


def read_shards(names, tokenizer):
    """Yield (split, ids, bytes of text) of the shards with these names."""
    lengths = token_lengths(tokenizer).astype(np.uint8)  # the longest token has 128 bytes
    for name in names:
        split = 'val' if 'val' in name else 'train'
        path = os.path.join(FOLDER, name)
        most = VAL_TOKENS if split == 'val' else 10**9
        header = np.fromfile(path, '<i4', count=3).tolist()
        ids = np.fromfile(path, '<u2')[HEADER // 2:][:most]
        if header[:2] != [20240520, 1] or not 0 < len(ids) == min(header[2], most) \
                or ids.max() >= tokenizer.vocab_size:
            os.remove(path)
            fail(f'{path} was not a shard of tokens, so it is removed: run this again')
        yield split, ids, int(lengths[ids].sum())


if __name__ == '__main__':
    run_main(main, __name__)
