"""
From texts of any size to a dataset. The texts are read as a stream, twice: first to make a
tokenizer, or to check a given one; then they are divided into training and validation, tokenized by
several threads, and written.
"""
import codecs
import contextlib
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
from pathlib import Path

from configurator import fail, first_line, one_line_errors
from data.bpe import PATTERN, count_pieces, to_letters, train_bpe
from data.dataset import SPLITS, id_dtype, is_val, make_meta, write_meta
from data.files import DATA_DIR, cannot_write, replace_file, show_progress, take_turns
from data.tokenizers import BytePairTokenizer, CharTokenizer, tokenizer_from_dict

import numpy as np

SAMPLE = 100_000_000  # number of characters that suffice to train a tokenizer
MANY_DOCUMENTS = 100  # from this number on, whole documents are chosen for validation


def write_dataset(name, texts, kind, drop=False, vocab_size=4096, val_fraction=0.1, val_paths=()):
    """Make the dataset data/NAME.

    texts: a Texts, or the path of a text. kind: char (the characters of the texts), bpe (vocab_size
    byte pairs trained on the texts), gpt2, or what to_dict of a tokenizer returned. drop: leave out
    characters that this tokenizer lacks; otherwise they are an error. val_fraction: the fraction
    for validation. It is the end of the text, or, among many documents, those that a hash chooses.
    val_paths: the files for validation, if they are chosen already.
    """
    texts = texts if isinstance(texts, Texts) else Texts(texts)
    missing = Counter()
    if kind == 'char':
        tokenizer = learn_characters(texts)
    elif kind == 'bpe':
        tokenizer = learn_byte_pairs(texts, vocab_size)
    else:
        tokenizer = tokenizer_from_dict({'kind': 'gpt2'} if kind == 'gpt2' else kind)
        missing = missing_characters(texts, tokenizer, drop)
    print(f'{texts.name}: {texts.characters:,} characters, documents: {texts.documents:,}')
    parts = divide(texts, tokenizer, missing, val_fraction, val_paths)
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
    return BytePairTokenizer(PATTERN, [*tokens, '<|endoftext|>'], [eot], eot)


def missing_characters(texts, tokenizer, drop):
    """Count the characters that a given tokenizer lacks. Fail unless they may be left out."""
    missing = Counter()
    for text in texts.blocks('reading'):
        if isinstance(tokenizer, CharTokenizer):
            text = text or (texts.line_break if tokenizer.eot is None else '')
            for character in tokenizer.missing(text):
                missing[character] += text.count(character)
    if missing:
        shown = ' '.join(map(repr, sorted(missing)[:50]))
        what = (f'{sum(missing.values()):,} of {texts.characters:,} characters are not in the '
                f'vocabulary: {shown}')
        if not drop:
            fail(f'{what}: leave them out with --unknown=drop')
        print(f'note: {what}: they are left out')
    return missing


def divide(texts, tokenizer, missing, val_fraction, val_paths):
    """Yield (split, text): the texts in blocks; the text None stands for an end-of-text token.

    missing: the characters to leave out. The texts have been read once, so their size is known.
    """
    by_document = val_paths or texts.documents >= MANY_DOCUMENTS
    size = texts.characters - sum(missing.values())
    train_size = int(size * (1 - Fraction(str(val_fraction))))  # 0.1 is exactly a tenth
    dropped = dict.fromkeys(map(ord, missing))
    end = texts.line_break.translate(dropped)
    if tokenizer.eot is not None and not texts.single:
        end = None
    position, split = 0, None
    for text in texts.blocks('tokenizing'):
        if text is None:
            yield split, end
            split = None
            continue
        text = text.translate(dropped)
        if by_document:
            if split is None:
                chosen = texts.path in val_paths
                if not val_paths:
                    chosen = is_val(text.encode(), val_fraction)
                split = 'val' if chosen else 'train'
            yield split, text
        else:
            n = max(train_size - position, 0)
            yield 'train', text[:n]
            yield 'val', text[n:]
            position += len(text)
            split = 'train' if position <= train_size else 'val'


def tokenize(parts, tokenizer):
    """Yield (split, ids, bytes of text) for parts, which are pairs as divide yields them."""
    # tiktoken works outside of Python's lock. More than 16 threads would wait for the text
    threads = min(16, os.cpu_count())
    with ThreadPoolExecutor(threads) as pool:
        futures = deque()
        for batch in batches(parts):
            futures.append(pool.submit(encode, batch, tokenizer))
            if len(futures) > threads + 2:  # do not read far ahead
                yield from futures.popleft().result()
        for future in futures:
            yield from future.result()


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


def encode(batch, tokenizer):
    """Return [(split, ids, bytes of text)] of a list of parts."""
    dtype, encoded = id_dtype(tokenizer), []
    for split, text in batch:
        ids = [tokenizer.eot] if text is None else tokenizer.encode(text)
        size = len(text.encode()) if text else 0
        encoded.append((split, np.array(ids, dtype), size))
    return encoded


def write_tokens(folder, pieces, tokenizer, source, sha256):
    """Write a dataset. An older one stays as it is until both new files are complete on the disk.

    pieces: an iterable of (split, ids, bytes of text). source, sha256: as in make_meta.
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
                        fail(f'there is no text for {split}: too little, or another --val_fraction')
                    file.flush()
                    os.fsync(file.fileno())
                # train.bin is missing until all else is in place: it gets its new name last
                for old in ('train.bin', 'meta.pkl'):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(folder, old))
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

# the first bytes of files that are not UTF-8 text
FOREIGN = {b'PK\3\4': 'a zip archive, as .docx and .epub are', b'PAR1': 'a parquet file',
           b'%PDF': 'a PDF', b'\xff\xfe': 'UTF-16', b'\xfe\xff': 'UTF-16'}
JSON = re.compile(rb'\s*\[?\s*\{\s*"|\s*\[\s*"')  # how JSON begins, whatever the file's name is


class Texts:
    """The documents in the files that `sources` name.

    separator: the string between two documents of a file, or ''. field: the field of JSON objects
    that holds the text; '' reads JSON as plain text. single: whether the input is one plain file,
    and so one document. line_break: what follows each document if the tokenizer has no end-of-text
    token. size: the bytes of the files.

    While the texts are read, path is the file in work. Read so far are `position` bytes of the
    files, `characters`, and `documents`; `digest` is a hash of the text's bytes.
    """

    def __init__(self, *sources, separator='', field='text'):
        self.name = sources[0]
        self.paths = [path for source in sources for path in find_files(source)]
        self.separator, self.field = separator, field
        self.forms = {path: form_of(path, field) for path in self.paths}
        self.single = [*self.forms.values()] == ['plain'] and not separator
        self.line_break = '' if self.single else '\n'
        self.size = sum(map(os.path.getsize, self.paths))

    def blocks(self, work):
        """Yield the texts in blocks of some 260,000 characters, and None after each document.

        work: what the texts are read for, shown on a terminal.
        """
        self.position = self.characters = self.documents = 0
        self.digest = hashlib.sha256()
        return show_progress(self.read(), work, self.size, lambda: self.position)

    def read(self):
        for self.path in self.paths:
            for document in self.read_file():
                before = self.characters
                for block in cut(document):
                    if block:
                        self.characters += len(block)
                        yield block
                if self.characters > before:
                    self.documents += 1
                    yield None

    def read_file(self):
        """Yield each document of the file in work as an iterable of strings."""
        if self.forms[self.path] != 'plain':
            yield from self.read_json()
        elif self.separator:
            for document in split_at(self.separator, self.strings()):
                yield [document.strip()]
        else:
            yield self.strings()

    def read_json(self):
        """Yield the text of each line of JSON; or of each item of a list, which is read whole."""
        lines, unit = split_at('\n', self.strings()), 'line'
        if self.forms[self.path] == 'list':
            with one_line_errors(f'{self.path}: ', (ValueError, RecursionError)):
                lines, unit = map(json.dumps, json.loads('\n'.join(lines))), 'item'
        for i, line in enumerate(lines, start=1):
            if line.strip():
                yield [json_text(line, self.field, f'{self.path}: {unit} {i}')]

    def strings(self):
        """Yield the text of the file in work. All line ends become \\n, a byte order mark goes."""
        utf8 = codecs.getincrementaldecoder('utf-8-sig')()
        decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        before, done = self.position, 0
        try:
            for chunk, position in read_chunks(self.path):
                if b'\0' in chunk:
                    fail(f'{self.path}: a NUL at byte {done + chunk.index(0)}: it is UTF-16 or not '
                         'a text: save its text as UTF-8')
                self.digest.update(chunk)
                self.position, done = before + position, done + len(chunk)
                yield decoder.decode(chunk)
            yield decoder.decode(b'', final=True)
        except UnicodeDecodeError as e:
            byte = done - len(e.object) + e.start  # e.object ends with the chunk
            fail(f'{self.path}: not UTF-8 at byte {byte}: if it is text in another encoding, '
                 'convert it: iconv -f ENCODING -t UTF-8 OLD > NEW')


def read_chunks(path):
    """Yield (bytes, position): a file in pieces, unpacked if it is packed by gzip."""
    try:
        with open(path, 'rb') as file:
            packed = file.read(2) == b'\x1f\x8b'
            file.seek(0)
            unpacked = gzip.open(file) if packed else file
            while chunk := unpacked.read(BLOCK):
                yield chunk, file.tell()
    except (OSError, EOFError, zlib.error) as e:
        fail(f'{path}: {getattr(e, "strerror", None) or first_line(e)}')


def form_of(path, field):
    """Return plain, lines (of JSON), or list (in JSON). Fail if the file holds no plain text."""
    head, _ = next(read_chunks(path), (b'', 0))
    head, name = head.removeprefix(codecs.BOM_UTF8), path.lower().removesuffix('.gz')
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            fail(f'{path} is {what}: save its text as UTF-8')
    if field and name.endswith(('.csv', '.tsv')):
        fail(f'{path} is a table: write each text as a line {{"{field}": "..."}} to a .jsonl file, '
             'or train on all of it with --field=')
    if not field or not name.endswith(('.json', '.jsonl', '.ndjson')) and not JSON.match(head):
        return 'plain'
    return 'list' if head.lstrip().startswith(b'[') else 'lines'


def find_files(source):
    """Return the paths of the files that `source` names: a file, a folder, or a pattern.

    Hidden files are left out. Neither a folder nor ** leads through links to other folders, which
    could form a cycle.
    """
    if os.path.isfile(source):
        return [source]
    folder, pattern = Path(source), '**/*'
    if not os.path.isdir(source):
        if source == '-' or os.path.exists(source):
            fail(f'--input={source}: give the path of a file, because the text is read twice')
        folder, pattern = Path(folder.anchor), str(folder.relative_to(folder.anchor))
    with one_line_errors(f'--input={source}: '):  # a pattern like a**b
        paths = sorted(map(str, folder.glob(pattern)), reverse=True)
    unique = {}
    for found in paths:
        hidden = any(name[0] == '.' for name in set(Path(found).parts) - set(Path(source).parts))
        if os.path.isfile(found) and not hidden:
            unique[os.path.realpath(found)] = found  # links may lead to a file twice
    if not unique:
        fail(f'{source}: No such file, or a folder without files')
    return sorted(unique.values())


def split_at(separator, strings):
    """Yield what lies between the separators in the concatenated strings."""
    rest = ''
    for string in strings:
        *whole, rest = (rest + string).split(separator)
        yield from whole
    yield rest


def json_text(line, field, where):
    """Return the text in a line of JSON: a string, or the field of an object."""
    try:
        value = json.loads(line)
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError
        text.encode()  # ValueError for half of a surrogate pair
    except (ValueError, RecursionError):
        fail(f'{where}: this is not JSON with a text in its field "{field}": give another --field, '
             'or train on all of it with --field=')
    return text.replace('\r\n', '\n')


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
