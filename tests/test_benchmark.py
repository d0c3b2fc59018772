"""The benchmarks measure what they say; the figures themselves are the machine's."""
import importlib.util

import pandas as pd
import pytest
import torch
from conftest import REPO

spec = importlib.util.spec_from_file_location('benchmark', REPO / 'scripts' / 'benchmark.py')
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
CPU = torch.device('cpu')


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    def f():
        a = torch.ones(2**20)  # 4 MiB
        b = a + 1
        del a
        return b * 2
    f()
    assert benchmark.peak_mb(f, CPU) == pytest.approx(8, abs=0.1)


def test_alternate_takes_turns_and_leaves_the_warm_up_out():
    calls = []
    medians = benchmark.alternate([lambda: calls.append('a'), lambda: calls.append('b')], CPU, rounds=3)
    assert calls == ['a', 'b'] * 4 and len(medians) == 2 and min(medians) > 0


def test_layer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, 'LAYERS', [(name, peer, (2, 16, 8, 8), (1, 16, 8, 8)) for name, peer, *_ in benchmark.LAYERS[1:3]])
    assert not benchmark.main(['layer', '--quick', '--results', str(tmp_path)])
    table = pd.read_csv(tmp_path / 'benchmarks' / 'layer-quick.csv')
    assert table.layer.tolist() == ['simple', 'sagan'] and table['shape'].tolist() == ['1x16x8x8'] * 2
    assert (table.faster - table.fastai_ms / table.ours_ms).abs().max() < 0.05 and table.torch[0] == torch.__version__.split('+')[0]


def test_step_compares_the_same_experiment(tree):
    cfg = benchmark.Config(dataset='custom', data=str(tree), split='v2', attention='simple', bs=6, size=32, workers=0)
    cfg, dls, model = benchmark.training.prepare(cfg, CPU)
    theirs, ours = benchmark.plain_learner(cfg, CPU), benchmark.training.get_learner(cfg, dls, model)
    assert [len(learn.dls.train_ds) for learn in (theirs, ours)] == [24, 24]
    for learn in (theirs, ours):
        clock = benchmark.Clock(4)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cfg.lr, cbs=clock)
        assert len(clock.seconds) == 2 and min(clock.seconds) > 0
    (a, b), (c, d) = [(learn.opt.hypers[0]['wd'], learn.xb[0]) for learn in (theirs, ours)]
    assert a == c and b is d is None  # the same decay; both ended
