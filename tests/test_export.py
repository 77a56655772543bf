"""Models in the shapes of GPT-2, Llama and Qwen3: to other programs and back."""
import json
import os
import random
import re
from dataclasses import dataclass

import sample
import train
from configurator import configure
from data import bpe as bpe_training
from data import huggingface
from data.checkpoints import load_model
from data.gguf import write_gguf
from data.huggingface import KEYS, changes, portable, read_pretrained, write_pretrained
from data.tokenizers import BytePairTokenizer, CharTokenizer, GPT2Tokenizer
from model import GPT, GPTConfig

import pytest
import torch
from conftest import TINY
from test_data import Hub, hub  # noqa: F401

transformers = pytest.importorskip('transformers')

LLAMA = dict(bias=False, norm='rmsnorm', activation='swiglu', rotary=True)
SHAPES = {
    'gpt2': dict(activation='gelu_tanh'),
    'gpt2 untied': dict(bias=False, tie_weights=False, n_inner=48, norm_eps=1e-6),
    'llama': LLAMA | dict(tie_weights=False, n_kv_head=2),
    'llama tied': LLAMA | dict(rope_base=500000.0, n_kv_head=1),
    'qwen3': LLAMA | dict(qk_norm=True, n_kv_head=2),
    'qwen3 untied': LLAMA | dict(qk_norm=True, tie_weights=False, head_dim=6, norm_eps=1e-6,
                                 n_inner=40)}
WORDS = ['Ça', 'fait', 'déjà', '1234', 'œufs', 'à', 'l’été.', '我能吞下玻璃', '而不伤身体。',
         "don't", 'Größe', '\n', '\n\n', '  ', 'What', 'is', 'an', 'LLM?', 'naïve', '☕', 'αβγ',
         '-12.5']


def mixed_text(length):
    """Return a text of several languages."""
    rng = random.Random(1)
    return ' '.join(rng.choice(WORDS) for _ in range(length // 5))[:length]


def characters():
    return CharTokenizer(mixed_text(5000), eot=True)


def byte_pairs():
    pieces = bpe_training.count_pieces([mixed_text(5000)])
    tokens = [bpe_training.to_letters(t) for t in bpe_training.train_bpe(pieces, 399)]
    eot = len(tokens)
    return BytePairTokenizer(bpe_training.PATTERN, [*tokens, '<|endoftext|>'], [eot], eot)


TOKENIZERS = {'characters': characters, 'byte pairs': byte_pairs, 'gpt2': GPT2Tokenizer}


def make(shape, vocab_size):
    """Return a model with random weights that all matter; its vocabulary has rows of padding."""
    torch.manual_seed(0)
    padded = -(-vocab_size // 64) * 64
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    model = GPT(GPTConfig(block_size=128, vocab_size=padded, n_layer=2, n_head=4, n_embd=32,
                          **shape)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float('norm' in name or 'ln_' in name), std=0.2)
    return model


def greedy(model, prompt, n, vocab_size):
    new = model.generate(torch.tensor([prompt]), n, temperature=0, vocab_size=vocab_size)
    return [token.item() for token in new]


def same_model(ours, theirs, vocab_size):
    """Check that a model of transformers has the logits of ours and continues as ours does."""
    idx = torch.randint(vocab_size, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = ours(idx)[0][..., :vocab_size], theirs(idx).logits
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)
        prompt = idx[:1, :8]
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100,
                              do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy(ours, prompt[0].tolist(), 100, vocab_size) == out[0, 8:].tolist()


# -----------------------------------------------------------------------------
# out

@pytest.mark.parametrize('shape, kind', [
    *((shape, 'characters') for shape in SHAPES), ('llama', 'byte pairs'), ('qwen3', 'byte pairs'),
    ('gpt2', 'gpt2'), ('llama', 'gpt2')])
def test_transformers_reads_an_export_and_quill_reads_it_back(tmp_path, shape, kind, bpe):
    tokenizer = TOKENIZERS[kind]()
    size = tokenizer.vocab_size
    ours = make(shape, size)
    write_pretrained(str(tmp_path), ours, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == shape.split()[0]
    if shape.startswith('gpt2'):  # mlx-lm requires this old name of n_positions
        assert json.loads((tmp_path / 'config.json').read_text())['n_ctx'] == 128
    same_model(ours, theirs, size)
    back = read_pretrained(str(tmp_path))
    assert back['tokenizer'] == tokenizer.to_dict() and back['model_args']['vocab_size'] == size
    _, _, tensors = portable(ours, tokenizer)
    _, _, again = portable(load_model(back), tokenizer)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], t) for name, t in tensors.items())
    text = mixed_text(100_000)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = their_tokenizer(text)['input_ids']
    assert ids == tokenizer.encode(text).tolist() and their_tokenizer.decode(ids) == text
    for token in ('bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id'):
        assert getattr(their_tokenizer, token) == tokenizer.eot
    if kind == 'characters':  # mlx-lm encodes such a character when it reads the tokenizer
        assert their_tokenizer('Ω')['input_ids'] == [tokenizer.eot]
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == tokenizer.eot


@pytest.mark.parametrize('shape', ['gpt2', 'llama', 'qwen3 untied'])
def test_quill_reads_what_a_client_has_saved_again(tmp_path, shape):
    tokenizer = characters()
    ours = make(shape, tokenizer.vocab_size)
    write_pretrained(str(tmp_path), ours, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    their_tokenizer.add_special_tokens({'pad_token': '[PAD]'})  # without a row in the weights
    for folder, resize in ('small', False), ('large', True):
        if resize:
            theirs.resize_token_embeddings(len(their_tokenizer))
        theirs.save_pretrained(tmp_path / folder)
        their_tokenizer.save_pretrained(tmp_path / folder)
        model, back = sample.load(str(tmp_path / folder))
        idx = torch.arange(50)[None]
        a, b = ours(idx)[0], model(idx)[0]
        size = tokenizer.vocab_size
        assert torch.allclose(a[..., :size], b[..., :size], atol=1e-5)
        assert back.eot == tokenizer.eot and back.vocab_size == size + resize
        text = mixed_text(1000)
        assert back.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize('shape', ['gpt2', 'qwen3'])
def test_an_export_works_in_a_pipeline_and_in_the_trainer(tmp_path, shape):
    pytest.importorskip('accelerate')
    tokenizer = characters()
    write_pretrained(str(tmp_path / 'hf'), make(shape, tokenizer.vocab_size), tokenizer)
    pipeline = transformers.pipeline('text-generation', model=str(tmp_path / 'hf'))
    text = pipeline('déjà', max_new_tokens=5, do_sample=False)[0]['generated_text']
    assert text.startswith('déjà')
    collator = transformers.DataCollatorForLanguageModeling(pipeline.tokenizer, mlm=False)
    rows = [pipeline.tokenizer(t) for t in ('What is', 'naïve', 'an LLM?', 'été')]  # uneven
    arguments = transformers.TrainingArguments(
        str(tmp_path / 'trained'), max_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy='no')
    trainer = transformers.Trainer(pipeline.model, arguments, collator, train_dataset=rows)
    assert trainer.train().global_step == 2


def test_all_settings_that_stand_in_the_way_are_named(tmp_path):
    shape = LLAMA | dict(qk_norm=True, token_shift=True, embed_norm=True, softcap=15.0)
    with pytest.raises(ValueError) as e:
        write_pretrained(str(tmp_path / 'hf'), make(shape, 64), characters())
    own, remedy = str(e.value).split(': no other program can express this. Train with ')
    assert own == 'embed_norm=True, token_shift=True, softcap=15.0'
    assert remedy.startswith('--embed_norm=False --token_shift=False --softcap=0.0, or take')
    assert not (tmp_path / 'hf').exists()
    # the remedy
    shape |= dict(token_shift=False, embed_norm=False, softcap=0.0)
    write_pretrained(str(tmp_path / 'hf'), make(shape, 64), characters())


@pytest.mark.parametrize('more', [
    dict(norm='rmsnorm'), dict(rotary=True), dict(qk_norm=True), dict(activation='relu2'),
    dict(attn_scale=0.1), dict(n_kv_head=2), LLAMA | dict(bias=True), LLAMA | dict(rotary=False),
    LLAMA | dict(activation='gelu'), LLAMA | dict(attn_scale=0.1), LLAMA | dict(norm='layernorm')])
def test_a_model_that_no_client_has_is_refused(tmp_path, more):
    with pytest.raises(ValueError, match='no other program can express this'):
        write_pretrained(str(tmp_path / 'hf'), make(more, 64), characters())


def test_a_setting_that_the_tables_forget_ends_in_a_refusal(tmp_path):
    @dataclass
    class Config(GPTConfig):
        new_setting: int = 7

    model = make('gpt2', 64)
    model.config = Config(**vars(model.config))
    assert not any(changes(model.config, 'gpt2'))
    model.config.new_setting = 8
    with pytest.raises(ValueError, match='new_setting=8: .* --new_setting=7'):
        write_pretrained(str(tmp_path / 'hf'), model, characters())
    assert all(changes(model.config, model_type)['new_setting'] == 7 for model_type in KEYS)


@pytest.mark.parametrize('config', ['train_shakespeare_qwen3', 'train_tinystories'])
def test_the_configs_in_the_shape_of_qwen3_can_be_exported(config):
    configure('train', [config])
    assert huggingface.find_model_type(train.model_config(4096)) == 'qwen3'


def test_the_command_writes_a_folder_for_all_clients(train_run, tmp_path, capsys):
    train_run('--max_iters=1', '--norm=rmsnorm', '--activation=swiglu', '--rotary=True',
              '--qk_norm=True', '--n_kv_head=1')
    configure('sample', [f'--out_dir={tmp_path / "out"}', '--weights=last',
                         f'--export={tmp_path / "hf"}'])
    sample.main()
    assert f'from_pretrained({str(tmp_path / "hf")!r}) of transformers' in capsys.readouterr().out
    files = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
             'tokenizer_config.json'}
    assert files <= set(os.listdir(tmp_path / 'hf')) <= files | {'model.gguf'}
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['model_type'] == 'qwen3'


# -----------------------------------------------------------------------------
# llama.cpp

def read_gguf(path):
    """Return what a GGUF file holds: ({key: value}, {name: array})."""
    gguf = pytest.importorskip('gguf')
    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(t.data.reshape(*reversed(t.shape.tolist())))
               for t in reader.tensors}
    return facts, tensors


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
@pytest.mark.parametrize('shape', SHAPES)
def test_the_file_for_llama_cpp_holds_the_model(tmp_path, shape, dtype):
    tokenizer = characters()
    model = make(shape, tokenizer.vocab_size)
    write_gguf(str(tmp_path / 'model.gguf'), model, tokenizer, dtype)
    facts, tensors = read_gguf(tmp_path / 'model.gguf')
    arch, c = shape.split()[0], model.config
    assert facts['general.architecture'] == arch
    expected = {'context_length': 128, 'embedding_length': 32, 'block_count': 2,
                'feed_forward_length': model.transformer.h[0].mlp.c_proj.in_features,
                'attention.head_count': 4, 'attention.head_count_kv': c.n_kv_head or 4,
                'attention.key_length': c.head_dim or 8, 'vocab_size': tokenizer.vocab_size}
    assert {key: facts[f'{arch}.{key}'] for key in expected} == expected
    norm = 'layer_norm' if arch == 'gpt2' else 'layer_norm_rms'
    assert facts[f'{arch}.attention.{norm}_epsilon'] == pytest.approx(c.norm_eps)
    assert facts[f'{arch}.rope.freq_base'] == c.rope_base
    blocks = {name.split('.', 2)[2].rpartition('.')[0] for name in tensors if name[:3] == 'blk'}
    attn = {'attn_qkv'} if arch == 'gpt2' else {'attn_q', 'attn_k', 'attn_v'}
    mlp = {'ffn_up', 'ffn_down'} | (set() if arch == 'gpt2' else {'ffn_gate'})
    norms = {'attn_norm', 'ffn_norm'} | ({'attn_q_norm', 'attn_k_norm'} if c.qk_norm else set())
    assert blocks == attn | mlp | norms | {'attn_output'}
    others = {name for name in tensors if name[:3] != 'blk'}
    assert ('output.weight' in others) != c.tie_weights
    assert ('position_embd.weight' in others) == (arch == 'gpt2')
    weights = model.state_dict()
    matrix = getattr(torch, dtype)
    assert torch.equal(tensors['blk.1.ffn_down.weight'],
                       weights['transformer.h.1.mlp.c_proj.weight'].to(matrix))
    assert torch.equal(tensors['token_embd.weight'],
                       weights['transformer.wte.weight'][:tokenizer.vocab_size].to(matrix))
    assert {t.dtype for t in tensors.values() if t.dim() == 1} == {torch.float32}
    if arch != 'gpt2':
        q = weights['transformer.h.0.attn.c_attn.weight'][:4 * c.head_size].to(matrix)
        theirs = tensors['blk.0.attn_q.weight']
        if arch == 'llama':  # channels 0, D/2, 1, D/2 + 1, ... of each head
            order = [head * 8 + i + half for head in range(4) for i in range(4) for half in (0, 4)]
            q = q[order]
        assert torch.equal(theirs, q)


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_the_file_for_llama_cpp_holds_the_tokenizer(tmp_path, kind, bpe):
    tokenizer = TOKENIZERS[kind]()
    write_gguf(str(tmp_path / 'model.gguf'), make('qwen3', tokenizer.vocab_size), tokenizer,
               'float16')
    facts, _ = read_gguf(tmp_path / 'model.gguf')
    facts = {key.removeprefix('tokenizer.ggml.'): value for key, value in facts.items()}
    assert facts['pre'] == ('gpt-2' if kind == 'gpt2' else 'llama-bpe')
    assert facts['eos_token_id'] == facts['bos_token_id'] == tokenizer.eot
    assert not facts['add_bos_token'] and not facts['add_space_prefix']
    assert facts['token_type'].count(3) == 1 and facts['token_type'][tokenizer.eot] == 3
    # byte pair encoding with these tokens and merges, by another program, gives the same ids
    tokenizers = pytest.importorskip('tokenizers')
    vocab = {token: i for i, token in enumerate(facts['tokens'])}
    assert len(vocab) == tokenizer.vocab_size
    letters = dict.fromkeys(bpe_training.LETTERS, 0)
    merged = {''.join(merge.split(' ')): 0 for merge in facts['merges']}
    missing = [token for token in letters | merged if token not in vocab]
    merges = [tuple(merge.split(' ')) for merge in facts['merges']]
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab | {token: len(vocab) + i for i, token in enumerate(missing)}, merges))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                     use_regex=kind == 'gpt2')
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(bpe_training.PATTERN), 'isolated')
    steps = [byte_level] if kind == 'gpt2' else [split, byte_level]
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    text = mixed_text(20_000)
    assert whole.encode(text).ids == tokenizer.encode(text).tolist()


def test_a_tokenizer_that_llama_cpp_lacks_is_a_note(train_run, tmp_path, capsys, monkeypatch):
    tokenizer = CharTokenizer('abc')  # of an older dataset, without an end-of-text token
    monkeypatch.setattr(sample, 'load', lambda *a, **k: (make('qwen3', 64), tokenizer))
    configure('sample', [f'--export={tmp_path / "hf"}', '--init_from=gpt2'])
    sample.main()
    assert 'note: no model.gguf: its tokenizer has no end-of-text' in capsys.readouterr().out
    assert not (tmp_path / 'hf' / 'model.gguf').exists()
    assert (tmp_path / 'hf' / 'model.safetensors').exists()


@pytest.mark.slow
@pytest.mark.parametrize('kind', TOKENIZERS)
@pytest.mark.parametrize('shape', SHAPES)
def test_llama_cpp_continues_as_quill_does(tmp_path, shape, kind, bpe):
    """Needs llama-cpp-python, which takes ten minutes to build on two cores:

    pip install llama-cpp-python && python -m pytest -m slow tests/test_export.py
    """
    llama_cpp = pytest.importorskip('llama_cpp')
    tokenizer = TOKENIZERS[kind]()
    ours, size = make(shape, tokenizer.vocab_size), tokenizer.vocab_size
    write_gguf(str(tmp_path / 'model.gguf'), ours, tokenizer, 'float32')
    theirs = llama_cpp.Llama(str(tmp_path / 'model.gguf'), n_ctx=128, n_threads=1, verbose=False)
    text = mixed_text(100_000)
    ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode(text).tolist()
    prompt, new = tokenizer.encode('What is').tolist(), []
    for token in theirs.generate(prompt, temp=0, top_k=1, repeat_penalty=1.0):
        new.append(token)
        if len(new) == 100:
            break
    assert new == greedy(ours, prompt, 100, size)


# -----------------------------------------------------------------------------
# in

def random_model(kind, **more):
    """Return a tiny Llama or Qwen3 of transformers with weights that all matter."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=72, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    torch.manual_seed(0)
    config = getattr(transformers, f'{kind}Config')(**shape | more)
    model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float('norm' in name), std=0.2)
    return model


def save(model, folder):
    model.save_pretrained(folder, max_shard_size='20KB' if str(folder).endswith('parts') else '1GB')
    CharTokenizer(chars=''.join(map(chr, range(32, 127))), eot=True).save_pretrained(folder)


@pytest.mark.parametrize('kind, more', [
    ('Llama', {}), ('Llama', dict(tie_word_embeddings=True, num_key_value_heads=4)),
    ('Llama', dict(rms_norm_eps=1e-5, head_dim=10)),
    ('Qwen3', dict(head_dim=16)), ('Qwen3', dict(head_dim=8, tie_word_embeddings=True))])
@pytest.mark.parametrize('name', ['whole', 'parts'])
def test_models_of_transformers_are_read(tmp_path, kind, more, name):
    theirs = random_model(kind, rope_parameters={'rope_type': 'default', 'rope_theta': 5e5}, **more)
    save(theirs, tmp_path / name)
    assert len(list((tmp_path / name).glob('*.safetensors'))) == 1 or name == 'parts'
    model, tokenizer = sample.load(str(tmp_path / name))
    same_model(model, theirs, 96)
    assert tokenizer.eot == 95


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_models_in_half_precision_are_read_to_float32(tmp_path, dtype):
    save(random_model('Llama').to(dtype), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same_model(sample.load(str(tmp_path))[0], theirs.eval(), 96)


def test_a_config_of_an_older_transformers_is_read(tmp_path):
    theirs = random_model('Llama', rope_parameters={'rope_type': 'default', 'rope_theta': 1e5})
    save(theirs, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    for key in ('rope_parameters', 'head_dim'):
        config.pop(key)
    config |= {'rope_theta': 100000, 'rope_scaling': None}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    same_model(sample.load(str(tmp_path))[0], theirs, 96)


@pytest.mark.parametrize('key, value', [
    ('rope_scaling', {'rope_type': 'llama3', 'factor': 8.0}), ('use_sliding_window', True),
    ('rope_scaling', {'type': 'linear', 'factor': 2.0}), ('attention_bias', True),
    ('mlp_bias', True), ('hidden_act', 'gelu'), ('layer_types', ['sliding_attention'] * 2),
    ('model_type', 'mistral')])
def test_what_quill_lacks_is_refused_by_name(tmp_path, key, value):
    save(random_model('Llama'), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config.pop('rope_parameters', None)
    (tmp_path / 'config.json').write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f'{key}=.*quill reads only models with'):
        read_pretrained(str(tmp_path))


def test_rope_scaling_of_a_new_transformers_is_refused_by_name(tmp_path):
    save(random_model('Llama', rope_parameters={
        'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}), tmp_path)
    with pytest.raises(ValueError, match='rope_scaling='):
        read_pretrained(str(tmp_path))


def test_missing_matrices_are_told(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    theirs = random_model('Qwen3', head_dim=8)
    save(theirs, tmp_path)
    weights = {name: t.clone() for name, t in theirs.state_dict().items() if 'k_proj' not in name}
    save_file(weights, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match='do not fit'):
        load_model(read_pretrained(str(tmp_path)))


def test_a_model_of_transformers_trains_further(tmp_path, text, train_run):
    save(random_model('Qwen3', head_dim=8, tie_word_embeddings=True), tmp_path / 'hf')
    tokenizer = json.loads(json.dumps(read_pretrained(str(tmp_path / 'hf'))['tokenizer']))
    from data.build import write_dataset
    write_dataset('topics_hf', str(text), tokenizer, drop=True)
    tiny = [a for a in TINY if not a.startswith(('--n_', '--dropout', '--dataset'))]
    train.main([*tiny, f'--init_from={tmp_path / "hf"}', '--dataset=topics_hf', '--max_iters=2',
                f'--out_dir={tmp_path / "out"}'])
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['iter_num'] == 2 and saved['model_args']['qk_norm']
    assert saved['model_args']['block_size'] == 32


# -----------------------------------------------------------------------------
# the hub

@pytest.mark.parametrize('parts', [False, True])
def test_a_name_on_the_hub_is_fetched_once(hub, tmp_path, monkeypatch, parts):  # noqa: F811
    made = tmp_path / ('parts' if parts else 'made')
    save(random_model('Llama'), made)
    monkeypatch.setattr(huggingface, 'DATA_DIR', str(tmp_path / 'data'))
    monkeypatch.setenv('HF_ENDPOINT', hub)
    Hub.files = {f'/Owner/tiny-1.0/resolve/main/{path.name}': path.read_bytes()
                 for path in made.iterdir()}
    found = read_pretrained('Owner/tiny-1.0', weights=False)
    asked = [path.rpartition('/')[2] for path, _ in Hub.requests]
    assert asked == ['config.json', 'tokenizer.json', 'tokenizer_config.json']
    assert found['tokenizer']['kind'] == 'char'
    back = read_pretrained('Owner/tiny-1.0')['model']
    assert len(Hub.requests) == (4 + len(list(made.glob('*-of-*'))) if parts else 4)
    Hub.requests.clear()
    assert read_pretrained('Owner/tiny-1.0')['model'].keys() == back.keys() and not Hub.requests
    load_model(read_pretrained('Owner/tiny-1.0'))


def test_a_missing_model_is_told_with_all_files_at_once(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface, 'DATA_DIR', str(tmp_path / 'data'))
    monkeypatch.setenv('HF_ENDPOINT', hub)
    for name, repository, folder, files in (
            ('gpt2', 'openai-community/gpt2', 'gpt2_weights/gpt2',
             'config.json, model.safetensors'),
            ('Owner/none', 'Owner/none', 'hub_weights/Owner/none',
             'config.json, tokenizer.json, tokenizer_config.json, model.safetensors')):
        with pytest.raises(ValueError, match='HTTP status 404') as e:
            read_pretrained(name)
        assert f'{files} of {hub}/{repository}/resolve/main belong in {tmp_path}/data/{folder}: ' \
            in str(e.value)


@pytest.mark.parametrize('name', ['../x', 'own/..', '.own/x', 'own/.x'])
def test_a_path_is_not_taken_for_a_name_on_the_hub(hub, tmp_path, monkeypatch, name):  # noqa: F811
    monkeypatch.setattr(huggingface, 'DATA_DIR', str(tmp_path / 'data'))
    monkeypatch.setenv('HF_ENDPOINT', hub)
    with pytest.raises(ValueError, match='it must be gpt2'):
        read_pretrained(name)
    assert not (tmp_path / 'data').exists()


def test_an_index_of_another_kind_is_one_line(tmp_path):
    save(random_model('Llama'), tmp_path / 'parts')
    path = tmp_path / 'parts' / 'model.safetensors.index.json'
    for content in ('{}', '{"weight_map": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match='has no weight_map: remove it'):
            read_pretrained(str(tmp_path / 'parts'))


def test_an_index_cannot_name_a_path_outside_its_folder(tmp_path):
    save(random_model('Llama'), tmp_path / 'parts')
    path = tmp_path / 'parts' / 'model.safetensors.index.json'
    path.write_text(re.sub('"(model-[^"]*safetensors)"', r'"../../\1"', path.read_text()))
    assert '../../' in path.read_text()
    sample.load(str(tmp_path / 'parts'))
