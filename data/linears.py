"""
Weights of fewer bytes for generation on a CPU, where a token takes as long as reading them.

    place_for_generation(model, device, dtype, quantize, num_samples)   stores the weights so
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from data.devices import cpu_multiplies_bfloat16

FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines  # x86: weights in float16


def pick_dtype(kind, dtype, quantize, num_samples):
    """Return the name of the dtype of weights in which a device of this kind generates fastest."""
    if dtype != 'auto' or kind != 'cpu':
        return dtype
    if quantize:
        return 'float32'
    if num_samples > 1 and cpu_multiplies_bfloat16():
        return 'bfloat16'
    return 'float16' if FBGEMM else 'bfloat16' if num_samples == 1 else 'float32'


def place_for_generation(model, device, dtype, quantize, num_samples):
    """Move the model to the device, in eval mode, with its weights in dtype or int8.

    On a CPU, only Linear layers get it: all else is fastest in float32.
    """
    model.eval().to(device)
    if device.type != 'cpu':
        return model.to(dtype)
    # oneDNN makes GELU of a few rows slower, so use it only for its own products
    onednn = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() \
        and getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)()
    torch.backends.mkldnn.enabled = onednn or dtype == torch.float32 and not quantize
    stored = {torch.bfloat16: OneDNNLinear if onednn else CastLinear,
              torch.float16: FBGEMMLinear if FBGEMM else CastLinear}.get(dtype)
    stored = Int8Linear if quantize else stored
    stored = stored and works(stored)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if stored and isinstance(child, nn.Linear):
                delattr(module, name)
                setattr(module, name, stored(child, dtype, num_samples))


def works(kind):
    """Return the class `kind` of those below if this torch has its private functions, or None."""
    try:
        kind(nn.Linear(16, 16), torch.bfloat16, 1)(torch.zeros(1, 1, 16))
        return kind
    except (AttributeError, RuntimeError, TypeError):
        print(f'note: {kind.__name__} does not work with torch {torch.__version__}: using float32')


class CastLinear:
    """A Linear with weights in any dtype, for any processor; inputs and outputs are float32.

    These classes are no nn.Modules, whose calls take 2 us longer.
    """
    def __init__(self, linear, dtype, rows):
        self.weight, self.bias = linear.weight.to(dtype), linear.bias

    def __call__(self, x):  # (B, T, in) -> (B, T, out)
        # float16 cannot hold large inputs
        dtype = torch.bfloat16 if self.weight.dtype == torch.bfloat16 else torch.float32
        y = F.linear(x.to(dtype), self.weight.to(dtype)).float()
        return y if self.bias is None else y + self.bias


class FBGEMMLinear:
    """float16: the fastest for one row, and for several rows if bfloat16 is slow."""
    def __init__(self, linear, dtype, rows):
        self.weight = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), linear.bias)
        # called directly, because a look through its arguments takes 5 us
        self.product = torch.ops.quantized.linear_dynamic_fp16._op

    def __call__(self, x):
        return self.product(x, self.weight)


class OneDNNLinear(CastLinear):
    """bfloat16 in the order in which oneDNN's kernel reads it: the fastest for several rows."""
    def __init__(self, linear, dtype, rows):
        super().__init__(linear, dtype, rows)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x):
        y = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, None, 'none', [], '')
        return y.float() if self.bias is None else y.float() + self.bias


class Int8Linear:
    """One byte a weight, with a scale per output channel.

    One row times a matrix is a weighted sum of the matrix's columns. embedding_bag computes such
    sums several times as fast as torch's int8 products.
    """

    def __init__(self, linear, dtype, rows):
        weight, self.bias = linear.weight.float(), linear.bias
        self.n_out, n_in = weight.shape
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-30)
        # parts of the outputs: equally many for each thread, and narrow, to sum in registers
        threads = torch.get_num_threads()
        parts = threads * math.ceil(self.n_out / 256 / threads)
        width = math.ceil(self.n_out / parts / 16) * 16
        self.parts = math.ceil(self.n_out / width)
        weight = F.pad(weight / self.scale[:, None], (0, 0, 0, self.parts * width - self.n_out))
        weight = weight.view(self.parts, width, n_in).transpose(1, 2)  # (parts, in, width)
        self.weight = torch.ops.quantized.embedding_bag_byte_prepack(weight.reshape(-1, width))
        # one sum per part and row, over all columns of the part
        self.rows = rows if rows <= 16 else 0  # more rows are faster as a product
        columns = torch.arange(self.parts * n_in, dtype=torch.int32).view(self.parts, 1, n_in)
        self.index = columns.repeat(1, self.rows, 1).flatten()
        self.offsets = torch.arange(0, len(self.index), n_in, dtype=torch.int32)

    def __call__(self, x):
        B, T, C = x.shape
        if T > 1 or B != self.rows:  # a prompt, or many rows
            weight = torch.ops.quantized.embedding_bag_byte_unpack(self.weight)
            y = x.reshape(B * T, C) @ weight.view(self.parts, C, -1)  # (parts, B * T, width)
        else:
            y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
                self.weight, self.index, self.offsets, False, 0, False,
                torch.cat((x,) * self.parts).view(-1))  # (parts * B, width)
        y = y.view(self.parts, B * T, -1).transpose(0, 1).reshape(B, T, -1)[..., :self.n_out]
        y = y * self.scale
        return y if self.bias is None else y + self.bias
