"""Other people's tools: a run shown while it trains (--log-to), its model opened elsewhere (--save, --export)."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from PIL import Image
from safetensors import safe_open

import runlog
import train_imagenette
import training.export
import training.run
from command import UsageError, weights_file
from experiments import Config
from layers import ATTENTION
from training import trackers
from training.data import IMAGENET_MEAN, IMAGENET_STD
from training.export import export
from training.learner import EpochLearner

TINY = ('--split', 'v1', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0, '--epochs', 2)
METRICS = 'valid_loss', 'accuracy', 'top5_accuracy'


def shown(tree, command, tmp_path, tool):
    "Trains without and with a tool; returns the row, the curve and the folder of the second run, which is the first."
    assert command('--data', tree, *TINY)[0] == 0
    code, _, err = command('--data', tree, *TINY, '--log-to', tool)
    assert code == 0, err
    first, row = runlog.load(tmp_path / 'results' / 'runs.csv').itertuples()
    assert row.status == 'ok' and row.valid_loss == first.valid_loss
    (folder,) = (tmp_path / 'results' / 'logs').iterdir()
    assert folder.name == row.run_id and json.loads((folder / 'config.json').read_text())['data'] == str(tree)
    with open(tmp_path / 'results' / 'curves' / f'{row.run_id}.csv') as f: return row, list(csv.DictReader(f)), folder


def assert_same_curve(values, curve):
    "{metric: its value after each epoch} is that of the record."
    for name in METRICS: assert values[name] == pytest.approx([float(line[name]) for line in curve], abs=2e-6)


def test_a_csv_file_has_the_metrics(tree, command, tmp_path):
    _, curve, folder = shown(tree, command, tmp_path, 'csv')
    with open(folder / 'history.csv') as f: lines = list(csv.DictReader(f))
    assert_same_curve({name: [float(line[name]) for line in lines] for name in METRICS}, curve)


@pytest.mark.slow(3)
def test_tensorboard_has_the_metrics_and_the_config(tree, command, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, curve, folder = shown(tree, command, tmp_path, 'tensorboard')
    events = EventAccumulator(str(folder)).Reload()
    assert_same_curve({name: [e.value for e in events.Scalars(name)] for name in METRICS}, curve)
    assert len(events.Scalars('train_loss')) == len(events.Scalars('lr')) == 2 * (30 // 6)
    (text,) = events.Tensors('config/text_summary')
    assert b'| arch | xresnet18 |' in text.tensor_proto.string_val[0]


@pytest.mark.slow(7)
def test_wandb_has_the_metrics_and_the_config_without_a_network(tree, command, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    sent, configs, init = [], [], wandb.init

    def watched(**kwargs):
        "Starts the run, which puts its own log into the module, and keeps what is logged."
        configs.append(kwargs['config'])
        started, log = init(**kwargs), wandb.log
        monkeypatch.setattr(wandb, 'log', lambda values, **options: sent.append(values) or log(values, **options))
        return started
    monkeypatch.setattr(wandb, 'init', watched)
    row, curve, folder = shown(tree, command, tmp_path, 'wandb')
    values = {name: [line[name] for line in sent if name in line] for name in METRICS}
    assert_same_curve(values, curve)
    assert configs == [{name: getattr(row, name) for name in configs[0]}] and wandb.run is None
    (file,) = folder.glob('wandb/offline-run-*/*.wandb')
    assert file.stat().st_size > 1000


def test_a_part_of_a_continued_run_has_its_own_folder(tmp_path):
    trackers.callbacks('csv', Config(), 'run', 0, tmp_path)
    trackers.callbacks('csv', Config(), 'run', 2, tmp_path)
    assert sorted(folder.name for folder in (tmp_path / 'logs').iterdir()) == ['run', 'run-2']
    assert trackers.callbacks(None, Config(), 'other', 0, tmp_path) == []


@pytest.mark.parametrize('tool', ['tensorboard', 'wandb'])
def test_a_continued_run_goes_on_counting(tool, tmp_path, monkeypatch):
    "With 3 steps an epoch, the second part has the steps of its own epoch alone."
    module, steps, epochs = pytest.importorskip(tool), [], []
    monkeypatch.setenv('WANDB_MODE', 'disabled')
    (callback,) = trackers.callbacks(tool, Config(), 'run', 1, tmp_path)
    if tool == 'wandb':
        monkeypatch.setattr(module, 'log', lambda values, step=None: (
            'raw_loss' in values and (steps.append(step), epochs.append(values['epoch']))))
    learn = tiny_learner(callback)
    learn.first_epoch = 1
    if tool == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
        monkeypatch.setattr(SummaryWriter, 'add_scalar', lambda self, name, value, step: (
            name == 'train_loss' and steps.append(step)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert steps == ([4, 5, 6] if tool == 'tensorboard' else [3, 4, 5])
    assert tool == 'tensorboard' or epochs == pytest.approx([4 / 3, 5 / 3, 2])


def tiny_learner(callback):
    "A Learner of 3 steps an epoch."
    data = [(torch.randn(4), torch.randn(1)) for _ in range(6)]
    dls = DataLoaders(DataLoader(data, bs=2), DataLoader(data, bs=2))
    return EpochLearner(dls, torch.nn.Linear(4, 1), torch.nn.MSELoss(), cbs=[callback])


def test_a_tool_that_cannot_start_is_one_line_and_no_run(tree, command, tmp_path):
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'logs').touch()
    code, _, err = command('--data', tree, *TINY, '--log-to', 'csv')
    assert code == 2 and err.count('\n') == 1 and '--log-to csv: cannot start (' in err
    assert not list((tmp_path / 'results' / 'curves').iterdir())


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a file that is always full')
def test_a_full_disk_ends_the_tool_alone(tmp_path, capsys):
    (callback,) = trackers.callbacks('csv', Config(), 'run', 0, tmp_path)
    (tmp_path / 'logs' / 'run' / 'history.csv').symlink_to('/dev/full')
    logged, learn = [], tiny_learner(callback)
    learn.logger = logged.append
    with learn.no_bar(): learn.fit(3)
    err = capsys.readouterr().err
    assert err.count('No space left on device; the run goes on without it') == err.count('\n') == 1
    assert [line[0] for line in logged] == [0, 1, 2]


def test_a_tool_that_fails_ends_alone(tmp_path, capsys, monkeypatch):
    pytest.importorskip('tensorboard')
    (callback,) = trackers.callbacks('tensorboard', Config(), 'run', 0, tmp_path)
    from torch.utils.tensorboard import SummaryWriter
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(SummaryWriter, 'add_scalar', full)
    learn = tiny_learner(callback)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert learn.epoch == 1 and capsys.readouterr().err.count('the run goes on without it') == 1


@pytest.mark.parametrize('argv, words', [
    ('--log-to wandbee', '--log-to wandbee: unknown; choose from csv, tensorboard, wandb (did you mean wandb?)'),
    ('--log-to wandb', '--log-to wandb: needs what is not installed; pip install wandb'),
    ('--export m.onnx', '--export m.onnx: needs what is not installed; pip install onnx onnxscript onnxruntime'),
    ('--export model.tflite', '--export model.tflite: the name must end in .onnx or .pkl'),
    ('--export /no/folder/m.pkl', '--export /no/folder/m.pkl: cannot be written (No such file or directory)'),
    ('--save m.safetensors', '--save m.safetensors: take another suffix'),
    ('--save m.pkl --export ./m.pkl', '--save and --export m.pkl: give them two names'),
    ('--save docs.pt', '--save docs.safetensors: cannot be written (Is a directory)'),
    ('--sa docs.py:Layer --export m.pkl', '--export m.pkl: load_learner cannot import a layer from a file (docs.py:'),
])
def test_a_mistake_is_one_line(argv, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path('docs.safetensors').mkdir()
    Path('docs.py').write_text('Layer = None')
    monkeypatch.setattr(train_imagenette, 'find_spec', lambda name: None)
    with pytest.raises(UsageError) as e: train_imagenette.parse(argv.split())
    assert str(e.value).startswith(words)


@pytest.mark.parametrize('file, beside', [
    ('woof.pt', 'woof'), ('a/woof.pth', 'a/woof'), ('woof.bin', 'woof'), ('woof-v1.0', 'woof-v1.0'),
    ('woof-v1.1', 'woof-v1.1'), ('woof', 'woof'),
])
def test_two_models_have_two_files_of_weights(file, beside):
    assert weights_file(Path(file)) == Path(f'{beside}.safetensors')


class Extra(torch.nn.Linear):
    "Keeps a dict beside its tensors."
    def get_extra_state(self): return dict(seen=3)
    def set_extra_state(self, state): self.seen = state['seen']


def test_weights_of_any_module_are_written(tmp_path, capsys):
    model = torch.nn.Sequential(Extra(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight  # two modules that share a weight
    training.run.write_model(tmp_path / 'model.pt', Config(), ['a', 'b'], model, 'run')
    assert not capsys.readouterr().err
    assert training.run.read_model(tmp_path / 'model.pt')['model']['0._extra_state'] == dict(seen=3)
    with safe_open(tmp_path / 'model.safetensors', 'pt') as f:
        assert sorted(f.keys()) == ['0.bias', '0.weight', '1.bias', '1.weight']
        assert torch.equal(f.get_tensor('1.weight'), model[0].weight)


class Stubborn(torch.nn.Linear):
    def get_extra_state(self): raise ValueError('no state')


def test_a_model_without_a_state_has_its_row(tree, command, tmp_path, monkeypatch):
    make = training.run.get_model
    def get_model(*args):
        model = make(*args)
        model.head = Stubborn(model.head.in_features, model.head.out_features)
        return model
    monkeypatch.setattr(training.run, 'get_model', get_model)
    argv = ['--data', tree, *TINY, '--epochs', 2, '--checkpoint-every', 1, '--save', tmp_path / 'model.pt']
    code, _, err = command(*argv)
    assert code == 0 and runlog.load(tmp_path / 'results' / 'runs.csv').status.tolist() == ['ok']
    assert [line.endswith('could not be written (no state); the run goes on') for line in err.splitlines()] == [1, 0]
    assert err.splitlines()[1] == f'--save {tmp_path}/model.pt: could not be written (no state)'


def test_the_file_that_could_not_be_written_is_named(tmp_path, capsys):
    (tmp_path / 'model.safetensors').mkdir()
    training.run.write_model(tmp_path / 'model.pt', Config(), ['a', 'b'], torch.nn.Linear(2, 2), 'run')
    err = capsys.readouterr().err
    assert err.startswith(f'--save {tmp_path}/model.safetensors: could not be written (') and err.count('\n') == 1
    assert training.run.read_model(tmp_path / 'model.pt')['run_id'] == 'run'


def saved(tree, command, tmp_path, *argv):
    "Trains a run that saves its model; returns what `load_model` gives, and a batch of two images."
    code, _, err = command('--data', tree, *TINY, '--sa', '--save', tmp_path / 'model.pt', *argv)
    assert code == 0 and not err, err
    return *training.run.load_model(tmp_path / 'model.pt'), torch.randn(2, 3, 32, 32)


def test_a_saved_model_opens_elsewhere(tree, command, tmp_path):
    "The safetensors file has the weights, the Config and the classes; fastai's load_learner predicts from a file."
    from fastai.learner import load_learner

    from training.maps import load_images
    model, vocab, _ = saved(tree, command, tmp_path, '--export', tmp_path / 'model.pkl')
    with safe_open(tmp_path / 'model.safetensors', 'pt') as f:
        cfg = Config(**json.loads(f.metadata()['config']))
        assert json.loads(f.metadata()['vocab']) == vocab and (cfg.arch, cfg.attention) == ('xresnet18', 'simple')
        model.load_state_dict({name: f.get_tensor(name) for name in f.keys()})
    learn = load_learner(tmp_path / 'model.pkl')
    files = sorted(tree.rglob('*.JPEG'))[:3]
    with torch.no_grad(): expected = model(load_images(files, 32)[1]).softmax(1)
    for file, p in zip(files, expected):
        label, index, probabilities = learn.predict(file)
        assert label == vocab[p.argmax()] and index == p.argmax()
        assert torch.allclose(probabilities, p, atol=1e-4)


def test_a_run_that_does_not_end_ok_exports_nothing(tree, command, tmp_path):
    code, _, err = command('--data', tree, *TINY, '--opt', 'sgd', '--lr', 1e30, '--export', tmp_path / 'model.pkl')
    assert code == 0 and f'--export {tmp_path}/model.pkl: not written, as the run is diverged' in err
    assert not (tmp_path / 'model.pkl').exists()


def test_the_row_is_there_before_the_export(tree, command, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(training.run, 'write_export', lambda *args: (
        rows.append(runlog.load(tmp_path / 'results' / 'runs.csv'))))
    assert command('--data', tree, *TINY, '--epochs', 1, '--export', tmp_path / 'model.pkl')[0] == 0
    assert [list(row.status) for row in rows] == [['ok']]


def test_a_model_that_cannot_be_exported_is_not_trained(tree, command, tmp_path, monkeypatch):
    monkeypatch.setattr(training.export, 'write_learner', lambda *args: 1 / 0)
    code, _, err = command('--data', tree, *TINY, '--export', tmp_path / 'model.pkl')
    assert code == 2 and err.count('\n') == 1
    assert 'model.pkl: this model cannot be exported (division by zero)' in err
    assert not list((tmp_path / 'results' / 'curves').iterdir())


def test_an_exported_learner_reads_images_as_a_run_does(tmp_path):
    "Such as one that lies on its side, and one of 16 bits; also from their bytes."
    from fastai.learner import load_learner

    from training.maps import load_images
    model = Small('simple').eval()
    export(tmp_path / 'model.pkl', model, Config(size=32), ['a', 'b', 'c', 'd'])
    learn = load_learner(tmp_path / 'model.pkl')
    ramp = np.linspace(0, 65535, 48 * 60).reshape(48, 60).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / 'turned.jpg', exif=exif)
    Image.fromarray(ramp).save(tmp_path / 'deep.png')
    files = [tmp_path / 'turned.jpg', tmp_path / 'deep.png']
    with torch.no_grad(): expected = model(load_images(files, 32)[1]).softmax(1)
    for file, p in zip(files, expected):
        for item in (file, str(file), file.read_bytes()):
            assert torch.allclose(learn.predict(item)[2], p, atol=1e-4)


# --- ONNX ---

class Small(torch.nn.Sequential):
    "A convolution and a layer, as small as an exporter can be tried on."
    def __init__(self, attention):
        super().__init__(torch.nn.Conv2d(3, 8, 3, 4, 1), ATTENTION[attention](8), torch.nn.Flatten(),
                         torch.nn.Linear(8 * 8 * 8, 4))


def logits_of(file, x):
    "Returns the logits of onnxruntime for a batch."
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return session.run(None, {'images': x.numpy()})[0]


@pytest.mark.slow(4)
@pytest.mark.parametrize('attention', ATTENTION)
def test_every_layer_is_the_same_in_onnxruntime(attention, tmp_path):
    "For another number of images than it was exported with."
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = Small(attention)
    for name, p in model.named_parameters():
        if 'gamma' in name: torch.nn.init.constant_(p, 0.5)
    export(tmp_path / 'model.onnx', model, Config(size=32), ['a', 'b', 'c', 'd'])
    x = torch.randn(5, 3, 32, 32)
    about = onnxruntime.InferenceSession(tmp_path / 'model.onnx').get_modelmeta().custom_metadata_map
    assert json.loads(about['vocab']) == ['a', 'b', 'c', 'd'] and json.loads(about['size']) == 32
    assert json.loads(about['mean']) == list(IMAGENET_MEAN) and json.loads(about['std']) == list(IMAGENET_STD)
    with torch.no_grad(): expected = model.eval()(x).numpy()
    assert np.abs(logits_of(tmp_path / 'model.onnx', x) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow(13)
def test_an_exported_network_predicts_what_the_saved_one_does(tree, command, tmp_path):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    model, _, x = saved(tree, command, tmp_path, '--export', tmp_path / 'model.onnx')
    with torch.no_grad(): expected = model(x).numpy()
    found = logits_of(tmp_path / 'model.onnx', x)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow(10)
def test_a_network_of_fastai_is_the_same_in_onnxruntime(tmp_path):
    "With what the records of the leaderboard have: squeeze and excitation, grouped convolutions, max pooling, Mish."
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    cfg = Config(size=32, arch='xse_resnext18', pool='max', act='mish', attention='simple')
    model = training.run.get_model(cfg, 4)
    for name, p in model.named_parameters():
        if 'gamma' in name: torch.nn.init.constant_(p, 0.5)
    export(tmp_path / 'model.onnx', model, cfg, ['a', 'b', 'c', 'd'])
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad(): expected = model.eval()(x).numpy()
    assert np.abs(logits_of(tmp_path / 'model.onnx', x) - expected).max() <= 1e-4 * np.abs(expected).max()


class Branching(torch.nn.Module):
    "Does what an exporter cannot follow."
    def forward(self, x): return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_a_network_that_torch_cannot_export_is_one_line(tmp_path, capfd):
    pytest.importorskip('onnxscript')
    with pytest.raises(UsageError, match=r'm\.onnx: this model cannot be exported \(Could not guard'):
        training.run.try_export('m.onnx', Config(size=32), ['a', 'b'], Branching())
    assert not ''.join(capfd.readouterr())


def test_logits_that_differ_are_not_written(tmp_path, monkeypatch, capsys):
    def fail(*args): raise RuntimeError('\x1b[31mlogits\n differ\x1b[0m')
    monkeypatch.setattr(training.export, 'write_onnx', fail)
    training.run.write_export(tmp_path / 'model.onnx', Config(), ['a', 'b'], torch.nn.Identity())
    assert 'model.onnx: could not be written (logits differ)' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
