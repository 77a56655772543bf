"""
Datasets: the tokens of a text in a folder of data/, and how training and evaluation read them.

    meta, train, val = open_dataset('shakespeare_char', block_size, process)
    x, y = train.train_batch(first, count, process)

A dataset is a folder data/NAME with three files:
    train.bin, val.bin   token ids without a header, uint16 or uint32
    meta.json            tokenizer, vocab_size, dtype, source, sha256; tokens and bytes per split

A folder without meta.json is nanoGPT's, and gets one when it is first opened.
"""
import contextlib
import hashlib
import importlib
import json
import math
import os
import pickle

from configurator import fail, one_line_errors, say, torchrun
from data.files import DATA_DIR, replace_file, sha256_file, show_progress, take_turns
from data.tokenizers import CharTokenizer, tokenizer_from_dict, tokenizer_size

import numpy as np
import torch

SPLITS = ('train', 'val')
FIRST_USE = ('shakespeare', 'shakespeare_char')  # prepared when they are first used


def open_dataset(name, block_size, process):
    """Return (meta, train, val): the content of meta.json, and the Tokens of both splits.

    Prepares Shakespeare if it is missing. Fails if any other dataset is missing or damaged.
    """
    if os.path.basename(name) != name or name in ('', '.', '..'):
        fail(f'dataset={name}: dataset is the name of a folder in data/')
    process.once_per_node(lambda: complete_dataset(name))
    meta = read_meta(name)
    splits = []
    for split in SPLITS:
        path = os.path.join(DATA_DIR, name, f'{split}.bin')
        tokens = Tokens(path, block_size, meta['dtype'], meta['vocab_size'], meta['bytes'][split])
        expected = meta['tokens'][split]
        if tokens.n != expected:
            fail(f'{path} has {tokens.n:,} tokens instead of {expected:,}: {remedy(name)}, or, if '
                 f'nanoGPT has prepared it again, remove data/{name}/meta.json')
        tokens.check()
        splits.append(tokens)
    everyones = process.gather((meta['sha256'], meta['tokens']))
    if any(other != everyones[process.rank] for other in everyones):
        fail(f'data/{name} has {meta["tokens"]} tokens for rank {process.rank}, and not the same '
             'for others: prepare it alike on every node')
    process.print(f'{name}: {splits[0].n:,} tokens to train on, {splits[1].n:,} to validate, '
                  f'vocabulary of {meta["vocab_size"]:,}')
    return meta, *splits


def complete_dataset(name):
    """Prepare Shakespeare if it is missing, or write the meta.json of a folder of nanoGPT."""
    if missing_file(name) == 'meta.json':
        meta = adopt_nanogpt_folder(name)
        kind = "GPT-2's tokens" if meta['vocab_size'] == 50257 else 'the characters in meta.pkl'
        if torchrun('RANK', 0) == 0:
            say(f"note: data/{name} is read as nanoGPT's, with {kind}")
        with contextlib.suppress(OSError):  # a folder that cannot be written: read it every time
            write_meta(os.path.join(DATA_DIR, name), meta)
    elif missing_file(name) and name in FIRST_USE:
        with take_turns(DATA_DIR):  # another run may prepare the dataset at this moment
            if missing := missing_file(name):
                say(f'no {missing} in data/{name} yet: running data/{name}/prepare.py')
                importlib.import_module(f'data.{name}.prepare').main()


def missing_file(name):
    """Return the name of the first missing file of the dataset, or None."""
    files = ('train.bin', 'val.bin', 'meta.json')
    return next((f for f in files if not os.path.exists(os.path.join(DATA_DIR, name, f))), None)


def remedy(name):
    """Return, as the end of an error line, how to prepare the dataset again."""
    if os.path.exists(os.path.join(DATA_DIR, name, 'prepare.py')):
        return f'run python data/{name}/prepare.py'
    return f'run python data/text/prepare.py --input=FILE --name={name}'


def read_meta(name):
    """Return the content of meta.json as a dict; fail if a file is missing, or this one damaged."""
    missing = missing_file(name)
    if missing == 'meta.json':
        return adopt_nanogpt_folder(name)
    if missing:
        fail(f'no {missing} in data/{name}: {remedy(name)}')
    path = os.path.join(DATA_DIR, name, 'meta.json')
    kinds = (ValueError, OSError, KeyError, TypeError, AttributeError)  # also of another structure
    with one_line_errors(f'{path} is damaged ({remedy(name)}): ', kinds):
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        numbers = [meta[key][split] for key in ('tokens', 'bytes') for split in SPLITS]
        if any(type(n) is not int for n in numbers) or type(meta['sha256']) is not str:
            raise ValueError('tokens, bytes or sha256 is of another type')
        if meta['vocab_size'] != tokenizer_size(meta['tokenizer']) \
                or meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError('vocab_size or dtype does not fit the tokenizer')
    return meta


# -----------------------------------------------------------------------------
# windows of tokens

class Tokens:
    """The token ids in a .bin file, read as windows of block_size + 1 tokens.

    Windows are read, not memory-mapped: resident memory does not grow with the file, and a file
    that becomes shorter is an error and not a crash (SIGBUS).
    """

    def __init__(self, path, block_size, dtype='uint16', vocab_size=2**32, n_bytes=None):
        self.path = path
        self.n_bytes = n_bytes  # the length of the text
        self.block_size = block_size
        self.dtype = np.dtype(dtype)
        self.vocab_size = vocab_size
        with one_line_errors():
            self.file = open(path, 'rb', buffering=0)
        self.n = os.path.getsize(path) // self.dtype.itemsize
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
        self.refuse_outside(ids, code=1)
        x, y = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(y)

    def check(self):
        """Fail if an id is outside the vocabulary, among the first 100M tokens, to start soon."""
        self.refuse_outside(np.memmap(self.path, self.dtype, 'r', shape=min(self.n, 100_000_000)))

    def refuse_outside(self, ids, code=2):
        """Fail with this exit code if one of the ids is outside the vocabulary."""
        if ids.max() >= self.vocab_size:
            fail(f'{self.path}: token id {ids.max()} is outside the vocabulary of '
                 f'{self.vocab_size}: prepare the dataset again', code=code)

    def bits_per_byte(self, loss):
        """Return a loss in nats per token as bits per byte, which compares between tokenizers."""
        return loss / math.log(2) * self.n / self.n_bytes

    def train_batch(self, first, count, process):
        """Return x and y of the training sequences first, ..., first + count - 1.

        Sequences are numbered without end. Those of one epoch are windows that lie side by side,
        each taken once, in random order. They depend only on the seed and the number of the epoch.
        """
        starts = []
        for sequence in range(first, first + count):
            epoch, i = divmod(sequence, self.windows_per_epoch)
            if epoch != self.epoch:
                self.begin_epoch(epoch, process)
            starts.append(self.offset + self.order[i].item() * self.block_size)
        return self.read(starts)

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
        Batches with very many logits are divided.
        """
        # at most 2**28 logits at a time: evaluation takes no more memory than training
        rows = max(1, min(batch_size, 2**28 // (self.block_size * self.vocab_size)))
        starts = self.eval_starts(count * batch_size)
        batches = [starts[i:i + rows] for i in range(0, len(starts), rows)]
        share = range(process.rank, len(batches) + process.rank, process.world_size)
        for i in show_progress(share, 'evaluating') if process.is_main else share:
            batch = batches[min(i, len(batches) - 1)]
            idx, targets = self.read(batch)
            if i >= len(batches):  # with fsdp, all ranks must compute equally often
                targets = torch.full_like(targets, -1)
            if len(starts) > 1 and batch[-1] == starts[-1]:  # count no token twice
                overlap = max(0, starts[-2] + self.block_size - starts[-1])
                targets[-1, :overlap] = -1
            yield idx, targets


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


# -----------------------------------------------------------------------------
# what preparing a dataset shares

def make_meta(tokenizer, source, sha256, tokens, sizes):
    """Return the content of meta.json. tokens, sizes: the numbers of tokens and bytes by split."""
    return {'tokenizer': tokenizer.to_dict(), 'vocab_size': tokenizer.vocab_size,
            'dtype': id_dtype(tokenizer).name, 'source': source, 'sha256': sha256,
            'tokens': tokens, 'bytes': sizes}


def write_meta(folder, meta):
    """Write meta.json, which marks the dataset in folder as complete."""
    with replace_file(os.path.join(folder, 'meta.json')) as f:
        f.write(json.dumps(meta, indent=1).encode())


def id_dtype(tokenizer):
    """Return the smallest dtype for the ids of a tokenizer."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)


def is_val(document, val_fraction):
    """Return whether a document, given as the bytes of its text, is for validation: by its hash."""
    digest = hashlib.sha256(document).digest()
    return int.from_bytes(digest[:8], 'big') < val_fraction * 2**64


def token_lengths(tokenizer):
    """Return the number of bytes of each token in a text, as an array; 0 for end-of-text."""
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    if tokenizer.eot is not None:
        lengths[tokenizer.eot] = 0
    return lengths


# -----------------------------------------------------------------------------
# folders that nanoGPT prepared

def adopt_nanogpt_folder(name):
    """Return the content of a meta.json for a folder data/NAME that nanoGPT prepared."""
    folder, digest, tokens, sizes = os.path.join(DATA_DIR, name), hashlib.sha256(), {}, {}
    kinds = (ValueError, OSError, IndexError)  # IndexError: an id is outside the vocabulary
    with one_line_errors(f"data/{name} has no meta.json and cannot be read as nanoGPT's: ", kinds):
        tokenizer = nanogpt_tokenizer(os.path.join(folder, 'meta.pkl'))
        lengths = token_lengths(tokenizer)
        for split in SPLITS:
            path = os.path.join(folder, f'{split}.bin')
            sizes[split] = text_size(path, lengths)
            tokens[split] = os.path.getsize(path) // 2
            digest.update(sha256_file(path).encode())
    return make_meta(tokenizer, 'nanoGPT', digest.hexdigest(), tokens, sizes)


def text_size(path, lengths):
    """Return the bytes of the text in a .bin file of uint16. lengths: the bytes of each token."""
    words = np.memmap(path, np.uint16, 'r')
    head = words[:1 << 20]
    # numpy and llm.c write headers. Half of the words are zero if the ids have 32 or 64 bits
    if head.tobytes().startswith((b'\x93NUMPY', b'\x88\xd8\x34\x01')) or not head[1::2].any():
        raise ValueError(f'{path} must hold ids of 16 bits without a header: with numpy, '
                         'ids.astype(np.uint16).tofile(path) writes them')
    parts = np.array_split(words, 1 + len(words) // 2**23)
    return sum(int(lengths[ids].sum()) for ids in parts)


def nanogpt_tokenizer(path):
    """Return the tokenizer of the characters in nanoGPT's meta.pkl; without this file, GPT-2's."""
    if not os.path.exists(path):
        return tokenizer_from_dict({'kind': 'gpt2'})
    try:
        with open(path, 'rb') as f:
            stoi = PlainUnpickler(f).load()['stoi']
        chars = ''.join(sorted(stoi, key=stoi.get))
    except Exception as e:  # a damaged pickle can raise anything
        raise ValueError(f'its meta.pkl holds no characters: {e!r}')
    if [*map(stoi.get, chars)] != [*range(len(stoi))]:
        raise ValueError('its meta.pkl has no vocabulary of single characters (stoi)')
    return CharTokenizer(chars=chars)


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers. Nothing else in a pickle is run or made."""

    def find_class(self, module, name):
        raise ValueError(f'it needs {module}.{name}, and quill reads plain values only')
