"""Every command and every flag in the README and in config/ names files and keys that exist."""
import glob
import os
import re
import shlex

import bench
import sample
import train
from configurator import configure

import pytest
from conftest import ROOT


def read(*names):
    with open(os.path.join(ROOT, *names), encoding='utf-8') as f:
        return f.read()


def indented_lines(text):
    """Return the lines that are indented by four spaces, which Markdown shows as code."""
    return re.findall(r'^    (.*)$', text, re.M)


README = read('README.md')
SPEEDRUN = read('config', 'speedrun_shakespeare_char.md')
# nanoGPT's own commands are among them: their files and keys have the same names in quill
COMMANDS = [line.strip() for line in indented_lines(README + SPEEDRUN)
            if re.search(r'python |torchrun ', line)]
COMMANDS += re.findall(r'`((?:python|torchrun) [^`]*\.py[^`]*)`', README)
FLAGS = re.findall(r'`(--[^`]*)`', README + SPEEDRUN)
for _path in sorted(glob.glob(os.path.join(ROOT, 'config', '*.py'))):
    COMMANDS += re.findall(r'^#\s+((?:python|torchrun) .*)$', read(_path), re.M)
    FLAGS += re.findall(r'^#(?!.*\.py).*?(--\w+=.*)$', read(_path), re.M)


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20
    section = re.search(r'^## Two commands\n(.*?)^## ', README, re.M | re.S).group(1)
    install, test = indented_lines(section)  # .ci/run runs these
    assert 'requirements.txt' in install and 'requirements-dev.txt' in test


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_names_real_files_and_keys(command):
    command = re.sub(r'\$\w+', '1', command)  # the variables of a loop
    for part in command.split('&&'):
        check(shlex.split(part))


def check(words):
    """Check one command, given as its words."""
    scripts = [w for w in words if w.endswith('.py') and not w.startswith('--')]
    for path in scripts:
        assert os.path.exists(os.path.join(ROOT, path)), path
    if words[0] == 'pip':
        assert os.path.exists(os.path.join(ROOT, words[-1]))
    if not scripts:
        return
    name, *_ = scripts
    if name == 'tests/gpu_table.py':  # it has no settings
        return
    arguments = [w for w in words[words.index(name) + 1:] if w != '--help']
    if name.startswith('data/'):
        for argument in arguments:
            key = argument.removeprefix('--').split('=')[0]
            assert re.search(rf'^{key} = ', read(name), re.M), argument
        return
    arguments = [os.path.join(ROOT, w) if w.endswith('.py') else w for w in arguments]
    try:
        if name == 'bench.py':
            configure(bench.__name__, arguments, base='train', check=train.check_settings)
        elif name == 'sample.py':
            configure('sample', arguments)
        else:
            assert name == 'train.py'
            configure('train', arguments, check=train.check_settings)
    finally:  # restore the default settings, which are module globals
        configure('bench', [], base='train')
        configure('sample', [])


def test_each_flag_in_the_text_is_a_setting():
    keys = {key for flags in FLAGS for key in re.findall(r'--(\w[\w-]*)', flags)}
    assert len(keys) > 20
    prepare = read('data', 'text', 'prepare.py')
    settings = {*vars(train), *vars(sample), *re.findall(r'^(\w+) = ', prepare, re.M)}
    assert keys - settings == {'key', 'max-restarts'}  # --key=value; torchrun's --max-restarts


def test_the_file_tree_is_the_real_one():
    section = re.search(r'^## Files\n(.*?)^## ', README, re.M | re.S).group(1)
    names = re.findall(r'^    (\S+)', section, re.M)
    for name in names:
        assert os.path.exists(os.path.join(ROOT, name)), name
    modules = glob.glob('*.py', root_dir=ROOT) + glob.glob('data/[!_]*.py', root_dir=ROOT)
    assert set(modules) <= set(names)
    assert all(re.search(rf'^    {name} +\S', section, re.M) for name in modules)
