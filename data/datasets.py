"""
The files of a dataset: checking and opening them.

A dataset is a folder data/NAME with three files:
    train.bin, val.bin   token ids without a header, uint16 or uint32
    meta.json            tokenizer, vocab_size, dtype, source, sha256; tokens and bytes per split
"""
import hashlib
import importlib
import json
import os

import numpy as np

from configurator import fail, one_line_errors, torchrun
from data import nanogpt
from data.downloads import DATA_DIR
from data.files import sha256_file, write_atomic
from data.tokenizers import tokenizer_from_dict, tokenizer_size
from data.windows import Tokens

SPLITS = ('train', 'val')


def write_meta(folder, tokenizer, source, sha256, tokens, sizes):
    """Write meta.json, which marks the dataset in folder as complete.

    source: name of the origin. sha256: identifies the content. tokens, sizes: the number of tokens,
    and of bytes of text, of each split.
    """
    meta = {'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size,
            'dtype': id_dtype(tokenizer).name, 'source': source, 'sha256': sha256,
            'tokens': tokens, 'bytes': sizes}
    write_atomic(os.path.join(folder, 'meta.json'), [json.dumps(meta, indent=1).encode()])


def id_dtype(tokenizer):
    """Return the smallest dtype for the ids of a tokenizer."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)


def is_val(document, val_fraction):
    """Return whether a document, given as the bytes of its text, is for validation.

    Its hash decides, so the answer does not depend on the other documents.
    """
    digest = hashlib.sha256(document).digest()
    return int.from_bytes(digest[:8], 'big') < val_fraction * 2**64


def text_size(path, tokenizer, dtype='uint16'):
    """Return the number of bytes of the text in a .bin file. End-of-text tokens have no text.

    Fails if the file holds an id that is not one of the tokenizer's.
    """
    size, ids = tokenizer.vocab_size, range(tokenizer.vocab_size)
    lengths = np.array([0 if i == tokenizer.eot else len(tokenizer.token_bytes(i)) for i in ids])
    total = 0
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 24):
            ids = np.frombuffer(chunk, dtype=dtype)
            if ids.max() >= size:
                fail(f'{path}: token id {ids.max()} is outside the vocabulary of {size:,}')
            total += int(lengths[ids].sum())
    return total


def adopt_nanogpts(name):
    """Write the meta.json of a dataset that nanoGPT prepared in data/NAME, if it is missing."""
    folder = os.path.join(DATA_DIR, name)
    if not nanogpt.outdated(folder):
        return
    with one_line_errors(f'data/{name} is not of quill (python data/text/prepare.py --input=FILE '
                         '--name=NAME makes a dataset of any text): '):
        saved = nanogpt.read_vocabulary(folder)
        tokenizer_size(saved)
    tokenizer, digest, tokens, sizes = tokenizer_from_dict(saved), hashlib.sha256(), {}, {}
    for split in SPLITS:
        path = os.path.join(folder, f'{split}.bin')
        if os.path.getsize(path) % 2:
            fail(f'{path}: its bytes are not a whole number of 2-byte tokens, as nanoGPT writes')
        tokens[split] = os.path.getsize(path) // 2
        sizes[split] = text_size(path, tokenizer)
        digest.update(sha256_file(path).encode())
    write_meta(folder, tokenizer, 'nanoGPT', digest.hexdigest(), tokens, sizes)
    if torchrun('RANK', 0) == 0:
        print(f'note: data/{name} is in the form of nanoGPT: wrote its meta.json, with a '
              f'vocabulary of {tokenizer.vocab_size:,}', flush=True)


def open_dataset(name, block_size, process):
    """Return (meta, train, val): the content of meta.json, and the Tokens of both splits.

    Prepares Shakespeare if it is missing. Fails if any other dataset is missing or damaged.
    """
    if os.path.basename(name) != name or name in ('', '.', '..'):
        fail(f'dataset={name}: dataset is the name of a folder in data/')
    process.once_per_node(lambda: adopt_nanogpts(name))
    if name in ('shakespeare_char', 'shakespeare'):
        process.once_per_node(lambda: prepare_if_missing(name, process))
    command = prepare_command(name)
    if missing := missing_file(name):
        nanogpts = ''
        if missing == 'meta.json':
            nanogpts = " (if it is nanoGPT's, put its meta.pkl or its prepare.py there instead)"
        fail(f'no {missing} in data/{name}: run {command}{nanogpts}')
    meta = read_meta(name)
    splits = []
    for split in SPLITS:
        path = os.path.join(DATA_DIR, name, f'{split}.bin')
        tokens = Tokens(path, block_size, meta['dtype'], meta['vocab_size'], meta['bytes'][split])
        expected = meta['tokens'][split]
        if tokens.n != expected:
            fail(f'{path} has {tokens.n:,} tokens instead of {expected:,}: run {command}')
        tokens.check()
        splits.append(tokens)
    everyones = process.gather((meta['sha256'], meta['tokens']))
    if any(other != everyones[process.rank] for other in everyones):
        fail(f'data/{name} has {meta["tokens"]} tokens for rank {process.rank}, and not the same '
             'for others: prepare it alike on every node')
    process.print(f'{name}: {splits[0].n:,} tokens to train on, {splits[1].n:,} to validate, '
                  f'vocabulary of {meta["vocab_size"]:,}')
    return meta, *splits


def missing_file(name):
    """Return the name of the first missing file of the dataset, or None."""
    for file in ('train.bin', 'val.bin', 'meta.json'):
        if not os.path.exists(os.path.join(DATA_DIR, name, file)):
            return file
    return None


def prepare_command(name):
    """Return the command that prepares the dataset."""
    if os.path.exists(os.path.join(DATA_DIR, name, 'prepare.py')):
        nanogpts = nanogpt.prepared_here(os.path.join(DATA_DIR, name))
        more = ', which has to write train.bin and val.bin' * nanogpts
        return f'python data/{name}/prepare.py{more}'
    return f'python data/text/prepare.py --input=FILE --name={name}'


def prepare_if_missing(name, process):
    """Run main() of data/NAME/prepare.py, if it is quill's and a file of the dataset is missing."""
    missing = missing_file(name)
    if missing and not nanogpt.prepared_here(os.path.join(DATA_DIR, name)):
        process.print(f'no {missing} in data/{name} yet: running data/{name}/prepare.py')
        importlib.import_module(f'data.{name}.prepare').main()


def read_meta(name):
    """Return the content of meta.json as a dict; fail if it is damaged."""
    path = os.path.join(DATA_DIR, name, 'meta.json')
    with one_line_errors(f'{path} is damaged (run {prepare_command(name)}): '):
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        size = meta['vocab_size']
        if type(size) is not int or size != tokenizer_size(meta['tokenizer']):
            raise ValueError(f'vocab_size={size} is not the size of the tokenizer')
        if meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'dtype={meta["dtype"]} is not uint16 or uint32')
        if 'sha256' not in meta:
            raise ValueError('sha256 is missing')
        for key in ('tokens', 'bytes'):
            for split in SPLITS:
                n = meta[key][split]
                if type(n) is not int or n < 0:
                    raise ValueError(f'{key} of {split} is {n!r} instead of a number')
    return meta
