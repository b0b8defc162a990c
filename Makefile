# Two commands: `make demo` trains and synthesizes on the embedded corpus, `make test` checks everything.
# Both make their own virtual environment from Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := configs/demo.json
DEMO_ITERATIONS ?= 600

IMAGES := demo/images
IMAGE_TRAIN := $(BIN)/python image_density_experiments/train.py
IMAGE_DEMO := --dataset digits --y_condition --n_bits 4 --K 8 --L 2 --batch_size 64 --warmup 1 --lr 2e-3 \
  --max_grad_norm 50 --n_workers 0 --sample_every 20 --temperatures 0.5 --fresh

.PHONY: demo demo-images test test-kernels lint soak clean

# First the weights that come with the project speak, then a small model is trained on the embedded corpus.
demo: $(VENV)/demo.stamp
	$(BIN)/python -m experiments speak --output demo/speech
	$(BIN)/python data.py demo demo/data
	$(BIN)/python train.py -c $(DEMO) --max_iterations $(DEMO_ITERATIONS) --resume latest
	$(BIN)/python train.py -c $(DEMO) --evaluate
	$(BIN)/python train.py -c $(DEMO) --synthesize --match_mel 4
	$(BIN)/python -m experiments speak --weights $(DEMO) --list demo/data/test_files.txt --output demo/trained

# Glow and NanoFlow of equal size on handwritten digits, a few minutes for both: samples by class, bits/dim.
demo-images: $(VENV)/demo.stamp
	$(IMAGE_TRAIN) --model_type glow --hidden_channels 48 $(IMAGE_DEMO) --epochs 40 --output_dir $(IMAGES)/glow
	$(IMAGE_TRAIN) --model_type nanoflow --hidden_channels 32 $(IMAGE_DEMO) --epochs 80 --output_dir $(IMAGES)/nanoflow
	for model in glow nanoflow; do \
	  $(IMAGE_TRAIN) --saved_model $(IMAGES)/$$model --evaluate && \
	  $(IMAGE_TRAIN) --saved_model $(IMAGES)/$$model --sample --temperatures 0.5 && \
	  $(IMAGE_TRAIN) --saved_model $(IMAGES)/$$model --interpolate || exit 1; \
	done
	$(BIN)/python -m image_density_experiments.compare $(IMAGES)/glow $(IMAGES)/nanoflow --curves $(IMAGES)/curves.png

# Each test needs one core, so two run at once.
test: $(VENV)/dev.stamp lint
	$(BIN)/python -m pytest -n 2

# The accelerator's kernels; without a GPU through Triton's interpreter, and compiled for capability 9.0. A PyTorch for
# CUDA brings its own Triton: 2.13 that of TRITON, 2.11 3.6.0, whose interpreter needs a numpy below 2.4.
TRITON ?= 3.7.1
test-kernels: $(VENV)/dev.stamp
	$(BIN)/python -c 'import triton' || $(BIN)/python -m pip install --quiet --disable-pip-version-check triton==$(TRITON)
	$(BIN)/python -m pytest tests/fast/test_gpu_step.py tests/fast/test_gpu.py tests/fast/test_gpu_tiles.py \
	  tests/fast/test_gpu_training.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

soak: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m soak

$(VENV)/demo.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) demo
	find experiments -mindepth 1 -maxdepth 1 -type d ! -name data -exec rm -rf {} +  # runs, beside our own files
