"""
GPT-2's weights: folders of Hugging Face's library transformers, read and written.

    model = load_gpt2(gpt2_folder('gpt2'))
    save_gpt2(model, folder)

Such a folder holds config.json and model.safetensors.
"""
import glob
import json
import os

from configurator import fail
from data.downloads import DATA_DIR, DownloadError, download_resumable, hub_address
from data.safetensors import read_safetensors, write_safetensors
from model import GPT, GPTConfig

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GPT2_FILES = ('config.json', 'model.safetensors')


def gpt2_folder(name, files=GPT2_FILES, process=None):
    """Return the folder that holds these files of a GPT-2. Missing files are downloaded.

    name: one of GPT2_NAMES, or a folder, which is returned as it is. The files are taken from
    Hugging Face's cache ($HF_HOME) if they are there, otherwise from data/gpt2_weights.
    process: makes one rank of each node download while the other ranks wait.
    """
    if name not in GPT2_NAMES:
        if not os.path.isdir(name):
            fail(f'init_from={name}: init_from is one of resume, {", ".join(GPT2_NAMES)}, '
                 'or a folder with config.json and model.safetensors')
        return name
    if process:
        process.once_per_node(lambda: gpt2_folder(name, files))
    cache = os.environ.get('HF_HOME', os.path.expanduser('~/.cache/huggingface'))
    for repository in (f'models--openai-community--{name}', f'models--{name}'):
        for folder in glob.glob(os.path.join(cache, 'hub', repository, 'snapshots', '*')):
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


def gpt2_config(folder, block_size=0, dropout=0.0):
    """Return the GPTConfig of the GPT-2 in folder; see load_gpt2."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        c = json.load(f)
    activations = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
    activation = activations.get(c.get('activation_function', 'gelu_new'))
    if c.get('model_type') != 'gpt2' or not activation:
        raise ValueError(f'{folder}/config.json does not describe a GPT-2')
    for key, ours in (('layer_norm_epsilon', 1e-5), ('scale_attn_weights', True),
                      ('scale_attn_by_inverse_layer_idx', False)):
        if c.get(key, ours) != ours:
            raise ValueError(f'{folder}/config.json has {key}={c[key]}, quill has {ours}')
    if not 0 <= block_size <= c['n_positions']:
        raise ValueError(f'block_size={block_size} but it has {c["n_positions"]} positions')
    return GPTConfig(
        block_size=block_size or c['n_positions'], vocab_size=c['vocab_size'],
        n_layer=c['n_layer'], n_head=c['n_head'], n_embd=c['n_embd'], dropout=dropout,
        bias=True, activation=activation, tie_weights=c.get('tie_word_embeddings', True))


def load_gpt2(folder, block_size=0, dropout=0.0):
    """Return the GPT-2 in folder: config.json and model.safetensors of transformers.

    block_size > 0 keeps only that many positions. Raises ValueError for other models.
    """
    model = GPT(gpt2_config(folder, block_size, dropout))
    path = os.path.join(folder, 'model.safetensors')
    own, loaded = model.state_dict(), set()
    for name, tensor in read_safetensors(path).items():
        if name != 'lm_head.weight' and not name.startswith('transformer.'):
            name = f'transformer.{name}'  # OpenAI's own files leave it out
        if name.endswith(('.attn.bias', '.attn.masked_bias')):
            continue  # the causal mask
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            tensor = tensor.t()  # GPT-2 stores the matrices of its blocks as (in, out)
        if name == 'transformer.wpe.weight':
            tensor = tensor[:model.config.block_size]
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f'{path}: {name} {tuple(tensor.shape)} does not fit config.json')
        own[name].copy_(tensor)
        loaded.add(name)
    missing = set(own) - loaded - ({'lm_head.weight'} if model.config.tie_weights else set())
    if missing:
        raise ValueError(f'{path} lacks {min(missing)}')
    return model


def save_gpt2(model, folder, eot=None):
    """Write config.json and model.safetensors, which transformers.GPT2LMHeadModel reads.

    eot: id of the end-of-text token. Missing biases are written as zeros. ValueError names a
    setting that GPT-2 does not have.
    """
    c = model.config
    gpt2 = {'activation': ('gelu', 'gelu_tanh'), 'norm': ('layernorm',), 'rotary': (False,),
            'qk_norm': (False,), 'token_shift': (False,), 'softcap': (0.0,)}
    for key, values in gpt2.items():
        if getattr(c, key) not in values:
            raise ValueError(f'{key}={getattr(c, key)} has no counterpart in GPT-2')
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight' and c.tie_weights:
            continue
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
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
