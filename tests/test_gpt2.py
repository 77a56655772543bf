"""data/gpt2.py and data/safetensors.py: GPT-2's weights, in and out."""
import json

import pytest
import torch
from test_model import make

from data.gpt2 import load_gpt2, save_gpt2
from data.safetensors import read_safetensors


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
    reference.save_pretrained(tmp_path)
    idx = torch.randint(50, (2, 1024))
    for block_size in (0, 1, 7, 1023, 1024):
        model = load_gpt2(tmp_path, block_size).eval()
        T = model.config.block_size
        with torch.no_grad():
            assert torch.allclose(model(idx[:, :T])[0], reference(idx[:, :T]).logits, atol=1e-4)
    with pytest.raises(ValueError, match='positions'):
        load_gpt2(tmp_path, 1025)
    for other in (dict(layer_norm_epsilon=1e-6), dict(scale_attn_weights=False),
                  dict(scale_attn_by_inverse_layer_idx=True)):
        config = json.loads((tmp_path / 'config.json').read_text())
        (tmp_path / 'other').mkdir(exist_ok=True)
        (tmp_path / 'other' / 'config.json').write_text(json.dumps(config | other))
        with pytest.raises(ValueError, match=list(other)[0]):
            load_gpt2(tmp_path / 'other')


@pytest.mark.parametrize('variant', [
    {}, dict(bias=False), dict(activation='gelu_tanh', tie_weights=False)])
def test_transformers_loads_an_export_with_equal_logits_and_the_round_trip_is_exact(
        tmp_path, variant):
    transformers = pytest.importorskip('transformers')
    model = make(**variant)
    save_gpt2(model, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = torch.randint(50, (3, 16))
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, model(idx)[0], atol=1e-4)
    back, weights = load_gpt2(tmp_path).state_dict(), model.state_dict()
    assert all(torch.equal(back[k], v) for k, v in weights.items())
    assert all(not v.any() for k, v in back.items() if k not in weights)  # biases of zeros


@pytest.mark.parametrize('variant', [
    dict(activation='relu2'), dict(norm='rmsnorm'), dict(rotary=True), dict(qk_norm=True),
    dict(token_shift=True), dict(softcap=30.0)])
def test_what_gpt2_lacks_is_not_exported(tmp_path, variant):
    with pytest.raises(ValueError, match=list(variant)[0]):
        save_gpt2(make(**variant), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_hostile_safetensors_header_is_an_error(tmp_path):
    path = str(tmp_path / 'x.safetensors')

    def write(header, data=b'\0' * 16, length=None):
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = len(header) if length is None else length
        with open(path, 'wb') as f:
            f.write(length.to_bytes(8, 'little') + header + data)
    good = {'a': {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 16]}}
    write(good)
    assert read_safetensors(path)['a'].shape == (2, 2)
    for bad in ({'data_offsets': [0, 20]}, {'data_offsets': [4, 16]}, {'data_offsets': [-16, 0]},
                {'shape': [2, 3]}, {'dtype': 'F8'}, {'shape': [-2, -2]}, {'shape': 'x'},
                {'data_offsets': [0]}):
        write({'a': good['a'] | bad})
        with pytest.raises(ValueError, match='not a sound safetensors file'):
            read_safetensors(path)
    for length, header in ((2**63, b'{}'), (100, b'{}'), (2, b'[]'), (2, b'{x')):
        write(header, length=length)
        with pytest.raises(ValueError, match='not a sound safetensors file'):
            read_safetensors(path)
