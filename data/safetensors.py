"""
The file format safetensors (https://github.com/huggingface/safetensors).

A file is an 8-byte length, a JSON header of this length, and the raw tensors.
"""
import json
import math
import os

import torch

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
