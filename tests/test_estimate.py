"""What the published tables cost."""
import pytest
from conftest import REPO, script

from experiments import EXPERIMENTS, Config, planned_runs
from report import published as published_record

pytestmark = pytest.mark.full_width

estimate = script('estimate')


def test_the_published_runs_are_those_of_every_published_row_each_once():
    runs = estimate.published_runs()
    wanted = {cfg for exp in EXPERIMENTS.values() if exp.tables for _, cfg in planned_runs(exp)}
    assert set(runs) == {cfg for cfg in wanted if cfg.attention != 'simple_sym'} and len(set(runs)) == len(runs)


def test_the_table_is_not_stale():
    table = (REPO / 'results' / 'tables' / 'cost.md').read_text()
    for name, exp in EXPERIMENTS.items():
        assert f'| {name} | {len(planned_runs(exp))} |' in table, 'run: python scripts/estimate.py'
    assert f'| every published mean, each run once | {len(estimate.published_runs())} |' in table


@pytest.mark.slow(18)
def test_the_hours_of_an_entry_are_those_of_one_rtx_2080_ti():
    device, rate = next(iter(estimate.rates().items()))
    assert device.startswith('RTX 2080 Ti, 2019')
    for name, exp in EXPERIMENTS.items():
        seconds = sum(estimate.multiply_adds(cfg) for _, cfg in planned_runs(exp)) / rate
        assert exp.hours == float(f'{seconds / 3600:.2g}') == estimate.rounded(seconds / 3600), name


def test_multiply_adds_of_a_run():
    stem = 32 * 32 * 9 * (3 * 32 + 32 * 64 + 64 * 64)  # three convolutions at 32x32 positions, for an image of 64x64
    rest = estimate.forward('xresnet18', 'none', '1', 64) - stem
    conv = 16 * 16 * 9 * 64 * 64  # of 64 channels at 16x16, or of twice the channels at half the side
    assert rest == conv * (4 + 3 * 3.5) + 3 * conv / 18 + 512 * 10  # 4 in stage 1; in others a half, 3, a shortcut
    simple = estimate.forward('xresnet18', 'simple', '1', 64) - stem - rest
    assert simple == 64 * 64 * 256 * 2 + 64**3  # C = 64 channels at N = 256 positions: ((x xT) W) x
    cfg = Config(dataset='imagewoof', split='v1', size=64, arch='xresnet18', epochs=7)
    assert estimate.multiply_adds(cfg) == 7 * (3 * 12_454 + 500) * (stem + rest)


def test_rates_are_measured_ones():
    rates = estimate.rates()
    published = next(rate for what, rate in rates.items() if what.startswith('RTX 2080 Ti, 2019: 5 published'))
    timed = published_record.load_published().query('epochs == 50 and variant == "none" and wall_time_min > 0').iloc[0]
    work = timed.epochs * (3 * 12_454 + 500) * estimate.forward('xresnet18', 'none', '1', 128)
    assert published == pytest.approx(work / timed.wall_time_min / 60, rel=0.2)


@pytest.mark.parametrize('n, seconds', [(1, 10), (2, 6), (3, 4), (64, 4)])
def test_runs_are_dealt_out_the_longest_first(n, seconds):
    assert estimate.makespan([1, 2, 4, 3], n) == pytest.approx(seconds, abs=1)
