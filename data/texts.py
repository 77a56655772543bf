"""
Texts of any size, read as a stream: files, folders, patterns, .gz, .jsonl, and standard input.

    texts = Texts('books/*.txt')
    for text, begins, ends, path in texts.blocks('reading'): ...

A plain file is one document, or several with a separator between them. In a .jsonl file, each line
is a document: its field `text`.
"""
import codecs
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

from configurator import fail, first_line
from data.downloads import DATA_DIR
from data.files import cannot_write, show_progress

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
