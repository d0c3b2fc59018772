"The figures of the record: what they show, and that they can be read."
import numpy as np
import pandas as pd
import pytest
import scipy.stats as st
from made_runs import make_runs

import runlog
from command import UsageError
from experiments import EXPERIMENTS
from report import compare, figures, tables


def marks(ax, label):
    "Returns the y values of the marks with this label."
    return [y for line in ax.lines if line.get_label() == label for y in line.get_ydata() if not np.isnan(y)]


def draw(name, runs, published, results):
    exp = EXPERIMENTS[name]
    rows = compare.gaps({name: exp}, runs, published, results)
    return figures.experiment(name, exp, rows, runs, published, results)


def bars(ax):
    "Returns the [low, high] of the intervals of ours."
    lines = [line for line in ax.lines if line.get_color() == figures.OURS and len(line.get_xdata()) == 2]
    return [list(line.get_ydata()) for line in lines if not np.isnan(line.get_data()).any()]


def test_a_figure_shows_every_run_the_means_and_the_paired_differences(published, tmp_path):
    runs = pd.concat([make_runs('none', [0.60, 0.64, 0.62, None]), make_runs('simple', [0.65, 0.66, 0.66])])
    runs = runs.assign(device=['a', 'b', 'c', 'a', 'a', 'b', 'c'])
    points, differences = draw('woof-128-5', runs, published, tmp_path).axes
    assert sorted(marks(points, 'seed')) == pytest.approx([60, 62, 64, 65, 66, 66])
    assert marks(points, 'mean') == pytest.approx([62, 197 / 3])
    assert marks(points, 'published') == pytest.approx([62.3] * 2 + [65.2] * 2)
    assert [t.get_text() for t in points.get_xticklabels()] == ['none\n3 runs', 'simple\n3 runs']  # no empty column
    assert sorted(marks(differences, 'seed')) == pytest.approx([2, 4, 5])
    assert marks(differences, 'mean') == pytest.approx([11 / 3])
    assert marks(differences, 'published') == pytest.approx([2.9])
    interval = st.ttest_rel([65, 66, 66], [60, 64, 62]).confidence_interval()
    assert bars(differences) == [pytest.approx(list(interval))] and len(bars(points)) == 2
    with pytest.raises(UsageError, match='no runs'): draw('woof-128-5', runs[:0], published, tmp_path)


def test_two_runs_have_no_bar_that_would_hide_all_others(published, tmp_path):
    runs = pd.concat([make_runs('none', [0.60, 0.64, 0.62]), make_runs('simple', [0.65, 0.66])])
    for run_id in runs.run_id: runlog.write_curve(run_id, [dict(epoch=1, accuracy=0.1)], tmp_path)
    points, differences, epochs = draw('woof-128-5', runs, published, tmp_path).axes
    assert len(bars(points)) == 1 and not bars(differences)
    assert list(epochs.lines[0].get_ydata()) == [0] and not epochs.collections[0].get_paths()


def test_a_figure_shows_the_difference_after_each_epoch(published, tmp_path):
    runs = pd.concat([make_runs('none', [0.6] * 3), make_runs('simple', [0.65] * 3)])
    curves = {run_id: np.random.default_rng(i).random(4) for i, run_id in enumerate(runs.run_id)}
    for run_id, curve in curves.items():
        runlog.write_curve(run_id, [dict(epoch=e, accuracy=y) for e, y in enumerate(curve, 1)], tmp_path)
    ax = draw('woof-128-5', runs, published, tmp_path).axes[2]
    base, arm = (np.array([curves[i] for i in runs.run_id[runs.attention == a]]) for a in ('none', 'simple'))
    line, band = ax.lines[0], ax.collections[0].get_paths()[0].vertices
    assert list(line.get_ydata()) == pytest.approx(list(100 * (arm - base).mean(0)))
    ends = st.ttest_rel(100 * arm[:, 0], 100 * base[:, 0]).confidence_interval()
    at_first = band[band[:, 0] == 1, 1]
    assert (at_first.min(), at_first.max()) == pytest.approx((ends.low, ends.high))
    assert all(float(tick).is_integer() for tick in ax.get_xticks()) and ax.get_title(loc='left') == 'simple − none'


def test_arms_of_different_lengths_have_no_difference_by_epoch(published, tmp_path):
    settings, name = dict(arch='xresnet18', lr=8e-3, split='v2'), 'woof-128-50-r18'  # of v2 nothing is published
    runs = pd.concat([make_runs('none', [0.7, 0.72], [0.8, 0.82], epochs=50, **settings),
                      make_runs('simple', [0.7, 0.7], [0.85, 0.84], epochs=47, **settings)])
    for run_id, epochs in zip(runs.run_id, runs.epochs):
        runlog.write_curve(run_id, [dict(epoch=e, accuracy=0.1) for e in range(1, epochs + 1)], tmp_path)
    points, differences = draw(name, runs, published, tmp_path).axes
    assert sorted(marks(points, 'seed')) == pytest.approx([80, 82, 84, 85])  # the metric is the published one
    assert points.get_ylabel() == 'accuracy of the best epoch (%)' and not marks(differences, 'published')


def words(fig): return [text for ax in fig.axes for text in ax.texts if text.get_text()]


def assert_readable(fig, texts):
    "No text is cut off, by more than a pixel, or runs into another one."
    fig.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for number, (text, box) in enumerate(boxes):
        assert -1 <= min(box.x0, box.y0) and box.x1 <= fig.bbox.x1 + 1 and box.y1 <= fig.bbox.y1 + 1, text
        for other, beside in boxes[:number]:
            assert not box.shrunk(0.9, 0.9).overlaps(beside.shrunk(0.9, 0.9)), (text, other)


def test_the_forest_has_ours_beside_the_published_and_is_readable(published):
    runs = pd.concat([make_runs('none', [0.60, 0.64]), make_runs('simple', [0.65, 0.66]), make_runs('sagan', [0.6] * 2),
                      make_runs('none', [0.6, 0.61], epochs=80, size=256),
                      make_runs('simple', [0.69, 0.70], epochs=80, size=256)])
    drawn = figures.forests(compare.gaps(EXPERIMENTS, runs, published))
    assert list(drawn) == ['forest', 'learning_rates']
    texts = [text.get_text() for text in words(drawn['forest'])]
    at = texts.index('none → simple')
    assert texts[at:at + 5] == ['none → simple', tables.change(dict(difference=0.035, low=-0.1556, high=0.2256)),
                                'ours (2, 2)', '+2.9  no interval', 'published (12, 12) *']
    assert not bars(drawn['forest'].axes[0])  # of two runs
    claims = [text for text in texts if text in {exp.claim for exp in EXPERIMENTS.values()}]
    assert claims[:2] == ["The layer helps, and more than SAGAN's", 'The layer helps little after 80 epochs']
    assert len(claims) == len(set(claims))
    assert not any('lr 0.008' in text for text in texts)  # they have a figure of their own
    assert any('lr 0.008' in text.get_text() for text in words(drawn['learning_rates']))
    assert not any('woof-256-400,' in text for text in texts)  # its baseline is of another script: no difference
    ax = drawn['forest'].axes[0]
    assert ax.get_xlim() == (-3, 9) and drawn['learning_rates'].axes[0].get_xlim() == (-3, 3)  # ours is always inside
    published_alone = figures.forests(compare.gaps(EXPERIMENTS, runs[:0], published))['forest']
    assert published_alone.axes[0].get_xlim() == (-3, 6)  # the largest is 5.7
    for fig in drawn.values(): assert_readable(fig, [*words(fig), fig.axes[0].xaxis.label])


@pytest.mark.slow(2)
def test_the_figures_of_the_record_are_readable(published, rows_of_record):
    rows, runs = [row for row in rows_of_record if row['experiment'] in ('woof-128-5', 'attention')], runlog.load()
    drawn = figures.forests(rows_of_record) | figures.experiments(rows, runs, published)
    drawn['layers'] = figures.layers(compare.beside_first(rows, runs, published))
    for name, fig in drawn.items():
        fig.draw_without_rendering()
        alone = name in ('forest', 'learning_rates', 'layers')  # in other figures words may cross marks
        texts = words(fig) if alone else []
        for ax in filter(lambda ax: ax.get_visible(), fig.axes):
            low, high = ax.get_xlim()
            texts += [t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
            texts += [ax.xaxis.label, ax.yaxis.label, ax._left_title]
        assert_readable(fig, [text for text in texts if text.get_text() and text.get_visible()])


def test_the_layers_stand_in_the_order_of_their_rows():
    tests = [dict(difference=d, low=d - 0.01, high=d + 0.01) for d in (0.02, 0.01, -0.03)]
    rows = [dict(experiment='attention', split='v2', n_val=3929, planned=True, precision=precision,
                 base='none', arm=arm, difference=test, adds=adds, ours=dict(base=dict(n=5), arm=dict(n=5)))
            for arm, test, adds, precision in zip('abc', tests, (6, np.nan, 0.1), ('fp16', 'fp16', 'fp32'))]
    fig = figures.layers(rows)
    change, size = fig.axes
    marks = [[line.get_xdata()[0] for line in ax.lines if line.get_marker() == 'o'] for ax in (change, size)]
    assert marks[0] == pytest.approx([2, 1, -3]) and marks[1] == pytest.approx([6, np.nan, 0.1], nan_ok=True)
    assert change.get_xlim() == (-4, 2 + 1)
    texts = [text.get_text() for text in change.texts]
    names = [text[:9] for text in texts if text in 'abc' or 'attention' in text]
    assert names == ['attention', 'a', 'b', 'attention', 'c'] and tables.change(tests[2]) in texts


def luminance(colour):
    "Returns the relative luminance of a #rrggbb colour (WCAG 2)."
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055)**2.4 for part in parts]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def test_the_palette_survives_greyscale_and_its_texts_can_be_read():
    shades = [luminance(colour) for colour in (figures.INK, figures.OURS, figures.GREY, figures.PALE)]
    lightness = [116 * y**(1 / 3) - 16 for y in shades]  # CIE L*: 100 is white
    assert min(np.diff([*lightness, 100])) >= 18
    assert all(1.05 / (shade + 0.05) >= 4.5 for shade in shades[:3])  # PALE has no texts
