"""
Hugging Face's files of a tokenizer: writing and reading them.

Here a tokenizer is the dict that to_dict of data/tokenizers.py returns. The files are
tokenizer.json and tokenizer_config.json. GPT-2's older vocab.json and merges.txt are read, too.
"""
import hashlib
import json
import os
import re

from configurator import torchrun

GPT2_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|"
                r'\s+(?!\S)|\s+')  # how GPT-2 splits a text before it looks for byte pairs
GPT2_SIZE = 50257
GPT2_SHA256 = 'e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f'  # of its tokens
ONE_BY_ONE = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated',
              'invert': False}  # splits a text into its characters


# -----------------------------------------------------------------------------
# tokens as text: one letter for each byte, as in GPT-2's files

def byte_letters():
    """Return the 256 letters of the bytes. A visible character of Latin-1 stands for itself."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return ''.join(letters[byte] for byte in range(256))


LETTERS = byte_letters()
TO_BYTES = {ord(letter): byte for byte, letter in enumerate(LETTERS)}


def to_letters(token):
    """Return the letters of a token, which is given as bytes."""
    return token.decode('latin-1').translate(LETTERS)


def to_bytes(letters):
    """Return the bytes of a token, which is given as letters."""
    return letters.translate(TO_BYTES).encode('latin-1')


def merges_of(saved):
    """Return the pairs of letters that make the tokens of several bytes, in the order of ids.

    The last two parts of a token are what byte pair encoding makes of it with the tokens of lower
    ids. ValueError names a token that has no such parts: no text would be encoded to it.
    """
    special = set(saved['special'])
    ranks, merges = dict.fromkeys(LETTERS, -1), []
    for rank, token in enumerate(saved['tokens']):
        if rank in special or len(token) == 1:
            continue
        parts = list(token)
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            lowest = min(pairs)
            if lowest == rank:
                break
            i = pairs.index(lowest)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) != 2 or not ranks.keys() >= set(parts):
            raise ValueError(f'its token {token!r} is not made of two tokens of lower ids')
        merges.append(tuple(parts))
        ranks[token] = rank
    return merges


# -----------------------------------------------------------------------------
# writing

def write_tokenizer(folder, saved):
    """Write the files that transformers.AutoTokenizer.from_pretrained(folder) reads."""
    whole = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
             'normalizer': None, 'post_processor': None}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if saved['kind'] == 'char':
        vocab = {char: i for i, char in enumerate(saved['chars'])}
        # no character is <unk>: an unknown character is an error
        whole['model'] = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unk>'}
        whole['pre_tokenizer'], whole['decoder'] = ONE_BY_ONE, {'type': 'Fuse'}
    else:
        tokens, byte_level = saved['tokens'], {'type': 'ByteLevel', 'add_prefix_space': False,
                                               'trim_offsets': True, 'use_regex': False}
        whole['model'] = {
            'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
            'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
            'vocab': {token: i for i, token in enumerate(tokens)},
            'merges': [' '.join(pair) for pair in merges_of(saved)]}
        split = ONE_BY_ONE | {'pattern': {'Regex': saved['pattern']}}
        whole['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [split, byte_level]}
        whole['decoder'] = byte_level
        whole['added_tokens'] = [
            {'id': i, 'content': tokens[i], 'single_word': False, 'lstrip': False,
             'rstrip': False, 'normalized': False, 'special': True} for i in saved['special']]
        if saved['eot'] is not None:
            config |= dict.fromkeys(('bos_token', 'eos_token'), tokens[saved['eot']])
    for name, content in (('tokenizer.json', whole), ('tokenizer_config.json', config)):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=1)


# -----------------------------------------------------------------------------
# reading; ValueError names what quill cannot represent exactly

def read_tokenizer(path):
    """Return the tokenizer of a folder, or of a tokenizer.json; None if the folder has none."""
    folder, file = path, os.path.join(path, 'tokenizer.json')
    if not os.path.isdir(path):
        folder, file = os.path.dirname(path), path
    config = read_json(os.path.join(folder, 'tokenizer_config.json'), {})
    model = read_json(os.path.join(folder, 'config.json'), {})
    try:
        whole = read_json(file, None)
        if whole is None:
            file = os.path.join(folder, 'vocab.json')
            whole = read_vocab_and_merges(folder, config)
        if whole is None:
            return None
        if whole.get('normalizer'):
            raise ValueError(f'it changes a text first ({whole["normalizer"]["type"]})')
        if whole['model']['type'] == 'WordLevel':
            return read_characters(whole)
        return read_byte_pairs(whole, config, model)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        problem = f'it has not the form of a tokenizer ({e!r})'
    except ValueError as e:
        problem = str(e)
    raise ValueError(f'{file} cannot be used: {problem}')


def read_json(path, default):
    """Return the content of a JSON file, or the default if there is no such file."""
    if not os.path.exists(path):
        return default
    with open(path, encoding='utf-8') as f:
        text = f.read()
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f'{path} is not JSON: its text begins with {text[:40]!r}')


def read_vocab_and_merges(folder, config):
    """Return vocab.json and merges.txt in the form of a tokenizer.json, or None without them."""
    vocab = read_json(os.path.join(folder, 'vocab.json'), None)
    path = os.path.join(folder, 'merges.txt')
    if vocab is None or not os.path.exists(path):
        return None
    with open(path, encoding='utf-8') as f:
        merges = [line.rstrip('\n') for line in f if not line.startswith('#version')]
    added = [{'id': int(i), **token} for i, token in
             config.get('added_tokens_decoder', {}).items()]
    if not added:
        more = read_json(os.path.join(folder, 'added_tokens.json'), {})
        added = [{'id': i, 'content': text, 'special': True} for text, i in more.items()]
    return {'model': {'type': 'BPE', 'vocab': vocab, 'merges': [m for m in merges if m]},
            'added_tokens': added, 'pre_tokenizer': {'type': 'ByteLevel'}}


def read_characters(whole):
    """Return a vocabulary of single characters, in the form in which write_tokenizer writes it."""
    chars = in_order(whole['model']['vocab'])
    if any(len(char) != 1 for char in chars) or whole['pre_tokenizer'] != ONE_BY_ONE \
            or whole['added_tokens']:
        raise ValueError('its vocabulary is words, which quill does not read')
    return {'kind': 'char', 'chars': ''.join(chars)}


def read_byte_pairs(whole, config, model_config):
    """Return the tokenizer of a byte-level BPE model."""
    model, added = whole['model'], whole['added_tokens']
    if model['type'] != 'BPE':
        raise ValueError(f'its model is {model["type"]}, quill reads byte-level BPE')
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(key):
            raise ValueError(f'its model has {key}={model[key]!r}')
    for token in added:
        if not token['special']:
            raise ValueError(f'its added token {token["content"]!r} is not a special one: texts '
                             'are cut there before they become byte pairs')
    merges = [tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']]
    tokens = in_order(model['vocab'] | {token['content']: token['id'] for token in added})
    ordinary = {*LETTERS, *map(''.join, merges)} - {token['content'] for token in added}
    if missing := set(LETTERS) - set(tokens):
        raise ValueError(f'it lacks tokens for {len(missing)} of the 256 bytes')
    special = [i for i, token in enumerate(tokens) if token not in ordinary]
    saved = {'kind': 'bpe', 'pattern': read_pattern(whole['pre_tokenizer'], config),
             'tokens': tokens, 'special': special, 'eot': None}
    if merges_of(saved) != merges:
        raise ValueError('its merges have another order than its ids, which tiktoken cannot do')
    # a config.json may hold GPT-2's default of 50256, which may be any token here
    ends = [config.get('eos_token'), '<|endoftext|>']
    ends = [end['content'] if isinstance(end, dict) else end for end in ends]
    ends = [tokens.index(end) for end in ends if end in tokens] + [model_config.get('eos_token_id')]
    saved['eot'] = next((end for end in ends if end in special), None)
    return gpt2_or(saved)


def in_order(vocab):
    """Return the tokens of a vocabulary {token: id} in the order of ids."""
    tokens = sorted(vocab, key=vocab.get)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f'the ids of its {len(tokens)} tokens are not 0 to {len(tokens) - 1}')
    return tokens


def read_pattern(pre_tokenizer, config):
    """Return the regular expression by which a pre-tokenizer splits a text."""
    kind = (pre_tokenizer or {}).get('type')
    *splits, last = pre_tokenizer['pretokenizers'] if kind == 'Sequence' else [pre_tokenizer or {}]
    own = last.get('use_regex', True)
    if last.get('add_prefix_space') or config.get('add_prefix_space'):
        raise ValueError('it puts a space before every text (add_prefix_space)')
    if last.get('type') == 'ByteLevel' and own and not splits:
        return GPT2_PATTERN
    if last.get('type') == 'ByteLevel' and not own and [s['type'] for s in splits] == ['Split']:
        split, = splits
        pattern = split['pattern'].get('Regex')
        matches = (split['behavior'], split['invert']) in (('Isolated', False), ('Removed', True))
        # these mean something else in the regular expressions of tiktoken
        if pattern and matches and not re.search(r'\$|(?<!\[)\^|[\d,]\}\+', pattern):
            return pattern
    raise ValueError('it splits texts in a way that quill cannot (pre_tokenizer)')


def gpt2_or(saved):
    """Return {'kind': 'gpt2'} if a tokenizer is GPT-2's with or without more special tokens."""
    tokens, more = saved['tokens'][:GPT2_SIZE], saved['tokens'][GPT2_SIZE:]
    digest = hashlib.sha256('\n'.join(tokens).encode('utf-8', 'replace')).hexdigest()
    if digest != GPT2_SHA256 or saved['pattern'] != GPT2_PATTERN \
            or saved['special'] != list(range(GPT2_SIZE - 1, len(saved['tokens']))):
        return saved
    if more and torchrun('RANK', 0) == 0:
        print(f"note: GPT-2's tokens, without {len(more)} special ones added to them: "
              + ' '.join(map(repr, more[:10])), flush=True)
    return {'kind': 'gpt2'}
