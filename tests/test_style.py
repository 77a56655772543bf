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
FLOORS = ('model configurator', 'data', 'train sample', 'bench')  # imports point down only
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


def is_product(name):
    return name.endswith('.py') and not name.startswith(('tests/', 'config/'))


def floor(module):
    """Return the floor on which a module of quill stands, or -1 for other packages."""
    return next((i for i, names in enumerate(FLOORS) if module in names.split()), -1)


def test_the_files_are_found():
    assert {'model.py', 'train.py', 'sample.py', 'configurator.py', 'bench.py'} <= set(FILES)
    for folder in ('data/', 'data/shakespeare/', 'config/', 'tests/'):
        assert any(name.startswith(folder) for name in FILES), folder


def test_the_product_keeps_its_budget_of_lines():
    # on its way to 4,600: this bound only ever goes down
    assert sum(count_lines(name) for name in FILES if is_product(name)) <= 4837


def test_the_readme_keeps_its_size():
    assert count_lines('README.md') <= 220
    assert len(read('README.md').split()) <= 2200


@pytest.mark.parametrize('name', FILES)
def test_no_line_is_longer_than_100_columns(name):
    too_long = [f'{name}:{number}' for number, line in enumerate(read(name).splitlines(), 1)
                if len(line) > 100]
    assert not too_long


@pytest.mark.parametrize('name', [name for name in FILES if is_product(name)])
def test_no_import_points_up_a_floor(name):
    own = floor(name.removesuffix('.py').partition('/')[0])
    assert own >= 0
    if name == 'data/hellaswag/evaluate.py':  # a script that loads weights as sample.py does
        own = floor('sample')
    above = [module for module in imports(read(name)) if floor(module) > own]
    assert not above
    if own == 0:  # the ground floor: not even each other
        assert not imports(read(name)) & {'model', 'configurator'}


def test_sampling_needs_nothing_of_training():
    assert 'train' not in imports(read('sample.py'))


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
