"""sample.py: prompts, samples, exports, and weights of fewer bytes on a CPU."""
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import textwrap
import types

import configurator
import sample
from configurator import configure
from data import runs
from data.checkpoints import read_checkpoint
from data.tokenizers import CharTokenizer
from model import GPT, GPTConfig, KVCache
from sample import place_for_generation, stored_linear, unescape

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics, script
from torch import nn

CPU = torch.device('cpu')
fbgemm = pytest.mark.skipif(not sample.FBGEMM, reason='needs FBGEMM, which is for x86')
onednn = pytest.mark.skipif(not sample.ONEDNN, reason='needs a CPU on which oneDNN has bfloat16')
# the dtype of stored weights, and the relative error of products
STORED = [pytest.param(torch.float16, 2e-3, id='fbgemm', marks=fbgemm),
          pytest.param(torch.bfloat16, 8e-3, id='onednn', marks=onednn)]


@pytest.fixture
def trained(train_run, tmp_path):
    train_run('--max_iters=10', '--learning_rate=0.02')
    return tmp_path / 'out'


@pytest.fixture
def sampled(capsys, monkeypatch):
    """A function that runs sample.main, without downloads, and returns what it prints."""
    monkeypatch.setattr('data.tokenizers.download', None)

    def go(*arguments):
        capsys.readouterr()
        configure('sample', ['--max_new_tokens=20', '--num_samples=2', *map(str, arguments)])
        sample.main()
        return capsys.readouterr().out
    return go


def test_a_sample_begins_with_the_prompt_from_any_directory(project, trained, tmp_path):
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    out, err = script(project, 'sample.py', '--start=What is an LLM?', '--num_samples=3',
                      cwd=elsewhere)
    assert len(re.findall(r'^\[What is an LLM\?\]', out, re.M)) == 3 and not err
    assert str(trained) in out
    assert re.search(r'3 x 500 tokens in \d+\.\d+ s: \d+ tokens/s$', out)
    assert os.listdir(elsewhere) == []


def test_best_and_last_weights_are_told_apart(trained, sampled):
    losses = {r['step']: r['val_loss'] for r in metrics(trained)[1]}
    best = min((5, 10), key=losses.get)
    line = f'{trained}/model.pth, step {best}, best val loss {losses[best]:.4f}'
    assert f'best weights: {line}' in sampled(f'--out_dir={trained}')
    line = f'{trained}/ckpt.pt, step 10'
    assert f'last weights: {line}' in sampled(f'--out_dir={trained}', '--weights=last')


def test_sampling_is_repeatable_and_needs_no_dataset(project, trained, sampled):
    dataset, hidden = project / 'data' / 'topics', project / 'data' / 'hidden'
    dataset.rename(hidden)
    try:
        outs = [sampled(f'--out_dir={trained}', f'--seed={seed}') for seed in (1, 1, 2)]
    finally:
        hidden.rename(dataset)
    a, b, c = (out.split('---------------') for out in outs)
    assert a[:-1] == b[:-1] and a[:-1] != c[:-1]
    assert a[0].splitlines()[2:] != a[1].splitlines()[1:]  # two samples differ


@pytest.mark.parametrize('choice', ['--dtype=float16', '--dtype=bfloat16'])
def test_weights_of_fewer_bytes_still_tell_what_was_learned(trained, sampled, choice):
    out = sampled(f'--out_dir={trained}', choice, '--start=The ')
    assert len(out.split('---------------')) == 3 and out.count('\n[The ]') == 2
    assert choice[2:] in out  # the line that tells what is used


def test_a_batch_of_samples_and_streaming_show_the_same_greedy_text(trained, sampled):
    def text(num_samples):
        out = sampled(f'--out_dir={trained}', '--temperature=0', '--start=The ', '--dtype=float32',
                      f'--num_samples={num_samples}')
        return re.sub(r'.*\n.*\n', '', out, count=1).rsplit('\n', 2)[0]
    one, two = text(1), text(2)
    assert two == f'{one}\n---------------\n{one}\n---------------'
    assert one.startswith('[The ]') and len(one) == 26


def test_the_prompt_can_come_from_a_file_be_empty_or_be_too_long(trained, sampled, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('from a file')
    assert 'from a file' in sampled(f'--out_dir={trained}', f'--start=FILE:{prompt}')
    assert 'tokens/s' in sampled(f'--out_dir={trained}', '--start=')
    assert 'long ' * 20 in sampled(f'--out_dir={trained}', '--start=' + 'long ' * 20)


@pytest.mark.parametrize('arguments, words', [
    (['--start=Größe'], "'ß' 'ö'"), (['--start=FILE:nowhere'], 'nowhere: No such file'),
    (['--out_dir=nowhere'], 'cannot use nowhere/model.pth: there is no such file: train first'),
    (['--num_samples=0'], 'num_samples=0 must be between 1'),
    (['--max_new_tokens=0'], 'max_new_tokens=0 must be between 1'),
    (['--temperature=nan'], "temperature='nan' must be a number"),
    (['--temperature=inf'], "temperature='inf' must be a number"),
    (['--temperature=-1'], 'temperature=-1.0 must be'),
    (['--temperature=1e999'], 'temperature=inf must be'),
    (['--top_k=-1'], 'top_k=-1 must be'), (['--top_p=2'], 'top_p=2.0 must be'),
    (['--top_p=0'], 'top_p=0.0 must be'),
    (['--seed=-1'], 'seed=-1 must be'),
    (['--seed=9223372036854775808'], 'seed=9223372036854775808 must be'),
    (['--weights=worst'], 'weights=worst must be one of best, last'),
    (['--dtype=int8'], 'dtype=int8 must be one of'), (['--init_from=gpt5'], 'gpt2, gpt2-medium')])
def test_mistakes_end_with_one_line(trained, sampled, capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={trained}', *arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err
    assert len(err.splitlines()) == 1 and err.startswith('error: ')


def test_a_model_is_loaded_from_python(trained, tmp_path):
    model, tokenizer = sample.load(str(trained))
    assert not model.training
    idx = torch.from_numpy(tokenizer.encode('What is ')[None])
    logits, _ = model(idx)
    assert logits.shape == (1, 8, tokenizer.vocab_size)
    greedy = [token.item() for token in model.generate(idx, 5, temperature=0)]
    expected = []
    for _ in range(5):
        token = model(torch.cat([idx, torch.tensor([expected]).long()], dim=1))[0][0, -1].argmax()
        expected.append(token.item())
    assert greedy == expected and len(tokenizer.decode(greedy)) == 5
    last, _ = sample.load(str(trained / 'ckpt.pt'))
    assert last.config == model.config
    shutil.copy(trained / 'model.pth', tmp_path / 'weights')  # a file of any name
    assert sample.load(str(tmp_path / 'weights'))[0].config == model.config
    configure('sample', [f'--out_dir={trained}', f'--export={tmp_path / "hf"}'])
    sample.main()
    configure('sample', [])
    exported, same = sample.load(str(tmp_path / 'hf'))
    assert torch.equal(exported(idx)[0], logits) and same.to_dict() == tokenizer.to_dict()


def test_the_lines_of_python_in_the_readme_run(trained, capsys):
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        lines = f.read().split('From Python:\n\n')[1].split('\n\n')[0]
    assert lines.count('\n') <= 5
    exec(textwrap.dedent(lines).replace("'out-shakespeare-char'", repr(str(trained))), {})
    assert len(capsys.readouterr().out) == 101


def test_each_line_is_continued_until_the_input_ends(trained, project):
    done = subprocess.run(
        [sys.executable, str(project / 'sample.py'), f'--out_dir={trained}', '--interactive=True',
         '--max_new_tokens=5', '--temperature=0'], capture_output=True, text=True, timeout=100,
        input='What is\n中\nWhat is\n')
    assert done.returncode == 0 and not done.stderr
    first, wrong, second, end = done.stdout.splitlines()[-4:]
    assert first == second and re.fullmatch(r'> \[What is\].{5}', first) and end == '> '
    assert wrong.startswith('> error: not in the vocabulary') and '中' in wrong


def test_ctrl_c_ends_one_continuation_only(trained, project):
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # xdist's processes ignore it
        os.execv(sys.executable, [
            sys.executable, str(project / 'sample.py'), f'--out_dir={trained}',
            '--interactive=True', '--max_new_tokens=100000', '--device=cpu', '--temperature=0'])
    keys = termios.tcgetattr(terminal)
    keys[3] &= ~termios.ECHO  # what comes back is the script's own
    termios.tcsetattr(terminal, termios.TCSANOW, keys)

    def read_until(words, timeout_s=60):
        """Return what the script writes up to words, or None if it writes nothing for timeout_s."""
        out = ''
        while words not in out:
            if not select.select([terminal], [], [], timeout_s)[0]:
                return None
            out += os.read(terminal, 1).decode()
        return out
    assert read_until('> ')
    for _ in range(2):
        os.write(terminal, b'What is\n')
        assert read_until('[What is]')
        os.write(terminal, b'\x03')  # Ctrl-C
        assert read_until('\n> ')
        # the script waits: this was its prompt, which the model has not written
        assert not select.select([terminal], [], [], 0.5)[0]
    # Ctrl-C at the prompt, again if it is lost: Python ignores one just before it begins to read
    for _ in range(10):
        os.write(terminal, b'\x03')
        if read_until('\n> ', timeout_s=2):
            break
    else:
        pytest.fail('Ctrl-C at the prompt brings no new one')
    os.write(terminal, b'\x04')  # Ctrl-D
    assert os.waitpid(pid, 0)[1] == 0


def test_stop_ends_a_sample_before_its_text_while_streaming_too():
    tokenizer = CharTokenizer('abcdef')
    text, shown = sample.Text(tokenizer, 'dead'), ''
    for i, token in enumerate(tokenizer.encode('abdecdeadabc')):
        text.add(token)
        shown += text.new()
        assert 'abdecdeadabc'[:len(shown)] == shown and 'dea' not in shown[4:]
    assert text.done and shown + text.new(end=True) == 'abdec'
    text, shown = sample.Text(tokenizer, 'dead'), ''
    for token in tokenizer.encode('abdea'):
        text.add(token)
        shown += text.new()
    # the sample ends with the beginning of stop
    assert shown == 'ab' and shown + text.new(end=True) == 'abdea'


def test_stop_ends_all_samples_early(trained, sampled):
    out = sampled(f'--out_dir={trained}', '--stop=e', '--max_new_tokens=2000')
    n = int(re.search(r'2 x (\d+) tokens in', out).group(1))
    texts = re.sub(r'.*\n.*\n', '', out, count=1).split('---------------')[:2]
    assert n < 2000 and not any('e' in text for text in texts)


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    class Bytes:
        def token_bytes(self, token):
            return bytes([token])
    text = sample.Text(Bytes(), '')
    shown = []
    for token in 'aß☕'.encode() + b'\xe2':
        text.add(token)
        shown.append(text.new())
    assert shown == ['a', '', 'ß', '', '', '☕', '']


def test_padding_of_the_vocabulary_is_never_sampled(trained, sampled, tmp_path):
    checkpoint = torch.load(trained / 'model.pth')
    # as if all other ids were padding
    checkpoint['tokenizer']['chars'] = checkpoint['tokenizer']['chars'][:40]
    torch.save(checkpoint, trained / 'model.pth')
    assert '2 x 200 tokens' in sampled(f'--out_dir={trained}', '--max_new_tokens=200',
                                       '--temperature=3', '--start=\n')


def test_an_export_loads_in_transformers_and_comes_back(trained, sampled, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    folder = tmp_path / 'hf'
    out = sampled(f'--out_dir={trained}', f'--export={folder}')
    assert 'exported to' in out
    weights = torch.load(trained / 'model.pth')['model']
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).state_dict()
    name = 'transformer.h.0.mlp.c_fc.weight'
    assert torch.equal(theirs[name].t(), weights[name])
    config = transformers.GPT2Config.from_pretrained(folder)  # its default is GPT-2's 50256
    assert config.bos_token_id == config.eos_token_id == config.vocab_size - 1 == 92
    assert '2 x 20 tokens' in sampled(f'--init_from={folder}')
    os.remove(folder / 'tokenizer.json')
    for arguments, code, words in (
            ([f'--out_dir={trained}', f'--export={folder}'], 2, 'name another'),
            ([f'--out_dir={trained}', f'--export={trained / "model.pth" / "hf"}'], 2,
             'Not a directory'),
            ([f'--init_from={folder}'], 2, 'tokenizer')):
        with pytest.raises(SystemExit) as e:
            sampled(*arguments)
        err = capsys.readouterr().err
        assert e.value.code == code and words in err and len(err.splitlines()) == 1


def test_a_model_that_no_client_can_express_is_not_exported(train_run, tmp_path, sampled, capsys):
    train_run('--max_iters=1', '--rotary=True')
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "hf"}')
    assert e.value.code == 2
    assert 'rotary=True: no other program can express this' in capsys.readouterr().err
    assert not (tmp_path / 'hf').exists()


def test_the_list_of_runs_may_be_empty_and_hold_any_name(trained, sampled, train_run, tmp_path,
                                                         capsys):
    open(runs.RUNS_LOG, 'w').close()
    with pytest.raises(SystemExit) as e:
        sampled()
    assert e.value.code == 2 and 'nothing has been trained yet' in capsys.readouterr().err
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/\xff')
    sys.stdout.reconfigure(errors='backslashreplace')  # as run_main does
    train_run('--max_iters=5', out=odd)
    assert runs.read_runs() == [odd] and sample.find_weights() == f'{odd}/model.pth'
    with open(runs.RUNS_LOG, 'a') as f:
        f.write(f'{tmp_path / "deleted"}\n')
    assert runs.read_runs()[-1] == str(tmp_path / 'deleted')
    assert sample.find_weights() == f'{odd}/model.pth'


@pytest.mark.parametrize('mistake, words', [
    ('--start=FILE:/nonexistent', '/nonexistent: No such file'),
    ('--export=/', 'not an empty folder')])
def test_mistakes_are_found_before_weights_are_fetched(sampled, monkeypatch, capsys, mistake,
                                                       words):
    monkeypatch.setattr(sample, 'read_weights', None)
    with pytest.raises(SystemExit) as e:
        sampled('--init_from=gpt2', mistake)
    assert e.value.code == 2 and words in capsys.readouterr().err


# -----------------------------------------------------------------------------
# checkpoints that people bring

@pytest.fixture
def theirs(trained):
    """A checkpoint of nanoGPT, as a dict, for the path of the last weights."""
    ours = torch.load(trained / 'model.pth')
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    return {'model': ours['model'], 'optimizer': {'state': {}, 'param_groups': []},
            'model_args': {name: ours['model_args'][name] for name in names}, 'iter_num': 3,
            'best_val_loss': 3.5, 'config': {'dataset': 'topics'}}


def test_numbers_of_numpy_and_names_of_wrapped_models_are_read(trained, sampled, theirs):
    torch.save(theirs, trained / 'ckpt.pt')
    command = f'--out_dir={trained}', '--weights=last', '--temperature=0'
    expected = sampled(*command)
    weights = dict(theirs['model'])
    weights.pop('lm_head.weight')  # tied weights need one of the names
    for prefix in ('module.', '_orig_mod.module.', 'module._orig_mod.'):
        theirs['model'] = {prefix + name: tensor for name, tensor in weights.items()}
        theirs['best_val_loss'], theirs['iter_num'] = np.float64(3.5), np.int64(3)
        theirs['config'] |= {'more': [np.float32(0.5), np.bool_(True), np.uint8(7)]}
        torch.save(theirs, trained / 'ckpt.pt')
        speed = re.compile(r'in .* tokens/s')
        assert speed.sub('', sampled(*command)) == speed.sub('', expected)
        read = read_checkpoint(str(trained / 'ckpt.pt'))
        values = [read['iter_num'], *read['config']['more']]
        assert [(type(x), x) for x in values] == [(int, 3), (float, 0.5), (bool, True), (int, 7)]


def test_nanogpts_characters_have_no_end_of_text(trained, sampled, theirs):
    for name in ('transformer.wte.weight', 'lm_head.weight'):  # without the last row
        theirs['model'][name] = theirs['model'][name][:-1].clone()
    theirs['model_args']['vocab_size'] -= 1
    torch.save(theirs, trained / 'ckpt.pt')
    assert '2 x 20 tokens' in sampled(f'--out_dir={trained}', '--weights=last')
    _, tokenizer = sample.load(str(trained / 'ckpt.pt'))
    assert tokenizer.eot is None and tokenizer.vocab_size == theirs['model_args']['vocab_size']


class Setting:
    """A class of somebody's own."""


@pytest.mark.parametrize('content, words', [
    (lambda theirs: theirs['config'].update(path=pathlib.PurePosixPath('x')), 'PurePosixPath'),
    (lambda theirs: theirs['config'].update(x=Setting()), 'test_sample.Setting'),
    (lambda theirs: theirs.update(model=GPT(GPTConfig(32, 65, 1, 1, n_embd=8))), 'model.GPT')])
def test_code_in_a_checkpoint_is_named(trained, sampled, theirs, capsys, content, words):
    content(theirs)
    torch.save(theirs, trained / 'ckpt.pt')
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={trained}', '--weights=last')
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1
    assert re.search(f'torch refuses it: \\S*{words} is code: save only tensors, numbers', err)


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(trained, sampled, capsys, train_run, number):
    for name, command in ('model.pth', sampled), ('ckpt.pt', train_run):
        checkpoint = torch.load(trained / name)
        checkpoint['model']['transformer.h.1.mlp.c_fc.weight'][3, 3] = number
        torch.save(checkpoint, trained / name)
        arguments = ['--temperature=0', f'--out_dir={trained}']
        if command is train_run:
            arguments = ['--init_from=resume', '--max_iters=20']
        with pytest.raises(SystemExit) as e:
            command(*arguments)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count('\n') == 1
        assert 'transformer.h.1.mlp.c_fc.weight has numbers that are not finite' in err


# -----------------------------------------------------------------------------
# weights of fewer bytes

@pytest.mark.parametrize('rows', [1, 3, 40])
@pytest.mark.parametrize('dtype, error', STORED)
def test_stored_weights_multiply_like_the_exact_ones(dtype, error, rows):
    torch.manual_seed(0)
    linear = nn.Linear(128, 960)
    with torch.no_grad():
        linear.weight *= torch.logspace(-3, 1, 960)[:, None]  # channels of different size
        linear.weight[5] = 0
        function = stored_linear(linear, dtype)
        # a token of each sample, a prompt, another number of samples
        for x in (torch.randn(rows, 1, 128), torch.randn(rows, 7, 128),
                  torch.randn(rows + 1, 1, 128)):
            got, expected = function(x), linear(x)
            assert got.dtype == torch.float32 and got.shape == expected.shape
            size = expected.abs().amax(dim=(0, 1)) + linear.weight.norm(dim=1) * 128**0.5 * 0.1
            assert ((got - expected).abs().amax(dim=(0, 1)) <= error * size).all()


@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.parametrize('dtype, error', STORED)
def test_stored_weights_take_and_give_what_float16_cannot_hold(dtype, error, rows):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    x = torch.randn(rows, 1, 64)
    x[:, :, 7] = 7e5
    with torch.no_grad():
        got, expected = stored_linear(linear, dtype)(x), linear(x)
    assert expected.abs().max() > 65504
    assert (got - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.parametrize('dtype, error', STORED)
def test_stored_weights_add_the_bias_exactly(dtype, error, rows):
    linear = nn.Linear(8, 20)
    nn.init.zeros_(linear.weight)
    nn.init.normal_(linear.bias, std=1e5)
    with torch.no_grad():
        got = stored_linear(linear, dtype)(torch.randn(rows, 1, 8))
    assert torch.equal(got, linear.bias.expand(rows, 1, 20))


@pytest.mark.parametrize('width', [1, 8, 20, 24, 33, 40, 65, 100, 130])
@pytest.mark.parametrize('dtype, error', STORED)
def test_stored_weights_of_any_width_are_multiplied(dtype, error, width):
    torch.manual_seed(0)
    for n_out in (1, 65, 2000):
        linear = nn.Linear(width, n_out)
        for rows in (1, 3):
            x = torch.randn(rows, 1, width)
            with torch.no_grad():
                assert torch.allclose(stored_linear(linear, dtype)(x), linear(x), atol=0.05)


def small_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32))


@pytest.fixture
def with_libraries(libraries, monkeypatch):
    """Let sample.py use the libraries that this machine has, or none."""
    if not libraries:
        monkeypatch.setattr(sample, 'FBGEMM', False)
        monkeypatch.setattr(sample, 'ONEDNN', False)


@pytest.mark.parametrize('libraries', [True, False])
@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.parametrize('dtype, error', [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_logits_with_stored_weights_are_near(with_libraries, dtype, error, rows):
    model = small_gpt().eval()
    idx = torch.randint(50, (rows, 16))
    with torch.no_grad():
        exact = model(idx)[0]
        place_for_generation(model, CPU, dtype)
        cache = KVCache(16)
        near = [model(idx[:, :2], cache=cache)[0]]
        near += [model(idx[:, [i]], cache=cache)[0] for i in range(2, 16)]
        near = torch.cat(near, dim=1)
    assert 0 < (near - exact[:, 1:]).std() < error * exact.std()


@pytest.mark.parametrize('libraries, dtype, private', [
    pytest.param(True, torch.bfloat16, 'mkldnn', marks=onednn),
    pytest.param(True, torch.float16, 'quantized', marks=fbgemm),
    (False, torch.bfloat16, ''), (False, torch.float16, ''), (True, torch.float32, '')])
def test_weights_are_stored_for_the_libraries_that_the_machine_has(with_libraries, dtype, private,
                                                                   monkeypatch):
    model = small_gpt()
    place_for_generation(model, CPU, dtype)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == (0 if private else 9) and not model.training
    kept = torch.float32 if private else dtype
    assert {p.dtype for p in model.parameters()} == {kept}
    for name in ('mkldnn', 'quantized'):  # as in a torch without this library
        monkeypatch.setattr(torch.ops, name, types.SimpleNamespace())
    if private:
        with pytest.raises(AttributeError):
            place_for_generation(small_gpt(), CPU, dtype)
    else:
        place_for_generation(small_gpt(), CPU, dtype)


@pytest.mark.parametrize('kind, dtype, num_samples, bf16, fbgemm, expected', [
    ('cuda', 'auto', 1, True, True, 'auto'), ('cpu', 'float32', 1, True, True, 'float32'),
    ('cpu', 'auto', 1, True, True, 'float16'), ('cpu', 'auto', 1, True, False, 'float32'),
    ('cpu', 'auto', 10, True, True, 'bfloat16'), ('cpu', 'auto', 10, False, True, 'float16'),
    ('cpu', 'auto', 10, False, False, 'float32')])
def test_the_dtype_of_weights_is_the_fastest_for_the_machine(
        kind, dtype, num_samples, bf16, fbgemm, expected, monkeypatch):
    monkeypatch.setattr(configurator, 'cpu_multiplies_bfloat16', lambda: bf16)
    monkeypatch.setattr(sample, 'FBGEMM', fbgemm)
    assert sample.pick_dtype(kind, dtype, num_samples) == expected


def test_stop_and_start_may_name_line_breaks_and_tabs(trained, sampled):
    common = f'--out_dir={trained}', '--temperature=0', '--dtype=float32', '--num_samples=2'
    text = sampled(*common, '--start=The ', '--max_new_tokens=30').split('[The ]')[1]
    end = text[3:5]
    stopped = sampled(*common, '--start=The ', f'--stop={end}').split('[The ]')[1]
    assert stopped == text[:text.index(end)] + '\n---------------\n'
    assert unescape(r'a\nb\tc\\nd\x') == 'a\nb\tc\\nd\\x'
    assert '[one\ntwo]' in sampled(*common, r'--start=one\ntwo')
    # a newline that is given as \n ends the sample that a real newline ends
    texts = [sampled(*common, '--start=a\nb', '--temperature=3',
                    '--max_new_tokens=300', f'--stop={stop}').split('[a')[1]
             for stop in (r'\n', '\n', '')]
    assert texts[0] == texts[1] != texts[2]


# -----------------------------------------------------------------------------
# small mistakes that no other test would notice

class Scripted:
    """Stands in for a model: writes given texts, one character of each at a time."""

    def __init__(self, *texts):
        self.texts = texts

    def generate(self, idx, max_new_tokens, temperature, top_k, top_p, generator, vocab_size):
        self.settings = max_new_tokens, temperature, top_k, top_p, vocab_size
        for characters in zip(*self.texts):
            yield torch.tensor([ord(c) - ord('a') for c in characters])


@pytest.mark.parametrize('texts, n, shown', [
    (['abxzzz', 'cccccc'], 6, ['ab', 'cccccc']), (['cxcccc', 'bbbxbb'], 4, ['c', 'bbb'])])
def test_a_sample_that_meets_its_stop_leaves_the_others_alone(capsys, texts, n, shown):
    configure('sample', ['--stop=x'])
    tokenizer = CharTokenizer('abcdefghijklmnopqrstuvwxyz')
    written = sample.write_samples(Scripted(*texts), tokenizer, '', torch.zeros(2, 1), None)
    configure('sample', [])
    assert written == n
    assert capsys.readouterr().out.split('\n---------------\n') == [*shown, '']


def test_the_settings_of_generation_reach_the_model(capsys):
    configure('sample', ['--max_new_tokens=9', '--temperature=0.7', '--top_k=5', '--top_p=0.6'])
    model = Scripted('a')
    sample.write_samples(model, CharTokenizer('abc'), '', torch.zeros(1, 1), None)
    configure('sample', [])
    assert model.settings == (9, 0.7, 5, 0.6, 3)


def test_the_text_of_a_model_in_training_is_written_without_dropout():
    texts, tokenizer = [], CharTokenizer('abcdefghij')
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        shape = GPTConfig(block_size=16, vocab_size=10, n_layer=1, n_head=1, n_embd=16,
                          dropout=dropout)
        model = GPT(shape).train()
        with torch.no_grad():
            model.transformer.wte.weight.mul_(50)  # what the model prefers depends on its input
        generator = torch.Generator().manual_seed(1)
        texts.append(sample.continue_text(model, tokenizer, 'abc', 30, generator))
        assert model.training
    assert texts[0] == texts[1] and texts[0].startswith('[abc]') and len(texts[0]) == 35


def test_an_empty_prompt_of_characters_is_a_newline_or_the_first_token():
    for characters, ids in (('\tab\n', [[1]]), ('abc', [[0]])):
        assert sample.encode_prompt(CharTokenizer(characters), '').tolist() == ids
    # the prompt that nobody chose gives way to an empty one if the vocabulary lacks a character
    assert sample.pick_prompt(CharTokenizer('abc'), 'What?', given=False) == ''
    assert sample.pick_prompt(CharTokenizer('abc'), 'cab', given=False) == 'cab'
