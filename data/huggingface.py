"""
Models of Hugging Face's library transformers, in and out: GPT-2, Llama and Qwen3.

    checkpoint = read_pretrained('gpt2')  # or a folder, or a name on the hub
    write_pretrained('exported', model, tokenizer)

Such a folder holds config.json, model.safetensors (or its parts) and the tokenizer. What a client
cannot express follows from the tables below: a setting without an entry must have its default.
"""
import contextlib
import json
import os
import re
from dataclasses import asdict, fields

from data.downloads import DownloadError, download, hub_address
from data.files import DATA_DIR
from data.tokenizers import HuggingFaceTokenizer, recognize, write_json

import torch

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
CLASSES = {'gpt2': 'GPT2LMHeadModel', 'llama': 'LlamaForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}

# settings and their keys in config.json
LLAMA_KEYS = {
    'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings', 'n_embd': 'hidden_size',
    'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads', 'head_dim': 'head_dim',
    'n_kv_head': 'num_key_value_heads', 'n_inner': 'intermediate_size', 'rope_base': 'rope_theta',
    'norm_eps': 'rms_norm_eps', 'tie_weights': 'tie_word_embeddings'}
KEYS = {'gpt2': {
    'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_embd': 'n_embd',
    'n_layer': 'n_layer', 'n_head': 'n_head', 'n_inner': 'n_inner',
    'norm_eps': 'layer_norm_epsilon', 'tie_weights': 'tie_word_embeddings'},
    'llama': LLAMA_KEYS, 'qwen3': LLAMA_KEYS}
# settings that a model may have with these values only; a folder is read with the first value
LLAMA_VALUES = {'bias': [False], 'norm': ['rmsnorm'], 'activation': ['swiglu'], 'rotary': [True]}
VALUES = {'gpt2': {'bias': [True, False], 'activation': ['gelu', 'gelu_tanh']},
          'llama': LLAMA_VALUES, 'qwen3': LLAMA_VALUES | {'qk_norm': [True]}}
TRAINING = ('dropout', 'zero_init', 'zero_head')  # settings that matter in training only

# keys of config.json that change what a model computes, with the values that quill can follow; a
# missing key has the first value
READABLE = {
    'model_type': [*KEYS], 'hidden_act': ['silu'], 'rope_scaling': [{}], 'mlp_bias': [False],
    'attention_bias': [False], 'use_sliding_window': [False], 'layer_types': [['full_attention']],
    'activation_function': ['gelu_new', 'gelu_pytorch_tanh', 'gelu'], 'scale_attn_weights': [True],
    'scale_attn_by_inverse_layer_idx': [False], 'tie_word_embeddings': [False, True]}

# the names of a module in quill, in Llama and Qwen3, and in llama.cpp. GPT-2 has quill's names
# without `transformer.`
NAMES = [
    ('transformer.wte', 'model.embed_tokens', 'token_embd'),
    ('transformer.wpe', '', 'position_embd'),
    ('transformer.ln_f', 'model.norm', 'output_norm'),
    ('lm_head', 'lm_head', 'output'),
    ('transformer.h.N.ln_1', 'model.layers.N.input_layernorm', 'blk.N.attn_norm'),
    ('transformer.h.N.ln_2', 'model.layers.N.post_attention_layernorm', 'blk.N.ffn_norm'),
    ('transformer.h.N.attn.c_attn', '', 'blk.N.attn_qkv'),
    ('transformer.h.N.attn.q', 'model.layers.N.self_attn.q_proj', 'blk.N.attn_q'),
    ('transformer.h.N.attn.k', 'model.layers.N.self_attn.k_proj', 'blk.N.attn_k'),
    ('transformer.h.N.attn.v', 'model.layers.N.self_attn.v_proj', 'blk.N.attn_v'),
    ('transformer.h.N.attn.c_proj', 'model.layers.N.self_attn.o_proj', 'blk.N.attn_output'),
    ('transformer.h.N.attn.q_norm', 'model.layers.N.self_attn.q_norm', 'blk.N.attn_q_norm'),
    ('transformer.h.N.attn.k_norm', 'model.layers.N.self_attn.k_norm', 'blk.N.attn_k_norm'),
    ('transformer.h.N.mlp.c_fc', '', 'blk.N.ffn_up'),
    ('transformer.h.N.mlp.gate', 'model.layers.N.mlp.gate_proj', 'blk.N.ffn_gate'),
    ('transformer.h.N.mlp.up', 'model.layers.N.mlp.up_proj', 'blk.N.ffn_up'),
    ('transformer.h.N.mlp.c_proj', 'model.layers.N.mlp.down_proj', 'blk.N.ffn_down')]
# matrices of quill whose rows are several matrices in Llama and Qwen3
JOINED = {'attn.c_attn': ['attn.q', 'attn.k', 'attn.v'], 'mlp.c_fc': ['mlp.gate', 'mlp.up']}
# GPT-2 stores the matrices of its blocks as (in, out)
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
# constants that old versions of transformers stored: causal masks and rotary frequencies
CONSTANTS = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')


def read_pretrained(source, weights=True):
    """Return the model that source names as a dict: model_args, tokenizer, model.

    source: a folder, one of GPT2_NAMES or OWNER/NAME on the hub. model: the state_dict, in float32;
    weights=False leaves it out, with its download. ValueError and OSError say what is wrong.
    """
    folder = find_folder(source, weights)
    model_type, args = read_config(os.path.join(folder, 'config.json'))
    checkpoint = {'model_args': args, 'tokenizer': read_tokenizer(source)}
    if weights:
        checkpoint['model'] = read_weights(folder, model_type)
    return checkpoint


def write_pretrained(folder, model, tokenizer):
    """Write a folder that transformers reads. ValueError names settings that no client has."""
    model_type, shape, tensors = portable(model, tokenizer)
    config = {key: shape[setting] for setting, key in KEYS[model_type].items()}
    config |= {'architectures': [CLASSES[model_type]], 'model_type': model_type,
               'torch_dtype': 'float32'}
    if model_type == 'gpt2':
        names = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu'}
        config |= {'activation_function': names[shape['activation']], 'n_ctx': shape['block_size']}
    ends = {f'{name}_token_id': tokenizer.eot for name in ('bos', 'eos', 'pad')}
    llama_names = {quill: llama for quill, llama, _ in NAMES}
    theirs = {}
    for name, tensor in tensors.items():
        if model_type == 'gpt2':
            tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
            name = name.removeprefix('transformer.')
        else:
            name = rename(name, llama_names)
        theirs[name] = tensor.contiguous()
    library = import_safetensors()
    os.makedirs(folder, exist_ok=True)
    library.torch.save_file(theirs, os.path.join(folder, 'model.safetensors'), {'format': 'pt'})
    write_json(os.path.join(folder, 'config.json'), config | ends)
    write_json(os.path.join(folder, 'generation_config.json'), ends)
    tokenizer.save_pretrained(folder)


def portable(model, tokenizer):
    """Return what a model is for other programs: its model_type, its settings, and its tensors.

    The settings have no zeros that stand for a default. The tensors have the names in NAMES, and
    no rows of padding. Missing biases of GPT-2 are zeros.
    """
    model_type, c, block = find_model_type(model.config), model.config, model.transformer.h[0]
    shape = asdict(c) | {
        'vocab_size': tokenizer.vocab_size, 'n_kv_head': block.attn.n_kv_head,
        'head_dim': block.attn.head_dim, 'n_inner': block.mlp.c_proj.in_features}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            tensor = tensor[:tokenizer.vocab_size]
        if name != 'lm_head.weight' or not c.tie_weights:
            tensors[name] = tensor.cpu()
    if model_type == 'gpt2' and not c.bias:
        for name in [name for name in tensors if '.h.' in name or '.ln_f.' in name]:
            tensors[name.replace('.weight', '.bias')] = torch.zeros(len(tensors[name]))
    elif model_type != 'gpt2':
        rows, kv_rows = (shape[n] * shape['head_dim'] for n in ('n_head', 'n_kv_head'))
        sizes = {'attn.c_attn': [rows, kv_rows, kv_rows], 'mlp.c_fc': shape['n_inner']}
        for whole, parts in JOINED.items():
            for name in [name for name in tensors if f'.{whole}.' in name]:
                for part, rows in zip(parts, tensors.pop(name).split(sizes[whole])):
                    tensors[name.replace(whole, part)] = rows
    return model_type, shape, tensors


def find_model_type(config):
    """Return the model_type that expresses a GPTConfig. ValueError names what stands in the way."""
    needed = {model_type: changes(config, model_type) for model_type in KEYS}
    nearest = min(needed, key=lambda model_type: len(needed[model_type]))
    if needed[nearest]:
        own = ', '.join(f'{key}={getattr(config, key)}' for key in needed[nearest])
        flags = ' '.join(f'--{key}={value}' for key, value in needed[nearest].items())
        raise ValueError(f'{own}: no other program can express this. Train with {flags}, or take '
                         'config/train_shakespeare_qwen3.py')
    return nearest


def changes(config, model_type):
    """Return {setting: value} that would turn a GPTConfig into one that model_type expresses."""
    needed = {}
    for field in fields(config):
        values = VALUES[model_type].get(field.name, [field.default])
        free = field.name in KEYS[model_type] or field.name in TRAINING
        if not free and getattr(config, field.name) not in values:
            needed[field.name] = values[0]
    return needed


def rename(name, names):
    """Return the name of a tensor by the dict `names` of modules, where N is a block's number."""
    module, _, kind = name.rpartition('.')
    number = ''.join(re.findall(r'\.(\d+)\.', module))
    module = re.sub(r'\.\d+\.', '.N.', module)
    return f'{names[module].replace("N", number)}.{kind}' if module in names else name


# -----------------------------------------------------------------------------
# reading

def read_config(path):
    """Return the model_type and model_args of a config.json. ValueError names what quill lacks."""
    c = {'layer_norm_epsilon': 1e-5, 'rms_norm_eps': 1e-6} | read_json(path)
    model_type = c.setdefault('model_type', None)
    if model_type == 'gpt2':
        c.setdefault('tie_word_embeddings', True)
    # old versions of transformers write rope_theta and rope_scaling, new ones rope_parameters
    rope = dict(c.get('rope_parameters') or c.get('rope_scaling') or {})
    c['rope_theta'] = rope.pop('rope_theta', c.get('rope_theta', 10000.0))
    c['rope_scaling'] = rope if rope != {'rope_type': 'default'} else {}
    c['layer_types'] = sorted(set(c.get('layer_types') or ['full_attention']))
    for key, values in READABLE.items():
        if c.setdefault(key, values[0]) not in values:
            raise ValueError(f'{path} has {key}={json.dumps(c[key])}: quill reads only models '
                             f'with {" or ".join(map(json.dumps, values))}')
    args = {setting: values[0] for setting, values in VALUES[model_type].items()}
    if model_type == 'gpt2' and c['activation_function'] != 'gelu':
        args['activation'] = 'gelu_tanh'
    args |= {setting: c.get(key) for setting, key in KEYS[model_type].items()}
    for setting in ('n_inner', 'n_kv_head', 'head_dim'):  # null: as quill's default
        args[setting] = args.get(setting) or 0
    return model_type, args


def read_weights(folder, model_type):
    """Return the weights in folder with quill's names and shapes, in float32."""
    our_names = {llama: quill for quill, llama, _ in NAMES}
    weights = {}
    for path in weight_paths(folder):
        for name, tensor in read_safetensors(path).items():
            if model_type != 'gpt2':
                name = rename(name, our_names)
            elif name != 'lm_head.weight':  # OpenAI's own files leave out the first word
                name = f'transformer.{name.removeprefix("transformer.")}'
                tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
            weights[name] = tensor.float()
    for whole, parts in JOINED.items():
        for name in [name for name in weights if f'.{parts[0]}.' in name]:
            names = [name.replace(parts[0], part) for part in parts]
            rows = [weights.pop(part) for part in names if part in weights]
            weights[name.replace(parts[0], whole)] = torch.cat(rows)
    return weights


def weight_paths(folder):
    """Return the paths of the weights in folder: one file, or those that an index names."""
    path = os.path.join(folder, 'model.safetensors')
    if os.path.exists(path) or not os.path.exists(f'{path}.index.json'):
        return [path]
    weight_map = read_json(f'{path}.index.json').get('weight_map')
    if not isinstance(weight_map, dict):
        raise ValueError(f'{path}.index.json has no weight_map: remove it and download it again')
    names = sorted(set(weight_map.values()))
    return [os.path.join(folder, os.path.basename(name)) for name in names]


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file. ValueError: it is damaged, or quantized."""
    library = import_safetensors()
    try:
        tensors = library.torch.load_file(path)
    except library.SafetensorError as e:
        raise ValueError(f'{path} is damaged ({e}): download it again, or run git lfs pull')
    tensors = {name: t for name, t in tensors.items() if not name.endswith(CONSTANTS)}
    for name, t in tensors.items():
        if t.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f'{path}: {name} has dtype {t.dtype}: save it as float32')
    return tensors


def import_safetensors():
    """Return the module safetensors. ValueError says how to install it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError('this needs the library safetensors: pip install safetensors')
    return safetensors


def read_tokenizer(source):
    """Return the tokenizer that belongs to weights of Hugging Face, as its to_dict returns it.

    source: as in read_pretrained, or a tokenizer.json. ValueError and OSError say what is wrong.
    """
    if source in GPT2_NAMES:
        return {'kind': 'gpt2'}
    folder, path = os.path.dirname(source), source
    if not os.path.isfile(source):
        folder = find_folder(source, weights=False)
        path = os.path.join(folder, 'tokenizer.json')
    content = read_json(path)
    rows = read_json(os.path.join(folder, 'config.json'), {}).get('vocab_size')  # of the weights
    if rows:  # a client may have added a padding token that the weights lack
        added = content.get('added_tokens', [])
        content['added_tokens'] = [token for token in added if token['id'] < rows]
    if saved := recognize(content):
        return saved
    tokenizer = HuggingFaceTokenizer(json.dumps(content, ensure_ascii=False))
    end = read_json(os.path.join(folder, 'tokenizer_config.json'), {}).get('eos_token')
    end = end['content'] if isinstance(end, dict) else end
    tokenizer.eot = tokenizer.library.token_to_id(end) if end else None
    return tokenizer.to_dict()


def read_json(path, default=None):
    """Return the dict in a JSON file, or the default if there is no file."""
    if default is not None and not os.path.exists(path):
        return default
    with open(path, 'rb') as f:
        try:
            return dict(json.load(f))
        except (ValueError, TypeError):
            raise ValueError(f'{path} is not a JSON object: remove it and download it again, or '
                             'run git lfs pull')


# -----------------------------------------------------------------------------
# the hub

def find_folder(source, weights):
    """Return the folder that source names. If it is on the hub, download the missing files."""
    files = ['config.json', 'tokenizer.json', 'tokenizer_config.json']
    folder, repository = os.path.join('hub_weights', source), source
    if source in GPT2_NAMES:
        folder, repository = os.path.join('gpt2_weights', source), f'openai-community/{source}'
        files = ['config.json']
    elif os.path.isdir(source):
        return source
    elif not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', source):
        raise ValueError(f'it must be {", ".join(GPT2_NAMES)}, OWNER/NAME on the Hugging Face hub, '
                         'or a folder with config.json and model.safetensors')
    folder, url = os.path.join(DATA_DIR, folder), f'{hub_address()}/{repository}/resolve/main'

    def fetch(name):
        download(f'{url}/{name}', os.path.join(folder, name))
    try:
        for name in files:
            fetch(name)
        if weights and not os.path.exists(os.path.join(folder, 'model.safetensors')):
            with contextlib.suppress(DownloadError):  # weights in one file have no index
                fetch('model.safetensors.index.json')
            for path in weight_paths(folder):
                fetch(os.path.basename(path))
    except DownloadError as e:
        names = ', '.join([*files, 'model.safetensors'])
        raise ValueError(f'{names} of {url} belong in {folder}: {e}')
    return folder
