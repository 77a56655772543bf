"""The model, its generation, and the peak FLOP/s of a device."""
import math

from configurator import Process, peak_flops
from model import (
    ACTIVATIONS,
    GPT,
    Dropout,
    GPTConfig,
    KVCache,
    attention_by_products,
    draw,
    rotate,
)

import pytest
import torch
from torch.nn import functional as F

SMALL = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
MODERN = dict(activation='relu2', norm='rmsnorm', rotary=True, qk_norm=True, token_shift=True,
              tie_weights=False, softcap=15.0, bias=False)
HALF = MODERN | dict(half_rotary=True, attn_scale=0.12, embed_norm=True)
QWEN3 = dict(n_kv_head=1, head_dim=24, n_inner=40, activation='swiglu', norm='rmsnorm',
             norm_eps=1e-6, rotary=True, rope_base=500.0, qk_norm=True, bias=False)
VARIANTS = [{}, dict(bias=False), dict(activation='gelu_tanh'), MODERN, HALF, QWEN3]


def make(**more):
    """Return a small GPT whose weights are far from their initial values: every part matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | more))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
        else:
            p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def greedy(model, idx, n):
    """Return idx (B, T) and the n most likely tokens after it, (B, T + n)."""
    new = list(model.generate(idx, n, temperature=0))
    return torch.cat([idx, torch.stack(new, 1)], 1)


@pytest.mark.parametrize('n_layer, n_head, n_embd, expected', [
    (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168),
    (36, 20, 1280, 774_030_080), (48, 25, 1600, 1_557_611_200)])
def test_parameter_counts_are_gpt2s(n_layer, n_head, n_embd, expected):
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params(non_embedding=False) == expected
    assert model.num_params() == expected - 1024 * n_embd


def test_the_reference_model_has_the_published_counts():
    shape = dict(block_size=128, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape))
        untied = GPT(GPTConfig(**shape, tie_weights=False))
    assert model.num_params() == 10_646_784
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert (len(matrices), sum(p.numel() for p in matrices)) == (26, 10_690_944)
    # PaLM's formula by hand: 6 N + 12 L C T
    assert model.flops_per_token() == 6 * 10_646_784 + 12 * 6 * 384 * 128
    # a token's embedding is looked up, which is no product
    assert untied.flops_per_token() == model.flops_per_token()


def test_initialization_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=8, n_head=4, n_embd=128))
    block = model.transformer.h[3]
    for p, std in ((model.transformer.wte.weight, 0.02), (model.transformer.wpe.weight, 0.02),
                   (block.mlp.c_fc.weight, 0.02), (block.attn.c_proj.weight, 0.02 / 4),
                   (block.mlp.c_proj.weight, 0.02 / 4)):
        assert abs(p.std().item() / std - 1) < 0.05
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not block.mlp.c_fc.bias.any() and (block.ln_1.weight == 1).all()
    zero = GPT(GPTConfig(**SMALL, zero_init=True))
    block = zero.transformer.h[0]
    assert not block.attn.c_proj.weight.any() and not block.mlp.c_proj.weight.any()
    assert block.mlp.c_fc.weight.any()
    untied = GPT(GPTConfig(**SMALL, tie_weights=False))
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert untied.lm_head.weight.any() and zero.transformer.wte.weight.any()
    untied = GPT(GPTConfig(**SMALL, tie_weights=False, zero_head=True))
    assert untied.transformer.h[0].mlp.c_proj.weight.any()
    assert not untied.lm_head.weight.any() and untied.transformer.wte.weight.any()


def test_state_dict_has_gpt2s_keys():
    keys = GPT(GPTConfig(**SMALL)).state_dict().keys()
    for key in ('transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.0.ln_1.bias',
                'transformer.h.0.attn.c_attn.weight', 'transformer.h.1.mlp.c_proj.bias',
                'transformer.ln_f.weight', 'lm_head.weight'):
        assert key in keys
    assert len(keys) == 4 + 1 + 12 * 2


@pytest.mark.parametrize('bad', [
    dict(n_embd=33), dict(dropout=1.0), dict(activation='swish'), dict(norm='batch'),
    dict(n_layer=0), dict(softcap=-1.0), dict(head_dim=3, rotary=True),
    dict(half_rotary=True), dict(head_dim=6, half_rotary=True, rotary=True), dict(attn_scale=-1.0),
    dict(zero_head=True), dict(n_head=2.0), dict(n_kv_head=3), dict(rope_base=0.5),
    dict(norm_eps=-1.0), dict(n_inner=-1)])
def test_senseless_shapes_are_refused(bad):
    with pytest.raises(ValueError, match=list(bad)[0]):
        GPTConfig(**SMALL | bad)


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_position_sees_only_the_past(variant):
    model = make(**variant)
    idx = torch.randint(50, (2, 16))
    other = idx.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 50
    a, b = model(idx)[0], model(other)[0]
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9], b[:, 9])


def test_the_loss_is_cross_entropy_and_skips_minus_one():
    model = make()
    idx, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    logits, loss = model(idx, targets)
    p = logits.double().softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert loss.item() == pytest.approx(-p.log().mean().item(), abs=1e-5)
    targets[0, 3:] = -1
    _, loss = model(idx, targets)
    assert loss.item() == pytest.approx(-p.log()[targets >= 0].mean().item(), abs=1e-5)


def test_the_modern_parts_equal_their_formulas():
    # rotary: channel pairs are complex numbers, turned by an angle that grows with the position
    x = torch.randn(1, 1, 5, 8)
    angles = torch.outer(torch.arange(5), 10000 ** (-torch.arange(4) / 4))
    got = rotate(x, angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], 1))
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    turned = pairs * torch.polar(torch.ones(5, 4).double(), angles.double())
    assert torch.allclose(got, torch.cat([turned.real, turned.imag], -1).float(), atol=1e-6)
    model = make(**MODERN)
    cosines = [math.cos(3 * 10000 ** (-i / 8)) for i in range(8)] * 2
    assert torch.allclose(model.cos[3], angles.new_tensor(cosines))
    # rmsnorm and its gradients, relu2, softcap
    block, x = model.transformer.h[0], torch.randn(2, 3, 32)
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.ln_1.weight
    assert torch.allclose(block.ln_1(x), rms, atol=1e-5)
    x = (0.01 * torch.randn(3, 32)).requires_grad_()  # so small that epsilon matters
    weights = torch.randn(3, 32)
    ours, = torch.autograd.grad((weights * block.ln_1(x)).sum(), x)
    theirs = F.rms_norm(x, (32,), block.ln_1.weight, 1e-5)
    assert torch.allclose(ours, torch.autograd.grad((weights * theirs).sum(), x)[0], rtol=1e-4)
    x = torch.randn(2, 3, 32)
    h = block.mlp.c_fc(x)
    assert torch.allclose(block.mlp(x), block.mlp.c_proj(torch.where(h > 0, h * h, 0)), atol=1e-4)
    h = h.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(ACTIVATIONS['relu2'], h)
    assert model(torch.randint(50, (2, 16)))[0].abs().max() <= 15
    plain = make(**MODERN | dict(softcap=0.0))
    idx = torch.randint(50, (1, 16))
    assert torch.allclose(model(idx)[0], 15 * torch.tanh(plain(idx)[0] / 15), atol=1e-4)


def test_swiglu_gates_the_second_half_of_its_channels_with_the_first():
    for more, inner in (dict(n_inner=40), 40), (dict(n_embd=384, n_head=4), 1024):
        mlp = make(activation='swiglu', **more).transformer.h[0].mlp
        gate, up = mlp.c_fc.weight.split(inner)
        bias_gate, bias_up = mlp.c_fc.bias.split(inner)
        x = torch.randn(2, 3, mlp.c_fc.in_features)
        expected = F.silu(x @ gate.T + bias_gate) * (x @ up.T + bias_up)
        torch.testing.assert_close(mlp(x), mlp.c_proj(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_grouped_queries_equal_a_model_with_the_same_keys_and_values_for_several_heads(qk_norm):
    shape = dict(n_head=4, n_embd=32, head_dim=12, norm='rmsnorm', rotary=True, qk_norm=qk_norm)
    grouped, whole = make(**shape, n_kv_head=2), make(**shape)
    weights = grouped.state_dict()
    for key, tensor in weights.items():
        if '.c_attn.' in key:
            q, k, v = tensor.split([48, 24, 24])
            k, v = (x.view(2, 12, -1).repeat_interleave(2, 0).view(48, -1) for x in (k, v))
            weights[key] = torch.cat([q, k.view(48, *q.shape[1:]), v.view(48, *q.shape[1:])])
    whole.load_state_dict(weights)
    idx = torch.randint(50, (2, 16))
    torch.testing.assert_close(grouped(idx)[0], whole(idx)[0], rtol=1e-4, atol=1e-4)
    cache = KVCache(16)
    grouped(idx, cache=cache)
    assert cache.k[0].shape == (2, 2, 16, 12)  # the keys of the two heads of keys only


def test_flops_count_the_channels_of_the_heads():
    model = make(n_head=4, head_dim=12)
    assert model.flops_per_token() == 6 * model.num_params() + 12 * 2 * 48 * 16


def test_half_rotary_turns_a_quarter_of_the_pairs_with_base_1024_and_keeps_the_rest():
    model = make(rotary=True, half_rotary=True)  # 16 channels a head, 8 pairs
    angles = [5 * 1024 ** (-i / 3) for i in range(4)] + [0.0] * 4
    assert torch.allclose(model.cos[5], torch.tensor([math.cos(a) for a in angles] * 2))
    x = torch.randn(1, 1, 16, 16)
    turned = rotate(x, model.cos, model.sin)
    kept = (torch.arange(16) % 8) >= 4
    assert torch.equal(turned[..., kept], x[..., kept])
    assert not torch.isclose(turned, x)[:, :, 5, ~kept].any()


def test_attn_scale_replaces_one_over_the_root_of_head_dim():
    idx = torch.randint(50, (1, 16))
    default, same, other = (make(qk_norm=True, attn_scale=scale)(idx)[0]
                            for scale in (0.0, 0.25, 0.12))
    assert torch.equal(default, same) and not torch.allclose(default, other, atol=1e-3)
    # the scale of queries does the same
    model = make(attn_scale=0.12)
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:32] *= 0.25 / 0.12
        block.attn.c_attn.bias.data[:32] *= 0.25 / 0.12
    assert torch.allclose(model(idx)[0], make()(idx)[0], atol=1e-3)
    # attention by products, which training takes in bfloat16
    model = make(attn_scale=2.0)
    with torch.autocast('cpu', torch.bfloat16):
        trained = model(idx)[0]
        with torch.no_grad():
            evaluated = model(idx)[0]
    assert (trained - evaluated).norm() < 0.05 * evaluated.norm()


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
def test_embed_norm_makes_the_model_independent_of_the_scale_of_its_embeddings(norm):
    model = make(embed_norm=True, norm=norm, tie_weights=False)
    idx = torch.randint(50, (1, 16))
    before = model(idx)[0]
    for embedding in (model.transformer.wte, model.transformer.wpe):
        embedding.weight.data *= 10
    assert torch.allclose(model(idx)[0], before, atol=1e-2)
    model.transformer.ln_e.weight.data *= 2
    assert not torch.allclose(model(idx)[0], before, atol=1e-2)


def test_qk_norm_makes_attention_independent_of_the_scale_of_queries():
    model = make(qk_norm=True)
    idx = torch.randint(50, (1, 16))
    before = model(idx)[0]
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:64] *= 3  # queries and keys
        block.attn.c_attn.bias.data[:64] *= 3
    assert torch.allclose(model(idx)[0], before, atol=1e-3)


def test_token_shift_takes_half_of_the_channels_from_the_previous_position():
    model = make(token_shift=True, bias=False)
    block = model.transformer.h[1]
    seen = {}
    block.ln_1.register_forward_hook(lambda module, inputs, output: seen.update(ln_1=output))
    block.ln_2.register_forward_hook(lambda module, inputs, output: seen.update(ln_2=output))
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.update(attn=inputs[0]))
    block.mlp.register_forward_pre_hook(lambda module, inputs: seen.update(mlp=inputs[0]))
    model(torch.randint(50, (2, 16)))
    half = model.config.n_embd // 2
    for x, shifted in ((seen['ln_1'], seen['attn']), (seen['ln_2'], seen['mlp'])):
        assert torch.equal(shifted[..., half:], x[..., half:])
        assert not shifted[:, 0, :half].any()  # the first position has no previous one
        assert torch.equal(shifted[:, 1:, :half], x[:, :-1, :half])


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('batch_size', [1, 3])
def test_cached_decoding_equals_the_full_forward(variant, batch_size):
    model = make(**variant)
    idx = torch.randint(50, (batch_size, 4))
    tokens = greedy(model, idx, 12)
    # each token is the most likely one by a forward pass over everything before it
    for t in range(4, 16):
        logits = model(tokens[:, :t])[0][:, -1]
        assert torch.equal(logits.argmax(-1), tokens[:, t])

    # the logits themselves
    def cached_logits():
        cache = KVCache(16)
        got = [model(tokens[:, :5], cache=cache)[0]]
        got += [model(tokens[:, t:t + 1], cache=cache)[0] for t in range(5, 16)]
        return torch.cat(got, 1)
    with torch.no_grad():
        full = model(tokens)[0]
        assert torch.allclose(cached_logits(), full[:, 4:], atol=1e-4)
    with torch.autocast('cpu', torch.bfloat16):  # here with gradients, too
        error = (cached_logits() - full[:, 4:]).std() / full.std()
    assert error < 0.02, error


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.filterwarnings('error')
def test_autocast_on_a_cpu_halves_activations_and_keeps_the_loss(variant):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | variant))
    idx = torch.randint(50, (4, 16))
    _, exact = model(idx, idx)
    inputs = []
    for module in (*model.transformer.h, model.transformer.ln_f, model.lm_head):
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        _, loss = model(idx, idx)
    assert set(inputs) == {torch.bfloat16} and loss.dtype == torch.float32
    assert 0 < abs(loss - exact) < 3e-3 * exact


@pytest.mark.parametrize('shape', [(3, 2, 40, 16), (5, 8, 1024, 8)])
def test_attention_by_products_is_as_exact_as_torchs(shape):
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, *shape).unbind()

    def results(attention, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = attention(*leaves)
        y.backward(dy.to(dtype))
        return [t.detach().double() for t in (y, *(leaf.grad for leaf in leaves))]

    def sdpa(*qkv):
        return F.scaled_dot_product_attention(*qkv, is_causal=True)

    def by_products(*qkv):
        return attention_by_products(*qkv, scale=shape[-1]**-0.5)
    for exact, ours, torchs in zip(results(sdpa, torch.float64),
                                   results(by_products, torch.bfloat16),
                                   results(sdpa, torch.bfloat16)):
        assert (ours - exact).norm() < 2 * (torchs - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize('length, by_products', [(1024, True), (1025, False)])
def test_attention_keeps_its_weights_for_short_sequences_in_training_only(
        length, by_products, monkeypatch):
    model = GPT(GPTConfig(block_size=1025, vocab_size=50, n_layer=1, n_head=1, n_embd=4))
    calls = []
    monkeypatch.setattr('model.attention_by_products', lambda q, k, v, scale: calls.append(1) or v)
    idx = torch.zeros(1, length, dtype=torch.int64)
    model(idx)  # in float32
    with torch.autocast('cpu', torch.bfloat16):
        with torch.no_grad():
            model(idx)
        assert not calls
        model(idx)
    assert bool(calls) == by_products


@pytest.mark.parametrize('variant', [{}, MODERN])
def test_past_block_size_generation_continues_from_the_last_half(variant):
    model = make(**variant)
    idx = torch.randint(50, (2, 10))
    tokens = greedy(model, idx, 40)
    start = 0
    for t in range(10, 50):
        if t - start > 16:
            start = t - 8  # 16 positions are cached: generation goes on from the last 8 tokens
        assert torch.equal(model(tokens[:, start:t])[0][:, -1].argmax(-1), tokens[:, t]), t
    # of a prompt longer than block_size, the model sees the last tokens
    long = torch.randint(50, (1, 40))
    expected = model(long[:, -16:])[0][:, -1].argmax(-1)
    assert torch.equal(next(model.generate(long, 1, temperature=0)), expected)


def test_generation_is_repeatable_and_never_leaves_the_vocabulary():
    model = make()
    idx = torch.zeros(8, 1, dtype=torch.int64)

    def go(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(list(model.generate(idx, 20, generator=generator, **more)))
    torch.manual_seed(5)
    a = go(1, temperature=2.0)
    torch.manual_seed(6)
    assert torch.equal(a, go(1, temperature=2.0))
    assert not torch.equal(a, go(2, temperature=2.0))
    assert (a >= 30).any() and (go(1, temperature=2.0, vocab_size=30) < 30).all()
    assert (go(1, temperature=0, vocab_size=30) < 30).all()


@pytest.mark.parametrize('settings, kept', [
    (dict(), [.4, .3, .2, .1]), (dict(top_k=2), [.4, .3, 0, 0]), (dict(top_k=9), [.4, .3, .2, .1]),
    (dict(top_p=.65), [.4, .3, 0, 0]), (dict(top_p=.05), [.4, 0, 0, 0]),
    (dict(top_p=.75), [.4, .3, .2, 0]), (dict(temperature=.5), [.16, .09, .04, .01]),
    (dict(temperature=0), [1, 0, 0, 0]),
    # top_p counts the probabilities after temperature and top_k
    (dict(temperature=.5, top_p=.5), [1, 0, 0, 0]), (dict(top_k=3, top_p=.42), [1, 0, 0, 0]),
    (dict(top_k=3, top_p=.5), [.4, .3, 0, 0])])
def test_draws_follow_the_stated_distribution(settings, kept):
    expected = torch.tensor(kept) / sum(kept)
    order = torch.tensor([2, 0, 3, 1])  # the most likely one is not the first
    logits = torch.tensor([.4, .3, .2, .1]).log()[order].repeat(20000, 1)
    ids = draw(logits, generator=torch.Generator().manual_seed(0), **settings)
    frequencies = torch.bincount(ids, minlength=4) / len(ids)
    assert torch.allclose(frequencies, expected[order], atol=0.015)


@pytest.mark.parametrize('temperature', [1e-40, 1e-300, 1e-6])
def test_at_the_lowest_temperatures_the_most_likely_token_is_drawn(temperature):
    logits = torch.randn(5, 65, generator=torch.Generator().manual_seed(0)) * 100
    for settings in {}, {'top_k': 3}, {'top_p': 0.5}:
        assert torch.equal(draw(logits, temperature, **settings), logits.argmax(dim=-1))


def test_dropout_keeps_the_mean_and_drops_p():
    torch.manual_seed(0)
    drop = Dropout(0.2).train()
    x = torch.ones(1000, 1001)
    y = drop(x)
    p = 51 / 256
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.002)
    assert y.mean().item() == pytest.approx(1, abs=0.002)
    assert y.max().item() == pytest.approx(1 / (1 - p))
    # eight bytes come from one random number: each of the eight positions drops as often
    assert (dropped.flatten()[:1000 * 1000].view(-1, 8).mean(0) - p).abs().max() < 0.006
    assert not torch.equal(drop(x), y) and torch.equal(drop.eval()(x), x)
    assert Dropout(0.0).train()(x) is x
    assert not Dropout(0.001).train()(x).all()  # a small p is not rounded to zero


def test_dropout_masks_do_not_depend_on_how_rows_are_divided():
    x = torch.randn(8, 5, 7)
    drop = Dropout(0.3).train()
    torch.manual_seed(3)
    whole = drop(x)
    for part in range(4):
        drop.part, drop.parts = part, 4
        torch.manual_seed(3)
        assert torch.equal(drop(x[2 * part:2 * part + 2]), whole[2 * part:2 * part + 2])


def test_attention_dropout_drops_whole_keys():
    model = make(dropout=0.4, n_layer=1).train()
    attention = model.transformer.h[0].attn
    attention.resid_dropout = torch.nn.Identity()
    x = torch.randn(1, 16, 32)
    torch.manual_seed(1)
    got = attention(x)
    torch.manual_seed(1)
    keep = attention.attn_dropout(torch.ones(1, 2, 16, 1))  # (B, H, S, 1)
    assert 0 < (keep == 0).sum() < 32
    q, k, v = (t.view(1, 16, 2, 16).transpose(1, 2) for t in attention.c_attn(x).split(32, dim=2))
    weights = (q @ k.mT / 4).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    expected = attention.c_proj(((weights * keep.mT) @ v).transpose(1, 2).reshape(1, 16, 32))
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('variant', [{}, MODERN])
def test_activation_checkpointing_gives_the_same_gradients_with_dropout(variant):
    grads, kept = [], [0, 0]  # kept: bytes that the backward pass needs
    for on in (False, True):
        model = make(dropout=0.3, **variant).train()
        model.activation_checkpointing = on
        torch.manual_seed(7)

        def keep(t):
            kept[on] += t.nbytes
            return t
        idx = torch.arange(32).view(2, 16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            _, loss = model(idx, idx)
        loss.backward()
        grads.append([loss] + [p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))
    assert kept[True] < kept[False] / 2


def test_gelu_is_exact_by_default():
    x = torch.linspace(-4, 4, 100).double()
    exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert torch.allclose(make().transformer.h[0].mlp.activation(x), exact)
    assert torch.allclose(make(activation='gelu_tanh').transformer.h[0].mlp.activation(x), tanh)
    assert not torch.allclose(exact, tanh, atol=1e-5) and torch.allclose(F.gelu(x), exact)


def test_gpu_peaks_are_found_by_name(process, monkeypatch):
    assert peak_flops(process) is None  # of a CPU
    process = Process(torch.device('cuda'), torch.bfloat16)
    for name, peak in (('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', None),
                       ('NVIDIA H200', 989), ('NVIDIA H200 NVL', None), ('NVIDIA B200', 2250),
                       ('NVIDIA GB200', None), ('NVIDIA GH200 480GB', None),
                       ('NVIDIA A100-SXM4-40GB', 312), ('NVIDIA A100 80GB PCIe', 312),
                       ('NVIDIA A10', None), ('NVIDIA A10G', 70), ('NVIDIA L40', None),
                       ('NVIDIA L40S', 362), ('NVIDIA L4', 121), ('Tesla T4', 65),
                       ('Tesla V100-SXM2-16GB', 125), ('NVIDIA Mystery 9', None)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: name)
        assert peak_flops(process) == (peak and peak * 1e12), name
    for number, peak in ((5090, 209.5), (4090, 165.2), (3090, 71)):
        for variant in ('', ' Ti', ' D', ' D v2', ' Laptop GPU', ' Ti Laptop GPU'):
            name = f'NVIDIA GeForce RTX {number}{variant}'
            monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: name)
            assert peak_flops(process) == (None if variant else peak * 1e12), name
    process.dtype = torch.float32
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: 'NVIDIA H100 80GB HBM3')
    assert peak_flops(process) is None


@pytest.mark.slow
def test_a_compiled_loss_keeps_the_logits_once_and_in_bfloat16():
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=1, n_head=2, n_embd=32))
    targets = torch.randint(500, (2, 64))
    targets[0, :9] = -1  # not counted
    logits, losses, grads = torch.randn(2, 64, 500), [], []
    for compiled in (False, True):
        if compiled:
            model.compile_in_parts()
        x, saved = logits.bfloat16().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = model.loss(x, targets)
        loss.backward()
        losses.append(loss.item())
        grads.append(x.grad)
        kept = {t.untyped_storage().data_ptr(): t.dtype for t in saved if t.numel() == x.numel()}
        assert list(kept.values()) == [torch.bfloat16 if compiled else torch.float32]
    log_p = logits.bfloat16().double().log_softmax(dim=-1)
    rows, columns = (targets >= 0).nonzero(as_tuple=True)
    expected = -log_p[rows, columns, targets[rows, columns]].mean().item()
    assert losses == pytest.approx([expected] * 2, abs=1e-5)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_residual_stream_is_in_bfloat16_but_never_in_float16(dtype):
    model, seen = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=8)), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast('cpu', dtype):
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert seen == [torch.bfloat16 if dtype == torch.bfloat16 else torch.float32] * 2


def test_generation_does_without_cudnns_attention_and_restores_it():
    cudnn = torch.backends.cuda
    model, seen = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=8)), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(cudnn.cudnn_sdp_enabled()))
    before = cudnn.cudnn_sdp_enabled()
    for _ in model.eval().generate(torch.zeros(1, 1, dtype=torch.int64), 3):
        assert cudnn.cudnn_sdp_enabled() == before
    assert before and seen == [False] * 3


# -----------------------------------------------------------------------------
# small mistakes that no other test would notice

@pytest.mark.parametrize('variant', [
    dict(qk_norm=True), dict(rotary=True),
    dict(rotary=True, half_rotary=True, qk_norm=True, attn_scale=0.12)])
def test_attention_equals_its_formula_in_complex_numbers(variant):
    model, seen = make(n_layer=1, **variant), {}  # two heads of 16 channels: 8 pairs
    attention = model.transformer.h[0].attn
    attention.register_forward_hook(lambda module, inputs, y: seen.update(x=inputs[0], y=y))
    model(torch.randint(50, (3, 16)))
    q, k, v = (t.view(3, 16, 2, 16).transpose(1, 2).double()
               for t in attention.c_attn(seen['x']).split(32, dim=-1))
    if 'qk_norm' in variant:
        q, k = (t - t.mean(-1, keepdim=True) for t in (q, k))
        q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() for t in (q, k))
    if 'rotary' in variant:
        frequencies = [10000 ** (-i / 8) for i in range(8)]
        if 'half_rotary' in variant:
            frequencies = [1024 ** (-i / 3) for i in range(4)] + [0.0] * 4
        angles = torch.outer(torch.arange(16.0), torch.tensor(frequencies)).double()
        turn = torch.polar(torch.ones_like(angles), angles)  # position t turns by t * frequency
        q, k = (torch.complex(t[..., :8], t[..., 8:]) * turn for t in (q, k))
    scores = (q @ k.mH).real * variant.get('attn_scale', 1 / 4)
    weights = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    expected = attention.c_proj((weights @ v).transpose(1, 2).flatten(2).float())
    assert torch.allclose(seen['y'], expected, atol=1e-4)


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
def test_norms_add_1e_5_to_the_mean_square(norm):
    layer = make(norm=norm).transformer.ln_f
    x = 0.003 * torch.randn(2, 3, 32)  # so small that 1e-5 is half of the sum
    mean, bias = 0, 0
    if norm == 'layernorm':
        mean, bias = x.mean(-1, keepdim=True), layer.bias
    square = (x - mean).square().mean(-1, keepdim=True)
    expected = (x - mean) / (square + 1e-5).sqrt() * layer.weight + bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize('top_p, kept', [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_top_p_keeps_the_token_that_reaches_it_exactly_and_none_after_it(top_p, kept):
    logits = torch.zeros(500, 4)  # four probabilities of exactly 1/4
    ids = draw(logits, top_p=top_p, generator=torch.Generator().manual_seed(0))
    assert len(ids.unique()) == kept


def test_activation_checkpointing_leaves_generation_as_it_is():
    model, idx = make(**MODERN), torch.randint(50, (2, 4))
    expected = greedy(model, idx, 10)
    model.activation_checkpointing = True
    assert torch.equal(greedy(model, idx, 10), expected)


def test_dropout_acts_on_the_embeddings_and_on_both_outputs_of_a_block():
    model, seen = make(dropout=0.5), []
    block = model.transformer.h[0]
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for part in (block.attn, block.mlp):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.train()(torch.randint(50, (4, 16)))
    assert len(seen) == 3 and all(0.4 < (x == 0).float().mean() < 0.6 for x in seen)
    model.eval()(torch.randint(50, (4, 16)))
    assert all(x.all() for x in seen[3:])


def test_what_a_cache_would_answer_wrongly_is_refused():
    model, cache = make(), KVCache(16)
    with pytest.raises(ValueError, match='17 tokens exceed block_size=16'):
        model(torch.zeros(1, 17, dtype=torch.int64))
    model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match='one token at a time'):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)


def test_a_model_that_is_compiled_in_parts_is_compiled_for_training_only(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'compile', lambda part: lambda *a: calls.append(part) or part(*a))
    model, idx = make(), torch.randint(50, (2, 16))
    model.compile_in_parts()
    model(idx, idx)
    greedy(model, idx, 3)
    assert not calls
    model.train()(idx, idx)
    assert len(calls) == 2 + 1  # two blocks, and the loss
