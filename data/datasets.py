"""
The files of a dataset: writing and checking them.

A dataset is a folder data/NAME with three files:
    train.bin, val.bin   token ids without a header, uint16 or uint32
    meta.json            tokenizer, vocab_size, dtype, source, sha256; tokens and bytes per split
"""
import codecs
import importlib
import json
import os

import numpy as np

from configurator import fail, one_line_errors
from data.downloads import DATA_DIR
from data.files import sha256_file, write_atomic
from data.tokenizers import CharTokenizer, GPT2Tokenizer, tokenizer_size
from data.windows import Tokens

SPLITS = ('train', 'val')


def read_text(path):
    """Return the text of a UTF-8 file, under any locale and without a byte order mark."""
    try:
        with open(path, 'rb') as f:
            raw = f.read()
    except OSError as e:
        fail(f'{path}: {e.strerror}')
    text = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode('utf-8').replace('\r\n', '\n')
    except UnicodeDecodeError as e:
        byte = len(raw) - len(text) + e.start
        fail(f'{path}: not UTF-8 at byte {byte}: convert it first, for example with iconv -t UTF-8')


def write_dataset(name, path, kind):
    """Make the dataset data/NAME from the text at path, with a tokenizer of this kind.

    kind: char or gpt2. The first 90% of the characters are for training, the rest for validation.
    """
    text = read_text(path)
    if len(text) < 20:
        fail(f'{path}: {len(text)} characters are too few for training and validation')
    print(f'{path}: {len(text):,} characters')
    sha256 = sha256_file(path)
    tokenizer = CharTokenizer(text) if kind == 'char' else GPT2Tokenizer()
    folder = os.path.join(DATA_DIR, name)
    meta_path = os.path.join(folder, 'meta.json')
    if os.path.exists(meta_path):
        os.remove(meta_path)  # it exists only while both .bin files are complete
    cut = len(text) * 9 // 10
    tokens, sizes = {}, {}
    for split, part in (('train', text[:cut]), ('val', text[cut:])):
        ids = tokenizer.encode(part).astype(id_dtype(tokenizer))
        bin_path = os.path.join(folder, f'{split}.bin')
        write_atomic(bin_path, [ids.tobytes()])
        tokens[split], sizes[split] = len(ids), len(part.encode('utf-8'))
        print(f'{bin_path}: {len(ids):,} tokens')
    write_meta(folder, tokenizer, os.path.basename(path), sha256, tokens, sizes)
    units = f'characters {tokenizer.chars!r}' if kind == 'char' else 'byte pairs of GPT-2'
    print(f'vocabulary: {tokenizer.vocab_size:,} {units}', flush=True)


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


def open_dataset(name, block_size, process):
    """Return (meta, train, val): the content of meta.json, and the Tokens of both splits.

    Prepares Shakespeare if it is missing. Fails if any other dataset is missing or damaged.
    """
    if os.path.basename(name) != name or name in ('', '.', '..'):
        fail(f'dataset={name}: dataset is the name of a folder in data/')
    if name in ('shakespeare_char', 'shakespeare'):
        process.once_per_node(lambda: prepare_if_missing(name, process))
    command = prepare_command(name)
    if missing := missing_file(name):
        fail(f'no {missing} in data/{name}: run {command}')
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
        return f'python data/{name}/prepare.py'
    return f'python data/text/prepare.py --input=FILE --name={name}'


def prepare_if_missing(name, process):
    """Run main() of data/NAME/prepare.py if a file of the dataset is missing."""
    if missing := missing_file(name):
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
