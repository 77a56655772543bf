"""
GPT-2 and its modern variants: the configuration, the layers, the key-value cache and the model.

    model = GPT(GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384))
    logits, loss = model(idx, targets)
    for token in model.generate(idx, max_new_tokens=100): ...

The default of every switch in GPTConfig gives GPT-2 (https://github.com/openai/gpt-2), and module names are
GPT-2's, so are the keys of state_dict. In comments on shapes:
B batch, T time, C n_embd, H heads, D head_dim, V vocab, S cached positions.
"""
import json
import math
import os
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a GPT; ValueError where it makes no sense."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm
    activation: str = 'gelu'  # gelu (exact) | gelu_tanh (OpenAI's GPT-2) | relu2 (https://arxiv.org/abs/2109.08668)
    norm: str = 'layernorm'  # layernorm | rmsnorm (https://arxiv.org/abs/1910.07467)
    rotary: bool = False  # rotary positions (https://arxiv.org/abs/2104.09864) instead of learned ones
    qk_norm: bool = False  # LayerNorm, without parameters, of queries and keys (https://arxiv.org/abs/2302.05442)
    token_shift: bool = False  # half of attention's and MLP's input is of the position before (https://arxiv.org/abs/2305.13048)
    tie_weights: bool = True  # lm_head shares the matrix of wte
    zero_init: bool = False  # c_proj starts at zero, so every block starts as the identity
    softcap: float = 0.0  # c * tanh(logits / c), 0 for none (https://arxiv.org/abs/2408.00118)

    def __post_init__(self):
        if wrong := [f for f in fields(self) if not isinstance(getattr(self, f.name), (f.type, int))]:
            raise ValueError('; '.join(f'{f.name}={getattr(self, f.name)!r} is no {f.type.__name__}' for f in wrong))
        problems = [f'{key}={getattr(self, key)}: {key} is at least 1'
                    for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd') if getattr(self, key) < 1]
        if not problems:  # else it may divide by zero
            head_dim, rest = divmod(self.n_embd, self.n_head)
            if rest:
                problems.append(f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}')
            elif self.rotary and head_dim % 2:
                problems.append(f'n_embd/n_head={head_dim} is odd: rotary turns pairs of channels')
            if self.token_shift and self.n_embd == 1:
                problems.append('n_embd=1: token_shift moves half of the channels')
        if not 0 <= self.dropout < 1:
            problems.append(f'dropout={self.dropout}: dropout is at least 0 and below 1')
        if self.activation not in ACTIVATIONS:
            problems.append(f'activation={self.activation}: activation is one of {", ".join(ACTIVATIONS)}')
        if self.norm not in ('layernorm', 'rmsnorm'):
            problems.append(f'norm={self.norm}: norm is one of layernorm, rmsnorm')
        if not 0 <= self.softcap < math.inf:
            problems.append(f'softcap={self.softcap}: softcap is at least 0, which is off')
        if problems:
            raise ValueError('; '.join(problems))

    @classmethod
    def from_pretrained(cls, folder, block_size=0, dropout=0.0):
        """Return the shape of the GPT-2 in folder, as GPT.from_pretrained does, from its config.json alone."""
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            c = json.load(f)
        activations = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
        if c.get('model_type') != 'gpt2' or c.get('activation_function', 'gelu_new') not in activations:
            raise ValueError(f'{folder}/config.json does not describe a GPT-2')
        for key, ours in (('layer_norm_epsilon', 1e-5), ('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False)):
            if c.get(key, ours) != ours:
                raise ValueError(f'{folder}/config.json has {key}={c[key]}, this GPT-2 computes with {ours}')
        if not 0 <= block_size <= c['n_positions']:
            raise ValueError(f'block_size={block_size}: this model has {c["n_positions"]} positions')
        return cls(
            block_size=block_size or c['n_positions'], vocab_size=c['vocab_size'], n_layer=c['n_layer'], n_head=c['n_head'],
            n_embd=c['n_embd'], dropout=dropout, bias=True, activation=activations[c.get('activation_function', 'gelu_new')],
            tie_weights=c.get('tie_word_embeddings', True))


class SquaredReLU(torch.autograd.Function):
    """relu(x)**2. Its own backward has two operations instead of the five of torch's, and keeps one tensor instead of two."""

    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, dy):
        return (dy * ctx.saved_tensors[0]).mul_(2)


ACTIVATIONS = {
    'gelu': F.gelu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
    'relu2': SquaredReLU.apply,
}


class RMSNorm(nn.RMSNorm):
    """torch's, which wants its weight in the dtype of x, unlike LayerNorm."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class Dropout(nn.Module):
    """Zero each element with probability p and divide the others by 1 - p, in training.

    Differs from nn.Dropout in where the randomness comes from: one random byte an element, of torch's global
    generator, which train_step seeds for each micro-batch. p is rounded to a multiple of 1/256. Where the rows of
    a micro-batch are split over processes, each draws the mask of the whole micro-batch and takes its own
    rows, so the masks do not depend on the number of processes.
    """

    def __init__(self, p):
        super().__init__()
        self.threshold = max(1, min(255, round(p * 256))) if p else 0
        self.part, self.parts = 0, 1  # these rows are part `part` of `parts` equal ones

    def forward(self, x):
        if not self.training or not self.threshold:
            return x
        n = x.numel() * self.parts
        if x.device.type == 'mps':  # has no generator of 64 bits
            noise = torch.randint(256, (n,), dtype=torch.uint8, device=x.device)
        else:
            # bytes come eight at a time: 64 random bits cost a generator as much as one
            noise = torch.randint(-2**63, 2**63 - 1, ((n + 7) // 8,), device=x.device).view(torch.uint8)
        noise = noise[self.part * x.numel():][:x.numel()].view(x.shape)
        # 0 or 1, at once in the dtype of x: to make it of a Boolean mask takes ten times as long
        mask = torch.ge(noise, self.threshold, out=torch.empty_like(x))
        return x * mask.mul_(256 / (256 - self.threshold))

    def extra_repr(self):
        return f'p={self.threshold / 256:.4g}'


class KVCache:
    """The keys and values of every layer for the positions seen so far.

    Memory for max_length positions is allocated once, by the first append: 2 * n_layer tensors (B, H, max_length, D).
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.k, self.v = {}, {}  # by layer
        self.last = {}  # by layer and part ('attn' or 'mlp'), for token_shift: half of its input (B, 1, C/2) at the last position
        self.length = 0  # S, the positions in use; GPT.forward moves it on

    def append(self, layer, k, v):
        """Store k and v (B, H, T, D) of new positions; return those of all positions (B, H, S+T, D)."""
        if layer not in self.k:
            B, H, _, D = k.shape
            self.k[layer], self.v[layer] = k.new_empty(B, H, self.max_length, D), v.new_empty(B, H, self.max_length, D)
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + D/2) of x (B, H, T, D) by angles given as [cos, cos] and [-sin, sin] (T, D)."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.size(-1) // 2, -1), sin.to(x.dtype))


def attention_by_products(q, k, v):
    """Causal attention of q, k, v (B, H, T, D), whose weights (B, H, T, T) are kept for the backward pass.

    In bfloat16 on a CPU half as much time, forward and backward, as F.scaled_dot_product_attention, which keeps none.
    """
    T, D = q.shape[-2:]
    mask = q.new_full((T, T), -torch.inf).triu_(1)
    q, k, v = (t.contiguous() for t in (q * D**-0.5, k, v))
    return (q @ k.mT).add_(mask).softmax(dim=-1) @ v


class CausalSelfAttention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.qk_norm = config.qk_norm
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)  # (B, H, T, D)
        if self.qk_norm:
            q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if self.training and self.attn_dropout.threshold:
            # drop whole keys, for all queries alike (https://arxiv.org/abs/1907.11065): dropping single
            # attention weights would need the (T, T) matrix, which fused attention, on a GPU, never forms
            v = v * self.attn_dropout(v.new_ones(B, self.n_head, T, 1))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S+T, D)
        if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and cache is None \
                and T <= 1024:  # for longer sequences its weights would take more memory than all else
            y = attention_by_products(q, k, v)
        else:
            # one new query sees every cached key; is_causal would align the mask to the upper left
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.token_shift = config.token_shift
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def shift(self, part, x, cache=None):
        """Move the first half of the channels of x (B, T, C), the input of `part`, one position on; zeros come first."""
        if not self.token_shift:
            return x
        late, rest = x.chunk(2, dim=-1)
        before = torch.zeros_like(late[:, :1])
        if cache is not None:
            if cache.length:
                before = cache.last[self.attn.layer, part]
            cache.last[self.attn.layer, part] = late[:, -1:]
        return torch.cat([torch.cat([before, late[:, :-1]], dim=1), rest], dim=-1)

    def forward(self, x, rotation=None, cache=None):
        x = x + self.attn(self.shift('attn', self.ln_1(x), cache), rotation, cache)
        x = x + self.mlp(self.shift('mlp', self.ln_2(x), cache))
        return x


class SkipInit(TorchFunctionMode):
    """Within this context weights are not drawn, since they are loaded next.

    On the meta device, where only shapes are wanted, drawing would import torch._dynamo: a second of every start-up.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', '') == 'torch.nn.init':
            return None
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """A GPT of the given GPTConfig, initialized like GPT-2 from torch's global generator."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # less memory, for a third more computation
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rotary else {'wpe': nn.Embedding(config.block_size, config.n_embd)}),
            drop=Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=make_norm(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.rotary:
            half = config.n_embd // config.n_head // 2
            # device: on the meta device, where only shapes are wanted, this too would import torch._dynamo (see SkipInit)
            position, pair = torch.arange(config.block_size, device='cpu'), torch.arange(half, device='cpu')
            angles = torch.outer(position, 10000 ** (-pair / half))  # (T, D/2)
            self.register_buffer('cos', angles.cos().repeat(1, 2), persistent=False)
            self.register_buffer('sin', torch.cat([-angles.sin(), angles.sin()], dim=1), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                # each block adds two terms to the residual stream: keep their sum's variance independent of depth
                nn.init.normal_(p, std=0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    @classmethod
    def from_pretrained(cls, folder, block_size=0, dropout=0.0):
        """Return the GPT-2 in folder: config.json and model.safetensors as Hugging Face's transformers write them.

        block_size > 0 keeps only the first so many positions. ValueError where the folder holds something else.
        """
        with SkipInit():
            model = cls(GPTConfig.from_pretrained(folder, block_size, dropout))
        tensors = read_safetensors(os.path.join(folder, 'model.safetensors'))
        own = model.state_dict()
        loaded = set()
        for name, tensor in tensors.items():
            if name != 'lm_head.weight' and not name.startswith('transformer.'):
                name = f'transformer.{name}'  # OpenAI's own files leave it out
            if name.endswith(('.attn.bias', '.attn.masked_bias')):
                continue  # the causal mask
            if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                tensor = tensor.t()  # GPT-2 stores the matrices of its blocks as (in, out)
            if name == 'transformer.wpe.weight':
                tensor = tensor[:model.config.block_size]
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f'{folder}/model.safetensors: {name} {tuple(tensor.shape)} does not fit config.json')
            with torch.no_grad():
                own[name].copy_(tensor)
            loaded.add(name)
        missing = set(own) - loaded - ({'lm_head.weight'} if model.config.tie_weights else set())
        if missing:
            raise ValueError(f'{folder}/model.safetensors lacks {min(missing)}')
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers.GPT2LMHeadModel.from_pretrained(folder) reads.

        ValueError names the switch that GPT-2 has no counterpart for. Biases that the model lacks are written as zeros.
        """
        c = self.config
        for switch, gpt2 in (('activation', ('gelu', 'gelu_tanh')), ('norm', ('layernorm',)), ('rotary', (False,)),
                             ('qk_norm', (False,)), ('token_shift', (False,)), ('softcap', (0.0,))):
            if getattr(c, switch) not in gpt2:
                raise ValueError(f'{switch}={getattr(c, switch)} has no counterpart in GPT-2')
        tensors = {}
        for name, tensor in self.state_dict().items():
            if name == 'lm_head.weight' and c.tie_weights:
                continue
            if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                tensor = tensor.t()
            tensors[name] = tensor
            if not c.bias and name.startswith(('transformer.h.', 'transformer.ln_f.')):
                tensors[name.replace('.weight', '.bias')] = tensor.new_zeros(tensor.size(-1))
        write_safetensors(tensors, os.path.join(folder, 'model.safetensors'))
        with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
            json.dump({
                'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'n_positions': c.block_size, 'n_ctx': c.block_size,
                'vocab_size': c.vocab_size, 'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
                'activation_function': {'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}[c.activation],
                'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': c.tie_weights, 'resid_pdrop': c.dropout,
                'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout, 'torch_dtype': 'float32'}, f, indent=1)

    def num_params(self, non_embedding=True):
        """Number of parameters; `non_embedding` leaves out wpe but not wte, which is also the output matrix."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and not self.config.rotary:
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self):
        """FLOPs of forward and backward for one token of a full block (PaLM, https://arxiv.org/abs/2204.02311, B)."""
        c = self.config
        matrices = self.num_params() - (0 if c.tie_weights else self.transformer.wte.weight.numel())  # looking up is free
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size

    def forward(self, idx, targets=None, cache=None):
        """Return (logits, loss) for token ids idx (B, T).

        logits is (B, T, V); with a KVCache, whose positions come before idx, only the last position's (B, 1, V).
        loss is the mean cross-entropy in nats against targets (B, T), where -1 is not counted; None without targets.
        """
        past = cache.length if cache is not None else 0
        T = idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} tokens do not fit into block_size={self.config.block_size}')
        if past and T > 1:
            raise ValueError('after the first call, a cache takes one token at a time')
        x = self.transformer.wte(idx)  # (B, T, C)
        rotation = None
        if self.config.rotary:
            rotation = self.cos[past:past + T], self.sin[past:past + T]
        else:
            x = x + self.transformer.wpe.weight[past:past + T]
        if x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            # what follows stays in it: half the bytes in each pass. On a GPU LayerNorm would go back to float32
            x = x.to(torch.get_autocast_dtype('cpu'))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training:
                # keep only the block's input, compute the rest anew in the backward pass, with the same dropout
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation, cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        logits = self.lm_head(self.transformer.ln_f(x))
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, vocab_size=None):
        """Continue token ids idx (B, T), yielding the next id of each sequence (B,), max_new_tokens times.

        temperature 0 takes the likeliest token. top_k > 0 keeps the k likeliest; top_p < 1 keeps the likeliest
        that together reach probability top_p. Ids at or beyond vocab_size (padding of the vocabulary) are never
        drawn. Once block_size positions are cached, the last half of the context is fed anew and serves as the
        context from there on, so the cost of a token stays constant. Computes in the dtype of the weights: autocast
        would cast all of them for every token (on a CPU, see store_weights). The caller sets eval mode.
        """
        block_size = self.config.block_size
        new = tokens = idx[:, -block_size:]
        cache = KVCache(min(block_size, tokens.size(1) + max_new_tokens))
        for _ in range(max_new_tokens):
            if cache.length == block_size:
                new = tokens = tokens[:, -max(1, block_size // 2):]
                cache.length = 0
            logits, _ = self(new, cache=cache)
            next_token = draw(logits[:, -1, :vocab_size].float(), temperature, top_k, top_p, generator)
            new = next_token[:, None]
            tokens = torch.cat([tokens, new], dim=1)
            yield next_token


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one id per row of logits (B, V), as GPT.generate describes; returns (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = logits / max(temperature, 1e-30), None  # which stays finite
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # in falling order; what follows has only (B, top_k) to do
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    p = logits.softmax(dim=-1)
    if top_p < 1:
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)  # the likelier ones alone reach it: so the first always stays
    choice = torch.multinomial(p, 1, generator=generator)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


# -----------------------------------------------------------------------------
# fewer bytes for the weights, for generation on a CPU

# x86 alone: products of float32 with weights stored in float16, in an order of its own
FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines
# embedding_bag for weights of one byte each, of which every row has its own scale and offset
embedding_bag_byte = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default


class StoredLinear:
    """A Linear for generation on a CPU, whose weights are stored as bfloat16, float16 or int8.

    Inputs and outputs are float32: (B, T, in) and (B, T, out); rows is the B in which tokens follow one by one, with T = 1.
    A few rows take as long as the weights take to read, so fewer bytes are less time; all but the products stays in
    float32, in which the rest of a step is several times faster on a CPU. int8 has one scale per output channel and
    rounds each weight by at most 1/255 of the channel's largest.

    The product with one row is a weighted sum of the matrix's columns, which is what embedding_bag computes: its kernels
    read half precision and bytes as fast as memory gives them, those for products of matrices read bytes half as fast.
    No nn.Module, whose call takes 1 us more.
    """

    def __init__(self, linear, dtype, rows):
        weight = linear.weight.detach().float()
        self.n_out, n_in = weight.shape
        self.bias, self.scale, self.kernel = linear.bias, None, 'sum'
        if dtype == torch.float16 and FBGEMM:
            self.kernel, self.weight = 'fbgemm', torch.ops.quantized.linear_prepack_fp16(weight, self.bias)
            return
        if rows > 1 and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() \
                and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # in the order in which oneDNN's kernel reads them, by the operators that torch.compile uses
            self.kernel, self.weight = 'onednn', torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
            return
        # more rows are faster as a product; float16 would not hold large inputs
        self.rows = rows if rows <= 16 and dtype != torch.float16 else 0
        # the outputs in parts, for each thread as many, narrow enough that a part's sums stay in registers; two where
        # there are outputs enough, since for a single sum in half precision torch takes a way ten times as slow
        threads = max(2, torch.get_num_threads())
        parts = threads * math.ceil(self.n_out / 256 / threads)
        self.width = math.ceil(self.n_out / parts / 16) * 16
        self.parts = math.ceil(self.n_out / self.width)
        if dtype == torch.int8:
            self.scale = weight.abs().amax(dim=1).clamp(min=1e-30)
            weight = weight / self.scale[:, None]
        weight = F.pad(weight, (0, 0, 0, self.parts * self.width - self.n_out))
        weight = weight.view(self.parts, self.width, n_in).transpose(1, 2).reshape(-1, self.width)  # a part: (in, width)
        self.weight = torch.ops.quantized.embedding_bag_byte_prepack(weight) if dtype == torch.int8 else weight.to(dtype)
        # the sums, part by part, in each part one for each row of x: each is over all rows of the part's weight
        self.index = torch.arange(len(weight), dtype=torch.int32).view(self.parts, 1, n_in).repeat(1, self.rows, 1).flatten()
        self.offsets = torch.arange(0, len(self.index), n_in, dtype=torch.int32)  # where in index each one begins

    def __call__(self, x):
        if self.kernel == 'fbgemm':
            return torch.ops.quantized.linear_dynamic_fp16._op(x, self.weight)  # itself: a look through its arguments takes 5 us
        if self.kernel == 'onednn':
            y = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, None, 'none', [], '').float()
            return y if self.bias is None else y + self.bias
        B, T, C = x.shape
        int8 = self.scale is not None
        if T > 1 or B != self.rows:  # a prompt, or more rows
            weight = torch.ops.quantized.embedding_bag_byte_unpack(self.weight) if int8 else self.weight.float()
            y = (x.reshape(B * T, C) @ weight.view(self.parts, C, self.width)).transpose(0, 1).reshape(B, T, -1)
        else:
            x = x if int8 else x.to(self.weight.dtype)
            bag = (self.weight, self.index, self.offsets, False, 0, False, torch.cat((x,) * self.parts).view(-1))
            y = embedding_bag_byte(*bag) if int8 else torch.embedding_bag(*bag)[0].float()  # (parts * B, width)
            y = y.view(self.parts, B, -1).transpose(0, 1).reshape(B, 1, -1) if B > 1 else y.view(1, 1, -1)
        if y.size(2) != self.n_out:
            y = y[..., :self.n_out]
        if int8:
            y = y.mul_(self.scale)
        return y if self.bias is None else y + self.bias


def store_weights(model, dtype, rows):
    """Replace every Linear of model, a float32 GPT on a CPU, by a StoredLinear of dtype, to generate so many rows at a time."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                delattr(module, name)
                setattr(module, name, StoredLinear(child, dtype, rows))


# -----------------------------------------------------------------------------
# safetensors (https://github.com/huggingface/safetensors): an 8-byte length, a JSON header, raw tensors

SAFETENSORS_DTYPES = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'U8': torch.uint8,
                      'BOOL': torch.bool, 'I64': torch.int64}


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file, memory-mapped; ValueError where the file contradicts itself."""
    size = os.path.getsize(path)
    try:
        with open(path, 'rb') as f:
            n = int.from_bytes(f.read(8), 'little')
            if size < 8 or n > min(size - 8, 100_000_000):
                raise ValueError('the header is longer than the file')
            header = json.loads(f.read(n))
        data = torch.from_file(path, size=size, dtype=torch.uint8)[8 + n:]
        tensors = {}
        for name, entry in header.items():
            if name == '__metadata__':
                continue
            dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry['dtype']], entry['shape'], entry['data_offsets']
            if not all(type(i) is int and i >= 0 for i in (*shape, begin, end)) or end > len(data) \
                    or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f'{name} lies outside of the file or has another size than its shape')
            raw = data[begin:end]
            if (8 + n + begin) % dtype.itemsize:
                raw = raw.clone()  # views in another dtype must be aligned
            tensors[name] = raw.view(dtype).view(shape)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f'{path} is not a sound safetensors file: {type(e).__name__}: {e}') from e


def write_safetensors(tensors, path):
    """Write {name: tensor} to a .safetensors file."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {'dtype': names[t.dtype], 'shape': list(t.shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # the tensors then lie aligned
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
