"""What the documents say is there: links, commands, and a README of one screen."""
import re
import shlex

import pytest
import torch
import yaml
from conftest import REPO, script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import runlog
import train_imagenette
from report import __main__ as report

DOCUMENTS = ['README.md', 'CONTRIBUTING.md', 'scripts/README.md', 'tests/faults/README.md', 'results/README.md',
             'results/LOG.md', 'results/published/README.md', 'results/benchmarks/README.md']
TEXTS = {name: (REPO / name).read_text(encoding='utf-8') for name in DOCUMENTS}


def anchors(text):
    "Returns the anchors that GitHub gives the headings of a document: lower case, no punctuation, hyphens for spaces."
    headings = re.findall(r'^#+ (.+)$', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r'\]\(([^)\s]+)\)', TEXTS[name]):
        if target.startswith('http'): continue
        path, _, anchor = target.partition('#')
        file = (REPO / name).parent / path if path else REPO / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding='utf-8')), target


@pytest.mark.parametrize('name', [name for name in DOCUMENTS if 'published' not in name])  # That one is a copy.
def test_lines_of_prose_fit_120_columns(name):
    prose = re.sub(r'^```.*?^```', '', TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(('|', '#', '    '))]
    assert max(map(len, lines)) <= 120


def commands(program):
    "Returns the arguments of the lines of all documents that call a program; FILE.md:line is their id."
    found = []
    for name, text in TEXTS.items():
        for number, line in enumerate(text.splitlines(), 1):
            match = re.match(rf' {{4}}(?:\S*python |torchrun .*?){program}(.*)', line)
            if match: found.append(pytest.param(shlex.split(match[1], comments=True), id=f'{name}:{number}'))
    return found


@pytest.mark.parametrize('argv', commands('train_imagenette.py'))
def test_training_commands_are_understood(argv, tree, tmp_path, monkeypatch, capsys):
    for flag, package in (('--log-to', 'tensorboard'), ('--export', 'onnxruntime')):
        if flag in argv: pytest.importorskip(package, reason='of requirements-extras.txt')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_layers.py').write_text('class MyLayer: ...')
    argv = [str(tree) if word == 'DIR' else word for word in argv]
    if '--help' in argv:
        with pytest.raises(SystemExit): train_imagenette.parse(argv)
    else: assert train_imagenette.parse(argv)


@pytest.mark.parametrize('argv', commands('scripts/reproduce.py'))
def test_commands_that_repeat_are_understood(argv):
    if 'EXPERIMENT' not in argv: assert script('reproduce').parse(argv)


@pytest.mark.parametrize('argv', commands('scripts/trial.py'))
def test_commands_of_trials_are_understood(argv, tmp_path, monkeypatch):
    if argv[0].startswith('timm'): pytest.importorskip('timm')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my_layers.py').write_text('class MyLayer: ...')
    if 'FILE.py:NAME`' not in argv: assert script('trial').parse(argv)


@pytest.mark.parametrize('argv', commands('scripts/attention_maps.py'))
def test_commands_of_maps_are_understood(argv): assert script('attention_maps').parse(argv)


@pytest.mark.parametrize('argv', commands('runlog.py'))
def test_commands_of_the_record_are_understood(argv): assert runlog.parse(argv)


@pytest.mark.parametrize('argv', commands('-m report'))
def test_commands_of_reports_are_understood(argv): assert report.parse(argv)


def test_the_commands_are_found():
    assert len(commands('train_imagenette.py')) > 8 and len(commands('scripts/reproduce.py')) > 4
    assert commands('runlog.py') and commands('-m report')


@pytest.mark.slow(3)
def test_the_layer_goes_into_networks_of_others_as_is_said():
    from fastai.vision.models.xresnet import xresnet50
    from torchvision.models import resnet50

    from layers import SimpleSelfAttention
    block = TEXTS['scripts/README.md'].partition('## The layer in other networks')[2].split('```')[1]
    lines = block.removeprefix('python\n').splitlines()
    for make, code in ((resnet50, lines[:2]), (xresnet50, lines[2:3])):
        model, x = make().eval(), torch.randn(1, 3, 64, 64)
        before = model(x)
        exec('\n'.join(code), dict(model=model, torch=torch, SimpleSelfAttention=SimpleSelfAttention))
        assert sum(isinstance(m, SimpleSelfAttention) for m in model.modules()) == 1
        assert torch.equal(model.eval()(x), before)
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction, True
    try:
        exec('\n'.join(lines[3:]), dict(torch=torch))
        assert not matmul.allow_fp16_reduced_precision_reduction and len(lines) == 4
    finally: matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.parametrize('name', DOCUMENTS)
def test_the_rows_of_a_table_have_a_cell_for_each_column(name):
    for table in re.findall(r'(?:^\|.*\n)+', TEXTS[name], re.MULTILINE):
        lines = re.sub(r'`[^`]*`', '', table).splitlines()
        assert len({line.count('|') for line in lines}) == 1, table


def test_the_readme_is_short(): assert len(TEXTS['README.md'].split()) <= 1200


def test_the_readme_starts_with_commands_that_start_from_nothing():
    "Each of the two blocks under Start makes its environment, so that a reader can copy either one alone."
    start = TEXTS['README.md'].split('\n## Start\n')[1].split('\n## ')[0]
    blocks = [block for block in re.findall(r'(?:^ {4}.+\n)+', start, re.MULTILINE) if '-m venv' in block]
    assert len(blocks) == 2 and all('-r requirements.txt' in block for block in blocks)
    assert 'train_imagenette.py --dataset digits' in blocks[0] and blocks[1].rstrip().endswith('-m pytest')


@pytest.mark.slow(8)
def test_the_first_command_prints_what_the_readme_shows(command):
    "But for the numbers: those of the README are of the whole network, here it is narrow."
    start = TEXTS['README.md'].partition('## Start')[2].partition('\n## ')[0]
    argv = shlex.split(re.search(r'train_imagenette.py (.+)', start)[1])
    shown = [line.strip() for line in start.splitlines() if line.startswith(('    epoch ', '    accuracy '))]
    code, out, _ = command(*argv)
    def masked(line): return re.sub(r'[\d.]+', '0', line).partition('->')[0]
    assert code == 0 and len(shown) == 4 and [masked(line) for line in out.splitlines()] == list(map(masked, shown))


# --- how it is installed ---

def first_commands():
    "Returns the commands of the first two blocks of README.md, which install, train and test, each once."
    blocks = re.findall(r'\n\n((?:    .*\n)+)', TEXTS['README.md'].partition('## Start')[2])[:2]
    return list(dict.fromkeys(re.sub(r'\s*&&\s*', '\n', '\n'.join(blocks)).split('\n')))


def test_the_dockerfile_does_what_the_readme_says():
    text = (REPO / 'Dockerfile').read_text(encoding='utf-8')
    parts = re.findall(r'^(?:RUN|CMD) (.+)$', text, re.MULTILINE)
    found = {command for part in parts for command in part.split(' && ')}
    assert found == {command.strip() for command in first_commands() if command.strip()} and len(found) == 4


def test_models_that_git_ignores_stay_out_of_the_image():
    ignored = [(REPO / name).read_text(encoding='utf-8').splitlines() for name in ('.gitignore', '.dockerignore')]
    models = {f'**/{line}' for line in ignored[0] if line.startswith('*.') and not line.endswith('/')}
    assert len(models) == 4 and models <= set(ignored[1])
    assert 'results/predictions' not in ignored[1]  # The tests in the image need them.


def pins():
    lines = (REPO / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    return dict(line.split('==') for line in lines if not line.startswith('#'))


@pytest.mark.parametrize('file', sorted(REPO.glob('requirements*.txt')), ids=lambda file: file.name)
def test_the_constraints_are_versions_of_what_is_required(file):
    exact = pins()
    lines = [line.partition('#')[0].strip() for line in file.read_text(encoding='utf-8').splitlines()]
    for requirement in map(Requirement, filter(None, lines)):
        assert requirement.specifier.contains(exact[canonicalize_name(requirement.name)]), requirement


def test_the_citation_can_be_read():
    cited = yaml.safe_load((REPO / 'CITATION.cff').read_text(encoding='utf-8'))
    assert cited['license'] == 'Apache-2.0' and TEXTS['README.md'].startswith(f'# {cited["title"]}\n')
    assert {'cff-version', 'message', 'authors'} <= cited.keys()
    assert cited['references'][0]['url'] in TEXTS['README.md']
