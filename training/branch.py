"""Measures the size of each attention layer's change relative to its input."""
import torch
import torch.nn as nn

N_WATCHED = 8  # images of a batch: enough for a ratio, and little to copy


def attention_layers(model):
    "Returns {name: module} of the attention layers of a network; what a layer has inside is none, whatever its name."
    found = {}
    for name, module in model.named_modules():  # a module comes before those inside it
        is_inside = any(name.startswith(f'{outer}.') for outer in found)
        if name.endswith('.attention') and not is_inside and not isinstance(module, nn.Identity): found[name] = module
    return found


class Branch:
    """Compares the output of each attention layer with its input, on one batch of images (the first `n_images`).

    A ratio is the root mean square of the change over that of the input: of y = x + gamma b it is the size of gamma b
    beside x. It is None after a batch of zeros, and where there is no layer.
    """
    def __init__(self, n_images=N_WATCHED): self.n_images, self.hooks, self.squares = n_images, [], []

    def watch(self, model):
        "Starts with the next batch."
        self.stop()
        self.squares = []
        for module in attention_layers(model).values():
            self.hooks += [module.register_forward_pre_hook(self.before), module.register_forward_hook(self.after)]

    def before(self, module, inputs):
        self.x = inputs[0][:self.n_images].detach().clone()  # the layer may change it in place

    def after(self, module, inputs, y):
        x = self.x.float()
        change = y[:self.n_images].detach().float() - x
        self.squares.append(torch.stack([change.square().sum(), x.square().sum()]))

    def stop(self):
        "Ends with this batch."
        for hook in self.hooks: hook.remove()
        self.hooks = []

    def ratio(self):
        "Returns the ratio of all layers together."
        return _ratio(torch.stack(self.squares).sum(0)) if self.squares else None

    def ratios(self):
        "Returns the ratio of each layer, in the order of the network."
        return [_ratio(squares) for squares in self.squares]


def _ratio(squares):
    change, size = squares.tolist()
    return float(f'{(change / size)**0.5:.4g}') if size else None
