"""Shows a run in other tools while it trains, through fastai's own callbacks: a CSV file, TensorBoard, W&B.

    python train_imagenette.py --woof --sa --log-to tensorboard
    tensorboard --logdir results/logs

Each run has the folder results/logs/<run_id>, with its Config in it; a part of a run that was continued has a folder
of its own, <run_id>-1. W&B writes offline, unless WANDB_MODE says otherwise, and `wandb sync` uploads that.

A tool that cannot start ends the command before the training; one that fails later is left out, and the run goes on.
"""
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from fastai.callback.progress import CSVLogger

from command import UsageError, in_a_line, say
from training import distributed

PROJECT = 'simple-self-attention'  # at W&B


def callbacks(tool, cfg, run_id, resumed, results):
    "Returns the callbacks that send a run to a tool: an empty list without a tool, and in all processes but the first."
    if not tool or not distributed.is_rank_0(): return []
    name = f'{run_id}-{resumed}' if resumed else run_id
    folder = (Path(results) / 'logs' / name).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'config.json').write_text(json.dumps(asdict(cfg), indent=1), encoding='utf-8')
        return [{'csv': csv_file, 'tensorboard': tensorboard, 'wandb': wandb}[tool](cfg, name, folder)]
    except Exception as e:  # What the tools raise has no end.
        raise UsageError(f'--log-to {tool}: cannot start ({in_a_line(e)})') from None


class Dispensable:
    "Makes a callback that fails say so once, and do nothing more: the run is worth more."
    def __call__(self, event):
        try: return super().__call__(event)
        except Exception as e: self.leave(e)

    def leave(self, e):
        why = in_a_line(str(e).rsplit('\n\t')[-1])  # fastai puts its own words before
        say(f'--log-to: {why}; the run goes on without it', file=sys.stderr)
        self.run = False


def csv_file(cfg, name, folder):
    "Returns the callback that writes a line per epoch into history.csv."
    class Lines(Dispensable, CSVLogger):
        "Writes a line where the Learner logs it, so what fails then is no event of this callback."
        def _write_line(self, log):
            try: super()._write_line(log)
            except OSError as e:
                self.leave(e)
                self.learn.logger = self.old_logger
                self.old_logger(log)
    return Lines(folder / 'history.csv')


def tensorboard(cfg, name, folder):
    "Returns the callback that writes events for TensorBoard: loss and hyperparameters of each step, and the metrics."
    from fastai.callback.tensorboard import TensorBoardCallback

    class Board(Dispensable, TensorBoardCallback):
        "Adds the Config as a table of texts; a step sends numbers alone, as torch's own optimizers have more."
        @property
        def train_iter(self):
            "Counts the steps of the parts before this one, too."
            return self.learn.train_iter + self.learn.first_epoch * len(self.dls.train)

        def before_fit(self):
            super().before_fit()
            lines = ['| knob | value |', '|---|---|', *(f'| {key} | {value} |' for key, value in asdict(cfg).items())]
            self.writer.add_text('config', '\n'.join(lines))

        def after_batch(self):
            if not self.training: return
            numbers = {name: value for name, value in self.opt.hypers[0].items() if isinstance(value, float)}
            for name, value in dict(numbers, train_loss=self.smooth_loss).items():
                self.writer.add_scalar(name, value, self.train_iter)
    return Board(folder, trace_model=False, log_preds=False)


def wandb(cfg, name, folder):
    "Starts a run of W&B with the Config, and returns the callback that sends it the steps and the metrics."
    import wandb
    from fastai.callback.wandb import WandbCallback

    class Board(Dispensable, WandbCallback):
        "Leaves out what fastai gathers of the Learner, as the Config says it all; ends the run of W&B with the fit."
        def before_fit(self):
            self.learn.gather_args = dict
            super().before_fit()

        def before_epoch(self):
            "Counts the parts before this one, too."
            self._wandb_epoch, self._wandb_step = self.epoch, self.epoch * len(self.dls.train) - 1

        def after_fit(self):
            super().after_fit()
            wandb.finish()
    wandb.finish()  # one that an exception left open
    wandb.init(project=PROJECT, name=name, dir=folder, config=asdict(cfg), mode=os.environ.get('WANDB_MODE', 'offline'),
               settings=wandb.Settings(silent=True))
    return Board(log_preds=False)
