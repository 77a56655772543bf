"""
The file format of llama.cpp, GGUF: a header, facts about model and tokenizer, and tensors.

    write_gguf('model.gguf', model, tokenizer, 'float16')

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import math
import struct

from data.bpe import PATTERN, to_letters
from data.huggingface import NAMES, portable, rename
from data.tokenizers import END, merges_of

import torch

ALIGNMENT = 32  # bytes


def write_gguf(path, model, tokenizer, dtype):
    """Write a model and its tokenizer; its matrices in dtype, float32 or float16.

    ValueError says what llama.cpp cannot read.
    """
    arch, shape, tensors = portable(model, tokenizer)
    half = dtype == 'float16'
    facts = {'general.architecture': arch, 'general.file_type': int(half)}
    for key, setting in (
            ('context_length', 'block_size'), ('embedding_length', 'n_embd'),
            ('block_count', 'n_layer'), ('feed_forward_length', 'n_inner'),
            ('vocab_size', 'vocab_size'), ('attention.head_count', 'n_head'),
            ('attention.head_count_kv', 'n_kv_head'), ('attention.key_length', 'head_dim'),
            ('attention.value_length', 'head_dim'), ('rope.dimension_count', 'head_dim')):
        facts[f'{arch}.{key}'] = shape[setting]
    facts |= {f'{arch}.rope.freq_base': float(shape['rope_base']),
              f'{arch}.attention.layer_norm_epsilon': float(shape['norm_eps']),
              f'{arch}.attention.layer_norm_rms_epsilon': float(shape['norm_eps'])}
    facts |= tokenizer_facts(tokenizer)
    names = {quill: llama_cpp for quill, _, llama_cpp in NAMES}
    theirs = {}
    for name, t in tensors.items():
        if arch == 'llama' and ('.attn.q.' in name or '.attn.k.' in name):
            # channels i and i + D/2 of a head, which are rotated together, lie side by side
            heads = t.view(-1, 2, shape['head_dim'] // 2, t.size(1))
            t = heads.transpose(1, 2).reshape(t.shape)
        matrix = t.dim() == 2 and 'wpe' not in name  # all else stays in float32
        theirs[rename(name, names)] = t.half() if matrix and half else t.float()
    write(path, facts, theirs)


def tokenizer_facts(tokenizer):
    """Return the facts about a tokenizer of quill's own, or of GPT-2."""
    saved, eot = tokenizer.to_dict(), tokenizer.eot
    if eot is None:
        raise ValueError('its tokenizer has no end-of-text token: prepare the text again')
    if saved['kind'] == 'huggingface' or saved.get('pattern', PATTERN) != PATTERN:
        raise ValueError("its tokenizer is another program's: use llama.cpp's own converter")
    tokens = [to_letters(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    tokens[eot] = END
    special = saved.get('special', [eot])
    if saved['kind'] == 'char':  # a character of several bytes is merged from the left
        merges = [f'{t[:i]} {t[i]}' for t in tokens[:eot] for i in range(1, len(t))]
        merges = list(dict.fromkeys(merges))  # several characters begin with the same bytes
    else:
        merges = merges_of(tokens, special)
    facts = {'model': 'gpt2', 'pre': 'gpt-2' if saved['kind'] == 'gpt2' else 'llama-bpe',
             'tokens': tokens, 'merges': merges,
             'token_type': [3 if i in special else 1 for i in range(len(tokens))],
             'bos_token_id': eot, 'eos_token_id': eot, 'padding_token_id': eot,
             'add_bos_token': False, 'add_eos_token': False, 'add_space_prefix': False}
    return {f'tokenizer.ggml.{key}': value for key, value in facts.items()}


def write(path, facts, tensors):
    """Write a GGUF file: facts {key: value} and tensors {name: tensor}."""
    header = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(facts))
    for key, value in facts.items():
        kind, packed = pack(value)
        header += pack(key)[1] + struct.pack('<I', kind) + packed
    end = 0
    for name, t in tensors.items():
        header += pack(name)[1] + struct.pack(f'<I{t.dim()}Q', t.dim(), *reversed(t.shape))
        header += struct.pack('<IQ', int(t.dtype == torch.float16), end)
        end += math.ceil(t.nbytes / ALIGNMENT) * ALIGNMENT
    with open(path, 'wb') as f:
        for content in (header, *(t.contiguous().numpy().tobytes() for t in tensors.values())):
            f.write(content + bytes(-len(content) % ALIGNMENT))


def pack(value):
    """Return the number of a value's type, and its bytes."""
    if isinstance(value, str):
        return 8, struct.pack('<Q', len(value.encode())) + value.encode()
    if isinstance(value, list):
        kind = 5 if value and isinstance(value[0], int) else 8  # 5: signed, the same bytes
        items = b''.join(pack(item)[1] for item in value)
        return 9, struct.pack('<IQ', kind, len(value)) + items
    kind, code = {bool: (7, '?'), int: (4, 'I'), float: (6, 'f')}[type(value)]
    return kind, struct.pack(f'<{code}', value)
