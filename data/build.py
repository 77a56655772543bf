"""
From texts of any size to a dataset. The texts are read as a stream, and never held as a whole:

1. Survey: count the characters, and collect what a new tokenizer is made from.
2. Divide the texts into training and validation, tokenize them in several threads, and write the
   tokens.
"""
import codecs
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from configurator import fail, first_line, one_line_errors
from data.bpe import PATTERN, count_pieces, to_letters, train_bpe
from data.dataset import SPLITS, id_dtype, is_val, write_meta
from data.files import DATA_DIR, cannot_write, replace_file, show_progress
from data.tokenizers import BytePairTokenizer, CharTokenizer, tokenizer_from_dict

SAMPLE = 100_000_000  # characters that are enough to train a tokenizer
MANY_DOCUMENTS = 100  # if there are so many, whole documents are chosen for validation
MANY_CHARACTERS = 300  # if there are more in a vocabulary, byte pairs suit the text better


@dataclass
class Survey:
    """What is known about texts after they have been read once."""
    characters: int = 0
    documents: int = 0
    alphabet: set = field(default_factory=set)  # the characters, if the tokenizer is made of them
    pieces: Counter = field(default_factory=Counter)  # see data/bpe.py, if byte pairs are trained
    sampled: int = 0  # characters whose pieces were counted
    lost: int = 0  # characters that the given tokenizer lacks
    missing: set = field(default_factory=set)  # the different ones
    sha256: str = ''  # of the text's bytes


def write_dataset(name, texts, kind, drop=False, vocab_size=4096, val_fraction=0.1, val_paths=()):
    """Make the dataset data/NAME.

    texts: a Texts, or the path of a text. kind: char (the characters of the texts), bpe (vocab_size
    byte pairs trained on the texts), gpt2, or the dict that to_dict of a tokenizer returns. drop:
    leave out characters that this tokenizer lacks; otherwise they are an error. val_fraction: the
    part for validation. This is the end of the text. Among many documents, a hash chooses them.
    val_paths: the files for validation, if they are chosen already.
    """
    texts = texts if isinstance(texts, Texts) else Texts(texts)
    tokenizer = None
    if kind not in ('char', 'bpe'):
        tokenizer = tokenizer_from_dict({'kind': 'gpt2'} if kind == 'gpt2' else kind)
    found = survey(texts, kind, tokenizer)
    known = found.characters - found.lost
    if found.lost:
        report_lost(found, drop)
    if known < 20:
        fail(f'{texts.name}: {known} characters are too few for training and validation')
    documents = f' in {found.documents:,} documents' * (not texts.single)
    print(f'{texts.name}: {found.characters:,} characters{documents}', flush=True)
    tokenizer = tokenizer or make_tokenizer(kind, found, vocab_size)
    cut = None
    if not val_paths and (texts.single or found.documents < MANY_DOCUMENTS):
        cut = int(known * (1 - Fraction(str(val_fraction))))  # exact: 0.1 is one tenth
    parts = divide(texts, found, cut, val_fraction, val_paths)
    with one_line_errors(f'{texts.name}: '):  # tiktoken may fail
        tokens, sizes = write_tokens(os.path.join(DATA_DIR, name), parts, tokenizer,
                                     not texts.single)
    write_meta(os.path.join(DATA_DIR, name), tokenizer,
               os.path.basename(os.path.normpath(texts.name)), found.sha256, tokens, sizes)
    units = 'byte pairs' + ' of GPT-2' * (kind == 'gpt2')
    if isinstance(tokenizer, CharTokenizer):
        shown = tokenizer.chars[:200]
        units = f'characters {shown!r}' + ' ...' * (len(shown) < tokenizer.vocab_size)
    print(f'vocabulary: {tokenizer.vocab_size:,} {units}', flush=True)


def survey(texts, kind, tokenizer):
    """Return the Survey of texts. tokenizer: the one to use, or None if it is yet to be made."""
    found = Survey()
    known = set(tokenizer.chars) if isinstance(tokenizer, CharTokenizer) else None
    for text, begins, _, _ in texts.blocks('reading'):
        found.characters += len(text)
        found.documents += begins
        if kind == 'char':
            found.alphabet |= set(text)
        # of a large text, a sample that is spread evenly
        if kind == 'bpe' and found.sampled <= SAMPLE * texts.position / max(1, texts.size):
            found.pieces.update(count_pieces([text]))
            found.sampled += len(text)
        if known and (missing := set(text) - known):
            found.missing |= missing
            found.lost += sum(map(text.count, missing))
    found.sha256 = texts.digest.hexdigest()
    return found


def report_lost(found, drop):
    """Say which characters the tokenizer lacks. Fail unless they may be left out."""
    missing = sorted(found.missing)
    more = f' and {len(missing) - 50} others' * (len(missing) > 50)
    what = (f'{found.lost:,} of {found.characters:,} characters are not in the vocabulary: '
            + ' '.join(map(repr, missing[:50])) + more)
    if not drop:
        fail(f'{what}: leave them out with --unknown=drop')
    print(f'note: {what}: they are left out')


def make_tokenizer(kind, found, vocab_size):
    """Return a new tokenizer for the texts of a Survey: of their characters, or of byte pairs."""
    if kind == 'char':
        # there is no end-of-text token: a line break follows each document
        tokenizer = CharTokenizer(''.join(found.alphabet) + '\n' * (found.documents > 1))
        if tokenizer.vocab_size > MANY_CHARACTERS:
            print(f'note: {tokenizer.vocab_size:,} different characters are a large vocabulary: '
                  'byte pairs suit this text better (--tokenizer=bpe)')
        return tokenizer
    print(f'training {vocab_size:,} tokens on {found.sampled:,} characters', flush=True)
    tokens = [to_letters(token) for token in train_bpe(found.pieces, vocab_size - 1)]
    if len(tokens) < vocab_size - 1:
        print(f'note: this text has no more than {len(tokens) + 1:,} tokens')
    return BytePairTokenizer(PATTERN, [*tokens, '<|endoftext|>'], [len(tokens)], len(tokens))


def divide(texts, found, cut, val_fraction, val_paths):
    """Yield (split, text): the texts in blocks, and None at the end of each document.

    split: 0 for training, 1 for validation. found: the Survey; its missing characters are left out.
    cut: the number of characters for training, or None to choose whole documents for validation.
    """
    position, split, table = 0, 0, dict.fromkeys(map(ord, found.missing))
    for text, begins, ends, path in texts.blocks('tokenizing'):
        if table:
            text = text.translate(table)
        if cut is not None:
            middle = min(max(cut - position, 0), len(text))
            yield 0, text[:middle]
            yield 1, text[middle:]
            position += len(text)
            split = int(position > cut)  # where the end of the document belongs to
        else:
            if begins:
                raw = text.encode('utf-8')  # of its first block
                split = int(path in val_paths if val_paths else is_val(raw, val_fraction))
            yield split, text
        if ends:
            yield split, None
    if texts.digest.hexdigest() != found.sha256:
        fail(f'{texts.name} has changed while it was read: run this again')


def write_tokens(folder, parts, tokenizer, ends):
    """Write train.bin and val.bin; return the numbers of tokens, and of bytes of text, per split.

    parts: what divide yields. ends: whether to mark the end of each document. An older dataset
    stays as it is until both new files are complete on the disk.
    """
    dtype, line_break = id_dtype(tokenizer), ''
    if ends and isinstance(tokenizer, CharTokenizer) and '\n' in tokenizer.chars:
        line_break = '\n'

    def encode(batch):
        ids, sizes = [[np.empty(0, dtype)] for _ in SPLITS], [0, 0]
        for split, text in batch:
            if text is None and ends and tokenizer.eot is not None:
                ids[split].append(np.array([tokenizer.eot], dtype))
            text = line_break if text is None else text
            ids[split].append(tokenizer.encode(text).astype(dtype))
            sizes[split] += len(text.encode('utf-8'))
        return [np.concatenate(arrays) for arrays in ids], sizes

    for old in glob.glob(os.path.join(glob.escape(folder), '*.bin.*.tmp')):
        os.remove(old)  # of a process that was killed
    paths = [os.path.join(folder, f'{split}.bin') for split in SPLITS]
    tokens, sizes = [0, 0], [0, 0]
    # threads, because tiktoken works outside of Python's lock. More than 16 would wait for the text
    pool = ThreadPoolExecutor(min(16, os.cpu_count()))
    try:
        with pool, contextlib.ExitStack() as stack:
            files = [stack.enter_context(replace_file(path)) for path in paths]
            for arrays, lengths in map_ahead(pool, encode, batches(parts), 18):
                for i in range(len(SPLITS)):
                    files[i].write(arrays[i].tobytes())
                    tokens[i] += len(arrays[i])
                    sizes[i] += lengths[i]
            for split, n in zip(SPLITS, tokens):
                if not n:
                    fail(f'there is no text for {split}: too little, or another --val_fraction')
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            # meta.json, or nanoGPT's meta.pkl, is there only while both other files are complete
            for meta in ('meta.json', 'meta.pkl'):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, meta))
    except OSError as e:
        cannot_write(folder, e)
    for path, n in zip(paths, tokens):
        print(f'{path}: {n:,} tokens')
    return dict(zip(SPLITS, tokens)), dict(zip(SPLITS, sizes))


def batches(parts):
    """Yield lists of parts with at least BLOCK characters each."""
    batch, size = [], 0
    for split, text in parts:
        batch.append((split, text))
        size += len(text or '')
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    yield batch


def map_ahead(pool, function, items, n):
    """Yield function(item) for each item in order. At most n + 1 items are in work."""
    futures = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > n:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


# -----------------------------------------------------------------------------
# reading texts as a stream

BLOCK = 1 << 18  # characters or bytes
LONGEST = 2 * BLOCK  # characters in a block without a good place for a cut; tiktoken fails at 1M
# Where a text may be cut: after a single line break, before a word; or before a single space
# between two words. The usual tokenizers begin a new token there.
CUTS = [re.compile(r'(?<=\S\n)(?=\w)'), re.compile(r'(?<=\w)(?= \w)')]


class Texts:
    """The documents in the files that `sources` name.

    separator: the string between two documents of a file, or ''. single: whether the input is one
    plain file, and so one document. size: bytes of the files. position: bytes of them that are
    read. digest: a hash of the text's bytes that are read.
    """

    def __init__(self, *sources, separator=''):
        self.name = 'standard input' if sources[0] == '-' else sources[0]
        self.paths = [path for source in sources for path in find_files(source)]
        # what can be read only once is copied into a file without a name
        self.copies = {path: copied(path) for path in self.paths if not os.path.isfile(path)}
        self.separator = separator
        self.single = len(self.paths) == 1 and not separator and not is_jsonl(self.paths[0])
        self.size = sum(self.copies[path].tell() if path in self.copies else os.path.getsize(path)
                        for path in self.paths)

    def blocks(self, work):
        """Yield (text, begins, ends, path): a part of a document, some 260,000 characters or fewer.

        begins, ends: whether this is the first or the last block of its document. work: what this
        is for, shown on a terminal.
        """
        self.digest, self.position = hashlib.sha256(), 0
        yield from show_progress(self.read(), work, self.size, lambda: self.position)

    def read(self):
        for path in self.paths:
            for document in self.documents(path):
                begins = True
                for text, ends in cut(document):
                    if text or not (begins and ends):  # not an empty document
                        yield text, begins, ends, path
                    begins = False

    def documents(self, path):
        """Yield each document of a file as an iterable of strings."""
        chunks = self.chunks(path)
        if is_jsonl(path):
            for i, line in enumerate(split(chunks, b'\n'), start=1):
                if line.strip():
                    yield [field_text(line, f'{path}: line {i}')]
        elif self.separator:
            for document in split(decode(chunks, path), self.separator):
                if document.strip():
                    yield [document.strip()]
        else:
            yield decode(chunks, path)

    def chunks(self, path):
        """Yield the bytes of a file."""
        before, file = self.position, self.copies.get(path)
        try:
            if file:
                file.seek(0)
            else:
                file = open(path, 'rb')
            unpacked = gzip.open(file) if path.endswith('.gz') else file
            while chunk := unpacked.read(BLOCK):
                self.digest.update(chunk)
                self.position = before + file.tell()
                yield chunk
            if path not in self.copies:
                file.close()
        except (OSError, EOFError, zlib.error) as e:
            fail(f'{path}: {getattr(e, "strerror", None) or first_line(e)}')


def find_files(source):
    """Return the paths of the files that --input names; `-` is standard input."""
    if source == '-' or os.path.exists(source) and not os.path.isdir(source):
        return [source]
    folder = os.path.join(glob.escape(source), '**', '*')  # hidden files are left out
    pattern = folder if os.path.isdir(source) else source
    paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not paths:
        fail(f'{source}: there is no file' if glob.has_magic(pattern) else
             f'{source}: No such file or directory')
    unique = {}  # links may lead to a file twice
    for path in paths:
        unique.setdefault(os.path.realpath(path), path)
    return list(unique.values())


def is_jsonl(path):
    return path.endswith(('.jsonl', '.jsonl.gz'))


def copied(path):
    """Return an open file, without a name, with the bytes of a pipe; `-` is standard input."""
    try:
        file = tempfile.TemporaryFile(dir=DATA_DIR)
        pipe = sys.stdin.buffer if path == '-' else open(path, 'rb')
        chunks = iter(lambda: pipe.read(BLOCK), b'')
        file.writelines(show_progress(chunks, 'reading', None, file.tell))
        return file
    except OSError as e:
        cannot_write(DATA_DIR, e, name=f'a copy of {path} to {DATA_DIR}')


def split(parts, separator):
    """Yield what lies between the separators in the concatenated parts."""
    rest = separator[:0]
    for part in parts:
        *whole, rest = (rest + part).split(separator)
        yield from whole
    yield rest


def decode(chunks, path):
    """Yield the text of bytes in UTF-8, without a byte order mark; \\r\\n becomes \\n."""
    decoder, held, done, first = codecs.getincrementaldecoder('utf-8')(), '', 0, True
    for chunk in itertools.chain(chunks, [b'']):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as e:
            # e.object is what was left of the chunks before, and this chunk
            byte = done + len(chunk) - len(e.object) + e.start
            fail(f'{path}: not UTF-8 at byte {byte}: if it is text in another encoding, convert '
                 'it, for example with iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW')
        if first and text:
            text, first = text.removeprefix('\ufeff'), False
        done += len(chunk)
        text = held + text
        held = '\r' if chunk and text.endswith('\r') else ''  # a \n may follow
        yield text[:len(text) - len(held)].replace('\r\n', '\n')


def field_text(line, where):
    """Return the field `text` of a line of JSON, given as bytes."""
    try:
        text = json.loads(line)['text']
        text.encode('utf-8')  # fails for half of a surrogate pair
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fail(f'{where}: this is not a JSON object whose field "text" is a text')
    return text.replace('\r\n', '\n')


def cut(parts, size=BLOCK):
    """Yield (block, last): the concatenated strings in blocks of `size` characters or more.

    The blocks have the same tokens as the whole, but for a long text without a place for a cut.
    """
    block = ''
    for part in parts:
        block += part
        while end := find_cut(block, size):
            yield block[:end], False
            block = block[end:]
    yield block, True


def find_cut(text, size):
    """Return the first place from `size` on at which to cut text, or 0 if more text is needed."""
    for pattern in CUTS:
        if found := pattern.search(text, size):
            return found.start()
    return LONGEST if len(text) > LONGEST else 0


def read_text(path):
    """Return the text of a UTF-8 file, under any locale and without a byte order mark."""
    try:
        with open(path, 'rb') as f:
            return ''.join(decode([f.read()], path))
    except OSError as e:
        fail(f'{path}: {e.strerror}')
