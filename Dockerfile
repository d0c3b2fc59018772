FROM python:3.12 AS installed
WORKDIR /repo
COPY . .
RUN python3 -m venv .venv && .venv/bin/pip install -r requirements.txt -c constraints.txt

FROM installed AS test
RUN .venv/bin/python -m pytest

FROM installed
CMD .venv/bin/python train_imagenette.py --dataset digits --size 32 --epochs 3 --arch xresnet18 --sa
