"""GPT-2's weights, in and out, checked against transformers."""
import json
import os
import re
import shutil
import sys

import train
from data import dataset, huggingface
from data.checkpoints import load_model
from data.huggingface import read_pretrained, read_safetensors, write_pretrained
from data.tokenizers import CharTokenizer

import pytest
import torch
from test_model import make

LFS = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n'


def reference(**more):
    """Return a tiny GPT-2 of transformers with weights that all matter."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    shape = dict(vocab_size=50, n_positions=16, n_layer=2, n_head=2, n_embd=8, bos_token_id=0,
                 eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | more)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


# the tokenizer of make() in test_model.py, which has 50 tokens
TOKENIZER = CharTokenizer(chars=''.join(map(chr, range(40, 90))))


def save(model, folder):
    """Save a model of transformers with a tokenizer of as many tokens as it has."""
    model.save_pretrained(folder)
    CharTokenizer(chars=''.join(map(chr, range(model.config.vocab_size)))).save_pretrained(folder)


def load(folder):
    """Return the model in a folder; its weights must have all names and shapes."""
    return load_model(read_pretrained(str(folder)))


def same_logits(ours, theirs, atol=1e-4):
    idx = torch.arange(32).view(2, 16)
    with torch.no_grad():
        return torch.allclose(ours.eval()(idx)[0], theirs(idx).logits, atol=atol)


def change(path, **more):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny GPT-2."""
    write_pretrained(tmp_path, make(), TOKENIZER)
    return tmp_path


@pytest.mark.parametrize('tanh', [False, True])
def test_logits_equal_transformers(tmp_path, tanh):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=1024, n_layer=2, n_head=2, n_embd=32,
        activation_function='gelu_new' if tanh else 'gelu')
    reference = transformers.GPT2LMHeadModel(config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.2)
    save(reference, tmp_path)
    idx = torch.randint(50, (2, 1024))
    with torch.no_grad():
        assert torch.allclose(load(tmp_path).eval()(idx)[0], reference(idx).logits, atol=1e-4)


@pytest.mark.parametrize('variant', [
    {}, dict(bias=False), dict(activation='gelu_tanh', tie_weights=False)])
def test_transformers_loads_an_export_with_equal_logits_and_the_round_trip_is_exact(
        tmp_path, variant):
    transformers = pytest.importorskip('transformers')
    model = make(**variant)
    write_pretrained(tmp_path, model, TOKENIZER)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = torch.randint(50, (3, 16))
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, model(idx)[0], atol=1e-4)
    back, weights = load(tmp_path).state_dict(), model.state_dict()
    assert all(torch.equal(back[k], v) for k, v in weights.items())
    assert all(not v.any() for k, v in back.items() if k not in weights)  # biases of zeros


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_floating_dtype_are_read_to_float32(tmp_path, dtype):
    theirs = reference().to(dtype)
    save(theirs, tmp_path)
    model = load(tmp_path)
    assert torch.equal(model.transformer.wte.weight, theirs.transformer.wte.weight.float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same_logits(model, theirs.float())


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('stored', ['as transformers does', 'lm_head', 'both'])
def test_tied_and_untied_weights_are_read_from_any_of_their_names(tmp_path, tied, stored):
    save_file = pytest.importorskip('safetensors.torch').save_file
    theirs = reference(tie_word_embeddings=tied)
    save(theirs, tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = {k: v.clone() for k, v in theirs.state_dict().items()}
    if stored == 'lm_head' and tied:
        del tensors['transformer.wte.weight']
    if stored != 'as transformers does':
        save_file(tensors, path)
    assert same_logits(load(tmp_path), theirs)
    if stored == 'both' and tied:
        tensors['lm_head.weight'] += 1
        save_file(tensors, path)
        with pytest.raises(ValueError, match='needs "tie_word_embeddings": false'):
            load(tmp_path)
        change(tmp_path / 'config.json', tie_word_embeddings=False)  # the remedy
        assert torch.equal(load(tmp_path).lm_head.weight, tensors['lm_head.weight'])


def test_names_without_transformer_and_stored_causal_masks_are_read(tmp_path):
    save_file = pytest.importorskip('safetensors.torch').save_file
    theirs = reference()
    save(theirs, tmp_path)
    tensors = {k.removeprefix('transformer.'): v.clone() for k, v in theirs.state_dict().items()
               if k != 'lm_head.weight'}
    tensors['h.0.attn.bias'] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    tensors['h.0.attn.masked_bias'] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / 'model.safetensors')
    assert same_logits(load(tmp_path), theirs)


def test_shards_are_read_and_a_missing_one_is_named(tmp_path):
    theirs = reference()
    save(theirs, tmp_path)
    os.remove(tmp_path / 'model.safetensors')
    theirs.save_pretrained(tmp_path, max_shard_size='3KB')
    shards = sorted(path.name for path in tmp_path.glob('model-*.safetensors'))
    assert len(shards) > 2 and not (tmp_path / 'model.safetensors').exists()
    assert same_logits(load(tmp_path), theirs)
    os.rename(tmp_path / shards[1], tmp_path / 'elsewhere')
    with pytest.raises(FileNotFoundError, match=shards[1]):
        load(tmp_path)
    (tmp_path / shards[1]).write_text(LFS)
    with pytest.raises(ValueError, match=f'{shards[1]} is damaged.*git lfs pull'):
        load(tmp_path)
    os.replace(tmp_path / 'elsewhere', tmp_path / shards[1])
    assert same_logits(load(tmp_path), theirs)


def test_pickled_weights_are_refused(folder):
    os.rename(folder / 'model.safetensors', folder / 'pytorch_model.bin')
    with pytest.raises(FileNotFoundError, match='model.safetensors'):
        load(folder)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_pointer_of_git_lfs_is_called_so(folder, name):
    (folder / name).write_text(LFS)
    with pytest.raises(ValueError, match=f'{name} .*git lfs pull'):
        load(folder)


@pytest.mark.parametrize('key, value, words', [
    ('model_type', 'mamba', 'model_type="mamba": quill reads only models with "gpt2" or "llama"'),
    ('activation_function', 'relu', 'activation_function="relu": quill reads only models with '
     '"gelu_new" or "gelu_pytorch_tanh" or "gelu"'),
    ('tie_word_embeddings', 'no', 'tie_word_embeddings="no": quill reads only'),
    ('layer_norm_epsilon', -1, 'norm_eps=-1 must be'),
    ('scale_attn_weights', False, 'scale_attn_weights=false: quill reads only'),
    ('scale_attn_by_inverse_layer_idx', True, 'scale_attn_by_inverse_layer_idx=true: quill reads'),
    ('n_layer', None, 'n_layer'), ('n_head', 'x', 'n_head'), ('n_positions', 0, 'block_size'),
    ('n_head', 3, 'n_head=3')])
def test_a_config_that_quill_cannot_follow_is_told_truly(folder, key, value, words):
    change(folder / 'config.json', **{key: value})
    with pytest.raises(ValueError, match=re.escape(words)):
        load(folder)


@pytest.mark.parametrize('key, value', [
    ('vocab_size', 49), ('vocab_size', 51), ('n_positions', 17), ('n_layer', 1), ('n_layer', 3),
    ('n_embd', 16), ('tie_word_embeddings', False)])
def test_weights_of_another_shape_than_the_config_are_refused(folder, key, value):
    change(folder / 'config.json', **{key: value})
    with pytest.raises(ValueError, match='do not fit|more tokens than|not tied'):
        load(folder)


def test_a_config_with_transformers_defaults_is_read(folder):
    config = json.loads((folder / 'config.json').read_text())
    for key in ('architectures', 'tie_word_embeddings', 'activation_function'):
        config.pop(key)
    (folder / 'config.json').write_text(json.dumps(config))
    args = read_pretrained(folder)['model_args']
    assert args['activation'] == 'gelu_tanh' and args['tie_weights']


@pytest.mark.parametrize('content', ['{"n_layer": ', '<html>', b'\xff\xfe', '[1]'])
def test_a_config_that_is_none_is_told_truly(folder, content):
    path = folder / 'config.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match='config.json is not a JSON object.*download it again'):
        load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match='config.json'):
        load(folder)


def test_damaged_weights_and_weights_of_other_kinds_are_told_truly(folder):
    save_file = pytest.importorskip('safetensors.torch').save_file
    path = folder / 'model.safetensors'
    whole, good = path.read_bytes(), {k: v.clone() for k, v in read_safetensors(str(path)).items()}
    for content in (whole[:-1], whole[:100], whole + b'0', b'', b'<!DOCTYPE html><html></html>'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='model.safetensors is damaged.*download'):
            load(folder)
    name = 'h.0.mlp.c_fc.weight'
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        save_file(good | {name: torch.zeros(32, 128).to(dtype)}, path)
        with pytest.raises(ValueError, match=f'{name} has dtype {dtype}: save it as float32'):
            load(folder)
    for more in ({'score.weight': torch.zeros(2, 32)}, {'wte.weight': torch.zeros(2)}):
        save_file(good | more, path)
        with pytest.raises(ValueError, match='do not fit'):
            load(folder)
    for number in (float('nan'), float('inf')):  # as after a fine-tune in float16 that went wrong
        broken = good['ln_f.weight'].clone()
        broken[3] = number
        save_file(good | {'ln_f.weight': broken}, path)
        with pytest.raises(ValueError, match='ln_f.weight has numbers that are not finite'):
            load(folder)


def test_tensors_that_overlap_or_leave_bytes_over_are_refused(tmp_path):
    path = tmp_path / 'x.safetensors'

    def write(*spans):
        header = {str(i): {'dtype': 'F32', 'shape': [2], 'data_offsets': list(span)}
                  for i, span in enumerate(spans)}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(16))
    write((0, 8), (8, 16))
    assert read_safetensors(str(path))['1'].shape == (2,)
    for spans in ([(0, 8)], [(0, 8), (4, 12)], [(0, 8), (0, 8)], [(0, 8), (8, 20)]):
        write(*spans)
        with pytest.raises(ValueError, match='is damaged'):
            read_safetensors(str(path))


def test_the_missing_library_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ValueError, match='pip install safetensors'):
        load(folder)


def test_a_config_of_a_billion_layers_ends_at_once(folder):
    change(folder / 'config.json', n_layer=10**9)
    with pytest.raises(ValueError, match='too few weights for n_layer=1000000000'):
        load(folder)


def test_only_the_config_is_read_before_the_weights(folder):
    (folder / 'model.safetensors').unlink()
    found = read_pretrained(folder, weights=False)
    assert found.keys() == {'model_args', 'tokenizer'}
    assert found['tokenizer'] == TOKENIZER.to_dict()
    with pytest.raises(ValueError, match='must be gpt2, .* or a folder'):
        read_pretrained(str(folder / 'none'))


# -----------------------------------------------------------------------------
# training

class FakeGPT2Tokenizer(CharTokenizer):
    """GPT-2's vocabulary without its files: an id for each character, the rest has no text."""
    vocab_size, eot = 50257, 50256

    def __init__(self):
        self.chars = ''.join(map(chr, range(32, 127)))

    def decode(self, ids):
        assert all(0 <= i < 50257 for i in ids)
        return 'x' * len(ids)

    def to_dict(self):
        return {'kind': 'gpt2'}


@pytest.fixture
def gpt2_tokens(project, monkeypatch):
    """A small dataset in GPT-2's tokens, with a tokenizer that needs no files."""
    folder = project / 'data' / 'few_gpt2_tokens'
    folder.mkdir()
    ids = torch.randint(50257, (3000,), generator=torch.Generator().manual_seed(0))
    ids[:2], tokens = torch.tensor([50256, 0]), {'train': 2000, 'val': 1000}
    for name, part in zip(tokens, ids.split([2000, 1000])):
        part.numpy().astype('uint16').tofile(folder / f'{name}.bin')
    meta = dataset.make_meta(FakeGPT2Tokenizer(), 'test', '0' * 64, tokens, tokens)
    dataset.write_meta(str(folder), meta)
    monkeypatch.setattr(train, 'tokenizer_from_dict', lambda _: FakeGPT2Tokenizer())
    yield folder.name
    shutil.rmtree(folder)


@pytest.mark.parametrize('vocab_size', [50257, 50258, 50304])
def test_gpt2_with_rows_of_padding_trains_resumes_and_samples_no_padding(
        train_run, gpt2_tokens, tmp_path, vocab_size, capsys, monkeypatch):
    model = reference(vocab_size=vocab_size, n_layer=1)
    with torch.no_grad():  # padding has by far the largest logits: sampling would draw it
        model.transformer.ln_f.bias.fill_(-1)
        model.transformer.wte.weight[50257:] = -50
    model.save_pretrained(tmp_path / 'hf')
    monkeypatch.setattr(huggingface, 'read_tokenizer', lambda _: {'kind': 'gpt2'})
    given = [f'--init_from={tmp_path / "hf"}', f'--dataset={gpt2_tokens}', '--block_size=16']
    shape = ['--n_layer=1', '--n_embd=8', '--bias=True', '--dropout=0', '--learning_rate=0.01']
    saved = train_run(*given, *shape, '--max_iters=5', '--eval_interval=5')
    out = capsys.readouterr().out
    assert saved['model']['transformer.wte.weight'].shape == (vocab_size, 8)
    assert '--- sample of the model at step 5, after [prompt] ---' in out
    saved = train_run('--init_from=resume', '--max_iters=8')
    assert saved['iter_num'] == 8 and saved['model_args']['vocab_size'] == vocab_size


@pytest.mark.parametrize('vocab_size, dataset', [(50256, 'few_gpt2_tokens'), (128, 'topics')])
def test_a_model_of_another_vocabulary_is_refused(
        train_run, gpt2_tokens, tmp_path, capsys, vocab_size, dataset):
    reference(vocab_size=vocab_size, n_layer=1).save_pretrained(tmp_path / 'hf')
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train.main([f'--init_from={tmp_path / "hf"}', f'--dataset={dataset}', '--block_size=16',
                    f'--out_dir={tmp_path / "out"}', '--max_iters=0'])
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'tokenizer.json' in err
    assert err.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_a_folder_that_cannot_be_read_ends_training_in_one_line(folder, tmp_path, capsys):
    change(folder / 'config.json', scale_attn_weights=False)
    with pytest.raises(SystemExit) as e:
        train.main([f'--init_from={folder}', '--dataset=topics', '--block_size=16',
                    f'--out_dir={tmp_path / "out"}', '--max_iters=0'])
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith(f'error: cannot use {folder}: {folder}/config.json has ')
    assert 'scale_attn_weights=false' in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()
