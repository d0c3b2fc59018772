"""A layer on trial: scripts/trial.py on a tree of a few images. Of its plan and page: test_trial_page.py."""
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO, script
from test_trial_page import step

import runlog
from experiments import Config
from training import timing

trial = script('trial')
TINY = ['--size', '32', '--epochs', '1', '--bs', '6', '--workers', '0']
LAYER = '''
import torch, torch.nn as nn
class Gate(nn.Module):
    "A gate on each channel, open at the start."
    def __init__(self, n_channels):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(n_channels, 1, 1))
    def forward(self, x): return x * (1 + torch.tanh(self.gate))
class Half(Gate):
    def forward(self, x): return x[:, :1]
class none(Gate): pass
'''


@pytest.fixture
def file(tmp_path):
    file = tmp_path / 'my_layers.py'
    file.write_text(LAYER)
    return file


@pytest.fixture
def call(file, tree, tmp_path, capfd, monkeypatch):
    """Runs trial.py on the layer and the tree: (exit code, stdout, stderr).

    A step of none takes 10 ms, of conv 12, of all others 20.
    """
    def steps(arms, device, threads=None):
        return {arm: step({'none': 10., 'conv': 12.}.get(arm, 20.)) for arm in arms}
    monkeypatch.setattr(timing, 'measure_steps', steps)

    def run(*argv, layer=f'{file}:Gate'):
        argv = [layer, '--data', tree, *TINY, '--name', 'gate', '--results', tmp_path / 'results', *argv]
        code = trial.main(list(map(str, argv)))
        return (code or 0, *capfd.readouterr())
    return run


def rows(tmp_path): return runlog.load(tmp_path / 'results' / 'runs.csv')
def page(tmp_path): return (tmp_path / 'results' / 'trials' / 'gate.md').read_text(encoding='utf-8')
def plan(tmp_path): return json.loads((tmp_path / 'results' / 'trials' / 'gate.json').read_text(encoding='utf-8'))


# --- the command ---

@pytest.mark.slow(11)
def test_a_trial_from_plan_to_page_and_on(call, file, tmp_path):
    code, out, err = call('--runs', 2)
    assert code == 0, err
    df = rows(tmp_path)
    assert list(zip(df.attention, df.seed)) == [(a, s) for s in (0, 1) for a in ('none', 'conv', 'my_layers.py:Gate')]
    assert out.index('Arms, in turn, each turn with one seed: none, conv, Gate.') < out.index('none seed 0:')
    assert 'Stopping: 2 runs of each arm, seeds 0 to 1.' in out and df.attention_source[2] in out
    text = page(tmp_path)
    assert '- **Gate** against none: ' in text and '- **Gate** against conv: ' in text and '(2)' in text
    assert '| conv | 4,097 | 262,144 | 12.0 | 1.20 [1.08, 1.32] | 3 |' in text
    assert '| Gate | 64 | 0 | 20.0 | 2.00 [1.80, 2.20] | 3 |' in text
    assert '## At equal run time' not in text
    assert all((tmp_path / 'results' / 'trials' / f'gate.{end}').stat().st_size > 1000 for end in ('png', 'svg', 'md'))

    before = page(tmp_path)
    moved = file.rename(tmp_path / 'set' / 'my_layers.py')  # wherever it is, it is the same layer
    code, out, err = call(layer=f'{moved}:Gate')
    assert code == 0 and 'seed 0:' not in out and len(rows(tmp_path)) == 6 and page(tmp_path) == before, err

    code, out, err = call('--runs', 3, '--equal-time', '--epochs', 1, layer=f'{moved}:Gate')
    assert code == 2 and '--equal-time: the slowest step takes 2.00 times as long as the fastest' in err
    code, out, err = call('--runs', 3, layer=f'{moved}:Gate')
    assert code == 0 and len(rows(tmp_path)) == 9, err
    assert 'when 6 runs were recorded; before, it was 2 runs of none, conv, Gate.' in page(tmp_path)
    changes = {('--lr', 0.1): 'has another plan (lr 0.003, here 0.1); give this trial another --name',
               ('--sa-at', 2): 'has another plan (sa_at 1, here 2)'}
    for change, words in changes.items():
        code, out, err = call(*change, layer=f'{moved}:Gate')
        assert code == 2 and words in err and err.count('\n') == 1
    moved.write_text(LAYER + '# edited')
    code, out, err = call(layer=f'{moved}:Gate')
    assert code == 2 and 'has another plan (attention_source ' in err
    moved.write_text(LAYER)
    code, out, err = call('--seed0', 3, layer=f'{moved}:Gate')
    assert code == 2 and '--seed0 3: the plan begins with seed 0; give another --name' in err
    code, out, err = call(layer='simple')
    assert code == 2 and 'is a trial of my_layers.py:Gate; give this one another --name' in err
    assert len(rows(tmp_path)) == 9


@pytest.mark.slow(15)
def test_at_equal_run_time_the_slower_arms_train_fewer_epochs(call, tmp_path):
    code, _, err = call('--runs', 2, '--epochs', 4, '--equal-time')
    assert code == 0, err
    df = rows(tmp_path)
    assert list(zip(df.attention, df.epochs))[:5] == [('none', 4), ('conv', 4), ('my_layers.py:Gate', 4), ('conv', 3),
                                                      ('my_layers.py:Gate', 2)]
    text = page(tmp_path)
    assert '- **Gate in 2 epochs** against none: ' in text
    assert '- **Gate in 2 epochs** against conv in 3 epochs: ' in text
    assert '- conv in 3 epochs: 90% of the time of none in 4 epochs.' in text
    assert text.index('## At equal run time') < text.index('**Gate in 2 epochs**') < text.index('## Plan')
    assert 'P values are of 4 comparisons' in text
    code, _, err = call('--runs', 2, '--epochs', 4)  # the plan holds what the first call asked for
    assert code == 0 and len(rows(tmp_path)) == 10 and page(tmp_path) == text, err


@pytest.mark.slow(4)
def test_a_layer_of_ours_beside_fastais_and_what_was_recorded_before(call, tree, command, tmp_path, monkeypatch):
    argv = ['--data', tree, *TINY, '--split', 'v2', '--arch', 'xresnet18']
    assert command(*argv)[0] == 0  # none, seed 0
    code, _, err = call('--runs', 1, layer='simple')
    assert code == 0 and len(rows(tmp_path)) == 3, err
    text = page(tmp_path)
    assert "| fastai's simple | 4,097 | " in text and '| 20.0 | 2.00 [1.80, 2.20] | 3 | not trained |' in text
    assert 'Recorded before the plan was saved, and counted: 1 of none.' in text
    assert 'too few runs to say' in text


def test_conv_on_trial_has_one_contrast(call, tmp_path, monkeypatch):
    monkeypatch.setattr(trial.loop.Loop, 'do', lambda self, todo: None)
    assert call(layer='conv')[0] == 0
    assert plan(tmp_path)['contrasts'] == [['none', 'conv']] and list(plan(tmp_path)['arms']) == ['none', 'conv']
    assert '**conv** against none: no runs.' in page(tmp_path)


def test_a_name_that_is_taken_and_a_dry_run(call, file, tmp_path, monkeypatch):
    code, out, _ = call('--runs', 2, '--dry-run', layer=f'{file}:none')
    assert code == 0 and 'my_layers.py:none seed 1: custom, 32 px, 1 epochs, xresnet18+my_layers.py:none' in out
    assert out.endswith('6 runs to do, 0 recorded\n') and not (tmp_path / 'results' / 'trials').exists()


@pytest.mark.slow(4)
def test_ctrl_c_leaves_plan_rows_and_page_and_the_trial_goes_on(file, tree, spawn, tmp_path):
    argv = [REPO / 'scripts' / 'trial.py', f'{file}:Gate', '--data', tree, *TINY, '--name', 'gate', '--results',
            tmp_path / 'results', '--runs', 1]
    process = spawn(*argv, '--epochs', 300, '--checkpoint-every', 1)
    while not (line := process.stdout.readline()).startswith('epoch 2'): assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and 'Traceback' not in err and 'Gate against none: no runs.' in out, err
    assert rows(tmp_path).status.tolist() == ['interrupted'] and plan(tmp_path)['runs'] == 1
    assert '**Gate** against none: no runs.' in page(tmp_path)


@pytest.mark.parametrize('argv, words', [
    ('none', 'none: is what a layer is compared with'), ('None', 'none: is what a layer is compared with'),
    ('simpel', '--sa simpel: unknown; choose from'),
    ('FILE:Gat', 'has no Gat (did you mean Gate?)'), ('FILE:Half', 'it must keep the shape'),
    ('nosuch.py:A', 'no such file'),
    ('FILE:Gate --runs 0', '--runs 0: must be at least 1'), ('FILE:Gate --name a/b', '--name a/b: letters, digits'),
    ('FILE:Gate --sa simple', '--sa: the layer stands first, without a flag'),
    ('FILE:Gate --epohcs 3', 'did you mean --epochs?'),
    ('FILE:Gate --jobs 0', 'from 1 to 1024'), ('', 'required: layer'),
    ('FILE:Gate --until -1', 'must be a number above 0'),
    ('FILE:Gate --runs 9999999999', '--seed 9999999998'),
])
def test_a_mistake_is_one_line_before_anything_is_trained(argv, words, file, tmp_path, capfd):
    argv = argv.replace('FILE', str(file)).split()
    assert trial.main([*argv, '--dataset', 'digits', '--results', str(tmp_path / 'results')]) == 2
    out, err = capfd.readouterr()
    assert words in err and err.startswith('trial.py: ') and err.count('\n') == 1 and not out
    assert not (tmp_path / 'results' / 'trials').exists()


def test_defaults(file):
    args, arms, arm = trial.parse([f'{file}:Gate'])
    cfg = arms[arm]
    assert (cfg.dataset, cfg.split, cfg.size, cfg.arch, cfg.epochs) == ('imagewoof', 'v2', 64, 'xresnet18', 5)
    assert arm == 'Gate' and list(arms) == ['none', 'conv', 'Gate'] and args.runs is None
    assert args.name == f'Gate-{cfg.attention_source[:6]}-imagewoof-64px-5ep'
    args, arms, _ = trial.parse(['simple', '--dataset', 'digits', '--epochs', '2'])
    assert (arms['none'].size, arms['none'].epochs, args.name) == (32, 2, 'simple-digits-32px-2ep')


# --- measured ---

def test_steps_are_measured_in_turn():
    cfg = Config(dataset='digits', size=32, arch='xresnet18', bs=4, precision='fp32', attention='simple')
    arms = {'simple': cfg, "fastai's simple": trial.replace(cfg, attention='fastai.layers:SimpleSelfAttention')}
    costs = timing.measure_steps(arms, torch.device('cpu'), threads=1, rounds=1)
    assert set(costs) == set(arms)
    assert all(0 < cost['step_ms'] < 60_000 and cost['peak_mb'] > 1 for cost in costs.values())
    assert costs['simple']['ratio'] == costs['simple']['ratio_low'] == costs['simple']['ratio_high'] == 1


def test_the_ratio_of_a_step_is_the_median_over_the_turns(monkeypatch):
    monkeypatch.setattr(timing, 'take_turns', lambda *_: np.array([[1., 2, 4], [2, 6, 4]]))
    cfg = Config(dataset='digits', size=32, arch='xresnet18', bs=4, precision='fp32')
    costs = timing.measure_steps(dict(none=cfg, simple=replace(cfg, attention='simple')), torch.device('cpu'))
    found = costs['simple']
    assert (found['step_ms'], found['ratio'], found['ratio_low'], found['ratio_high']) == (4000, 2, 1.5, 2.5)


@pytest.mark.parametrize('fused', [0, 1])
def test_a_step_that_is_measured_trains(fused):
    cfg = Config(dataset='digits', size=32, arch='xresnet18', bs=8, precision='fp32', attention='simple', fused=fused)
    step = timing.training_step(cfg, torch.device('cpu'))
    losses = [step().item() for _ in range(4)]
    assert losses[3] < losses[0]
