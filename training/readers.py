"""Reads and crops images from files, one at a time, here or in loader processes.

A loader process that is not forked imports this module and what it imports, so fastai is not among it.
"""
import sys

import numpy as np
import torch

from training.images import epoch_draws, read_image, train_image, valid_image

START_METHOD = 'fork' if sys.platform == 'linux' else 'spawn'  # of loader processes; a Mac's libraries forbid to fork


class Images:
    """Holds the order of labelled images, and the crops and flips of an epoch; an image is uint8 (3, size, size).

    labels  classes (n,), as integers
    seed    that of training images, whose order, crops and flips are random; None: validation images
    share   (rank, number n of processes): a process has every n-th image of the order; all have as many training images
    """
    def __init__(self, labels, size, seed=None, share=(0, 1)):
        self.labels, self.size, self.seed = labels, size, seed
        self.rank, self.n_processes = share
        self.order = range(len(labels))[self.rank::self.n_processes]
        self.set_epoch(0)

    def __len__(self): return len(self.order)

    def set_epoch(self, epoch):
        "Draws order, crops and flips of `epoch`; without a seed nothing is random."
        self.epoch = epoch
        if self.seed is None: return
        n = len(self.labels)
        order, self.u, self.flip = epoch_draws(self.seed, epoch, n)
        self.order = order[self.rank:n - n % self.n_processes:self.n_processes]


class ImageFiles(Images, torch.utils.data.Dataset):
    "Reads its images from `files` in the folder `path`, one (image, label) at a time."
    def __init__(self, path, files, labels, size, seed=None, share=(0, 1)):
        super().__init__(labels, size, seed, share)
        self.path, self.files = path, files

    def __getitem__(self, i):
        im = read_image(self.path / self.files[i])
        if self.seed is None: im = valid_image(im, self.size)
        else: im = train_image(im, self.size, self.u[i], self.flip[i])
        return torch.from_numpy(np.array(im)).permute(2, 0, 1), self.labels[i]  # (H, W, C) -> (C, H, W)


class Pool:
    """Has `n` loader processes that read the images of all `sets` of a run, and live as long as the run.

    One that is not forked takes seconds to import torch, and would do so for each set at each epoch.
    """
    def __init__(self, sets, n):
        self.sets, self.n, self.keys = sets, n, []
        self.loader = torch.utils.data.DataLoader(
            Keyed(sets), batch_sampler=self.keys, num_workers=n, persistent_workers=True,
            multiprocessing_context=START_METHOD, generator=torch.Generator())  # of its own: no other draw changes

    def batches(self, images, bs, drop_last):
        "Yields batches of one of the sets, in the order of its epoch."
        number = next(number for number, images_of in enumerate(self.sets) if images_of is images)
        keys = [(number, images.epoch, int(i)) for i in images.order]
        stop = len(keys) - len(keys) % bs if drop_last else len(keys)
        self.keys[:] = [keys[i:i + bs] for i in range(0, stop, bs)]
        for batch in self.loader: yield tuple(batch)


class Keyed(torch.utils.data.Dataset):
    "Has the images of several sets by (number of the set, epoch, number of the image), as loader processes need them."
    def __init__(self, sets): self.sets = sets

    def __getitem__(self, key):
        number, epoch, i = key
        images = self.sets[number]
        if images.epoch != epoch: images.set_epoch(epoch)
        return images[i]
