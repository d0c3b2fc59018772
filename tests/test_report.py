import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from conftest import REPO

import report
import runlog
from experiments import Config, UsageError, resolve


@pytest.fixture(scope='module')
def published(): return report.load_published()


def make_runs(attention, accuracies, max_accuracies=None, **config):
    "Rows of runs.csv as a frame, of the full archive; an accuracy of None is a diverged run."
    n = config.pop('n', (12_454, 500))
    cfg = asdict(resolve(Config(**dict(dataset='imagewoof', attention=attention) | config)))
    rows = [cfg | dict(run_id=f'{attention}{i}', status='diverged' if a is None else 'ok', seed=i, accuracy=a, max_accuracy=m,
                       fit_seconds=60., data_fingerprint='f', n_train=n[0], n_val=n[1])
            for i, (a, m) in enumerate(zip(accuracies, max_accuracies or accuracies))]
    return pd.DataFrame(rows).reindex(columns=list(runlog.COLUMNS)).astype({'accuracy': float, 'max_accuracy': float})


def test_summary_is_that_of_numpy_and_counts_what_did_not_end_ok():
    values = [0.60, 0.64, 0.62]
    s = report.summarise(pd.concat([make_runs('none', [*values, None]), make_runs('simple', [0.7])])).set_index('variant')
    assert s.n.to_dict() == {'none': 3, 'simple': 1} and s.not_ok.to_dict() == {'none': 1, 'simple': 0}
    assert s['mean']['none'] == pytest.approx(np.mean(values)) and s.sd['none'] == pytest.approx(np.std(values, ddof=1))
    assert np.isnan(s.sd['simple'])


def test_published_runs_have_the_published_means():
    "The 10 runs of the first release, read from its notebook, against its README."
    runs = pd.read_csv(runlog.RESULTS / 'published' / 'runs.csv')
    first = runs[runs.source == 'sdoria:v0.1'].groupby('attention').accuracy_pct.agg(['size', 'mean'])
    assert first['size'].tolist() == [10, 10] and first['mean'].round(1).to_dict() == {'none': 61.9, 'simple': 67.6}


def test_runs_stand_beside_the_published_numbers_of_their_setting(published):
    runs = pd.concat([make_runs('none', [0.62, 0.63]), make_runs('simple', [0.65]), make_runs('sagan', [0.64]),
                      make_runs('none', [0.4], size=64)])
    table = report.comparison(runs, published)
    ours = table[table.ours_none_n > 0].set_index(['size', 'variant'])
    assert ours.published_none_mean.dropna().round(4).to_dict() == {(128, 'simple'): 0.623, (128, 'sagan'): 0.623} and len(ours) == 3
    assert ours.published_variant_mean[128, 'simple'] == 0.652 and ours.published_variant_mean[128, 'sagan'] == 0.64
    assert ours.ours_none_mean[128, 'simple'] == pytest.approx(0.625) and ours.ours_variant_mean[128, 'simple'] == 0.65


def test_every_published_row_is_in_the_table_and_those_with_attention_once(published):
    for runs in (runlog.load('/no/such/file'), make_runs('simple', [0.65]), make_runs('none', [0.8], arch='xresnet18', epochs=50, lr=8e-3)):
        table = report.comparison(runs, published)
        none = published.variant == 'none'
        shown = table[table.variant != 'none'].published_variant_mean
        assert sorted(shown) == sorted(published['mean'][~none]) and set(table.published_none_mean.dropna()) == set(published['mean'][none])
    assert table.title.value_counts().max() == 2  # simple and sagan of one setting


def test_published_pairs_of_equal_run_time_have_their_own_epochs(published):
    def row(runs, variant='simple'):
        table = report.comparison(runs, published)
        return table[table.title.str.contains('128 px, 47 epochs') & (table.variant == variant) & (table.mixup == 0)].iloc[0]
    for variant, mean in (('simple', 0.8567), ('sagan', 0.8547)):
        r = row(runlog.load('/no/such/file'), variant)
        assert r.title == 'imagewoof v1, 128 px, 47 epochs (without: 50), xresnet18, lr 0.008'
        assert r[['published_none_mean', 'published_variant_mean']].tolist() == pytest.approx([0.8498, mean])
    arm = dict(arch='xresnet18', lr=8e-3)
    ours = [make_runs('simple', [0.80], [0.85], epochs=47, **arm), make_runs('none', [0.78], [0.84], epochs=50, **arm)]
    for variant in ('simple', 'sagan'):
        r = row(pd.concat([*ours, make_runs('sagan', [0.80], [0.85], epochs=47, **arm)]), variant)
        assert r[['ours_none_mean', 'ours_variant_mean', 'published_none_mean']].tolist() == pytest.approx([0.84, 0.85, 0.8498])
    r = row(pd.concat([*ours, make_runs('none', [0.77], [0.83], epochs=47, **arm)]))  # of equal epochs: another comparison
    assert r.ours_none_mean == 0.83 and np.isnan(r.published_none_mean) and 'without' not in r.title


def test_last_and_best_epoch_are_never_mixed(published):
    config = dict(arch='xresnet18', epochs=47, lr=8e-3)
    table = report.comparison(make_runs('simple', [0.80], [0.85], **config), published).iloc[0]
    assert table.metric == 'max' and table.ours_variant_mean == 0.85 and table.published_variant_mean == pytest.approx(0.8567)
    table = report.comparison(make_runs('simple', [0.60], [0.65]), published).iloc[0]
    assert table.metric == 'last' and table.ours_variant_mean == 0.60


@pytest.mark.parametrize('other', [
    dict(lr=8e-3), dict(split='v2'), dict(mixup=0.2), dict(source='320'), dict(stem='32-32-64'), dict(opt='sgd'), dict(pct_noise=50),
    dict(data='flowers'), dict(act='mish'), dict(wd=0.5), dict(label_smoothing=0.), dict(n=(200, 200)), dict(dataset='digits'),
])
def test_runs_of_other_settings_are_neither_pooled_nor_set_beside_the_published_mean(other, published):
    runs = pd.concat([make_runs(arm, [0.6], **settings) for settings in ({}, other) for arm in ('none', 'simple')])
    table = report.comparison(runs, published)
    table = table[table.ours_none_n > 0]
    assert table.ours_none_n.tolist() == [1, 1] and table.title.is_unique
    assert table.published_variant_mean.notna().tolist() == [True, False]


@pytest.mark.parametrize('column, value', [('precision', 'fp16'), ('data_fingerprint', 'g')])
def test_settings_of_one_title_are_told_apart(column, value, published):
    runs = pd.concat([make_runs('simple', [0.7]), make_runs('simple', [0.7]).assign(**{column: value})])
    table = report.comparison(runs, published)
    assert table.title[table.ours_variant_n > 0].is_unique and value in table.title[1]


def test_a_place_other_than_the_sources_is_a_variant_of_its_own():
    runs = pd.concat([make_runs('none', [0.6], sa_at='1,2'), make_runs('none', [0.6]), make_runs('simple', [0.7], sa_at='1,2')])
    assert report.summarise(runs).variant.tolist() == ['none', 'simple@1,2'] and report.summarise(runs).n.tolist() == [2, 1]


def test_markdown(published):
    runs = pd.concat([make_runs('none', [0.60, 0.64, None]), make_runs('simple', [0.652, 0.648])])
    lines = report.markdown(report.comparison(runs, published)).splitlines()
    assert lines[2] == ('| imagewoof v1, 128 px, 5 epochs, xresnet50 | simple | 62.3 (12) | 65.2 (12) | +2.9 '
                        '| 62.0 ± 2.8 (2, 1 not ok) | 65.0 ± 0.3 (2) | +3.0 ± 2.0 |')
    assert any('| 85.67 ± 0.9 (20) |' in line and 'best epoch' in line for line in lines)
    assert any('| none | 82.1 (10) | – |  | – | – |  |' in line for line in lines)
    assert len({line.count('|') for line in lines}) == 1


def test_strip_plot_shows_every_run(published):
    runs = pd.concat([make_runs('none', [0.60, 0.64, None]), make_runs('simple', [0.65]), make_runs('none', [0.3], size=64)])
    axes = report.strip_plot(runs, published).axes
    points = [sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() == 'o') for ax in axes]
    diamonds = [line.get_ydata()[0] for line in axes[0].lines if line.get_marker() == 'D']
    assert points == [3, 1] and diamonds == pytest.approx([62.3, 65.2])
    with pytest.raises(UsageError, match='nothing to plot'): report.strip_plot(make_runs('none', [None]), published)


def unchanged(path): return subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', path], cwd=REPO).returncode == 0


def test_readme_is_not_stale(published, tmp_path):
    if not unchanged('results/runs.csv'): pytest.skip('runs of your own are in results/runs.csv')
    readme = tmp_path / 'README.md'
    readme.write_text((REPO / 'README.md').read_text())
    report.write_readme(report.readme_table(runlog.load(), published), readme)
    assert readme.read_text() == (REPO / 'README.md').read_text(), 'run: python report.py --readme'
    readme.write_text('no markers')
    with pytest.raises(UsageError, match='markers'): report.write_readme('', readme)


def test_command(tmp_path, capsys):
    assert report.main(['--results', str(tmp_path)]) == 2 and capsys.readouterr().err.count('\n') == 1
    runlog.append(make_runs('none', [0.5]).iloc[0].dropna().to_dict(), tmp_path)
    assert not report.main(['--results', str(tmp_path)]) and '50.0 (1)' in capsys.readouterr().out


def test_needs_no_torch():
    code = 'import sys, report; assert not {"torch", "fastai"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=REPO, check=True)


def test_results_readme_explains_every_column():
    text = (runlog.RESULTS / 'README.md').read_text()
    cells = [line.split('|')[1] for line in text.split('## Columns')[1].splitlines() if line.startswith('| ')]
    assert {name.strip() for cell in cells for name in cell.split(',')} - {'column'} == set(runlog.COLUMNS)
