"""
The windows of tokens that training and evaluation read, and their division over processes.
"""
import math
import os

import numpy as np
import torch

from configurator import fail
from data.files import show_progress


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
