"""What an attention layer looks at: the maps against the layers themselves, their figures, the command."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_image, script

import runlog
from command import UsageError
from layers import ATTENTION, SimpleSelfAttention
from report import maps as drawn
from training import maps
from training.branch import Branch, attention_layers
from xresnet import xresnet

attention_maps = script('attention_maps')
TINY = '--split', 'v2', '--size', 32, '--bs', 6, '--arch', 'xresnet18', '--workers', 0
VALUES = {  # name: the value at a position, for z (B, C, N)
    'simple': lambda m, z: z, 'simple_sym': lambda m, z: z, 'simple_n': lambda m, z: z, 'low_rank': lambda m, z: z,
    'simple_out': lambda m, z: m.out() @ z, 'sagan': lambda m, z: m.value() @ z,
    'cov': lambda m, z: z - z.mean(2, keepdim=True), 'cov_large': lambda m, z: z - z.mean(2, keepdim=True),
}


def trained(name, n_channels=16):
    "A layer in float64 whose gamma is not 0."
    module = ATTENTION[name](n_channels).double().eval()
    module.gamma.data.fill_(0.3)
    return module


@pytest.mark.parametrize('name', VALUES)
def test_the_influence_is_what_the_layer_adds(name):
    module, x = trained(name), torch.randn(2, 16, 3, 5, dtype=torch.float64)
    z = x.flatten(2)
    scores, values = maps.influence(module, z), VALUES[name](module, z)
    assert scores.shape == (2, 15, 15)
    added = (module(x) - x).flatten(2)
    assert torch.allclose(0.3 * values @ scores, added, atol=1e-9)
    looked = maps.looked(module, x, 2)
    assert looked['softmax'] == (name == 'sagan') and looked['side'] == (3, 5)
    if name == 'sagan': assert np.allclose(looked['influence'].sum(1), 1) and looked['influence'].min() >= 0


def test_the_influence_of_a_wider_convolution():
    module, x = SimpleSelfAttention(8, ks=3).double().eval(), torch.randn(1, 8, 4, 4, dtype=torch.float64)
    module.gamma.data.fill_(0.3)
    z = x.flatten(2)
    assert torch.allclose(0.3 * z @ maps.influence(module, z), (module(x) - x).flatten(2), atol=1e-9)


@pytest.mark.parametrize('name', sorted(set(ATTENTION) - set(VALUES) - {'none'}))
def test_other_layers_do_not_relate_positions(name):
    assert maps.influence(ATTENTION[name](16), torch.randn(1, 16, 9)) is None


def test_eigenvectors_are_those_of_s():
    z = torch.randn(2, 6, 20, dtype=torch.float64)
    images, shares = maps.eigenvectors(z, 6)
    assert torch.allclose(shares.sum(1), torch.ones(2, dtype=torch.float64)) and (shares.diff(dim=1) <= 0).all()
    # u^T x for orthonormal u: they are orthogonal, and their squares are the eigenvalues
    products, trace = images @ images.mT, (z**2).sum((1, 2))
    assert torch.allclose(products, torch.diag_embed(shares * trace[:, None]), atol=1e-9)
    assert (images.gather(2, images.abs().argmax(2, keepdim=True)) > 0).all()
    assert not maps.eigenvectors(torch.zeros(1, 6, 20), 2)[1].any()


def network(attention='simple', places=((1, 1), (3, 0))):
    model = xresnet('xresnet18', 3, ATTENTION[attention], list(places)).eval()
    for stage, block in places:
        here = getattr(model, f'stage{stage}')[block]
        here.convs[-1][1].weight.data.fill_(1.)
        if hasattr(here.attention, 'gamma'): here.attention.gamma.data.fill_(0.01)
    return model


def test_looking_at_a_network_changes_nothing():
    model, batch = network(), torch.randn(3, 3, 32, 32)
    before = model(batch)
    looked = maps.look(model, batch, 2)
    assert list(looked) == ['stage1.1.attention', 'stage3.0.attention'] and model(batch).equal(before)
    assert [layer['side'] for layer in looked.values()] == [(8, 8), (2, 2)]
    assert looked['stage1.1.attention']['eigenvectors'].shape == (3, 2, 64)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_ratio_is_that_of_the_change():
    "To four digits."
    model, batch = network(places=((1, 1),)), torch.randn(5, 3, 32, 32)
    seen, branch = [], Branch()
    def keep(module, inputs, y): seen.append((inputs[0].clone(), y.clone()))
    hook = model.stage1[1].attention.register_forward_hook(keep)
    branch.watch(model)
    model(batch)
    branch.stop()
    model(batch)  # no longer watched
    hook.remove()
    x, y = seen[0]
    assert branch.ratio() == pytest.approx(((y - x).square().sum() / x.square().sum()).sqrt().item(), rel=5e-4)
    assert branch.ratios() == [branch.ratio()]
    few = Branch(n_images=2)
    few.watch(model)
    model(batch)
    few.stop()
    x, y = x[:2], y[:2]
    assert few.ratio() == pytest.approx(((y - x).square().sum() / x.square().sum()).sqrt().item(), rel=5e-4)
    fresh = xresnet('xresnet18', 3, SimpleSelfAttention).eval()  # what it is given is 0 at the start
    branch.watch(fresh)
    fresh(batch)
    assert branch.ratio() is None and branch.ratios() == [None]
    branch.watch(xresnet('xresnet18', 3).eval())
    assert branch.ratio() is None and branch.hooks == []


class Outer(torch.nn.Module):
    "A layer of a user's that has modules called attention inside, one of which gives a tuple."
    def __init__(self, n):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(n, 4, batch_first=True)
        self.self_attention = torch.nn.Identity()

    def forward(self, x):
        z = x.flatten(2).mT
        return x + self.self_attention(self.attention(z, z, z)[0]).mT.view_as(x)


def test_what_is_inside_a_layer_is_no_layer_of_the_network():
    model, branch = xresnet('xresnet18', 3, Outer).eval(), Branch()
    (name, layer), = attention_layers(model).items()
    assert isinstance(layer, Outer) and name.endswith('.attention')
    branch.watch(model)
    model(torch.randn(2, 3, 32, 32))
    assert len(branch.ratios()) == 1 and attention_layers(xresnet('xresnet18', 3)) == {}


def test_images_of_one_name_have_a_figure_each():
    files = [Path(name) for name in ('a/dog.jpg', 'b/dog.jpg', 'dog-2.png', 'epochs.jpg', 'cat.jpg')]
    assert attention_maps.titles(files) == ['dog', 'dog-2', 'dog-2-2', 'epochs-2', 'cat']


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / 'out').touch()
    with pytest.raises(UsageError, match=r'out/dog\.png: cannot be written \('):
        attention_maps.save(None, tmp_path / 'out' / 'dog')


def test_a_layer_that_works_in_place_is_measured_too():
    class Adds(torch.nn.Module):
        def __init__(self, n_channels): super().__init__()
        def forward(self, x): return x.mul_(1.5)
    model, branch = xresnet('xresnet18', 3, Adds).eval(), Branch()
    model.stage1[1].convs[-1][1].weight.data.fill_(1.)
    branch.watch(model)
    with torch.no_grad(): model(torch.randn(2, 3, 32, 32))
    assert branch.ratio() == pytest.approx(0.5, abs=1e-4)


# --- the figures ---

@pytest.mark.parametrize('attention, maps_drawn', [('simple', 3), ('sagan', 3), ('conv', 0)])
def test_a_figure_has_the_image_a_map_a_position_and_the_eigenvectors(attention, maps_drawn):
    model, batch = network(attention), torch.randn(2, 3, 32, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    looked = maps.look(model, batch)['stage1.1.attention']
    fig = drawn.attention(pixels, looked, 1, [(0, 0), (4, 4), (7, 2)], title='a dog')
    titles = [ax.get_title() for ax in fig.axes]
    assert sum('eigenvector' in title for title in titles) == 3 and 'a dog' in titles
    words = 'attends to' if attention == 'sagan' else 'counts for the others'
    assert sum(words in title for title in titles) == maps_drawn
    assert sum(bool(ax.images) for ax in fig.axes) >= 1 + maps_drawn + 3


# --- the command ---

@pytest.mark.slow(5)
def test_from_a_run_to_its_figures(command, tree, tmp_path, capfd):
    model, results = tmp_path / 'model.pt', tmp_path / 'results'
    argv = ['--data', tree, *TINY, '--epochs', 2]
    code, _, err = command(*argv, '--sa', 'simple', '--sa-at', '1,2', '--save', model)
    assert code == 0, err
    row = runlog.load(results / 'runs.csv').iloc[0]
    curve = pd.read_csv(results / 'curves' / f'{row.run_id}.csv')
    assert curve.branch_ratio.notna().all() and curve.branch_ratio.iloc[-1] > 0
    images = [tmp_path / f'{name}.png' for name in ('cat', 'dog')]
    for seed, file in enumerate(images): make_image(seed).save(file)

    def draw(*argv):
        code = attention_maps.main([*map(str, argv), '--results', str(results)])
        return (code or 0, *capfd.readouterr())
    code, out, err = draw(model, *images, '--at', '0,0', '--at', '1,1')
    assert code == 0, err
    made = {f.name for f in (tmp_path / 'model-maps').iterdir()}
    names = {f'{image}-stage{stage}.1.attention' for image in ('cat', 'dog') for stage in (1, 2)} | {'epochs'}
    assert made == {f'{name}.{end}' for name in names for end in ('png', 'svg')}
    assert 'stage1.1.attention: adds ' in out and 'dog-stage2.1.attention.png' in out
    code, out, err = draw(model, images[0], '--layer', 'stage2.1.attention', '--out', tmp_path / 'one', '--toward')
    assert code == 0 and (tmp_path / 'one' / 'cat.png').exists(), err

    assert command(*argv, '--save', tmp_path / 'none.pt')[0] == 0
    (tmp_path / 'text.pt').write_text('no model')
    for argv, words in [((tmp_path / 'none.pt', images[0]), 'has no attention layer'),
                        ((tmp_path / 'text.pt', images[0]), 'cannot be read as a model that --save wrote'),
                        ((tmp_path / 'nosuch.pt', images[0]), 'cannot be read as a model'),
                        ((model, tmp_path / 'text.pt'), 'cannot be read as an image'),
                        ((model, images[0], '--layer', 'stage1.1.attn'), 'did you mean stage1.1.attention?'),
                        ((model, images[0], '--at', '2,0'), 'must be from 0 to 1'), ((model,), 'required: images'),
                        ((model, images[0], '--at', 'x'), 'not two numbers')]:
        code, out, err = draw(*argv)
        assert code == 2 and words in err and err.count('\n') == 1, err
