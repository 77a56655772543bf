"""The budgets of the project hold: sizes of files, lengths of lines, the direction of imports."""
import ast
import pathlib
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

FOLDER = pathlib.Path(ROOT)
LINES = {'train.py': 600, 'model.py': 550, 'sample.py': 280, 'configurator.py': 430,
         'bench.py': 230}
FILES = sorted(path.relative_to(FOLDER).as_posix() for pattern in (
    '*.py', 'data/**/*.py', 'config/*.py', 'config/*.sh', 'tests/**/*.py')
    for path in FOLDER.glob(pattern))


def read(name):
    return (FOLDER / name).read_text(encoding='utf-8')


def count_lines(name):
    return len(read(name).splitlines())


def imports(source):
    """Return the first parts of the names of all modules that source imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or '')
    return {name.partition('.')[0] for name in names}


def test_the_files_are_found():
    assert set(LINES) <= set(FILES)
    for folder in ('data/', 'data/shakespeare/', 'config/', 'tests/'):
        assert any(name.startswith(folder) for name in FILES), folder


@pytest.mark.parametrize('name', FILES)
def test_a_file_keeps_its_budget_of_lines(name):
    limits = {'data': 250, 'config': 40}
    limit = LINES.get(name) or limits.get(name.partition('/')[0])
    if limit:
        assert count_lines(name) <= limit


def test_the_five_scripts_keep_their_budget_together():
    assert sum(map(count_lines, LINES)) <= 2050
    assert len(read('train.py')) <= 30_000


@pytest.mark.parametrize('name', FILES)
def test_no_line_is_longer_than_100_columns(name):
    too_long = [f'{name}:{number}' for number, line in enumerate(read(name).splitlines(), 1)
                if len(line) > 100]
    assert not too_long


@pytest.mark.parametrize('name, forbidden', [
    ('model.py', {'train', 'sample', 'bench', 'configurator', 'data'}),
    ('sample.py', {'train', 'bench'}),
    ('configurator.py', {'train', 'sample', 'bench'}), ('train.py', {'sample', 'bench'})])
def test_imports_go_one_way(name, forbidden):
    assert not imports(read(name)) & forbidden


def test_imports_are_found_in_every_form():
    source = 'import a.b\nfrom c.d import e\nimport f as g, h\ndef i():\n    from j import k\n'
    assert imports(source) == {'a', 'c', 'f', 'h', 'j'}


def test_pyproject_and_the_requirements_agree():
    project = tomllib.loads(read('pyproject.toml'))['project']
    assert read('requirements.txt').splitlines() == project['dependencies']
    first, *dev = read('requirements-dev.txt').splitlines()
    assert first == '-r requirements.txt' and dev == project['optional-dependencies']['dev']
    assert project['requires-python'] == '>=3.10'
    assert 'Python 3.10 or newer' in read('README.md')


def test_ci_installs_a_version_of_torch_that_the_requirements_admit():
    requirement, = (r for r in map(Requirement, read('requirements.txt').split())
                    if r.name == 'torch')
    constraints = [line for line in read('.ci/constraints.txt').splitlines() if line[0] != '#']
    pinned, = map(Requirement, constraints)
    (pin,) = pinned.specifier
    assert pinned.name == 'torch' and pin.operator == '==' and pin.version in requirement.specifier
    assert 'PIP_CONSTRAINT="$PWD/.ci/constraints.txt"' in read('.ci/run')
