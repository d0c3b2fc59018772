"""The benchmarks measure what they say; the figures themselves are the machine's."""

from io import StringIO

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPO, script, unchanged
from fastai.optimizer import OptimWrapper

from experiments import Config
from layers import ATTENTION, multiply_adds
from report import layer_cost
from training import benchmarks, timing
from training.data import get_dls

main = script('benchmark').main
CPU = torch.device('cpu')


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    def f():
        a = torch.ones(2**20)  # 4 MiB
        b = a + 1
        del a
        return b * 2
    f()
    assert timing.peak_mb(f, CPU) == pytest.approx(8, abs=0.1)


def test_functions_take_turns_and_the_warm_up_is_left_out():
    calls = []
    seconds = timing.take_turns([lambda: calls.append('a'), lambda: calls.append('b')], CPU, rounds=3)
    assert calls == ['a', 'b'] * 4 and seconds.shape == (2, 3) and seconds.min() > 0


def test_layer(monkeypatch, tmp_path, capsys):
    small = [(name, (2, 16, 8, 8), (1, 16, 8, 8)) for name, *_ in benchmarks.LAYERS[1:3]]
    monkeypatch.setattr(benchmarks, 'LAYERS', small)
    assert not main(['layer', '--quick', '--results', str(tmp_path)])
    table = pd.read_csv(tmp_path / 'benchmarks' / 'layer-quick.csv')
    assert table.layer.tolist() == ['simple', 'sagan'] and table['shape'].tolist() == ['1x16x8x8'] * 2
    assert (table.faster_low <= table.faster).all() and (table.faster <= table.faster_high).all()
    assert (table.fastai_ms > 0).all() and (table.ours_ms > 0).all() and set(table.rounds) == {3}
    assert table.torch[0] == torch.__version__.split('+')[0]


def run_cost(monkeypatch, tmp_path, *shapes):
    "The table of `cost --quick` at `shapes` (C, side)."
    monkeypatch.setattr(benchmarks, 'QUICK_COST', shapes)
    assert not main(['cost', '--quick', '--results', str(tmp_path)])
    return layer_cost.load_cost(tmp_path / 'benchmarks' / 'cost-quick.csv')


def test_cost_has_every_layer_in_every_order_at_every_shape(monkeypatch, tmp_path, capsys):
    table = run_cost(monkeypatch, tmp_path, (16, 4), (16, 8), (8, 8))
    simple = [name for name, make in ATTENTION.items() if isinstance(make(8), benchmarks.SimpleSelfAttention)]
    expected = {(name, order) for name in simple for order in multiply_adds(8, 1)}
    expected |= {('fastai simple', 'source'), ('fastai sagan', ''), ('sagan fused', '')}
    expected |= {(name, '') for name in ATTENTION if name not in ('none', *simple)}
    for (C, N), rows in table.groupby(['C', 'N']):
        assert set(zip(rows.layer, rows.order)) == expected and len(rows) == len(expected)
        for layer, out_conv in (('simple', False), ('simple_out', True)):
            counts = rows[rows.layer == layer].set_index('order').multiply_adds.to_dict()
            assert counts == multiply_adds(C, N, out_conv=out_conv)
            taken = rows[(rows.layer == layer) & rows.auto]
            assert taken.multiply_adds.tolist() == [min(counts.values())]
    assert (table.B * table.N == 1024).all() and (table.ms > 0).all() and (table.peak_mb > 0).all()
    assert (table.multiply_adds > 0).all() and table.device.nunique() == 1
    assert (table.ms_low <= table.ms).all() and (table.ms <= table.ms_high).all() and set(table.rounds) == {3}
    compared = table[table.faster.notna()]
    assert set(compared.layer) == {'simple', 'simple_sym', 'sagan', 'sagan fused'}
    assert (compared.faster_low <= compared.faster).all()
    for r in compared.itertuples():
        name = 'fastai ' + ('sagan' if 'sagan' in r.layer else 'simple')
        peer = table[(table.layer == name) & (table.C == r.C) & (table.N == r.N)].iloc[0]
        assert r.memory == pytest.approx(r.peak_mb / peer.peak_mb, rel=0.01)


def test_cost_skips_what_is_too_large_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks, 'SQUARES_MB', 0.5)  # 4 N x N matrices of 4 bytes and 1024/N images: N/64 MiB
    table = run_cost(monkeypatch, tmp_path, (8, 4), (8, 8))
    skipped = table[table.ms.isna()]
    assert set(skipped.N) == {64} and table.peak_mb.isna().equals(table.ms.isna()) and 'NaN' in capsys.readouterr().out
    assert set(skipped.name) == {'simple positions', 'simple_sym positions', 'simple_out positions',
                                 'simple_n positions', 'fastai sagan'}
    assert layer_cost.cost_plot(table).axes and layer_cost.order_plot(table).axes
    assert layer_cost.against_softmax(table).faster.notna().all()


def test_the_positions_hold_the_matrices_that_the_bound_counts():
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    module = benchmarks.SimpleSelfAttention(8, order='positions')
    peak = timing.peak_mb(lambda: benchmarks.forward_backward(module, x, x.detach()), CPU)
    assert 0.5 < peak / (4 * 2 * 1024**2 * 4 / 2**20) < 1.1


def test_equality_can_fail_where_gamma_is_not_0():
    table = benchmarks.equality(16, 6).set_index(['gamma', 'order'])
    assert set(table.loc[0.1].index) == set(multiply_adds(1, 1)) and table.own_weights.max() < 1e-5
    assert table.other_weights[0.].max() == 0 and table.other_weights[0.1].min() > 0.1


def made_up_cost(**ms):
    "A table of cost with the times {layer_order: f(C, N)}, one image a call and as many MiB as ms, without any spread."
    shapes = [(256, N) for N in (64, 256, 1024, 4096)] + [(64, 1024), (128, 1024)]
    names = dict(sagan=('sagan', ''), unfused=('fastai sagan', ''), theirs=('fastai simple', 'source'))
    rows = [(*names.get(key, ('simple', key)), 1, C, N, multiply_adds(C, N).get(key), f(C, N))
            for key, f in ms.items() for C, N in shapes]
    df = pd.DataFrame(rows, columns=['layer', 'order', 'B', 'C', 'N', 'multiply_adds', 'ms'])
    key = ['layer', 'C', 'N']
    peers = df[df.layer.str.startswith('fastai')].assign(layer=lambda peers: peers.layer.str.removeprefix('fastai '))
    theirs = df[key].merge(peers, how='left', on=key).ms
    df = df.assign(peak_mb=df.ms, device='a CPU', torch='2', faster=theirs / df.ms, memory=df.ms / theirs,
                   auto=df.index.isin(df.fillna(dict(multiply_adds=0)).groupby(key).multiply_adds.idxmin()))
    file = StringIO()
    df.assign(faster_low=df.faster, faster_high=df.faster).to_csv(file, index=False)
    file.seek(0)
    return layer_cost.load_cost(file)


def test_crossovers_are_where_the_costs_are_equal():
    table = made_up_cost(channels=lambda C, N: 600 * N, positions=lambda C, N: N**2)
    row = layer_cost.crossovers(table).iloc[0]
    assert row.multiply_adds == pytest.approx(256) and row.ms_image == pytest.approx(600)
    for factor, at in ((1e-3, 0), (1e9, np.inf)):
        table = made_up_cost(channels=lambda C, N, factor=factor: factor * N, positions=lambda C, N: N**2)
        assert layer_cost.crossovers(table).ms_image[0] == at and layer_cost.order_plot(table).axes


def test_the_verdict_follows_the_table():
    "simple is taken in the order of the fewest multiply-adds: positions at N = 64, channels elsewhere."
    cost = dict(channels=lambda C, N: 2. * N, positions=lambda C, N: 4. * N, unfused=lambda C, N: 8. * N)
    table = made_up_cost(sagan=lambda C, N: N * N / 128, **cost)
    against = layer_cost.against_softmax(table).set_index(['C', 'N'])
    assert against.order[256, 64] == 'positions' and (against.order.drop((256, 64)) == 'channels').all()
    assert against.faster[256, 4096] == pytest.approx(16) and against.faster_unfused[256, 64] == pytest.approx(2)
    text = layer_cost.softmax_verdict(table)
    assert 'at 4 of 6 shapes' in text and '(C, N) = (256, 64), (256, 256).' in text
    assert 'fastest of simple at 5 of the 6' in text
    assert 'from 0.12 at N = 64 to 16 at N = 4096' in text
    assert 'at 6 of 6 shapes' in layer_cost.softmax_verdict(made_up_cost(sagan=lambda C, N: 100. * N, **cost))


def test_ratios_are_those_of_the_order_that_the_layer_takes():
    cost = dict(channels=lambda C, N: 2. * N, positions=lambda C, N: 4. * N, theirs=lambda C, N: 6. * N,
                sagan=lambda C, N: 9. * N, unfused=lambda C, N: 3. * N)
    table = made_up_cost(**cost)
    found = layer_cost.ratios(table).set_index(['layer', 'C', 'N'])
    assert found.faster['simple', 256, 64] == 6 / 4 and found.faster['simple', 256, 1024] == 6 / 2  # the order of auto
    assert found.memory['sagan', 256, 64] == 3 and len(found) == 12
    assert layer_cost.verdict(table) == (
        "simple is 1.50 to 3.00 times as fast as fastai's, slower at 0 of 6 shapes, and takes 0.33 to 0.67 times its "
        "memory, more at 0. sagan is 0.33 to 0.33 times as fast as fastai's, slower at 6 of 6 shapes, and takes 3.00 "
        "to 3.00 times its memory, more at 6.")
    taken = layer_cost.ratios(table.assign(auto=table.order != 'positions')).set_index(['layer', 'C', 'N'])
    assert taken.faster['simple', 256, 64] == 3 and len(taken) == 12


def test_the_figures_of_cost_show_ratios_and_both_crossovers():
    table = made_up_cost(channels=lambda C, N: 600. * N, positions=lambda C, N: 1. * N**2, sagan=lambda C, N: 9. * N,
                         theirs=lambda C, N: 1200. * N, unfused=lambda C, N: 18. * N)
    table = table.assign(faster_low=0.9 * table.faster, faster_high=1.1 * table.faster)
    fig = layer_cost.cost_plot(table)
    against_n = fig.axes[0]
    lines = {line.get_label(): line for line in against_n.lines}
    assert list(lines['sagan'].get_ydata()) == [2.] * 4 and len(lines['simple'].get_xdata()) == 4
    assert len({(lines[layer].get_marker(), lines[layer].get_linestyle()) for layer in ('simple', 'sagan')}) == 2
    low, high = against_n.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.9 * 1200 / 64, 1.1 * 1200 / 64))
    assert {text.get_text() for ax in fig.axes for text in ax.texts} == {'simple', 'sagan'}  # and no legend
    for ax in layer_cost.cost_plot(table.assign(faster=2., memory=0.5)).axes:  # where the lines meet
        ax.figure.draw_without_rendering()
        one, other = (text.get_window_extent() for text in ax.texts)
        assert not one.shrunk(0.8, 0.8).overlaps(other.shrunk(0.8, 0.8))
    order = layer_cost.order_plot(table).axes[0]
    labels = [text.get_text() for text in order.get_legend().get_texts()]
    assert labels == ['multiply-adds, below 1 from N = 256', 'time, below 1 from N = 600',
                      'memory, below 1 from N = 600']
    assert list(order.lines[1].get_ydata()) == pytest.approx([600 / N for N in (64, 256, 1024, 4096)])


@pytest.mark.slow(3)
def test_a_step_with_a_layer_is_measured_beside_one_without(tmp_path, capsys):
    assert not main(['network', '--quick', '--results', str(tmp_path)])
    table = pd.read_csv(tmp_path / 'benchmarks' / 'network-quick.csv').set_index('layer')
    assert table.index.tolist() == ['none', 'simple'] and table.ratio['none'] == 1 and table.peak_mb.min() > 1
    assert table.parameters.tolist() == [0, 64 * 64 + 1] and table.multiply_adds.tolist() == [0, 64**3 + 2 * 64**3]
    assert (table.ratio_low <= table.ratio).all() and (table.ratio <= table.ratio_high).all()


@pytest.mark.slow(2)
def test_step_compares_the_same_experiment(tree):
    cfg = Config(dataset='custom', data=str(tree), split='v2', attention='simple', bs=6, size=32, workers=0)
    cfg, dls, model = benchmarks.prepare(cfg, CPU)
    theirs, ours = benchmarks.plain_learner(cfg, CPU), benchmarks.get_learner(cfg, dls, model)
    assert [len(learn.dls.train_ds) for learn in (theirs, ours)] == [24, 24]
    for learn in (theirs, ours):
        clock = benchmarks.Clock(4)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cfg.lr, cbs=clock)
        assert len(clock.seconds) == 2 and min(clock.seconds) > 0
    hypers = [learn.opt.hypers[0] for learn in (theirs, ours)]
    assert all(hypers[0][k] == hypers[1][k] for k in ('lr', 'mom', 'sqr_mom', 'eps', 'wd'))
    assert not isinstance(theirs.opt, OptimWrapper) and isinstance(ours.opt, OptimWrapper)


def test_floor_counts_what_is_multiplied_and_moved(monkeypatch):
    monkeypatch.setattr(benchmarks, 'matrix_rate', lambda device: 1e3)
    monkeypatch.setattr(benchmarks, 'copy_rate', lambda device: float('inf'))
    cfg = Config(bs=2, size=32, precision='fp32')
    model = torch.nn.Conv2d(3, 8, 1, bias=False)
    multiply_adds = 2 * 32 * 32 * 3 * 8
    seconds = 2 * multiply_adds / 1e3  # forward, and the weight's gradient
    assert benchmarks.floor(cfg, model, CPU) == (seconds, seconds)
    x = torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with benchmarks.CountBytes() as moved: model(x).sum().backward()
    monkeypatch.setattr(benchmarks, 'copy_rate', lambda device: 1e6)
    assert benchmarks.floor(cfg, model, CPU) == (seconds, seconds + moved.bytes / 1e6)
    with benchmarks.CountBytes() as moved:
        a = torch.ones(100)  # writes 400 bytes
        a.view(10, 10).t().add(1)  # reads 400, writes 400
    assert moved.bytes == 1200


def test_one_batch_is_the_same_batch_over_and_over(tree):
    dls = get_dls(Config(dataset='custom', data=str(tree), split='v2', bs=6, size=32, workers=0))
    first = next(iter(dls.train))[0]
    one = benchmarks.get_one_batch(dls).train
    assert len(list(one)) == len(dls.train) == 4 and all(torch.equal(x, first) for x, _ in one)


@pytest.mark.slow(8)
def test_loader_and_run(tree, tmp_path, monkeypatch, capfd):
    record = sorted((REPO / 'results').rglob('*'))
    monkeypatch.setattr(benchmarks, 'step_config', lambda args, device, folder, **kwargs: Config(
        dataset='custom', data=str(tree), split='v2', attention='simple', arch='xresnet18', bs=4, size=32, workers=0))
    assert not main(['loader', '--quick', '--results', str(tmp_path)])
    table = pd.read_csv(tmp_path / 'benchmarks' / 'loader-quick.csv')
    assert table.loader.tolist() == ['workers', 'device'] and table.loader_images_per_second.min() > 0
    share = table.step_images_per_second / table.one_batch_images_per_second
    assert table.share.tolist() == pytest.approx(share.tolist(), rel=0.01)
    flags = ['--data', str(tree), '--split', 'v2', '--arch', 'xresnet18', '--bs', '6', '--size', '32',
             '--epochs', '2', '--workers', '0']
    assert not main(['run', '--quick', '--results', str(tmp_path), *flags])
    table = pd.read_csv(tmp_path / 'benchmarks' / 'run-quick.csv')
    assert table.attention.tolist() == ['none', 'simple'] and (table.seconds >= table.fit_seconds - 0.01).all()
    assert (table.floor_seconds > 0).all() and table.epochs.tolist() == [2, 2]
    capfd.readouterr()
    assert main(['run', '--quick', '--results', str(tmp_path), '--size', '31']) == 2
    assert capfd.readouterr().err.count('\n') == 1
    assert sorted((REPO / 'results').rglob('*')) == record


def test_switches_are_measured_beside_the_default(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, 'SWITCHES', dict(keep_memory=0))
    monkeypatch.setattr(benchmarks, 'step_config', lambda args, device, folder, arch, size: Config(
        dataset='custom', data=str(tree), split='v2', attention='simple', arch=arch, bs=4, size=32, workers=0))
    kept = []
    monkeypatch.setattr(benchmarks, 'keep_memory', kept.append)
    assert not main(['switches', '--quick', '--results', str(tmp_path)])
    table = pd.read_csv(tmp_path / 'benchmarks' / 'switches-quick.csv')
    assert table.switch.tolist() == ['default', '--keep-memory 0'] and table.time[0] == 1
    assert (table.time_low <= table.time).all() and (table.time <= table.time_high).all()
    assert set(table.steps) == {4} and [bool(k) for k in kept] == [True, False]


ours = pytest.mark.skipif(not unchanged('results/benchmarks'), reason='results/benchmarks holds your own')


def measured(what): return pd.read_csv(REPO / 'results' / 'benchmarks' / f'{what}.csv')


@ours
def test_every_layer_is_as_fast_as_fastais_and_takes_no_more_memory_at_every_shape():
    table = measured('cost')
    rows = table[table.layer.isin(['simple', 'simple_sym', 'sagan']) & table.auto]
    assert len(rows) == 3 * len(benchmarks.COST) and set(zip(rows.C, rows.N)) == {(C, n**2) for C, n in benchmarks.COST}
    assert rows.faster.min() >= 1 and rows.memory.max() <= 1 and set(rows.git_dirty) == {0}


@ours
def test_the_speeds_in_the_readme_are_those_measured():
    text = (REPO / 'results' / 'benchmarks' / 'README.md').read_text()
    assert layer_cost.beside_fastai(measured('cost')) in text
    for r in measured('layer').itertuples():
        shape = r.shape.replace('x', ', ')
        assert (f'| {r.layer}, ({shape}) | {r.fastai_ms:,.0f} ms, {r.fastai_mb:.0f} MiB | {r.ours_ms:,.0f} ms, '
                f'{r.ours_mb:.0f} MiB | {r.faster:.2f} [{r.faster_low:.2f}, {r.faster_high:.2f}] |') in text
    for r in measured('switches').itertuples():
        assert (f'| `{r.switch}` | {r.images_per_second:.0f} | '
                f'{r.time:.2f} [{r.time_low:.2f}, {r.time_high:.2f}] |') in text
    network = measured('network').set_index(['arch', 'layer'])
    for (arch, layer), r in network.iterrows():
        if layer not in ('simple', 'sagan'): continue
        memory = r.peak_mb / network.peak_mb[arch, 'none']
        assert (f'| {arch}, {r["size"]} px | {layer} | {r.parameters:,} | {r.multiply_adds:,} | '
                f'{r.ratio:.2f} [{r.ratio_low:.2f}, {r.ratio_high:.2f}] | {memory:.2f} |') in text
    others = network.loc['xresnet18'].drop('sagan')
    assert others.ratio.max() <= 1.02 and (others.ratio_low <= 1.005).all()
    more = network.ratio['xresnet50', 'simple'] - 1
    assert f'{more:.0%} of time on a CPU'.replace('%', ' %') in (REPO / 'README.md').read_text()
    fused = measured('switches').set_index('switch').loc['--fused 0']
    assert f"fastai's own\nAdam took {fused.time - 1:.0%} longer".replace('%', ' %') in text
    r = measured('step').iloc[0]
    assert f'{r.fastai_images_per_second:.1f} images/s with\nfastai, {r.ours_images_per_second:.1f} with ours' in text
    assert f'{r.faster:.1f} times as fast' in text
    assert f'{r.matrix_share:.0%}'.replace('%', ' %') in text
