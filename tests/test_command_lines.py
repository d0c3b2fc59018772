"""Command lines that people have published for this recipe parse to what they mean, or are refused in one line.

command_lines.csv has them: where each stands, the line, what comes of it, the knobs off their defaults or, after an
exclamation mark, the start of the message, and the start of the note on what its own script did otherwise.
"""
import csv
import re
import shlex
from dataclasses import fields

import pytest
from conftest import REPO

import train_imagenette
from command import UsageError
from experiments import Config, resolve
from training.others import notes_on_others

with open(REPO / 'tests' / 'command_lines.csv', newline='', encoding='utf-8') as f: LINES = list(csv.DictReader(f))
TYPES = {f.name: f.type for f in fields(Config)}


def argv(line): return shlex.split(re.sub(r'^.*?\.py ', '', line))


@pytest.mark.parametrize('row', LINES, ids=[f'{i}-{row["source"]}' for i, row in enumerate(LINES, 2)])
def test_a_published_command_line(row):
    expected = row['expected']
    if expected.startswith('! '):
        with pytest.raises(UsageError) as e: train_imagenette.parse(argv(row['line']))
        return assert_one_line(str(e.value), expected[2:])
    values = dict(pair.split('=', 1) for pair in expected.split())
    knobs = {name: TYPES[name](values.pop(name)) for name in list(values) if name in TYPES}
    cfg, args = train_imagenette.parse(argv(row['line']))
    assert resolve(cfg) == resolve(Config(**knobs))
    assert {name: int(getattr(args, name)) for name in values} == {name: int(value) for name, value in values.items()}
    if 'runs' not in values: assert args.runs == 1
    notes = notes_on_others(argv(row['line']), args)
    assert len(notes) <= 2 and (notes[0].startswith(row['note']) if row['note'] else not notes)


def assert_one_line(message, start): assert message.startswith(start) and '\n' not in message and len(message) < 250


def test_the_list_is_of_real_lines():
    sources = {row['source'].split()[0] for row in LINES}
    assert len(LINES) >= 30 and sources >= {
        'sdoria/SimpleSelfAttention', 'mgrankin/SimpleSelfAttention', 'lessw2020/Ranger-Mish-ImageWoof-5',
        'fastai/imagenette', 'fastai/fastai1', 'fastai/fastai'}
    assert len({row['line'] for row in LINES}) == len(LINES)


FLAGS = {
    'sdoria/SimpleSelfAttention train.py':
        'gpu woof lr size alpha mom eps epochs bs mixup opt arch sa sym dump lrfinder log',
    'mgrankin/SimpleSelfAttention, lessw2020/Ranger-Mish-ImageWoof-5 train.py': 'run sched_type ann_start',
    'fastai/fastai1 examples/train_imagenette.py': 'gpu woof lr size alpha mom eps epochs bs mixup opt arch dump',
    'fastai/fastai 2.8.12 nbs/examples/train_imagenette.py':
        'woof pct_noise lr size sqrmom mom eps wd epochs bs mixup opt arch sh sa sym beta act_fn fp16 pool dump runs '
        'meta workers',
}


@pytest.mark.parametrize('script', FLAGS)
def test_every_flag_of_a_script_is_there(script):
    known = train_imagenette.make_parser()._option_string_actions
    for name in FLAGS[script].split():
        assert f'--{name.replace("_", "-")}' in known
        assert any(f'--{name}' in argv(row['line']) for row in LINES), f'no line has --{name}'


@pytest.mark.parametrize('line, note', [
    ('--fp16 1 --sa 1', "in fastai's script of 2020 the default was --lr 0.01 --opt ranger --act mish --schedule "
     'flat_cos --split v2 --source 320 --stem 32-32-64; here it is --lr 0.003 --opt adam --act relu --schedule '
     'one_cycle --split auto --source auto --stem 32-64-64'),
    ('--size 192 --lr 8e-3 --opt ranger --act_fn=Mish --sched_type flat_cos',
     'the default was --split v2 --stem 32-32-64 --precision fp32; here'),
    ('--size 192 --lr 8e-3 --opt ranger --act_fn=Mish --sched_type flat_cos --fp16 0',
     'the default was --split v2 --stem 32-32-64; here'),
    ('--fp16', ''), ('--pct_noise 5', ''), ('--fp16 --local-rank=0', ''), ('--fp16 --local_rank 0', ''),
    ('--fp16 --lr 1e-2 --opt ranger --act Mish --schedule flat_cos --split v2 --source 320 --stem 32-32-64', ''),
])
def test_a_reader_of_2020_is_told_what_differs(line, note):
    _, args = train_imagenette.parse(line.split())
    notes = notes_on_others(line.split(), args)
    assert note in ''.join(notes) and len(notes) == bool(note)


@pytest.mark.parametrize('line, message', [
    ('--fp16 0 --precision bf16', '--fp16 and --precision bf16: give one of them'), ('--repro=1', '--repro: every run'),
    ('--woof --dataset imagenette', '--woof and --dataset imagenette: give one of them'),
    ('--woof 0 --dataset imagewoof', '--woof 0 and --dataset imagewoof: give one of them'),
    ('--fused 0 --opt sgd', '--fused 0: for --opt adam only, not sgd (default 1)'),
    ('--beta 1 --opt sgd', '--beta 1.0: for --opt ranger or radam only, not sgd (default 0.0)'),
    ('--ann-start 0.5', '--ann-start 0.5: for --schedule flat_cos only, not one_cycle (default 0.75)'),
    ('--eps 1e-3 --opt sgd', '--eps 0.001: for --opt adam, rms, ranger, radam, lamb or lookahead only, not sgd'),
    ('--alpha 0.9 --opt sgd', '--sqrmom 0.9: for --opt adam, rms,'),
    ('--source 320 --dataset digits', '--source 320: for --dataset imagenette or imagewoof only, not digits'),
    ('--skip-damaged', '--skip-damaged: with --data only'), ('--sa-at 2', '--sa-at: with --sa only'),
    ('--dump --lrfinder', '--dump, --lrfinder: give one of them'),
    ('--dump --save m.pt', '--save, --export: with --dump and --lrfinder there is no trained model'),
    ('--sa my_layers.py', '--sa my_layers.py: name the layer in it, my_layers.py:NAME'),
    ('--arch mxresnet18 --act_fn relu', '--arch mxresnet18 and --act relu: that network has Mish; take --arch x'),
])
def test_flags_that_do_not_go_together(line, message):
    with pytest.raises(UsageError) as e: train_imagenette.parse(line.split())
    assert_one_line(str(e.value), message)
