"""Every command in the README and in the configs' headers names files and keys that exist."""
import glob
import os
import re
import shlex

import pytest

import bench
import sample
import train
from conftest import ROOT
from configurator import configure

README = open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read()
COMMANDS = [line.strip() for line in re.findall(r'^    (.*)$', README, re.M) if re.search(r'python |torchrun ', line)]
COMMANDS += re.findall(r'`((?:python|torchrun) [^`]*\.py[^`]*)`', README)
for _path in glob.glob(os.path.join(ROOT, 'config', '*.py')):
    COMMANDS += [m for m in re.findall(r'^#\s+((?:python|torchrun) .*)$', open(_path).read(), re.M)]


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20
    section = re.search(r'^## Two commands\n(.*?)^## ', README, re.M | re.S).group(1)
    two = re.findall(r'^    (.*)$', section, re.M)
    assert len(two) == 2 and 'requirements.txt' in two[0] and 'requirements-dev.txt' in two[1]  # .ci/run runs these


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_names_real_files_and_keys(command):
    for part in command.split('&&'):
        words = shlex.split(part)
        scripts = [w for w in words if w.endswith('.py') and not w.startswith('--')]
        for path in scripts:
            assert os.path.exists(os.path.join(ROOT, path)), path
        if words[0] == 'pip':
            assert os.path.exists(os.path.join(ROOT, words[-1]))
        if not scripts:
            continue
        arguments = [w for w in words[words.index(scripts[0]) + 1:] if w != '--help']
        if scripts[0].startswith('data/'):
            source = open(os.path.join(ROOT, scripts[0])).read()
            for argument in arguments:
                assert re.search(rf'^{argument[2:].split("=")[0]} = ', source, re.M), argument
        else:
            configure(vars({'train.py': train, 'sample.py': sample, 'bench.py': bench}[scripts[0]]),
                      [os.path.join(ROOT, a) if a.endswith('.py') else a for a in arguments])
    configure(vars(train), [])


def test_the_file_tree_is_the_real_one():
    tree = re.search(r'^## Files\n(.*?)^## ', README, re.M | re.S).group(1)
    names = re.findall(r'^    (\S+)', tree, re.M)
    for name in names:
        assert os.path.exists(os.path.join(ROOT, name)), name
    assert {f for f in os.listdir(ROOT) if f.endswith('.py')} <= set(names)


def test_every_test_that_the_readme_names_exists():
    names = set(re.findall(r'`(test_\w+)`', README))
    defined = {m for path in glob.glob(os.path.join(ROOT, 'tests', 'test_*.py'))
               for m in re.findall(r'^def (test_\w+)', open(path).read(), re.M)}
    assert len(names) > 15 and names <= defined, names - defined
