"The comparisons in words: tables, conclusions, how many runs are needed."
import numpy as np
import pandas as pd
import pytest
from made_runs import PUBLISHED, SMALL, all_gaps, gap, gaps, make_runs

import runlog
from experiments import EXPERIMENTS
from report import compare, figures, tables


def test_means_that_differ_by_rounding_only_are_equal():
    arms = make_runs('none', [.546, .568, .566, .536]), make_runs('simple', [.544, .57, .566, .536], seed0=7)
    r = gap('woof-128-5', *arms)
    assert abs(r['difference']['difference']) < 1e-12
    assert 'seen' in tables.plan([r]) and 'too small to plan for' in tables.plan([r])


def test_no_plan_is_made_for_a_difference_that_is_no_claim():
    plan = tables.plan(gaps('woof-256-50-r18-mixup', make_runs('none', [])))
    assert 'published -0.0 is no claim' in plan and 'needs' not in plan


@pytest.mark.parametrize('low, high, words',
                         [(0.0003, 0.0149, '+0.76 [0.03, 1.49]'), (-0.0008, 0.02, '+0.96 [-0.08, 2.00]'),
                          (0.001, 0.02, '+1.1 [0.1, 2.0]'), (-0.02, 0.0004, '-0.98 [-2.00, 0.04]')])
def test_an_end_within_a_tenth_of_0_has_two_decimals(low, high, words):
    assert tables.change(dict(difference=(low + high) / 2, low=low, high=high)) == words


def test_any_rows_have_their_tables_plan_and_figures(published):
    """Random runs of every end, without and with accuracies, on several sets, with several seeds twice: no fault, no
    'nan'."""
    rng = np.random.default_rng(0)
    for _ in range(25):
        frames = []
        for arm in ('none', 'simple', 'sagan', 'simple_sym'):
            n = int(rng.integers(0, 7))
            values = rng.choice([0.1, 0.5, 0.6, 0.6 + 1e-17, 0.7, 1., 0.], n).tolist()
            frame = make_runs(arm, values, seed0=int(rng.integers(3)), split=str(rng.choice(['v1', 'v2'])))
            ends = rng.choice(['ok', 'ok', 'ok', 'diverged', 'failed', 'interrupted'], n)
            blank = (ends != 'ok') | (rng.random(n) < 0.1)
            frame = frame.assign(status=ends, torch=rng.choice(['2.14', '2.15'], n),
                                 precision=str(rng.choice(['fp32', 'fp16'])))
            frame.loc[blank, ['accuracy', 'max_accuracy']] = np.nan
            frames += [frame, frame[:1]] if rng.random() < 0.5 else [frame]
        runs = pd.concat(frames, ignore_index=True)
        rows = all_gaps('woof-128-5', runs)
        texts = [tables.text(rows, details=True), tables.markdown(rows), tables.brief_markdown(rows), tables.plan(rows)]
        assert not any('nan' in text or 'NaN' in text for text in texts)
        tables.frame(rows).to_csv()
        compare.summarise(runs)
        if any(not np.isnan(r['difference']['difference']) for r in rows): figures.forest(rows)


def test_each_contrast_stands_beside_what_it_asks():
    values = dict(none=[0.60, 0.62, 0.61], conv=[0.61, 0.62, 0.62], simple=[0.63, 0.64, 0.65], channel=[0.6, 0.6, 0.6])
    rows = all_gaps('attention', *(make_runs(arm, accuracies, **SMALL) for arm, accuracies in values.items()))
    head, _, *lines = tables.contrasts_markdown(rows).splitlines()
    assert head.startswith('| runs | what it asks | contrast |') and head.endswith('| commit of the plan |')
    test = tables.change(rows[1]['difference'])
    assert [line.split(' | ')[1:3] for line in lines] == [['parameters', 'none → conv'],
                                                          ['data dependence', 'conv → simple']]
    assert test in lines[1] and tables.holm(rows[1]) in lines[1] and lines[1].endswith('| e16bc79 |')
    texts = [text.get_text() for ax in figures.forest(rows).axes for text in ax.texts]
    assert texts[texts.index('conv → simple'):][:3] == ['conv → simple', 'data dependence', test]


def test_each_layer_stands_beside_the_first_arm_once_all_its_runs_are_done(tmp_path):
    exp = EXPERIMENTS['attention']
    def some(arm, n): return make_runs(arm, [0.5 + 0.001 * (seed + 7 * (arm == 'mean')) for seed in range(n)], **SMALL)
    every = [some(arm, exp.wanted(arm)) for arm in exp.arms]
    for run_id in every[-1].run_id: runlog.write_curve(run_id, [dict(epoch=1, branch_ratio=0.26)], tmp_path)
    for frames, n in ((every, len(exp.arms) - 1), ([*every[:-1], every[-1][1:]], 0)):
        rows, runs = all_gaps('attention', *frames), pd.concat(frames)
        lines = tables.layers_markdown(rows, compare.beside_first(rows, runs, PUBLISHED, tmp_path)).splitlines()[2:]
        cells = [line.strip('| ').split(' | ') for line in lines]
        assert len(cells) == n
        if n: assert cells[0][1:4] == ['mean', '50.65 → 51.35 (14, 14)', '+0.7 [0.7, 0.7]']
        assert {cell[1]: cell[4] for cell in cells if len(cell) == 5 and cell[4]} == ({'se': '0.3'} if n else {})
        equal = sum(cell[3] == '+0.00 [0.00, 0.00]' for cell in cells)
        assert equal == max(0, n - 4)  # all but mean and the three of ten runs


def test_the_conclusion_counts_the_verdicts_and_names_what_they_rest_on():
    none, simple = [0.60, 0.61, 0.62] * 4, [0.63, 0.645, 0.65] * 4
    rows = [*all_gaps('woof-128-5', make_runs('none', none), make_runs('simple', simple), make_runs('sagan', none)),
            *all_gaps('woof-64-5-r18', make_runs('none', none[:10], **SMALL), make_runs('simple', simple[:9], **SMALL)),
            *all_gaps('woof-256-5', make_runs('none', []))]
    first, second, third = tables.conclusion(rows).split('\n')
    r = rows[0]
    found = f'woof-128-5, none → simple: {tables.change(r["difference"])}, published +2.9'
    assert first.startswith('Of 4 published differences, 3 have all their runs: “') and found in first
    assert '“not seen (assumed recipe)” for 1 (woof-128-5, none → sagan: +0.00 [0.00, 0.00], published +1.7)' in first
    assert second == 'Of 4 comparisons without a published number, none has all its runs yet.'
    assert third == 'Open are 5 comparisons: 1 with fewer runs than wanted, 4 without runs.'


@pytest.mark.parametrize('indent', [0, 4])
def test_tables_on_a_terminal_fit_100_columns(rows_of_record, indent):
    lines = tables.text(rows_of_record, details=True, indent=indent).splitlines()
    assert max(map(len, lines)) <= 100 and all(line.startswith(' ' * indent) for line in lines)
    for word in ('published', 'change [95 %]', 'P (Holm)', 'verdict', 'none → simple'):
        assert any(word in line for line in lines)


def test_details_count_the_seeds_and_name_the_arms():
    "Two of five seeds are better, one is equal; of four runs there is no share of the images."
    none, simple = [0.6, 0.61, 0.62, 0.63, 0.64], [0.65, 0.66, 0.62, 0.6, 0.6]
    text = tables.text([gap('woof-128-5', make_runs('none', none), make_runs('simple', simple))], details=True)
    assert 'better at 2 of 5 seeds (1 equal) and in ' in ' '.join(text.split()) and 'share of the variance' not in text


@pytest.mark.parametrize('share, n, words', [
    (np.nan, 12, ''), (1.4, 4, ''), (0.67, 12, '67% [23%, 100%]'),
    (1.3, 12, 'all, as far as 12 runs can tell (at least 45%),'),
])
def test_the_share_of_the_images_is_never_above_100_percent(share, n, words):
    assert tables.images_share(dict(images_share=share, n=n)) == words


def test_a_plan_of_another_split_is_that_of_its_runs():
    runs = [make_runs(a, values, split='v2') for a, values in (('none', [0.6, 0.62]), ('simple', [0.64, 0.66]))]
    line, *others = tables.plan(all_gaps('woof-128-5', *runs, split='v2')).splitlines()
    assert line.startswith('woof-128-5, split v2  none → simple: seen +4.0') and len(others) == 3


def test_a_flat_frame_has_a_column_for_each_number_and_no_name_twice():
    flat = tables.frame(all_gaps('woof-128-5', make_runs('none', [0.6, 0.62]),
                                 make_runs('simple', [0.65, 0.66]))).iloc[0]
    names = ['ours_base_mean', 'published_arm_mean', 'published_difference', 'difference', 'difference_low', 'verdict',
             'verdict_n_wanted']
    assert flat[names].tolist() == pytest.approx([0.61, 0.652, 0.029, 0.045, flat.difference_low, flat.verdict, 12])
    assert not any(isinstance(value, dict) for value in flat)
