"""
Datasets: their files, the windows of tokens that training and evaluation read, and nanoGPT's.

A dataset is a folder data/NAME with three files:
    train.bin, val.bin   token ids without a header, uint16 or uint32
    meta.json            tokenizer, vocab_size, dtype, source, sha256; tokens and bytes per split
"""
import hashlib
import importlib
import json
import math
import os
import pickle

import numpy as np
import torch

from configurator import fail, one_line_errors, torchrun
from data.files import DATA_DIR, sha256_file, show_progress, write_atomic
from data.tokenizers import tokenizer_from_dict, tokenizer_size

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
    if not outdated(folder):
        return
    with one_line_errors(f'data/{name} is not of quill (python data/text/prepare.py --input=FILE '
                         '--name=NAME makes a dataset of any text): '):
        saved = read_vocabulary(folder)
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
        nanogpts = prepared_here(os.path.join(DATA_DIR, name))
        more = ', which has to write train.bin and val.bin' * nanogpts
        return f'python data/{name}/prepare.py{more}'
    return f'python data/text/prepare.py --input=FILE --name={name}'


def prepare_if_missing(name, process):
    """Run main() of data/NAME/prepare.py, if it is quill's and a file of the dataset is missing."""
    missing = missing_file(name)
    if missing and not prepared_here(os.path.join(DATA_DIR, name)):
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


# -----------------------------------------------------------------------------
# windows of tokens

def divide(micro_batches, batch_size, process):
    """Return this rank's share of an update: (micro-batches, rows, parts).

    micro_batches: the number of micro-batches of batch_size sequences in an update. If the
    processes cannot share them evenly, groups of `parts` processes share each micro-batch, and a
    rank computes only the range `rows` of its sequences.
    """
    parts = process.world_size // math.gcd(micro_batches, process.world_size)
    if batch_size % parts:
        fail(f'gradient_accumulation_steps={micro_batches} micro-batches of '
             f'batch_size={batch_size} sequences cannot be divided over {process.world_size} '
             f'processes: make one of them a multiple of {parts}')
    group, part = divmod(process.rank, parts)
    n, rows = micro_batches * parts // process.world_size, batch_size // parts
    return range(group * n, (group + 1) * n), range(part * rows, (part + 1) * rows), parts


class Tokens:
    """The token ids in a .bin file, read as windows of block_size + 1 tokens.

    The file is read, not memory-mapped: resident memory does not grow with the file, and a file
    that becomes shorter is an error and not a crash (SIGBUS).
    """

    def __init__(self, path, block_size, dtype='uint16', vocab_size=2**32, n_bytes=None):
        self.path = path
        self.n_bytes = n_bytes  # of its text
        self.block_size = block_size
        self.dtype = np.dtype(dtype)
        self.vocab_size = vocab_size
        try:
            self.file = open(path, 'rb', buffering=0)
        except OSError as e:
            fail(f'{path}: {e.strerror}')
        size, item = os.path.getsize(path), self.dtype.itemsize
        if size % item:
            fail(f'{path}: {size} bytes are not a whole number of {item}-byte tokens: '
                 'prepare the dataset again')
        self.n = size // item
        if self.n < block_size + 1:
            fail(f'{path}: {self.n} tokens are fewer than block_size + 1 = {block_size + 1}: '
                 'use a smaller --block_size')
        # one window less than fits, so that an epoch can begin at any of the first tokens
        self.windows_per_epoch = max(1, (self.n - 1) // block_size - 1)
        self.epoch = None

    def read(self, starts):
        """Return x and y, (len(starts), block_size) int64 each; y is one token ahead of x."""
        ids = np.empty((len(starts), self.block_size + 1), dtype=self.dtype)
        for row, start in zip(ids, starts):
            self.file.seek(int(start) * self.dtype.itemsize)
            if self.file.readinto(row) != row.nbytes:
                fail(f'{self.path} ends at token {start}: it was cut short while in use', code=1)
        if ids.max() >= self.vocab_size:
            fail(self.outside(ids.max()), code=1)
        x, y = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(y)

    def check(self):
        """Fail if an id is outside the vocabulary.

        Checks the first 100M tokens, to start soon. read checks every token that it returns.
        """
        chunk = 1 << 20
        self.file.seek(0)
        for start in range(0, min(self.n, 100_000_000), chunk):
            ids = np.frombuffer(self.file.read(chunk * self.dtype.itemsize), self.dtype)
            if ids.max() >= self.vocab_size:
                fail(self.outside(ids.max(), f' at position {start + ids.argmax()}'))

    def outside(self, token, where=''):
        """Return the error message for an id that is outside the vocabulary."""
        return (f'{self.path}: token id {token}{where} is outside the vocabulary of '
                f'{self.vocab_size}: prepare the dataset again')

    def bits_per_byte(self, loss):
        """Return a loss in nats per token as bits per byte, which compares between tokenizers."""
        return loss / math.log(2) * self.n / self.n_bytes

    def train_batch(self, first, count, process, noise=0.0):
        """Return x and y of the training sequences first, ..., first + count - 1.

        Sequences are numbered without end. Those of one epoch are windows that lie side by side,
        each taken once, in random order. They depend only on the seed and the number of the epoch.
        noise: fraction of the tokens of x that are replaced by random tokens, which depend only on
        the seed and the number of the sequence.
        """
        starts = []
        for sequence in range(first, first + count):
            epoch, i = divmod(sequence, self.windows_per_epoch)
            if epoch != self.epoch:
                self.begin_epoch(epoch, process)
            starts.append(self.offset + self.order[i].item() * self.block_size)
        x, y = self.read(starts)
        if noise:
            for row, sequence in zip(x, range(first, first + count)):
                generator = process.generator('noise', sequence)
                replaced = torch.rand(self.block_size, generator=generator) < noise
                tokens = torch.randint(self.vocab_size, (self.block_size,), generator=generator)
                row[replaced] = tokens[replaced]
        return x, y

    def begin_epoch(self, epoch, process):
        """Draw where the first window of the epoch starts, and the order of its windows."""
        generator = process.generator('train', epoch)
        spare = self.n - 1 - self.windows_per_epoch * self.block_size
        self.offset = torch.randint(spare + 1, (1,), generator=generator).item()
        self.order = torch.randperm(self.windows_per_epoch, generator=generator)
        self.epoch = epoch

    def eval_starts(self, n):
        """Return the starts of n evenly spaced windows, or of windows that cover the whole file.

        n=0, or an n that is large enough, covers the whole file. Its windows lie side by side. Only
        the last window may overlap the previous one, because it ends with the file.
        """
        last = self.n - 1 - self.block_size
        if n == 0 or n * self.block_size >= self.n - 1:
            return [*range(0, last, self.block_size), last]
        return [i * last // max(1, n - 1) for i in range(n)]

    def eval_batches(self, count, batch_size, process):
        """Yield idx and targets of this rank's share of `count` batches, the same at every call.

        0 batches, or enough of them, cover the whole file. A target of -1 is not to be counted.
        Batches with very many logits come in several parts.
        """
        # at most 2**28 logits at a time: evaluation takes no more memory than training
        rows = max(1, 2**28 // (self.block_size * self.vocab_size))
        starts = self.eval_starts(count * batch_size)
        batches = [starts[i:i + batch_size] for i in range(0, len(starts), batch_size)]
        share = range(process.rank, len(batches) + process.rank, process.world_size)
        for i in show_progress(share, 'evaluating') if process.is_main else share:
            batch = batches[min(i, len(batches) - 1)]
            idx, targets = self.read(batch)
            if i >= len(batches):  # with fsdp, all ranks must compute equally often
                targets = torch.full_like(targets, -1)
            if len(starts) > 1 and batch[-1] == starts[-1]:  # count no token twice
                overlap = max(0, starts[-2] + self.block_size - starts[-1])
                targets[-1, :overlap] = -1
            if rows < batch_size and len(idx) < batch_size:  # as many parts on every rank
                padding = torch.zeros(batch_size - len(idx), self.block_size, dtype=idx.dtype)
                idx, targets = torch.cat([idx, padding]), torch.cat([targets, padding - 1])
            yield from zip(idx.split(rows), targets.split(rows))


# -----------------------------------------------------------------------------
# datasets that nanoGPT prepared

class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers. Nothing else in a pickle is run or made."""

    def find_class(self, module, name):
        raise ValueError(f'it needs {module}.{name}, and quill reads plain values only')


def prepared_here(folder):
    """Return whether the folder has a meta.pkl, or a prepare.py that writes no meta.json."""
    script = read_script(folder)
    ours = any(word in script for word in ('meta.json', 'write_dataset', 'write_meta'))
    return os.path.exists(os.path.join(folder, 'meta.pkl')) or bool(script) and not ours


def outdated(folder):
    """Return whether a folder of nanoGPT has both .bin files, and no meta.json as new as they."""
    if not prepared_here(folder):
        return False
    names = ('train.bin', 'val.bin', 'meta.json')
    train, val, meta = (os.path.join(folder, name) for name in names)
    if not os.path.isfile(train) or not os.path.isfile(val):
        return False
    # nanoGPT's prepare.py, run again, leaves the old meta.json
    newest = max(os.path.getmtime(train), os.path.getmtime(val))
    return not os.path.exists(meta) or os.path.getmtime(meta) < newest


def read_vocabulary(folder):
    """Return the tokenizer of a folder of nanoGPT, as to_dict of data/tokenizers.py returns it.

    ValueError says why quill cannot tell what the ids mean.
    """
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        if 'gpt2' in read_script(folder):
            return {'kind': 'gpt2'}
        raise ValueError('nothing in it tells what its ids mean: there is no meta.pkl, and its '
                         "prepare.py does not name GPT-2's tokens (gpt2)")
    try:
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError(f'its meta.pkl cannot be read: {e}')
    if not isinstance(meta, dict):
        raise ValueError(f'its meta.pkl holds a {type(meta).__name__} instead of a dict')
    itos, stoi, size = (meta.get(key) for key in ('itos', 'stoi', 'vocab_size'))
    if not itos and not stoi and size in (50257, 50304):  # 50304: padded
        return {'kind': 'gpt2'}
    if isinstance(stoi, dict) and not itos:
        itos = {i: token for token, i in stoi.items()}
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or not itos:
        raise ValueError('its meta.pkl has no vocabulary (stoi, itos)')
    tokens = [itos.get(i) for i in range(len(itos))]
    if not all(isinstance(token, str) for token in tokens):
        raise ValueError(f'in its meta.pkl, itos has not a text for each id from 0 to '
                         f'{len(itos) - 1}')
    if words := [token for token in tokens if len(token) != 1]:
        raise ValueError(f'the vocabulary in its meta.pkl has {words[0]!r}, and quill reads '
                         'vocabularies of single characters only')
    if len(set(tokens)) < len(tokens) or size not in (None, len(tokens)) \
            or stoi not in (None, {token: i for i, token in enumerate(tokens)}):
        raise ValueError('in its meta.pkl, stoi, itos and vocab_size contradict each other')
    return {'kind': 'char', 'chars': ''.join(tokens)}


def read_script(folder):
    """Return the text of the folder's prepare.py, empty if there is none."""
    path = os.path.join(folder, 'prepare.py')
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8', errors='replace') as f:
        return f.read()
