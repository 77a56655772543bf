"""
Folders of Hugging Face's library transformers: GPT-2's weights and their tokenizers, in and out.

    checkpoint = read_pretrained('gpt2')  # or a folder
    write_pretrained('exported', model, tokenizer)

Such a folder holds config.json, model.safetensors (or several files, which an index names) and the
files of the tokenizer.
"""
import glob
import json
import math
import os
from dataclasses import fields

from data.downloads import DownloadError, download_resumable, hub_address
from data.files import DATA_DIR
from data.tokenizers import HuggingFaceTokenizer, is_gpt2, recognize, write_json

import torch

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# Hugging Face's names of activations, and ours
OUR_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
THEIR_ACTIVATIONS = {'gelu_tanh': 'gelu_new', 'gelu': 'gelu'}
# GPT-2 stores the matrices of its blocks as (in, out)
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
CAUSAL_MASKS = ('.attn.bias', '.attn.masked_bias')  # stored by old versions of transformers
WTE, HEAD = 'transformer.wte.weight', 'lm_head.weight'  # one matrix if the weights are tied


def read_pretrained(source, weights=True):
    """Return the GPT-2 that source names as a dict: model_args, tokenizer, model.

    source: one of GPT2_NAMES, which is downloaded if it is missing, or a folder. model_args: for
    GPTConfig. tokenizer: what its to_dict returns. model: the state_dict, in float32. weights=False
    reads only config.json and the tokenizer. ValueError and OSError say what is wrong.
    """
    folder = source
    if source in GPT2_NAMES:
        files = ['config.json', 'model.safetensors'] if weights else ['config.json']
        folder = gpt2_folder(source, files)
    elif not os.path.isdir(source):
        raise ValueError(f'it must be {", ".join(GPT2_NAMES)}, or a folder with config.json and '
                         'model.safetensors')
    args = read_config(os.path.join(folder, 'config.json'))
    checkpoint = {'model_args': args, 'tokenizer': read_tokenizer(source)}
    if weights:
        checkpoint['model'] = read_weights(folder, args['tie_weights'])
    return checkpoint


def write_pretrained(folder, model, tokenizer):
    """Write a folder that GPT2LMHeadModel and AutoTokenizer of transformers read.

    Missing biases are written as zeros. ValueError names a setting that GPT-2 does not have.
    """
    c = model.config
    # GPT-2 has these with any value
    free = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias', 'activation',
            'tie_weights', 'dropout', 'zero_init', 'zero_head')
    for field in fields(c):
        value = getattr(c, field.name)
        if field.name not in free and value != field.default:
            raise ValueError(f'{field.name}={value} has no counterpart in GPT-2')
    if c.activation not in THEIR_ACTIVATIONS:
        raise ValueError(f'activation={c.activation} has no counterpart in GPT-2')
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and c.tie_weights:
            continue
        tensors[name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
        if not c.bias and name.startswith(('transformer.h.', 'transformer.ln_f.')):
            width = tensors[name].size(-1)
            tensors[name.replace('.weight', '.bias')] = tensor.new_zeros(width)
    config = {
        'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'torch_dtype': 'float32',
        'n_positions': c.block_size, 'n_ctx': c.block_size, 'vocab_size': c.vocab_size,
        'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
        'activation_function': THEIR_ACTIVATIONS[c.activation],
        'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': c.tie_weights,
        'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout,
        'bos_token_id': tokenizer.eot, 'eos_token_id': tokenizer.eot}
    os.makedirs(folder, exist_ok=True)
    write_safetensors(tensors, os.path.join(folder, 'model.safetensors'))
    write_json(os.path.join(folder, 'config.json'), config)
    tokenizer.save_pretrained(folder)


# -----------------------------------------------------------------------------
# reading

def read_config(path):
    """Return the model_args of a config.json. ValueError names what quill's model lacks."""
    c = read_json(path)
    readable = {  # a missing key has the first value
        'model_type': ('gpt2',),
        'activation_function': tuple(OUR_ACTIVATIONS),
        'layer_norm_epsilon': (1e-5,),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'tie_word_embeddings': (True, False)}
    for key, values in readable.items():
        if c.setdefault(key, values[0]) not in values:
            raise ValueError(f'{path} has {key}={json.dumps(c[key])}: quill reads only models '
                             f'with {" or ".join(map(json.dumps, values))}')
    args = {key: c.get(key) for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd')}
    return args | {'block_size': c.get('n_positions'), 'bias': True,
                   'activation': OUR_ACTIVATIONS[c['activation_function']],
                   'tie_weights': c['tie_word_embeddings']}


def read_weights(folder, tied):
    """Return the weights in folder with quill's names and shapes, in float32."""
    weights = {}
    for path in weight_paths(folder):
        for name, tensor in read_safetensors(path).items():
            # OpenAI's own files leave out the first word
            if name != HEAD and not name.startswith('transformer.'):
                name = f'transformer.{name}'
            tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
            weights[name] = tensor.float()
    if tied and weights.keys() & {WTE, HEAD}:  # the files hold both names, or only one
        table = weights.setdefault(WTE, weights.get(HEAD))
        if not torch.equal(table, weights.setdefault(HEAD, table)):
            raise ValueError(f'{folder}: lm_head.weight differs from wte.weight, so config.json '
                             'needs "tie_word_embeddings": false')
    return weights


def weight_paths(folder):
    """Return the paths of the weights in folder: one file, or those that an index names."""
    path = os.path.join(folder, 'model.safetensors')
    if os.path.exists(path):
        return [path]
    if not os.path.exists(f'{path}.index.json'):
        raise ValueError(f'no model.safetensors in {folder}: transformers can save pickled weights '
                         'as such')
    names = set(read_json(f'{path}.index.json')['weight_map'].values())
    return [os.path.join(folder, name) for name in sorted(names)]


def read_tokenizer(source):
    """Return the tokenizer that belongs to weights of Hugging Face, as its to_dict returns it.

    source: one of GPT2_NAMES, a folder, or a tokenizer.json. ValueError says what is missing.
    """
    if source in GPT2_NAMES:
        return {'kind': 'gpt2'}
    folder, path = os.path.dirname(source), source
    if os.path.isdir(source):
        folder, path = source, os.path.join(source, 'tokenizer.json')
    rows = read_json(os.path.join(folder, 'config.json'), {}).get('vocab_size')  # of the weights
    if not os.path.exists(path):
        vocab = read_json(os.path.join(folder, 'vocab.json'), {})
        if is_gpt2(vocab) or not vocab and rows in range(50257, 50305):  # maybe padded
            return {'kind': 'gpt2'}
        raise ValueError('it holds no tokenizer: put the tokenizer.json that belongs to these '
                         'weights into the folder')
    content = read_json(path)
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
    with open(path, encoding='utf-8', errors='replace') as f:
        text = f.read()
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f'{path} is not a JSON object, it begins with {text[:40]!r}: download it '
                         'again (with git lfs pull if this is a pointer of git-lfs)')
    return content


# -----------------------------------------------------------------------------
# OpenAI's weights

def gpt2_folder(name, files):
    """Return the folder that holds these files of a GPT-2. Missing files are downloaded.

    The files are taken from Hugging Face's cache if all are there, otherwise from
    data/gpt2_weights.
    """
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
            raise ValueError(f'no weights of {name}: {e}. Get {url} by other means and save it '
                             f'as {path}')
    return folder


def hub_cache():
    """Return the folder of Hugging Face's cache, by the rules of its library huggingface_hub."""
    home = os.path.join(os.environ.get('XDG_CACHE_HOME', '~/.cache'), 'huggingface')
    hub = os.path.join(os.environ.get('HF_HOME', home), 'hub')
    return os.path.expandvars(os.path.expanduser(os.environ.get('HF_HUB_CACHE', hub)))


# -----------------------------------------------------------------------------
# the file format safetensors: the header's length, a header in JSON, and the tensors' bytes

DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16,
          'BF16': torch.bfloat16}


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file, memory-mapped, without causal masks.

    Raises ValueError if the file is cut short, or holds numbers of another kind than DTYPES.
    """
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        begin = 8 + int.from_bytes(f.read(8), 'little')
        if begin > size:
            raise ValueError(f'{path} is cut short or no safetensors file: download it again '
                             '(a pointer of git-lfs: run git lfs pull)')
        header = json.loads(f.read(begin - 8))
    data = torch.from_file(path, size=size, dtype=torch.uint8)[begin:]
    tensors = {}
    for name, entry in header.items():
        if name == '__metadata__' or name.endswith(CAUSAL_MASKS):
            continue
        if entry['dtype'] not in DTYPES:
            raise ValueError(f'{path}: {name} has dtype {entry["dtype"]}: save it as F32')
        dtype, (start, end) = DTYPES[entry['dtype']], entry['data_offsets']
        if end > len(data) or end - start != math.prod(entry['shape']) * dtype.itemsize:
            raise ValueError(f'{path}: {name} is cut short: download the file again')
        raw = data[start:end]
        if (begin + start) % dtype.itemsize:
            raw = raw.clone()  # a view in another dtype must be aligned
        tensors[name] = raw.view(dtype).view(entry['shape'])
    return tensors


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
