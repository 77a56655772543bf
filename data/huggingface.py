"""
Folders of Hugging Face's library transformers: GPT-2's weights and tokenizers, in and out.

    model = load_gpt2(gpt2_folder('gpt2'))
    save_gpt2(model, folder)
"""
import glob
import hashlib
import json
import math
import os
import re
import shlex

import torch

from configurator import fail, torchrun
from data.bpe import LETTERS
from data.downloads import DownloadError, download_resumable, hub_address
from data.files import DATA_DIR
from model import GPT, GPTConfig

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GPT2_FILES = ('config.json', 'model.safetensors')
# Hugging Face's names of activations, and ours
OUR_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
# GPT-2 stores the matrices of its blocks as (in, out)
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
LFS_POINTER = b'version https://git-lfs'  # the file begins so


def gpt2_folder(name, files=GPT2_FILES, process=None):
    """Return the folder that holds these files of a GPT-2. Missing files are downloaded.

    name: one of GPT2_NAMES, or a folder, which is returned as it is. The files are taken from
    Hugging Face's cache if they are there, otherwise from data/gpt2_weights.
    process: makes one rank of each node download while the other ranks wait.
    """
    if name not in GPT2_NAMES:
        if not os.path.isdir(name):
            fail(f'init_from={name}: init_from is one of resume, {", ".join(GPT2_NAMES)}, '
                 'or a folder with config.json and model.safetensors')
        return name
    if process:
        process.once_per_node(lambda: gpt2_folder(name, files))
    for repository in (f'models--openai-community--{name}', f'models--{name}'):
        for folder in glob.glob(os.path.join(hub_cache(), repository, 'snapshots', '*')):
            if all(os.path.exists(os.path.join(folder, file)) for file in files):
                return folder
    folder = os.path.join(DATA_DIR, 'gpt2_weights', name)
    for file in files:
        path = os.path.join(folder, file)
        url = f'{hub_address()}/openai-community/{name}/resolve/main/{file}'
        try:
            download_resumable(url, path)
        except DownloadError as e:
            fail(f'no weights of {name}: {e}')
    return folder


def hub_cache():
    """Return the folder of Hugging Face's cache, by the rules of its library huggingface_hub."""
    def expand(path):
        return os.path.expandvars(os.path.expanduser(path))
    home = os.path.join(os.environ.get('XDG_CACHE_HOME', '~/.cache'), 'huggingface')
    home = expand(os.environ.get('HF_HOME', home))
    hub = os.environ.get('HUGGINGFACE_HUB_CACHE', os.path.join(home, 'hub'))  # its older name
    return expand(os.environ.get('HF_HUB_CACHE', hub))


def read_pretrained(source, weights=True):
    from dataclasses import asdict

    from data.tokenizers import pretrained_tokenizer
    if source not in GPT2_NAMES and not os.path.isdir(source):
        raise ValueError(f'init_from={source}: init_from is one of scratch, resume, auto, '
                         f'{", ".join(GPT2_NAMES)}, or a folder')
    c = gpt2_config(gpt2_folder(source, ['config.json']))
    found = {'model_args': asdict(c), 'tokenizer': pretrained_tokenizer(source, c.vocab_size)}
    if weights:
        found['model'] = load_gpt2(gpt2_folder(source)).state_dict()
    return found


# -----------------------------------------------------------------------------
# reading

def gpt2_config(folder, block_size=0, dropout=0.0):
    """Return the GPTConfig of the GPT-2 in folder; see load_gpt2."""
    path = os.path.join(folder, 'config.json')
    c = read_json_dict(path)
    if c.get('model_type') != 'gpt2':
        raise ValueError(f'{path} describes a model of type {json.dumps(c.get("model_type"))}, '
                         'quill reads "gpt2" only')
    for key in ('n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if type(c.get(key)) is not int or c[key] < 1:
            raise ValueError(f'{path} has {key}={json.dumps(c.get(key))}: {key} is at least 1')
    readable = {  # values of each key; a missing key has the first value
        'architectures': (['GPT2LMHeadModel'], ['GPT2Model'], None),
        'activation_function': tuple(OUR_ACTIVATIONS),
        'n_inner': (None, 4 * c['n_embd']),
        'layer_norm_epsilon': (1e-5,),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'add_cross_attention': (False,),
        'tie_word_embeddings': (True, False)}
    for key, values in readable.items():
        if c.setdefault(key, values[0]) not in values:
            raise ValueError(f'{path} has {key}={json.dumps(c[key])}: quill reads only models '
                             f'with {" or ".join(map(json.dumps, values))}')
    if not 0 <= block_size <= c['n_positions']:
        raise ValueError(f'block_size={block_size} but the model has {c["n_positions"]} positions')
    return GPTConfig(
        block_size=block_size or c['n_positions'], vocab_size=c['vocab_size'],
        n_layer=c['n_layer'], n_head=c['n_head'], n_embd=c['n_embd'], dropout=dropout,
        bias=True, activation=OUR_ACTIVATIONS[c['activation_function']],
        tie_weights=c['tie_word_embeddings'])


def load_gpt2(folder, block_size=0, dropout=0.0):
    """Return the GPT-2 in folder, in float32: config.json and .safetensors of transformers.

    block_size > 0 keeps only that many positions. Raises ValueError for other models.
    """
    config = gpt2_config(folder, block_size, dropout)
    paths = weight_files(folder)
    model = GPT(config)
    own, loaded = model.state_dict(), set()
    for path in paths:
        for stored, tensor in read_safetensors(path).items():
            if stored.endswith(('.attn.bias', '.attn.masked_bias')):
                continue  # the causal mask
            name = own_name(stored, config.tie_weights)
            if name == 'transformer.wpe.weight' and tensor.dim() == 2:
                tensor = tensor[:config.block_size]
            if name not in own:
                raise ValueError(f'{path}: {stored} is no weight of the model in config.json')
            target = own[name].t() if name.endswith(TRANSPOSED) else own[name]
            if tensor.shape != target.shape:
                raise ValueError(f'{path}: {stored} is {list(tensor.shape)}, the model in '
                                 f'config.json needs {list(target.shape)}')
            if not tensor.is_floating_point():
                raise ValueError(f'{path}: {stored} holds {tensor.dtype}: quill reads only '
                                 'floating-point weights, save the model as float32')
            if name in loaded and not torch.equal(target, tensor.to(target.dtype)):
                raise ValueError(f'{path}: lm_head.weight differs from wte.weight, so config.json '
                                 'needs "tie_word_embeddings": false')
            target.copy_(tensor)
            loaded.add(name)
    missing = set(own) - loaded - ({'lm_head.weight'} if config.tie_weights else set())
    if missing:
        raise ValueError(f'{", ".join(paths)}: {min(missing)} is missing, which the model in '
                         'config.json has')
    return model


def own_name(stored, tied):
    """Return the name in our state_dict of a tensor in a file."""
    if stored == 'lm_head.weight':  # the file of a tied model may hold this, or wte, or both
        return 'transformer.wte.weight' if tied else stored
    # OpenAI's own files leave out the first word
    return stored if stored.startswith('transformer.') else f'transformer.{stored}'


def weight_files(folder):
    """Return the paths of the weights in folder: one file, or the shards that an index names."""
    path = os.path.join(folder, 'model.safetensors')
    index = f'{path}.index.json'
    pickles = sorted(glob.glob(os.path.join(glob.escape(folder), 'pytorch_model*.bin')))
    paths = [path]
    if not os.path.exists(path) and os.path.exists(index):
        names = read_json_dict(index).get('weight_map')
        if not names or type(names) is not dict or {type(n) for n in names.values()} != {str}:
            raise ValueError(f'{index} has no weight_map with names of files: download it again')
        paths = [os.path.join(folder, name) for name in sorted(set(names.values()))]
    elif not os.path.exists(path) and pickles:
        check_file(pickles[0])
        where = json.dumps(str(folder))
        code = f'from transformers import GPT2LMHeadModel as M; M.from_pretrained({where})' \
            f'.save_pretrained({where}, safe_serialization=True)'
        raise ValueError(f'{pickles[0]} is a pickle, which quill does not read: convert it by '
                         f'python -c {shlex.quote(code)}')
    for path in paths:
        check_file(path)
    return paths


def read_json_dict(path):
    """Return the dict in a JSON file; ValueError says what is wrong with the file."""
    check_file(path)
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path} is not JSON ({e}): download it again') from e
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds {json.dumps(content)[:40]} instead of {{...}}')
    return content


def check_file(path):
    """Raise ValueError unless path is a file, and not what git leaves of it without git-lfs."""
    folder, name = os.path.split(path)
    if not os.path.isfile(path):
        raise ValueError(f'no {name} in {folder}: a folder of GPT-2 holds config.json and '
                         'model.safetensors, or all shards that its index names')
    with open(path, 'rb') as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f'{path} is a pointer of git-lfs, not the file itself: run git lfs '
                             f'pull in {folder}')


# -----------------------------------------------------------------------------
# writing

def save_gpt2(model, folder, eot=None):
    """Write config.json and model.safetensors, which transformers.GPT2LMHeadModel reads.

    eot: id of the end-of-text token. Missing biases are written as zeros. ValueError names a
    setting that GPT-2 does not have.
    """
    c = model.config
    gpt2 = {'activation': ('gelu', 'gelu_tanh'), 'norm': ('layernorm',), 'rotary': (False,),
            'qk_norm': (False,), 'attn_scale': (0.0,), 'embed_norm': (False,),
            'token_shift': (False,), 'softcap': (0.0,)}
    for key, values in gpt2.items():
        if getattr(c, key) not in values:
            raise ValueError(f'{key}={getattr(c, key)} has no counterpart in GPT-2')
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight' and c.tie_weights:
            continue
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor
        if not c.bias and name.startswith(('transformer.h.', 'transformer.ln_f.')):
            tensors[name.replace('.weight', '.bias')] = tensor.new_zeros(tensor.size(-1))
    write_safetensors(tensors, os.path.join(folder, 'model.safetensors'))
    config = {
        'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'torch_dtype': 'float32',
        'n_positions': c.block_size, 'n_ctx': c.block_size, 'vocab_size': c.vocab_size,
        'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
        'activation_function': 'gelu' if c.activation == 'gelu' else 'gelu_new',
        'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': c.tie_weights,
        'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout,
        'bos_token_id': eot, 'eos_token_id': eot}
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=1)


# -----------------------------------------------------------------------------
# the file format safetensors

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16,
          'BF16': torch.bfloat16, 'I64': torch.int64, 'U8': torch.uint8, 'BOOL': torch.bool}


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file, memory-mapped.

    Raises ValueError if the file contradicts itself, or has numbers of another kind than DTYPES.
    """
    size = os.path.getsize(path)
    try:
        with open(path, 'rb') as f:
            n = int.from_bytes(f.read(8), 'little')
            if size < 8 or n > min(size - 8, 100_000_000):
                raise ValueError('its header is longer than the file')
            header = json.loads(f.read(n))
        data = torch.from_file(path, size=size, dtype=torch.uint8)[8 + n:]
        header.pop('__metadata__', None)
        others = {entry['dtype'] for entry in header.values()} - set(DTYPES)
        tensors = {name: read_tensor(data, 8 + n, name, entry) for name, entry in header.items()
                   if not others}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = e if isinstance(e, ValueError) else repr(e)
        raise ValueError(f'{path} is not a sound safetensors file ({reason}): download it again, '
                         'it may be cut short') from e
    if others:
        raise ValueError(f'{path} holds tensors of dtype {", ".join(map(str, others))}, which '
                         'quill does not read: save them as F32')
    return tensors


def read_tensor(data, offset, name, entry):
    """Return the tensor that a header entry describes; data begins at byte `offset` of the file."""
    dtype, shape, (begin, end) = DTYPES[entry['dtype']], entry['shape'], entry['data_offsets']
    if not all(type(i) is int and i >= 0 for i in (*shape, begin, end)) \
            or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{name} has another size than its shape')
    if end > len(data):
        raise ValueError(f'{name} ends beyond the end of the file')
    raw = data[begin:end]
    if (offset + begin) % dtype.itemsize:
        raw = raw.clone()  # a view in another dtype must be aligned
    return raw.view(dtype).view(shape)


def write_safetensors(tensors, path):
    """Write {name: tensor} to a .safetensors file."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {'dtype': names[t.dtype], 'shape': list(t.shape),
                        'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # aligns the tensors
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


# -----------------------------------------------------------------------------
# tokenizers

GPT2_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|"
                r'\s+(?!\S)|\s+')  # how GPT-2 splits a text before it looks for byte pairs
GPT2_SIZE = 50257
GPT2_SHA256 = 'e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f'  # of its tokens
ONE_BY_ONE = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated',
              'invert': False}  # splits a text into its characters


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
