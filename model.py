"""
GPT-2 and its modern variants: the layers, the key-value cache, and generation.

    model = GPT(GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384))
    logits, loss = model(idx, targets)
    for token in model.generate(idx, max_new_tokens=100): ...

The defaults of GPTConfig give GPT-2 (https://github.com/openai/gpt-2) with exact GELU. Parameters
have the names of Hugging Face's GPT-2. Shapes in comments:
B batch, T time, C n_embd, H heads, D channels of a head, V vocab, S cached positions.
"""
import math
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NOT_ZERO = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'rope_base')

@dataclass
class GPTConfig:
    """The hyperparameters of a GPT. ValueError names those that do not fit."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # heads of keys and values (grouped-query attention); 0 means n_head
    head_dim: int = 0  # channels of a head; 0 means n_embd / n_head
    n_embd: int = 768
    n_inner: int = 0  # channels inside the MLP; 0 means 4 * n_embd, or 8/3 * n_embd for swiglu
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm
    activation: str = 'gelu'  # see ACTIVATIONS
    norm: str = 'layernorm'  # see NORMS
    norm_eps: float = 1e-5  # epsilon of the norms
    rotary: bool = False  # rotary instead of learned positions (https://arxiv.org/abs/2104.09864)
    rope_base: float = 10000.0  # base of the wavelengths of rotary positions
    half_rotary: bool = False  # rotate half of the channels, always with base 1024 (modded-nanogpt)
    # normalize queries and keys (https://arxiv.org/abs/2302.05442): by RMSNorm with weights if
    # norm is rmsnorm, otherwise by LayerNorm without weights
    qk_norm: bool = False
    attn_scale: float = 0.0  # scale of the products of queries and keys; 0: 1 / sqrt(head_dim)
    embed_norm: bool = False  # normalize the embeddings
    token_shift: bool = False  # see Block.shift (https://arxiv.org/abs/2305.13048)
    tie_weights: bool = True  # lm_head shares the matrix of wte
    zero_init: bool = False  # c_proj starts at zero, so every block starts as the identity
    zero_head: bool = False  # an untied lm_head starts at zero
    softcap: float = 0.0  # bounds the logits; 0 disables it (https://arxiv.org/abs/2408.00118)

    def __post_init__(self):
        kinds = {int: 'an integer', float: 'a number', bool: 'True or False', str: 'a string'}
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, (f.type, int)):
                raise ValueError(f'{f.name}={value!r} must be {kinds[f.type]}')
            low = 1 if f.name in NOT_ZERO else 0
            if f.type in (int, float) and not low <= value < math.inf:
                raise ValueError(f'{f.name}={value} must be at least {low}')
        if problems := list(self.problems()):
            raise ValueError('; '.join(problems))

    def problems(self):
        """Yield what does not fit together."""
        multiple = 4 if self.half_rotary else 2
        if not self.head_dim and self.n_embd % self.n_head:
            yield f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}'
        elif self.rotary and self.head_size % multiple:
            yield f'head_dim={self.head_size} must be a multiple of {multiple} for rotary'
        if self.n_kv_head and self.n_head % self.n_kv_head:
            yield f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}'
        if self.half_rotary and not self.rotary:
            yield 'half_rotary needs rotary=True'
        if self.zero_head and self.tie_weights:
            yield 'zero_head needs tie_weights=False'
        if self.dropout >= 1:
            yield f'dropout={self.dropout} must be below 1'
        for key, choices in ('activation', ACTIVATIONS), ('norm', NORMS):
            if getattr(self, key) not in choices:
                yield f'{key}={getattr(self, key)} must be one of {", ".join(choices)}'

    @property
    def head_size(self):
        """The channels D of a head: head_dim, or n_embd / n_head."""
        return self.head_dim or self.n_embd // self.n_head

class SquaredReLU(torch.autograd.Function):
    """relu(x)**2 (https://arxiv.org/abs/2109.08668) with a backward of two operations, not five."""

    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, dy):
        return (dy * ctx.saved_tensors[0]).mul_(2)

def swiglu(x):
    """silu(first half) * second half of the channels (https://arxiv.org/abs/2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up

ACTIVATIONS = {
    'gelu': F.gelu,  # exact
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # OpenAI's GPT-2
    'relu2': SquaredReLU.apply,
    'swiglu': swiglu,
}

class NormalizeRMS(torch.autograd.Function):
    """x / sqrt(mean(x**2) + eps), for CPUs, on which F.rms_norm takes three times as long."""

    @staticmethod
    def forward(ctx, x, eps):
        sum_dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sum_dtype)
        scale = (norm.square() / x.size(-1) + eps).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, scale = ctx.saved_tensors
        mean = (dy * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(dy, y, mean, value=-1).mul_(scale), None

class RMSNorm(nn.RMSNorm):
    """RMSNorm (https://arxiv.org/abs/1910.07467), in the dtype of x."""

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if x.device.type == 'cpu':
            return NormalizeRMS.apply(x, self.eps) * weight
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)

NORMS = {
    'layernorm': lambda config: nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
    'rmsnorm': lambda config: RMSNorm(config.n_embd, config.norm_eps),
}

class Dropout(nn.Module):
    """In training, zero each element with probability p and divide the others by 1 - p.

    One random byte decides each element, so p is rounded to a multiple of 1/256, above 0. On a CPU
    this is several times as fast as nn.Dropout. If the rows of a micro-batch are divided over
    `parts` processes, each process draws the mask of all rows and uses slice `part` of it. So the
    mask does not depend on the number of processes.
    """

    def __init__(self, p):
        super().__init__()
        self.threshold = max(1, min(255, round(p * 256))) if p else 0
        self.part, self.parts = 0, 1

    def forward(self, x):
        if not self.training or not self.threshold:
            return x
        n = x.numel() * self.parts
        if x.device.type == 'mps':  # its generator has no 64-bit integers
            noise = torch.randint(256, (n,), dtype=torch.uint8, device=x.device)
        else:  # eight bytes in a 64-bit number, which takes no longer to draw than one byte
            noise = torch.randint(-2**63, 2**63 - 1, ((n + 7) // 8,), device=x.device)
            noise = noise.view(torch.uint8)
        noise = noise[self.part * x.numel():][:x.numel()].view(x.shape)
        # write 0 and 1 directly in x.dtype: casting a boolean mask is ten times slower on a CPU
        mask = torch.ge(noise, self.threshold, out=torch.empty_like(x))
        return x * mask.mul_(256 / (256 - self.threshold))

class KVCache:
    """The keys and values of every layer for the positions seen so far.

    A layer's first append allocates its two tensors, (B, heads of keys, max_length, D) each.
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.k, self.v = {}, {}  # by layer
        self.last = {}  # for token_shift: half of the channels at the last position (B, 1, C/2)
        self.length = 0  # S, the positions in use; GPT.forward increases it

    def append(self, layer, k, v):
        """Store k and v (B, H, T, D); return those of all positions (B, H, S+T, D)."""
        if layer not in self.k:
            B, H, _, D = k.shape
            self.k[layer] = k.new_empty(B, H, self.max_length, D)
            self.v[layer] = v.new_empty(B, H, self.max_length, D)
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

def rotary_tables(config):
    """Return cos and sin for rotate(), (block_size, D) each; the first half of sin is negated."""
    half = config.head_size // 2
    if config.half_rotary:  # the second half of the pairs is not rotated
        frequencies = 1024 ** -torch.linspace(0, 1, half // 2)
        frequencies = torch.cat([frequencies, torch.zeros(half // 2)])
    else:
        frequencies = config.rope_base ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(config.block_size), frequencies)  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)

def rotate(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, H, T, D); see rotary_tables."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

def attention_by_products(q, k, v, scale):
    """Causal attention of q, k, v (B, H, T, D) that stores its (B, H, T, T) for backward.

    In bfloat16 on a CPU this takes half as long as F.scaled_dot_product_attention.
    """
    T = q.size(-2)
    mask = q.new_full((T, T), -torch.inf).triu_(1)
    q, k, v = (t.contiguous() for t in (q * scale, k, v))
    return (q @ k.mT).add_(mask).softmax(dim=-1) @ v

class CausalSelfAttention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head  # heads of queries
        self.n_kv_head = config.n_kv_head or config.n_head  # heads of keys and values
        self.head_dim = config.head_size
        self.scale = config.attn_scale or self.head_dim**-0.5
        # the queries of all heads, then the keys, then the values, as in GPT-2
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm and config.norm == 'rmsnorm':
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        elif config.qk_norm:
            self.q_norm = self.k_norm = nn.LayerNorm(self.head_dim, config.norm_eps, False)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None):
        B, T, _ = x.shape
        q_size, kv_size = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        q, k, v = self.c_attn(x).split([q_size, kv_size, kv_size], dim=-1)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)

        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:  # products of queries and keys depend on distances only
            cos, sin = (table.to(q.dtype) for table in rotation)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # drop the values of whole positions (https://arxiv.org/abs/1907.11065): to drop single
        # weights needs the (T, T) matrix, which fused attention never forms
        if self.training and self.attn_dropout.threshold:
            v = v * self.attn_dropout(v.new_ones(B, self.n_kv_head, T, 1))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.n_kv_head < self.n_head:  # several heads of queries share one of keys and values
            k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)  # (B, H, S+T, D)
            v = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)

        training_on_cpu = q.device.type == 'cpu' and cache is None and torch.is_grad_enabled()
        # for longer sequences, the (T, T) matrices would take too much memory
        if training_on_cpu and q.dtype == torch.bfloat16 and T <= 1024:
            y = attention_by_products(q, k, v, self.scale)
        else:
            # a single query sees all cached keys; is_causal would let it see the first one only
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=self.scale)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * D)
        return self.resid_dropout(self.c_proj(y))

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        gated = config.activation == 'swiglu'
        inner = config.n_inner or 4 * config.n_embd
        if gated and not config.n_inner:  # 8/3 * n_embd gives the same number of parameters
            inner = max(32, round(8 / 3 * config.n_embd / 32) * 32)
        self.c_fc = nn.Linear(config.n_embd, 2 * inner if gated else inner, bias=config.bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))

class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.token_shift = config.token_shift
        self.ln_1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLP(config)

    def shift(self, part, x, cache=None):
        """Return x (B, T, C) with half of its channels from the previous position.

        part: which part of the block x goes into, 'attn' or 'mlp'.
        """
        if not self.token_shift:
            return x
        shifted, rest = x.chunk(2, dim=-1)  # (B, T, C/2)
        if cache is not None and cache.length:
            previous = cache.last[self.attn.layer, part]
        else:
            previous = torch.zeros_like(shifted[:, :1])
        if cache is not None:
            cache.last[self.attn.layer, part] = shifted[:, -1:]
        shifted = torch.cat([previous, shifted[:, :-1]], dim=1)
        return torch.cat([shifted, rest], dim=-1)

    def forward(self, x, rotation=None, cache=None):
        x = x + self.attn(self.shift('attn', self.ln_1(x), cache), rotation, cache)
        return x + self.mlp(self.shift('mlp', self.ln_2(x), cache))

class GPT(nn.Module):
    """A GPT with the shape of a GPTConfig, initialized like GPT-2 from torch's global generator."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: recompute blocks in the backward pass
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if not config.rotary:
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        if config.embed_norm:
            self.transformer['ln_e'] = NORMS[config.norm](config)
        self.transformer['drop'] = Dropout(config.dropout)
        self.transformer['h'] = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer['ln_f'] = NORMS[config.norm](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.rotary:
            cos, sin = rotary_tables(config)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                # 2 * n_layer terms are added to the residual stream: the variance of their sum must
                # not depend on n_layer
                std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=0.0 if config.zero_init else std)
            elif p.dim() == 2:
                zero = config.zero_head and name == 'lm_head.weight'
                nn.init.normal_(p, std=0.0 if zero else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def num_params(self, non_embedding=True):
        """Return the number of parameters, by default without those of learned positions."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and not self.config.rotary:
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self):
        """Return the FLOPs of forward and backward per token (https://arxiv.org/abs/2204.02311)."""
        c, n = self.config, self.num_params()
        if not c.tie_weights:
            n -= self.transformer.wte.weight.numel()  # the embedding is only looked up
        return 6 * n + 12 * c.n_layer * c.n_head * c.head_size * c.block_size

    def forward(self, idx, targets=None, cache=None):
        """Return (logits, loss) for token ids idx (B, T).

        logits: (B, T, V). loss: mean cross-entropy against targets (B, T) in nats, or None without
        targets; a target of -1 is not counted. cache: a KVCache of the positions before idx; then
        logits are those of the last position only, (B, 1, V).
        """
        past = cache.length if cache is not None else 0
        T = idx.size(1)
        if past + T > self.config.block_size:
            raise ValueError(f'{past + T} tokens exceed block_size={self.config.block_size}')
        if past and T > 1:
            raise ValueError('after the first call, a cache takes one token at a time')
        x = self.transformer.wte(idx)  # (B, T, C)
        rotation = None
        if self.config.rotary:
            rotation = self.cos[past:past + T], self.sin[past:past + T]
        else:
            x = x + self.transformer.wpe.weight[past:past + T]
        if self.config.embed_norm:
            x = self.transformer.ln_e(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream takes half the bytes
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training:
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
        return logits, self.loss(logits, targets)

    def loss(self, logits, targets):
        """Return the mean cross-entropy of logits (B, T, V) against targets (B, T)."""
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def compile_in_parts(self):
        """Compile blocks and loss for training only; evaluation and generation stay eager."""
        for block in self.transformer.h:
            compile_for_training(block, 'forward')
        compile_for_training(self, 'loss')

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None,
                 vocab_size=None):
        """Yield max_new_tokens tensors (B,): the next token id of each sequence in idx (B, T).

        temperature 0 takes the most likely token. top_k > 0 samples from the k most likely tokens,
        top_p < 1 from the most likely ones that together reach probability top_p. Ids from
        vocab_size on are padding and never drawn. Call model.eval() first. When block_size
        positions are full, generation continues from the last half of them.
        """
        block_size = self.config.block_size
        new = tokens = idx[:, -block_size:]
        cache = KVCache(min(block_size, tokens.size(1) + max_new_tokens))
        for _ in range(max_new_tokens):
            if cache.length == block_size:
                new = tokens = tokens[:, -max(1, block_size // 2):]
                cache.length = 0
            # cuDNN's attention makes a new plan for each length of the cache, which takes 30 ms
            cudnn = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
            logits = self(new, cache=cache)[0][:, -1, :vocab_size].float()
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            next_token = draw(logits, temperature, top_k, top_p, generator)
            new = next_token[:, None]
            tokens = torch.cat([tokens, new], dim=1)
            yield next_token

def compile_for_training(module, name):
    """Compile a method of module, and use the compiled method in training mode."""
    eager = getattr(module, name)
    compiled = torch.compile(eager)
    setattr(module, name, lambda *args: (compiled if module.training else eager)(*args))

def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one id per row of logits (B, V), as GPT.generate describes; return (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / max(temperature, 1e-30)  # the quotient stays finite
    ids = None  # the id of each column of logits, if columns were selected or sorted
    if 0 < top_k < logits.size(-1):  # from here on, top_k columns instead of V
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    p = logits.softmax(dim=-1)
    if top_p < 1:  # keep a token if the more likely ones together are below top_p
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0)
    choice = torch.multinomial(p, 1, generator=generator)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)

def shard(model, process):
    """Shard the parameters over all processes (FSDP2). A block is gathered at its first use."""
    from torch.distributed.device_mesh import init_device_mesh  # here: slow to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy()
    if process.dtype != torch.float32:  # gather in bfloat16, sum gradients in float32
        policy = MixedPrecisionPolicy(param_dtype=process.dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    # keep gathered blocks until the last micro-batch's backward pass; train.update frees them
    more = dict(mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for block in model.transformer.h:
        fully_shard(block, **more)
    return fully_shard(model, **more)

# -----------------------------------------------------------------------------
# Muon, the optimizer of the blocks' matrices

class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalized updates (https://kellerjordan.github.io/posts/muon/).

    Every row of an update is then scaled so that its L2 norm is lr: all outputs of a layer learn at
    the same speed (Muon+, https://arxiv.org/abs/2602.21545).

    Unlike torch.optim.Muon, it multiplies matrices in `dtype`, orthogonalizes all matrices of one
    shape together, divides this work over the processes, and accepts sharded matrices.
    """

    def __init__(self, params, lr, momentum, weight_decay, dtype, process):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype, self.process = dtype, process

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        by_shape = {}
        for p in group['params']:
            by_shape.setdefault(p.shape, []).append(p)
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        for params in by_shape.values():
            means = [local(self.state[p]['momentum_buffer']) for p in params]
            grads = [local(p.grad) for p in params]
            torch._foreach_lerp_(means, grads, 1 - group['momentum'])
            steps = torch.stack(torch._foreach_lerp(grads, means, group['momentum']))  # Nesterov
            steps = F.normalize(self.orthogonalize_together(steps, params[0]), dim=-1)
            params = [local(p) for p in params]
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(params, steps.unbind(), alpha=-group['lr'])

    def orthogonalize_together(self, x, like):
        """Return x (matrices, rows, columns) orthogonalized. The processes divide the matrices.

        like: a parameter. If it is sharded, x and the result have this process's rows only.
        """
        if is_sharded(like):
            from torch.distributed.tensor import DTensor, Shard, distribute_tensor
            mesh, placements = like.device_mesh, [Shard(1)]
            whole = torch.empty(len(x), *like.shape, device='meta')
            x = DTensor.from_local(x, mesh, placements, run_check=False, shape=whole.shape,
                                   stride=whole.stride()).full_tensor()
        count = math.ceil(len(x) / self.process.world_size)
        share = slice(self.process.rank * count, (self.process.rank + 1) * count)
        y = torch.zeros_like(x)
        if len(x[share]):
            y[share] = orthogonalize(x[share].to(self.dtype))
        y = self.process.all_reduce(y)
        if is_sharded(like):
            y = distribute_tensor(y, mesh, placements, src_data_rank=None).to_local()
        return y

def is_sharded(tensor):
    """Return whether a process holds only a part of the tensor (a DTensor)."""
    return hasattr(tensor, 'to_local')

def local(tensor):
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor

# Coefficients (a, b, c) of a x + b x^3 + c x^5 in each step. For singular values s between 0.01 and
# 1, they make the worst error |s - 1| smallest (Polar Express, https://arxiv.org/abs/2505.16932)
POLAR_STEPS = [(8.093, -23.620, 17.446), (3.637, -2.722, 0.537), (2.661, -1.977, 0.453)]

def orthogonalize(x):
    """Return x (matrices, rows, columns) with its singular values near 1 (from 0.7 to 1.3).

    Each of POLAR_STEPS multiplies x by a polynomial of its Gram matrix x x^T.
    """
    wide = x if x.size(-2) <= x.size(-1) else x.mT
    wide = wide / (1.01 * torch.linalg.matrix_norm(wide, keepdim=True)).clamp(min=1e-7)
    identity = torch.eye(wide.size(-2), dtype=x.dtype, device=x.device)

    def polynomial(gram, a, b, c):
        return a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)

    if wide.size(-2) == wide.size(-1):
        for step in POLAR_STEPS:
            wide = polynomial(wide @ wide.mT, *step) @ wide
        return wide
    # the Gram matrix is smaller than x, so x is multiplied only once, at the end
    gram = wide @ wide.mT
    product = factor = polynomial(gram, *POLAR_STEPS[0])
    for step in POLAR_STEPS[1:]:
        gram = factor @ gram @ factor
        factor = polynomial(gram, *step)
        product = factor @ product
    wide = product @ wide
    return wide if x.size(-2) <= x.size(-1) else wide.mT
