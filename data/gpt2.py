"""
GPT-2's weights in folders of Hugging Face's library transformers.

    model = load_gpt2(gpt2_folder('gpt2'))
    save_gpt2(model, folder)

Such a folder holds config.json and model.safetensors, or the shards of a large model.
"""
import glob
import json
import os
import shlex

import torch

from configurator import fail
from data.downloads import DATA_DIR, DownloadError, download_resumable, hub_address
from data.safetensors import read_safetensors, write_safetensors
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
            if not os.path.exists(path):
                download_resumable(url, path)
        except DownloadError as e:
            fail(f'no weights of {name}: {e}. Get {url} by other means and save it as {path}')
    return folder


def hub_cache():
    """Return the folder of Hugging Face's cache, by the rules of its library huggingface_hub."""
    def expand(path):
        return os.path.expandvars(os.path.expanduser(path))
    home = os.path.join(os.environ.get('XDG_CACHE_HOME', '~/.cache'), 'huggingface')
    home = expand(os.environ.get('HF_HOME', home))
    hub = os.environ.get('HUGGINGFACE_HUB_CACHE', os.path.join(home, 'hub'))  # its older name
    return expand(os.environ.get('HF_HUB_CACHE', hub))


# -----------------------------------------------------------------------------
# reading

def gpt2_config(folder, block_size=0, dropout=0.0):
    """Return the GPTConfig of the GPT-2 in folder; see load_gpt2."""
    path = os.path.join(folder, 'config.json')
    c = read_json(path)
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
        names = read_json(index).get('weight_map')
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


def read_json(path):
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
