"""Measures how large what attention layers add is beside what they are given."""
import torch
import torch.nn as nn

N_IMAGES = 8  # of a batch: enough for a ratio, and little to copy


class Branch:
    """Compares the output of each attention layer with its input on one batch of validation images.

    `ratio()` is the root mean square of the change over that of the input, all layers together: of y = x + gamma b it is
    the size of gamma b beside x. It is None where there is no layer, and after a batch of zeros.
    """
    def __init__(self): self.hooks, self.squares = [], []

    def watch(self, model):
        "Starts with the next batch."
        self.stop()
        self.squares = []
        for name, module in model.named_modules():
            if not name.endswith('attention') or isinstance(module, nn.Identity): continue
            self.hooks += [module.register_forward_pre_hook(self.before), module.register_forward_hook(self.after)]

    def before(self, module, inputs): self.x = inputs[0][:N_IMAGES].detach().clone()  # the layer may change it in place

    def after(self, module, inputs, y):
        x = self.x.float()
        self.squares.append(torch.stack([(y[:N_IMAGES].detach().float() - x).square().sum(), x.square().sum()]))

    def stop(self):
        "Ends with this batch."
        for hook in self.hooks: hook.remove()
        self.hooks = []

    def ratio(self):
        if not self.squares: return None
        change, size = torch.stack(self.squares).sum(0).tolist()
        return round((change / size)**0.5, 6) if size else None
