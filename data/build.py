"""
From texts of any size to a dataset. The texts are read as a stream, twice: first to make a
tokenizer, or to check a given one; then they are divided into training and validation, tokenized by
several threads, and written.
"""
import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

from configurator import fail, one_line_errors
from data.bpe import PATTERN, count_pieces, to_letters, train_bpe
from data.dataset import SPLITS, id_dtype, is_val, make_meta, write_meta
from data.files import DATA_DIR, cannot_write, replace_file, show_progress, take_turns
from data.tokenizers import END, BytePairTokenizer, CharTokenizer, tokenizer_from_dict

import numpy as np

SAMPLE = 100_000_000  # number of characters that suffice to train a tokenizer
MANY_DOCUMENTS = 100  # from this number on, whole documents are chosen for validation


def write_dataset(name, texts, kind, drop=False, vocab_size=4096, val_fraction=0.1, val_paths=()):
    """Make the dataset data/NAME.

    texts: a Texts, or the path of a text. kind: char (the characters of the texts), bpe (vocab_size
    byte pairs trained on the texts), or what to_dict of a tokenizer returned. drop: leave out
    characters that this tokenizer lacks; otherwise they are an error. val_fraction: the fraction
    for validation. It is the end of the text, or, among many documents, those that a hash chooses.
    val_paths: files that are for validation as a whole.
    """
    texts = texts if isinstance(texts, Texts) else Texts(texts)
    if kind == 'char':
        tokenizer = learn_characters(texts)
    elif kind == 'bpe':
        tokenizer = learn_byte_pairs(texts, vocab_size)
    else:
        tokenizer = tokenizer_from_dict(kind)
        check_characters(texts, tokenizer, drop)
    print(f'{texts.name}: {texts.characters:,} characters, documents: {texts.documents:,}')
    parts = divide(texts, val_fraction, val_paths)
    source = os.path.basename(os.path.normpath(texts.name))
    with one_line_errors(f'{texts.name}: '):  # a text that changes meanwhile has new characters
        write_tokens(os.path.join(DATA_DIR, name), tokenize(parts, tokenizer), tokenizer, source,
                     texts.digest.hexdigest())


def learn_characters(texts):
    """Return the tokenizer of the characters in the texts."""
    alphabet = set()
    for text in texts.blocks('reading'):
        alphabet.update(text or '')
    tokenizer = CharTokenizer(alphabet, eot=True)
    print(f'vocabulary: {len(alphabet):,} characters {tokenizer.chars[:200]!r}')
    return tokenizer


def learn_byte_pairs(texts, vocab_size):
    """Return a tokenizer of byte pairs that is trained on the texts."""
    pieces, sampled = Counter(), 0
    for text in texts.blocks('reading'):
        # of a large text, take a sample that is spread evenly
        if text and sampled <= SAMPLE * texts.position / texts.size:
            pieces.update(count_pieces([text]))
            sampled += len(text)
    print(f'training {vocab_size:,} tokens on {sampled:,} characters', flush=True)
    tokens = [to_letters(token) for token in train_bpe(pieces, vocab_size - 1)]
    eot = len(tokens)
    print(f'vocabulary: {eot + 1:,} byte pairs')
    return BytePairTokenizer(PATTERN, [*tokens, END], [eot], eot)


def check_characters(texts, tokenizer, drop):
    """Fail if a given tokenizer lacks characters of the texts; drop: leave them out instead."""
    counts = Counter()
    for text in texts.blocks('reading'):
        if isinstance(tokenizer, CharTokenizer):  # byte pairs can write any text
            counts.update(text or '')
    missing = {char: n for char, n in counts.items() if char not in tokenizer.chars}
    if missing:
        shown = ' '.join(map(repr, sorted(missing)[:50]))
        what = (f'{sum(missing.values()):,} of {texts.characters:,} characters are not in the '
                f'vocabulary: {shown}')
        if not drop:
            fail(f'{what}: leave them out with --unknown=drop')
        print(f'note: {what}: they are left out')
        texts.dropped = dict.fromkeys(map(ord, missing))
        texts.characters -= sum(missing.values())


def divide(texts, val_fraction, val_paths):
    """Yield (split, text): the texts in blocks. If they are several documents, None follows each.

    The texts have been read once, so their size and number are known.
    """
    several = texts.documents > 1
    by_document = val_paths or texts.documents >= MANY_DOCUMENTS
    train_size = int(texts.characters * (1 - Fraction(str(val_fraction))))  # 0.1: exactly a tenth
    position, split = 0, None
    for text in texts.blocks('tokenizing'):
        if text is None:
            if several:
                yield split, None
            split = None
        elif not by_document:
            n = max(train_size - position, 0)
            yield 'train', text[:n]
            yield 'val', text[n:]
            position += len(text)
            split = 'train' if position <= train_size else 'val'
        else:
            if split is None:
                chosen = texts.path in val_paths or is_val(text.encode(), val_fraction)
                split = 'val' if chosen else 'train'
            yield split, text


def tokenize(parts, tokenizer):
    """Yield (split, ids, bytes of text) for parts, an iterator over pairs as divide yields them."""
    # tiktoken works outside of Python's lock. More than 16 threads would wait for the text
    threads = min(16, os.cpu_count())
    with ThreadPoolExecutor(threads) as pool:
        futures = deque()
        while batch := list(islice(parts, 16)):  # one by one, short documents would take longer
            futures.append(pool.submit(encode, batch, tokenizer))
            if len(futures) > threads + 2:  # do not read far ahead
                yield from futures.popleft().result()
        for future in futures:
            yield from future.result()


def encode(batch, tokenizer):
    """Return [(split, ids, bytes of text)] of a list of parts."""
    dtype, encoded = id_dtype(tokenizer), []
    for split, text in batch:
        if text is None and tokenizer.eot is None:
            text = '\n'  # follows each document, as in older datasets
        ids = [tokenizer.eot] if text is None else tokenizer.encode(text)
        encoded.append((split, np.array(ids, dtype), len((text or '').encode())))
    return encoded


def write_tokens(folder, pieces, tokenizer, source, sha256):
    """Write a dataset. An older one stays as it is until both new files are complete on the disk.

    pieces: an iterable of (split, ids, bytes of text). sha256: identifies the text.
    """
    train, val = (os.path.join(folder, f'{split}.bin') for split in SPLITS)
    tokens, sizes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    try:
        os.makedirs(folder, exist_ok=True)
        with take_turns(folder):
            for old in glob.glob(os.path.join(glob.escape(folder), '*.bin.*.tmp')):
                os.remove(old)  # its process was killed
            with replace_file(train) as train_file, replace_file(val) as val_file:
                files = {'train': train_file, 'val': val_file}
                for split, ids, size in pieces:
                    files[split].write(ids.tobytes())
                    tokens[split] += len(ids)
                    sizes[split] += size
                for split, file in files.items():
                    if not tokens[split]:
                        fail(f'{source}: there is no text for {split}: too little, or another '
                             '--val_fraction')
                    file.flush()
                    os.fsync(file.fileno())
                # train.bin is missing until all else is in place: it gets its new name last
                Path(train).unlink(missing_ok=True)
                write_meta(folder, make_meta(tokenizer, source, sha256, tokens, sizes))
    except OSError as e:
        cannot_write(folder, e)
    print(f'{train}: {tokens["train"]:,} tokens\n{val}: {tokens["val"]:,} tokens', flush=True)


# -----------------------------------------------------------------------------
# reading texts as a stream

BLOCK = 1 << 18  # number of characters or bytes
LONGEST = 2 * BLOCK  # characters in a block without a good place for a cut; tiktoken fails at 1M
# Where a text may be cut: after a single line break, before a word; or before a single space
# between two words. The usual tokenizers begin a new token there.
CUTS = [re.compile(r'(?<=\S\n)(?=\w)'), re.compile(r'(?<=\w)(?= \w)')]
JSON = re.compile(rb'\s*\[?\s*\{\s*"|\s*\[\s*"')  # how JSON begins, whatever the file's name is


class Texts:
    """The documents in the files that `sources` name.

    separator: the string after each document of a file, or ''. field: the field of JSON objects
    that holds the text; '' reads JSON as plain text. dropped: a dict for str.translate, which
    leaves out characters. size: the bytes of the files.

    While the texts are read, path is the file in work. Read so far are `position` bytes of the
    files, `characters`, and `documents`; `digest` is a hash of the text's bytes.
    """

    def __init__(self, *sources, separator='', field='text'):
        self.name = sources[0]
        self.paths = [path for source in sources for path in find_files(source)]
        self.separator, self.field, self.dropped = separator, field, {}
        self.size = sum(map(os.path.getsize, self.paths))

    def blocks(self, work):
        """Yield the texts in blocks of some 260,000 characters, and None after each document."""
        self.position = self.characters = self.documents = 0
        self.digest = hashlib.sha256()
        return show_progress(self.read(), work, self.size, lambda: self.position)

    def read(self):
        for self.path in self.paths:
            for document in self.read_file():
                before = self.characters
                for block in cut(document):
                    if block := block.translate(self.dropped):
                        self.characters += len(block)
                        yield block
                if self.characters > before:
                    self.documents += 1
                    yield None

    def read_file(self):
        """Yield each document of the file in work as an iterable of strings."""
        head, _ = next(read_chunks(self.path), (b'', 0))
        head = head.removeprefix(codecs.BOM_UTF8)
        name = self.path.lower().removesuffix('.gz')
        named_json = name.endswith(('.json', '.jsonl', '.ndjson'))
        if self.field and name.endswith(('.csv', '.tsv')):
            fail(f'{self.path} is a table: write its texts to a .jsonl file, each as a line '
                 f'{{"{self.field}": "..."}}, or train on all of it with --field=')
        if self.field and (named_json or JSON.match(head)):
            yield from self.read_json(is_list=head.lstrip().startswith(b'['))
        elif self.separator:
            # without what follows the last separator: a document whose end is missing
            for document, _ in pairwise(split_at(self.separator, self.strings())):
                yield [document.strip()]
        else:
            yield self.strings()

    def read_json(self, is_list):
        """Yield the text of each line of JSON; or of each item of a list, which is read whole."""
        done = 0
        try:
            values = (json.loads(line) for line in split_at('\n', self.strings()) if line.strip())
            if is_list:
                values = json.loads(''.join(self.strings()))
            for value in values:
                text = value.get(self.field) if isinstance(value, dict) else value
                if not isinstance(text, str):
                    raise ValueError
                text.encode()  # ValueError for half of a surrogate pair
                yield [text.replace('\r\n', '\n')]
                done += 1
        except (ValueError, RecursionError):
            fail(f'{self.path}: document {done + 1} is not JSON with a text in its field '
                 f'"{self.field}": give another --field, or train on all of it with --field=')

    def strings(self):
        """Yield the text of the file in work. All line ends become \\n, a byte order mark goes."""
        utf8 = codecs.getincrementaldecoder('utf-8-sig')()
        decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        before, done = self.position, 0
        try:
            for chunk, position in read_chunks(self.path):
                if b'\0' in chunk:
                    fail(f'{self.path}: a NUL at byte {done + chunk.index(0)}: save it as UTF-8')
                self.digest.update(chunk)
                self.position, done = before + position, done + len(chunk)
                yield decoder.decode(chunk)
            # a document whose end is missing may end within a character
            yield decoder.decode(b'', final=not self.separator)
        except UnicodeDecodeError as e:
            byte = done - len(e.object) + e.start  # e.object ends with the chunk
            fail(f'{self.path}: not UTF-8 at byte {byte}: save its text as UTF-8')


def read_chunks(path):
    """Yield (bytes, position): a file in pieces, unpacked if it is packed by gzip."""
    with one_line_errors(f'{path}: ', (OSError, EOFError, zlib.error)), open(path, 'rb') as file:
        packed = file.read(2) == b'\x1f\x8b'
        file.seek(0)
        unpacked = gzip.open(file) if packed else file
        while chunk := unpacked.read(BLOCK):
            yield chunk, file.tell()


def find_files(source):
    """Return the paths of the files that `source` names: a file, a folder, or a pattern.

    Hidden files, and what lies behind links to folders, which may form a cycle, are left out.
    """
    if os.path.isfile(source):
        return [source]
    folder, pattern = Path(source), '**/*'
    if not os.path.isdir(source):
        folder, pattern = Path(folder.anchor), str(folder.relative_to(folder.anchor))
    paths = []
    with one_line_errors(f'--input={source}: '):  # a pattern like a**b
        for path in folder.glob(pattern):
            hidden = any(name[0] == '.' for name in set(path.parts) - set(Path(source).parts))
            if path.is_file() and not hidden:
                paths.append(str(path))
    if not paths:
        fail(f'{source}: No such file, or a folder without files. A pipe cannot be read twice')
    return sorted(paths)


def split_at(separator, strings):
    """Yield what lies between the separators in the concatenated strings."""
    rest = ''
    for string in strings:
        *whole, rest = (rest + string).split(separator)
        yield from whole
    yield rest


def cut(strings):
    """Yield the concatenated strings in blocks of BLOCK characters or a few more.

    The blocks have the same tokens as the whole, except in a long text without a place for a cut.
    """
    block = ''
    for string in strings:
        block += string
        while end := find_cut(block):
            yield block[:end]
            block = block[end:]
    yield block


def find_cut(text):
    """Return the first place from BLOCK on at which to cut text, or 0 if more text is needed."""
    for pattern in CUTS:
        if found := pattern.search(text, BLOCK):
            return found.start()
    return LONGEST if len(text) > LONGEST else 0


def read_text(path):
    """Return the text of a UTF-8 file, under any locale and without a byte order mark."""
    return ''.join(filter(None, Texts(path, field='').blocks('reading')))
