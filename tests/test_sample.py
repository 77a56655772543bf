import os
import re

import pytest
import torch

import sample
import train
from conftest import metrics, script
from configurator import configure
from data.common import CharTokenizer


@pytest.fixture
def trained(train_run, tmp_path):
    train_run('--max_iters=10', '--learning_rate=0.02')
    return tmp_path / 'out'


@pytest.fixture
def sampled(capsys):
    """A function that runs sample.py in this process and returns what it prints."""
    def go(*arguments):
        capsys.readouterr()
        configure(vars(sample), ['--max_new_tokens=20', '--num_samples=2', *map(str, arguments)])
        sample.main()
        return capsys.readouterr().out
    return go


def test_a_sample_begins_with_the_prompt_from_any_directory(project, trained, tmp_path):
    os.makedirs(tmp_path / 'elsewhere')
    out, err = script(project, 'sample.py', '--start=What is an LLM?', '--num_samples=3', cwd=tmp_path / 'elsewhere')
    assert len(re.findall(r'^What is an LLM\?', out, re.M)) == 3 and not err and str(trained) in out
    assert re.search(r'3 x 500 tokens in \d+\.\d+ s: \d+ tokens/s$', out) and os.listdir(tmp_path / 'elsewhere') == []


def test_best_and_last_weights_are_told_apart(trained, sampled):
    losses = {r['step']: r['val_loss'] for r in metrics(trained)[1]}
    best = min((5, 10), key=losses.get)
    out = sampled(f'--out_dir={trained}')
    assert f'best weights: {trained}/model.pth, step {best}, val loss {losses[best]:.4f}' in out
    assert f'last weights: {trained}/ckpt.pt, step 10' in sampled(f'--out_dir={trained}', '--weights=last')


def test_sampling_is_repeatable_and_needs_no_dataset(trained, sampled, monkeypatch):
    monkeypatch.setattr(train, 'HERE', '/nonexistent')
    a, b, c = (sampled(f'--out_dir={trained}', f'--seed={s}').split('---------------') for s in (1, 1, 2))
    assert a[:-1] == b[:-1] and a[:-1] != c[:-1]
    assert a[0].splitlines()[2:] != a[1].splitlines()[1:]  # two samples differ


@pytest.mark.parametrize('choice', ['--dtype=float16', '--dtype=bfloat16', '--quantize=int8'])
def test_weights_of_fewer_bytes_still_tell_what_was_learned(trained, sampled, choice):
    out = sampled(f'--out_dir={trained}', choice, '--start=The ')
    assert len(out.split('---------------')) == 3 and out.count('\nThe ') == 2
    assert choice[2:] in out if 'dtype' in choice else ', as int8\n' in out  # the lines that say what is used


def test_a_batch_of_samples_and_streaming_show_the_same_greedy_text(trained, sampled):
    def texts(out):
        return re.sub(r'.*\n.*\n', '', out, count=1).rsplit('\n', 2)[0]
    greedy = (f'--out_dir={trained}', '--temperature=0', '--start=The ', '--dtype=float32')
    one, two = texts(sampled(*greedy, '--num_samples=1')), texts(sampled(*greedy, '--num_samples=2'))
    assert two == f'{one}\n---------------\n{one}\n---------------' and one.startswith('The ') and len(one) == 24


def test_the_prompt_can_come_from_a_file_be_empty_or_be_too_long(trained, sampled, tmp_path):
    (tmp_path / 'prompt.txt').write_text('from a file')
    assert 'from a file' in sampled(f'--out_dir={trained}', f'--start=FILE:{tmp_path / "prompt.txt"}')
    assert 'tokens/s' in sampled(f'--out_dir={trained}', '--start=')
    out = sampled(f'--out_dir={trained}', '--start=' + 'long ' * 20)
    assert 'note: the prompt has 100 tokens, the model sees the last 32' in out and 'long ' * 20 in out


@pytest.mark.parametrize('arguments, words', [
    (['--start=Größe'], "'ß' 'ö'"), (['--start=FILE:nowhere'], 'nowhere: No such file'), (['--out_dir=nowhere'], 'no model.pth in'),
    (['--num_samples=0', '--top_p=2', '--temperature=nan'], 'top_p is above 0'), (['--weights=worst'], 'best or last'),
    (['--quantize=int4'], 'int8 or nothing'), (['--init_from=gpt5'], 'resume, gpt2, gpt2-medium'), (['--seed=-1'], 'at least 0'),
    (['--quantize=int8', '--dtype=bfloat16'], 'without --dtype')])
def test_mistakes_end_with_one_line(project, trained, capsys, arguments, words):
    with pytest.raises(SystemExit) as e:
        config = configure(vars(sample), [f'--out_dir={trained}', *arguments])
        problems = sample.check_settings(config)
        if problems:
            sample.fail(*problems)
        sample.main()
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.splitlines()[-1].startswith('error: ')


def test_where_there_is_no_best_model_yet_the_error_says_to_take_the_last(train_run, tmp_path, sampled, capsys):
    train_run('--max_iters=3')
    os.remove(tmp_path / 'out' / 'model.pth')  # as after a signal before the first evaluation
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={tmp_path / "out"}')
    assert e.value.code == 2 and 'no model.pth in' in (err := capsys.readouterr().err) and 'use --weights=last' in err
    assert 'step 3' in sampled(f'--out_dir={tmp_path / "out"}', '--weights=last')


def test_stop_ends_a_sample_before_its_text_also_while_streaming():
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
    assert shown == 'ab' and shown + text.new(end=True) == 'abdea'  # the beginning of stop at the very end


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
    checkpoint['tokenizer']['chars'] = checkpoint['tokenizer']['chars'][:40]  # as if the rest were padding
    torch.save(checkpoint, trained / 'model.pth')
    assert '2 x 200 tokens' in sampled(f'--out_dir={trained}', '--max_new_tokens=200', '--temperature=3', '--start=\n')


def test_an_export_loads_in_transformers_and_comes_back(trained, sampled, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    out = sampled(f'--out_dir={trained}', f'--export={tmp_path / "hf"}')
    assert 'exported to' in out
    weights = torch.load(trained / 'model.pth')['model']
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'hf').state_dict()
    assert torch.equal(theirs['transformer.h.0.mlp.c_fc.weight'].t(), weights['transformer.h.0.mlp.c_fc.weight'])
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={trained}', f'--export={tmp_path / "hf"}')
    assert e.value.code == 2 and 'name another' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={trained}', f'--export={trained / "model.pth" / "hf"}')
    assert e.value.code == 2 and 'Not a directory' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        sampled(f'--init_from={tmp_path / "hf"}', '--out_dir=')
    assert e.value.code == 2 and 'such a folder holds no tokenizer' in capsys.readouterr().err


def test_an_export_that_finds_no_space_leaves_nothing(trained, sampled, tmp_path, monkeypatch, capsys):
    def full(model, folder):
        open(os.path.join(folder, 'model.safetensors'), 'wb').write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(sample.GPT, 'save_pretrained', full)
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={trained}', f'--export={tmp_path / "hf"}')
    assert e.value.code == 1 and 'No space left' in capsys.readouterr().err and not (tmp_path / 'hf').exists()


def test_a_model_that_gpt2_cannot_express_is_not_exported(train_run, tmp_path, sampled, capsys):
    train_run('--max_iters=1', '--rotary=True')
    with pytest.raises(SystemExit) as e:
        sampled(f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "hf"}')
    assert e.value.code == 2 and 'rotary=True has no counterpart' in capsys.readouterr().err and not (tmp_path / 'hf').exists()


def test_the_list_of_runs_may_be_empty_and_hold_any_name(trained, sampled, train_run, tmp_path, capsys):
    log = os.path.join(train.HERE, 'checkpoints.log')
    open(log, 'w').close()
    with pytest.raises(SystemExit) as e:
        sampled()
    assert e.value.code == 2 and 'nothing has been trained yet' in capsys.readouterr().err
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/\xff')
    train_run('--max_iters=5', out=odd)
    assert train.read_runs() == [odd] and sample.last_run() == odd


@pytest.mark.parametrize('mistake, words', [('--start=FILE:/nonexistent', '/nonexistent: No such file'), ('--export=/', 'not an empty folder')])
def test_mistakes_are_found_before_weights_are_fetched(sampled, monkeypatch, capsys, mistake, words):
    monkeypatch.setattr(sample, 'load_gpt2', None)
    with pytest.raises(SystemExit) as e:
        sampled('--init_from=gpt2', mistake)
    assert e.value.code == 2 and words in capsys.readouterr().err
